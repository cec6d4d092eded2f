"""Every method of compression on a real run: what it makes loads and answers; a stopped search goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import onnx
import pytest

from holotype import TrainResult, load
from holotype.bundle import open_bundle
from holotype.compress import compress
from holotype.compress.contract import Compressed
from holotype.config import CompressConfig, resolve_config
from holotype.errors import ConfigError
from holotype.export import export
from holotype.models import open_network

QUICK: dict[str, Any] = {
    "search": "all",
    "rounds": 3,
    "budget": {"drop": 100.0},
    "methods": ["bf16", "int8", "mixed", "structured", "qat", "student", "magnitude"],
    "int8": {"images": 32, "floats": 1},
    "structured": {"sparsities": [0.3], "steps": 1, "epochs": 1},
    "qat": {"epochs": 1},
    "student": {"epochs": 1},
    "magnitude": {"sparsity": 0.5, "epochs": 1},
}


@pytest.fixture(scope="module")
def everything(tuned: TrainResult, tmp_path_factory: pytest.TempPathFactory) -> Compressed:
    config = resolve_config(CompressConfig, overrides=QUICK)
    return compress(tuned.folder, out=tmp_path_factory.mktemp("out") / "all", config=config)


def one(outcome: Compressed, method: str) -> Any:
    return next(row for row in outcome.candidates if row.method == method)


@pytest.mark.slow
class TestMethods:
    def test_all_were_tried(self, everything: Compressed) -> None:
        assert everything.not_tried == {}
        methods = [row.method for row in everything.candidates]
        assert methods == [
            "openvino", "bf16", "int8", "mixed-1", "pruned-30", "pruned-30-int8", "qat", "student",
            "student-int8", "magnitude", "magnitude-int8",
        ]  # fmt: skip

    def test_each_answers_an_image(self, everything: Compressed, digits: Path) -> None:
        photo = next((digits / "test").glob("*/*.png"))
        for row in everything.candidates:
            assert load(row.bundle, runtime=row.runtime, precision=row.precision).predict(photo).label

    def test_a_pruned_network_is_smaller_and_trains_on(self, everything: Compressed) -> None:
        pruned = one(everything, "pruned-30")
        assert pruned.bytes < 0.85 * everything.parent.bytes
        network = open_network(*open_bundle(pruned.bundle).network_files(fix=""))
        assert network.architecture.widths
        assert one(everything, "pruned-30-int8").bytes < 0.35 * pruned.bytes

    def test_lineage_leads_to_the_parent(self, everything: Compressed, tuned: TrainResult) -> None:
        pruned = open_bundle(one(everything, "pruned-30").bundle)
        assert pruned.manifest.lineage.parent == tuned.bundle.hash
        rounded = open_bundle(one(everything, "pruned-30-int8").bundle)
        assert rounded.manifest.lineage.parent == pruned.hash

    def test_zeros_shrink_only_what_is_packed(self, everything: Compressed) -> None:
        zeros = one(everything, "magnitude")
        assert zeros.bytes == pytest.approx(everything.parent.bytes, rel=0.01)
        assert zeros.compressed_bytes < 0.8 * everything.parent.compressed_bytes
        model = onnx.load(Path(zeros.bundle) / "model.onnx")
        weights = [onnx.numpy_helper.to_array(t) for t in model.graph.initializer if len(t.dims) == 4]
        total = sum(weight.size for weight in weights)
        assert sum(int((weight == 0).sum()) for weight in weights) / total > 0.4

    def test_a_student_sees_smaller_images(self, everything: Compressed, tuned: TrainResult) -> None:
        spec = open_bundle(one(everything, "student").bundle).manifest.preprocess
        assert spec.height == 32 < tuned.bundle.manifest.preprocess.height

    def test_layers_are_listed_by_what_they_cost(self, everything: Compressed) -> None:
        assert len(everything.sensitivity) > 10
        assert all(layer.shift >= 0 for layer in everything.sensitivity)
        assert one(everything, "mixed-1").settings["floats"]

    def test_int8_goes_to_openvino_too(self, everything: Compressed, tmp_path: Path, digits: Path) -> None:
        bundle = one(everything, "int8").bundle
        exported = export(bundle, format="openvino", data=digits, out=tmp_path / "ir")
        assert exported.bundle.manifest.precision == "int8"
        photo = next((digits / "test").glob("*/*.png"))
        assert load(exported.bundle.path).predict(photo).label == load(bundle).predict(photo).label


def command(tuned: TrainResult, out: Path, *more: str) -> list[str]:
    quick = json.dumps({key: value for key, value in QUICK.items() if key != "budget"})
    recipe = out.with_suffix(".yaml")
    recipe.write_text(quick)
    return [
        sys.executable, "-m", "holotype", "compress", str(tuned.folder), "--out", str(out), "--recipe",
        str(recipe), "--set", "methods=[int8,structured,qat]", *more,
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_a_search_that_was_stopped_goes_on(tuned: TrainResult, tmp_path: Path, stop: signal.Signals) -> None:
    out = tmp_path / "search"
    asked = command(tuned, out, "--max-drop", "100", "--json")
    process = subprocess.Popen(
        asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # Tests that run in the background of a shell ignore Ctrl-C, and what they start inherits it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )  # fmt: skip
    limit = time.monotonic() + 120
    while not (out / "candidates" / "scratch" / "pruned-30-1").exists():
        assert time.monotonic() < limit
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(stop)
    _, told = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGKILL), told
    assert "Traceback" not in told
    again = subprocess.run(asked, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stderr
    assert "int8 was done before" in again.stderr
    outcome = Compressed.model_validate_json(again.stdout)
    assert [row.method for row in outcome.candidates] == ["int8", "pruned-30", "pruned-30-int8", "qat"]


@pytest.mark.slow
class TestBudgets:
    def run(self, tuned: TrainResult, out: Path, *flags: str) -> tuple[int, dict[str, Any]]:
        done = subprocess.run(
            command(tuned, out, *flags, "--json", "--quiet", "--set", "methods=[bf16,int8]"),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env={**os.environ, "HOLOTYPE_CACHE": str(out.parent / "cache")},
        )
        assert "Traceback" not in done.stderr
        return done.returncode, json.loads(done.stdout)

    def test_a_loose_one_is_met(self, tuned: TrainResult, tmp_path: Path) -> None:
        code, said = self.run(tuned, tmp_path / "loose", "--max-drop", "20", "--max-size", "20MB")
        assert code == 0
        assert said["decision"] in ("chosen", "keep-parent")
        assert said["chosen"]["bytes"] < 20e6
        assert {"accuracy", "low", "high", "images"} == set(said["test"])

    def test_an_impossible_one_says_what_binds(self, tuned: TrainResult, tmp_path: Path) -> None:
        code, said = self.run(tuned, tmp_path / "never", "--max-drop", "20", "--max-size", "1KB")
        assert code == 3
        assert said["decision"] == "nothing-fits"
        assert said["chosen"] is None
        assert said["reason"].startswith("size binds: int8")
        assert said["test"] is None


class TestRefusals:
    def test_a_number_needs_a_unit_that_is_known(self, tuned: TrainResult, tmp_path: Path) -> None:
        done = subprocess.run(
            command(tuned, tmp_path / "x", "--max-size", "5 parsecs"),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert "not a number with a unit" in line

    def test_a_folder_that_is_something_else_stays(self, tuned: TrainResult, tmp_path: Path) -> None:
        (tmp_path / "mine").write_text("precious")
        with pytest.raises(ConfigError, match="is in the way"):
            compress(tuned.folder, out=tmp_path)
        assert (tmp_path / "mine").read_text() == "precious"

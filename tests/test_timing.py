"""Speed is measured in processes of their own, and what was found is remembered for this machine."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from holotype import load
from holotype.benchmark import benchmark
from holotype.bundle import open_bundle, write_bundle
from holotype.cli import run
from holotype.config import BenchmarkConfig
from holotype.errors import BundleError, ConfigError
from holotype.machine import cache_root
from holotype.runtime import (
    Choice,
    choose,
    default_choice,
    has_tensorrt,
    open_runtime,
    remember,
    remembered,
    served_bytes,
)
from holotype.runtime import choice as choice_of_machine
from holotype.timing import Setup, find_fastest, race, setups_of

QUICK = BenchmarkConfig(rounds=3, seconds=0.02)


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLOTYPE_CACHE", str(tmp_path / "cache"))


class TestRace:
    def test_every_setup_has_its_figures(self, tiny_bundle: Path) -> None:
        setups = [
            Setup(tiny_bundle, "onnxruntime", "fp32"),
            Setup(tiny_bundle, "openvino", "fp32", threads=1),
        ]
        first, second = race(setups, batches=(1, 4), rounds=3, seconds=0.02)
        assert (first.setup, second.setup) == tuple(setups)
        for timing in (first, second):
            assert timing.batches[1].calls >= 3
            assert 0 < timing.batches[4].p50 <= timing.batches[4].p95 <= timing.batches[4].p99
            assert timing.batches[4].images_per_second == pytest.approx(4e3 / timing.batches[4].p50)
            assert timing.peak_mb > 10
            assert timing.load_seconds > 0
            assert timing.from_bytes is None

    def test_memory_is_that_of_the_setup_alone(self, tiny_bundle: Path) -> None:
        mine = np.ones(60_000_000)
        (timing,) = race([Setup(tiny_bundle, "onnxruntime", "fp32")], batches=(1,), rounds=1, seconds=0.01)
        assert 10 < timing.peak_mb < mine.nbytes / 1e6

    def test_what_cannot_be_opened_is_an_error_of_one_line(self, tiny_bundle: Path) -> None:
        with pytest.raises(BundleError, match=r"cannot be measured in torch \(.*has no torch weights"):
            race([Setup(tiny_bundle, "torch", "fp32")])


class TestChoice:
    def test_nothing_is_known_at_first(self, tiny_bundle: Path) -> None:
        bundle = open_bundle(tiny_bundle)
        assert remembered(bundle) is None
        assert default_choice(bundle) == Choice("onnxruntime", "fp32")
        assert choose(bundle) == default_choice(bundle)

    def test_the_fastest_is_measured_and_remembered(self, tiny_bundle: Path) -> None:
        bundle = open_bundle(tiny_bundle)
        found = find_fastest(bundle)
        assert found == remembered(bundle)
        assert found is not None
        assert open_runtime(bundle).name == found.runtime

    def test_what_was_measured_elsewhere_counts_for_nothing(self, tiny_bundle: Path) -> None:
        bundle = open_bundle(tiny_bundle)
        remember(bundle, Choice("openvino", "fp32", 1))
        assert choose(bundle).runtime == "openvino"
        (file,) = (cache_root() / "measured").glob("runtime-*.json")
        content = json.loads(file.read_text())
        content["question"]["machine"] = "another"
        file.write_text(json.dumps(content))
        assert remembered(bundle) is None
        file.write_text("{")
        assert choose(bundle).runtime == "onnxruntime"

    def test_machines_that_share_a_cache_keep_what_each_measured(
        self, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bundle = open_bundle(tiny_bundle)
        choices = {"one": Choice("openvino", "fp32", 1), "two": Choice("onnxruntime", "fp32")}
        for name, choice in choices.items():
            monkeypatch.setattr(choice_of_machine, "machine_name", lambda name=name: name)
            remember(bundle, choice)
        for name, choice in choices.items():
            monkeypatch.setattr(choice_of_machine, "machine_name", lambda name=name: name)
            assert remembered(bundle) == choice

    def test_what_is_asked_for_wins(self, tiny_bundle: Path) -> None:
        bundle = open_bundle(tiny_bundle)
        remember(bundle, Choice("openvino", "fp32", 1))
        assert choose(bundle, name="onnxruntime") == Choice("onnxruntime", "fp32")
        assert choose(bundle, precision="bf16", threads=2) == Choice("openvino", "bf16", 2)
        with pytest.raises(ConfigError, match="onnxruntime has no bf16"):
            open_runtime(bundle, name="onnxruntime", precision="bf16")

    def test_tensorrt_is_a_way_only_where_it_runs(
        self, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bundle = open_bundle(tiny_bundle)
        files = {"tensorrt": bundle.path / "model.onnx", "golden": bundle.path / "golden.npz"}
        other = write_bundle(tmp_path / "other", bundle.manifest, files=files)
        if not has_tensorrt():
            assert setups_of(other) == []
            with pytest.raises(BundleError, match="cannot run in tensorrt here"):
                benchmark([other.path], config=QUICK.model_copy(update={"runtimes": ("tensorrt",)}))
        monkeypatch.setattr("holotype.timing.has_tensorrt", lambda: True)
        assert setups_of(other) == [Setup(other.path, "tensorrt", "fp32")]

    def test_an_fp32_bundle_is_never_served_in_bf16_by_itself(self, tiny_bundle: Path) -> None:
        assert {setup.precision for setup in setups_of(open_bundle(tiny_bundle))} == {"fp32"}


class TestFiles:
    def test_a_runtime_without_a_file_is_an_error_of_one_line(
        self, tiny_bundle: Path, tmp_path: Path
    ) -> None:
        bundle = open_bundle(tiny_bundle)
        files = {"openvino": bundle.path / "model.onnx", "openvino_weights": bundle.path / "golden.npz"}
        other = write_bundle(tmp_path / "other", bundle.manifest, files=files)
        assert served_bytes(other, "openvino") > 0
        with pytest.raises(BundleError, match="has no onnx that onnxruntime could load"):
            served_bytes(other, "onnxruntime")


class TestBenchmark:
    def test_all_that_is_possible_and_which_to_deploy(self, tiny_bundle: Path, tmp_path: Path) -> None:
        result = benchmark([tiny_bundle], out=tmp_path / "bench.png", config=QUICK)
        ways = {(row.runtime, row.precision) for row in result.rows}
        assert ways == {("onnxruntime", "fp32"), ("openvino", "fp32"), ("openvino", "bf16")}
        fastest = min(result.rows, key=lambda row: row.timing.batches[1].p50)
        assert result.for_latency is fastest
        assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
        known = remembered(open_bundle(tiny_bundle))
        assert known is not None
        assert known.precision == "fp32"
        assert load(tiny_bundle).runtime.name == known.runtime

    def test_threads_and_runtimes_are_settings(self, tiny_bundle: Path) -> None:
        config = QUICK.model_copy(
            update={"runtimes": ("onnxruntime",), "threads": (1, 2), "precisions": ("fp32",)}
        )
        assert [row.threads for row in benchmark([tiny_bundle], config=config).rows] == [1, 2]

    def test_a_part_of_the_ways_does_not_decide_what_is_served(self, tiny_bundle: Path) -> None:
        bundle = open_bundle(tiny_bundle)
        remember(bundle, Choice("openvino", "fp32"))
        for change in ({"runtimes": ("onnxruntime",)}, {"threads": (1,)}, {"batches": (2,)}):
            benchmark([tiny_bundle], config=QUICK.model_copy(update=change))
            assert remembered(bundle) == Choice("openvino", "fp32")

    def test_what_is_asked_for_must_be_possible(self, tiny_bundle: Path) -> None:
        config = QUICK.model_copy(update={"runtimes": ("torch",)})
        with pytest.raises(BundleError, match="cannot run in torch here"):
            benchmark([tiny_bundle], config=config)

    def test_json_and_table_say_the_same(
        self, tiny_bundle: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "200")
        asked = ["benchmark", str(tiny_bundle), "--set", "rounds=3", "--set", "seconds=0.01", "--quiet"]
        assert run([*asked, "--json"]) == 0
        said = json.loads(capfd.readouterr().out)
        assert {row["runtime"] for row in said["rows"]} == {"onnxruntime", "openvino"}
        for row in (*said["rows"], said["for_latency"], said["for_throughput"]):
            assert row["bundle"] == str(tiny_bundle)
            assert row["bytes"] > 0
            batches = row["timing"]["batches"]
            assert batches.keys() == {"1", "8"}
            assert 0 < batches["8"]["p50"] <= batches["8"]["p95"] <= batches["8"]["p99"]
            assert row["timing"]["from_bytes"] is row["accuracy"] is row["threads"] is None
        assert run(asked) == 0
        assert "99 %" in capfd.readouterr().out.splitlines()[0]

"""The page of a search, and the same for a terminal: what each candidate changes, and what was not chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from holotype import TrainResult
from holotype.cli import run
from holotype.compress.contract import (
    Budget,
    Candidate,
    ClassDelta,
    Compressed,
    Decision,
    FlippedImage,
    Layer,
)
from holotype.compress.page import write_page
from holotype.dataset import thumbnailer_below
from holotype.report import Estimate
from holotype.terminal import show_compressed


def candidate(method: str, **changes: Any) -> Candidate:
    row: dict[str, Any] = {
        "method": method, "settings": {}, "bundle": f"runs/{method}", "bytes": 16_000_000, "accuracy": 0.9,
        "drop": Estimate(value=0.0, low=-1.0, high=1.0), "class_drop": 0.0, "worst_class": "0",
        "class_drops": {"0": 0.0, "1": 0.0}, "agreement": 1.0, "latency_ms": 4.0, "throughput": 250.0,
        "runtime": "onnxruntime", "precision": "fp32", "seconds": 1.0, "compressed_bytes": 15_000_000,
    }  # fmt: skip
    return Candidate.model_validate({**row, **changes})


PARENT = candidate("parent")
INT8 = candidate(
    "int8",
    bytes=4_000_000,
    latency_ms=2.0,
    class_drop=2.5,
    worst_class="1",
    class_drops={"0": -1.25, "1": 2.5},
)
ZEROS = candidate("magnitude", compressed_bytes=6_000_000, rejected_because=("not faster here",))


def outcome(decision: Decision, *, flips: tuple[FlippedImage, ...] = (), **changes: Any) -> Compressed:
    chosen = {"chosen": INT8, "keep-parent": PARENT, "nothing-fits": None}[decision]
    delta = ClassDelta(name="0", images=9, before=0.9, after=0.8, flipped=tuple(f.path for f in flips))
    content: dict[str, Any] = {
        "decision": decision, "reason": "because", "parent": PARENT, "best_float": PARENT, "chosen": chosen,
        "budget": Budget(drop=1.0, class_drop=None, size=5_000_000, latency=None),
        "candidates": (INT8, ZEROS),
        "not_tried": {"bf16": "needs the Python package 'openvino'"}, "flips": flips, "sensitivity": (),
        "classes": (delta, ClassDelta(name="1", images=9, before=0.9, after=0.9, flipped=())),
        "test": {"accuracy": 0.9, "low": 0.8, "high": 0.95, "images": 60}, "machine": "here", "seconds": 1.0,
    }  # fmt: skip
    return Compressed.model_validate({**content, **changes})


def page(found: Compressed, folder: Path, data: Path) -> str:
    (folder / "candidates").mkdir(parents=True)
    write_page(folder, found, thumbnail=thumbnailer_below(data))
    return (folder / "compress.html").read_text()


class TestPage:
    def test_images_that_flipped_are_seen(self, digits: Path, tmp_path: Path) -> None:
        photo = next((digits / "validation").glob("0/*.png")).relative_to(digits).as_posix()
        flips = (
            FlippedImage(path="gone.png", label="0", before="1", after="0"),
            FlippedImage(path=photo, label="0", before="0", after="1"),
        )
        text = page(outcome("chosen", flips=flips), tmp_path, digits)
        assert text.count('<img class="picture" src="data:image/jpeg;base64,') == 1
        assert "cannot be read" in text
        # What was right before comes first.
        assert text.index(f'alt="{photo}"') < text.index("gone.png</code>")
        assert "changes no label" not in text

    def test_every_candidate_says_what_each_class_loses(self, digits: Path, tmp_path: Path) -> None:
        text = page(outcome("chosen"), tmp_path, digits)
        _, _, table = text.partition('<table id="deltas">')
        table = table.partition("</table>")[0]
        assert [name in table for name in ("int8", "magnitude")] == [True, True]
        assert "-2.50" in table
        assert "+1.25" in table
        assert table.index("<bdi>1</bdi>") < table.index("<bdi>0</bdi>")
        assert "int8 changes no label on validation" in text

    @pytest.mark.parametrize(
        ("decision", "said"),
        [("nothing-fits", "Nothing was chosen."), ("keep-parent", "The bundle stays as it is.")],
    )
    def test_where_nothing_changes_it_claims_nothing(
        self, digits: Path, tmp_path: Path, decision: Decision, said: str
    ) -> None:
        text = page(outcome(decision), tmp_path, digits)
        assert said in text
        assert "changes no label" not in text.replace(said, "")
        assert '<table id="deltas">' in text

    def test_what_zeros_are_worth(self, digits: Path, tmp_path: Path) -> None:
        text = page(outcome("chosen"), tmp_path, digits).replace("\N{NO-BREAK SPACE}", " ")
        assert "Zeros shrink no file that is stored as it is: magnitude is 16.00 MB, the bundle" in text
        assert "6.00 MB and 15.00 MB" in text
        without = page(outcome("chosen", candidates=(INT8,)), tmp_path / "without", digits)
        assert "Zeros" not in without

    def test_on_how_many_images_layers_were_rounded(self, digits: Path, tmp_path: Path) -> None:
        layers = (Layer(name="conv", weights=9, drop=0.5, shift=0.01),)
        found = outcome("chosen", sensitivity=layers, sensitivity_images=1280)
        assert "on 1,280 images of validation" in page(found, tmp_path, digits)


class TestTerminal:
    def test_packed_sizes_are_shown_with_zeros(
        self, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "200")
        show_compressed(outcome("chosen"))
        told = capfd.readouterr().out
        assert "packed MB" in told.splitlines()[0]
        assert "zeros shrink no file" in told
        show_compressed(outcome("chosen", candidates=(INT8,)))
        assert "packed" not in capfd.readouterr().out


def test_nothing_fits_from_the_command_line(
    tuned: TrainResult, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "never"
    quick = ["methods=[int8]", "int8.images=32", "int8.calibration=min-max", "rounds=3"]
    asked = ["compress", str(tuned.folder), "--out", str(out), "--max-size", "1KB", "--quiet", "--json"]
    for setting in quick:
        asked += ["--set", setting]
    assert run(asked) == 3
    said = json.loads(capfd.readouterr().out)
    assert said["decision"] == "nothing-fits"
    assert said["chosen"] is said["test"] is None
    (row,) = said["candidates"]
    assert row["method"] == "int8"
    assert any("too many" in reason for reason in row["rejected_because"])
    assert "size binds" in said["reason"]
    assert said["parent"]["method"] == said["best_float"]["method"] == "parent"
    assert not (out / "best").exists()
    text = (out / "compress.html").read_text()
    assert "Nothing was chosen." in text
    assert "changes no label" not in text

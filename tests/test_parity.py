"""The parity gate on models that differ by a known amount: what passes, what is refused, what is listed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import numpy_helper

from holotype import TrainResult
from holotype.bundle import open_bundle
from holotype.cli import run
from holotype.errors import ParityError
from holotype.parity import LEAST_IMAGES, LIMITS, Parity, check_parity, parity_record
from holotype.policy import Policy
from holotype.preprocess import Pixels
from holotype.runtime import Runtime, load_onnx_model
from tiny import CLASSES, SIZE, tiny_model

IMAGES = 100


def model(*, green: float = 0.0) -> Runtime:
    """The tiny model, whose logit of green has so much added."""
    made = tiny_model()
    bias = next(tensor for tensor in made.graph.initializer if tensor.name == "bias")
    bias.CopyFrom(numpy_helper.from_array(np.array([0, green, 0], np.float32), "bias"))
    return load_onnx_model(made, threads=1)


def colours(*, red: int, green: int, count: int = IMAGES) -> Pixels:
    return np.full((count, SIZE, SIZE, 3), (red, green, 0), np.uint8)


def gate(images: Pixels, *, green: float, precision: str) -> Parity:
    return check_parity(
        model(),
        model(green=green),
        images=images,
        paths=[f"{number}.png" for number in range(len(images))],
        classes=CLASSES,
        policy=Policy(),
        limits=LIMITS[precision],  # type: ignore[index]
    )


def nearly(count: int) -> Pixels:
    """Sure of red, but for the last `count`, which a push of 0.05 to green makes green."""
    images = colours(red=250, green=0)
    images[IMAGES - count :] = (128, 127, 0)
    return images


class TestFlips:
    @pytest.mark.parametrize(("precision", "allowed"), [("fp32", 0), ("fp16", 1), ("bf16", 2), ("int8", 3)])
    def test_as_many_as_the_limit_pass_and_no_more(self, precision: str, allowed: int) -> None:
        limits = LIMITS[precision]  # type: ignore[index]
        assert limits.flips * IMAGES == allowed
        if allowed:
            passed = gate(nearly(allowed), green=0.05, precision=precision)
            assert [flip.path for flip in passed.flips] == [f"{IMAGES - 1 - i}.png" for i in range(allowed)][
                ::-1
            ]
            assert {(flip.reference, flip.candidate) for flip in passed.flips} == {("red", "green")}
            assert passed.limits == LIMITS[precision]  # type: ignore[index]
        with pytest.raises(ParityError, match=rf"flips {allowed + 1} of 100 labels.*99\.png \(red → green\)"):
            gate(nearly(allowed + 1), green=0.05, precision=precision)

    def test_a_tie_is_no_flip_but_is_told(self) -> None:
        images = colours(red=250, green=0)
        images[:3] = (128, 128, 0)
        passed = gate(images, green=1e-5, precision="fp32")
        assert passed.flips == ()
        assert [(tie.path, tie.reference, tie.candidate) for tie in passed.ties] == [
            (f"{number}.png", "red", "green") for number in range(3)
        ]
        kept = parity_record(passed)
        assert (kept["flips"], kept["ties"], kept["limits"]["gap"]) == (0, 3, 1e-4)
        json.dumps(kept)


class TestShift:
    @pytest.mark.parametrize(
        ("precision", "inside", "outside"),
        [("fp32", 1e-4, 0.01), ("fp16", 0.03, 0.06), ("bf16", 0.06, 0.12), ("int8", 0.17, 0.28)],
    )
    def test_probabilities_may_move_so_far(self, precision: str, inside: float, outside: float) -> None:
        images = colours(red=140, green=100)
        passed = gate(images, green=inside, precision=precision)
        assert not passed.flips
        assert 0 < passed.shift <= LIMITS[precision].shift  # type: ignore[index]
        with pytest.raises(ParityError, match="flips 0 of 100 labels"):
            gate(images, green=outside, precision=precision)

    def test_no_number_is_refused(self) -> None:
        with pytest.raises(ParityError):
            gate(colours(red=250, green=0), green=float("nan"), precision="int8")

    def test_it_takes_enough_images(self) -> None:
        with pytest.raises(ParityError, match=f"needs {LEAST_IMAGES} real images"):
            gate(colours(red=250, green=0, count=LEAST_IMAGES - 1), green=0.0, precision="fp32")


class TestExport:
    @pytest.fixture
    def printed(self, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
        def call(*arguments: object) -> str:
            capfd.readouterr()
            assert run(["export", *map(str, arguments)]) == 0
            return capfd.readouterr().out

        return call

    def test_what_the_gate_found_is_told_and_kept(
        self, printed: Callable[..., str], probe: TrainResult, tmp_path: Path
    ) -> None:
        asked = (probe.folder, "--format", "openvino", "--set", "precision=bf16")
        said = json.loads(printed(*asked, "--out", tmp_path / "a", "--json"))
        assert said["parity"]["limits"] == {"flips": 0.02, "margin": 0.0, "shift": 0.02, "gap": 1.0}
        assert said["parity"]["ties"] == []
        count = len(said["parity"]["flips"])
        assert said["fastest"] is None  # there is one way to run it
        kept = open_bundle(tmp_path / "a").manifest.metrics
        assert kept["parity"]["images"] == said["parity"]["images"]
        assert kept["parity"]["flips"] == count
        assert "validation" in kept
        told = printed(*asked, "--out", tmp_path / "b")
        assert f"2% of the labels changed: {count} are" in told
        assert "shifted by 0.02 on average" in told

    @pytest.mark.slow
    def test_the_fastest_is_named_where_there_is_a_choice(
        self, printed: Callable[..., str], tuned: TrainResult, tmp_path: Path
    ) -> None:
        asked = (tuned.best, "--format", "onnx", "--out", tmp_path / "a", "--json")
        said = json.loads(printed(*asked))
        assert said["fastest"]["runtime"] in ("onnxruntime", "openvino")
        assert said["fastest"]["precision"] == "fp32"
        assert said["parity"]["limits"]["gap"] == 1e-4

    def test_flips_are_listed_for_people(
        self, printed: Callable[..., str], probe: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A real bundle, and a gate that found what a rounder network would show."""
        found = gate(nearly(2), green=0.05, precision="bf16")
        monkeypatch.setattr(sys.modules["holotype.export"], "check_parity", lambda *_, **__: found)
        told = printed(
            probe.folder, "--format", "openvino", "--set", "precision=bf16", "--out", tmp_path / "c"
        )
        assert "2% of the labels changed: 2 are" in told
        assert "flip     98.png: red, now green" in told
        assert "flip     99.png: red, now green" in told

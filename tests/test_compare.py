"""Two bundles on the same images, and what may be said."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from onnx import numpy_helper
from PIL import Image

from holotype import TrainResult
from holotype.bundle import Golden, open_bundle, write_bundle, write_golden
from holotype.cli import run
from holotype.compare import compare, judge
from holotype.compare.contract import Comparison, Side
from holotype.config import CompareConfig
from holotype.errors import BundleError
from holotype.metrics import Predictions, binomial_bounds, images_needed, mcnemar, paired_metric
from holotype.runtime import load_onnx
from tiny import CLASSES, golden_images, tiny_model, write_tiny_bundle

SIDE = Side(
    bundle="a", hash="a", accuracy=0.9, macro_f1=0.9, bytes=1, runtime="r", precision="p", latency_ms=None,
    throughput=None,
)  # fmt: skip
OTHER = SIDE.model_copy(update={"bundle": "b", "hash": "b"})


def answers(right: np.ndarray, *, classes: int = 4, seed: int = 0) -> Predictions:
    """Labels 0 ... classes - 1 in turn; wrong answers are the next class."""
    labels = np.arange(len(right)) % classes
    said = np.where(right, labels, (labels + 1) % classes)
    return Predictions(
        classes=tuple(f"class {place}" for place in range(classes)),
        paths=tuple(f"{row}.jpg" for row in range(len(right))),
        labels=labels,
        probabilities=np.eye(classes)[said] * 0.9 + 0.1 / classes,
    )


def said(a: np.ndarray, b: np.ndarray, *, margin: float = 0.01) -> Comparison:
    return judge(answers(a), answers(b), sides=[SIDE, OTHER], dataset="d", split="test", margin=margin)


class TestVerdict:
    def pair(self, only_a: int, only_b: int, *, both: int = 800, neither: int = 100) -> tuple:
        a = np.array([True] * both + [False] * neither + [True] * only_a + [False] * only_b)
        b = np.array([True] * both + [False] * neither + [False] * only_a + [True] * only_b)
        return a, b

    @pytest.mark.parametrize(
        ("only_a", "only_b", "verdict"),
        [(5, 60, "better"), (60, 5, "worse"), (2, 1, "not worse"), (30, 35, "can't tell")],
    )
    def test_it_follows_the_interval(self, only_a: int, only_b: int, verdict: str) -> None:
        found = said(*self.pair(only_a, only_b))
        assert found.verdict == verdict
        assert (found.only_a, found.only_b) == (only_a, only_b)
        assert (found.needed_images is not None) == (verdict == "can't tell")
        assert len(found.flips) == only_a + only_b

    def test_a_loss_inside_the_margin_is_not_worse(self) -> None:
        assert said(*self.pair(12, 2), margin=0.03).verdict == "not worse"

    @pytest.mark.parametrize("margin", [0.01, 0.05])
    def test_few_images_tell_nothing_even_where_none_is_lost(self, margin: float) -> None:
        """Until exact bounds say so, which is the number of images that it asks for."""
        few = said(*self.pair(0, 0, both=40, neither=10), margin=margin)
        assert (few.verdict, few.mcnemar_p, few.flips) == ("can't tell", 1.0, ())
        assert few.difference.low < -margin < 0 < few.difference.high
        assert few.needed_images is not None
        assert f"about {few.needed_images} images would tell" in few.reason
        for images, verdict in ((few.needed_images, "not worse"), (few.needed_images - 1, "can't tell")):
            assert said(*self.pair(0, 0, both=images, neither=0), margin=margin).verdict == verdict

    def test_a_loss_of_a_whole_margin_is_rarely_taken_for_none(self) -> None:
        """B is wrong about one image of a hundred, and A about none: 2.5 % of the sets may hide that."""
        rng = np.random.default_rng(0)
        for images in (100, 400, 1000):
            lost = np.unique(rng.binomial(images, 0.01, size=4000), return_counts=True)
            hidden = sum(
                int(count)
                for only_a, count in zip(*lost, strict=True)
                if said(*self.pair(int(only_a), 0, both=images - int(only_a), neither=0)).verdict
                not in ("can't tell", "worse")
            )
            assert hidden / 4000 < 0.035

    def test_the_same_bundle_cannot_lose_anything(self) -> None:
        a, b = self.pair(0, 0, both=8, neither=2)
        found = judge(answers(a), answers(b), sides=[SIDE, SIDE], dataset="d", split="test", margin=0.01)
        assert (found.verdict, found.difference.low, found.needed_images) == ("not worse", 0.0, None)
        assert all(one.difference.low == one.difference.high == 0 for one in found.classes)

    def test_equal_answers(self) -> None:
        found = said(*self.pair(0, 0))
        assert (found.verdict, found.difference.value, found.mcnemar_p) == ("not worse", 0.0, 1.0)
        assert found.flips == ()

    def test_classes_have_differences_of_their_own(self) -> None:
        a = np.ones(400, dtype=bool)
        b = a.copy()
        b[2::8] = False  # half of class 2
        found = said(a, b)
        worst = min(found.classes, key=lambda one: one.difference.value)
        assert worst.name == "class 2"
        assert worst.difference.value == pytest.approx(-0.5)
        assert worst.difference.high < 0


class TestStatistics:
    def test_mcnemar_is_a_fair_coin(self) -> None:
        assert mcnemar(0, 0) == 1.0
        assert mcnemar(5, 5) == 1.0
        assert mcnemar(0, 10) == pytest.approx(2 / 1024)

    def test_pairs_are_resampled_together(self) -> None:
        rng = np.random.default_rng(0)
        a = rng.random(500) < 0.9
        b = a.copy()
        b[:10] = ~b[:10]
        together = paired_metric(answers(a), answers(b), metric="accuracy")
        assert together.high - together.low < 0.03  # ± 2.6 points if they were independent
        assert together.value == pytest.approx(b.mean() - a.mean())

    def test_many_classes_are_resampled_in_little_memory_and_as_few_are(self) -> None:
        rng, images, classes = np.random.default_rng(0), 20_000, 1000
        labels = rng.integers(0, classes, images)
        sides = []
        for _ in range(2):
            said = np.where(rng.random(images) < 0.75, labels, rng.integers(0, classes, images))
            chances = np.zeros((images, classes), dtype=np.uint8)
            chances[np.arange(images), said] = 1
            paths = tuple(map(str, range(images)))
            sides.append(Predictions(tuple(map(str, range(classes))), paths, labels, chances))
        tracemalloc.start()
        try:
            found = paired_metric(*sides, metric="accuracy")
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 250e6  # all resamples of all cells at once take twice as much
        cells = np.stack([labels, sides[0].predicted, sides[1].predicted])
        cells, counts = np.unique(cells, axis=1, return_counts=True)
        gained = (cells[2] == cells[0]).astype(float) - (cells[1] == cells[0])
        draws = np.random.default_rng(0).multinomial(images, counts / images, size=2000)
        low, high = np.quantile(draws @ gained / images, [0.025, 0.975])
        assert (found.low, found.high) == pytest.approx((low, high), abs=1e-12)

    def test_smaller_differences_need_more_images(self) -> None:
        few, many = (images_needed(value, 0.1, margin=0.0) for value in (0.05, 0.01))
        assert few is not None
        assert many is not None
        assert 20 < many / few < 30
        assert images_needed(0.0, 0.0, margin=0.0) is None

    @pytest.mark.parametrize(("margin", "least"), [(0.01, 368), (0.02, 183), (0.05, 72)])
    def test_never_fewer_than_exact_bounds_need(self, margin: float, least: int) -> None:
        assert binomial_bounds(0, least, confidence=0.975)[1] < margin
        assert binomial_bounds(0, least - 1, confidence=0.975)[1] >= margin
        assert images_needed(0.0, 0.0, margin=margin) == least
        assert images_needed(0.1, 0.1, margin=margin) == least


def leaning(target: Path, *bias: float) -> Path:
    """The tiny bundle with these added to the logits of its classes, and golden outputs of its own."""
    model = tiny_model()
    (tensor,) = [one for one in model.graph.initializer if one.name == "bias"]
    tensor.CopyFrom(numpy_helper.from_array(np.array(bias, dtype=np.float32), "bias"))
    file, golden = target.with_suffix(".onnx"), target.with_suffix(".npz")
    file.write_bytes(model.SerializeToString())
    logits = load_onnx(file, threads=1).run(golden_images()).logits
    write_golden(golden, Golden(images=golden_images(), logits=logits))
    return write_tiny_bundle(target, model=model, golden=golden).path


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each class 9 bright images and 6 nearly black ones, which are taken for what a bundle leans to."""
    root = tmp_path_factory.mktemp("data") / "colours"
    for place, name in enumerate(CLASSES):
        for number in range(16):
            pixel = [0, 0, 0]
            pixel[place] = 255 - number if number < 10 else 10 + number
            file = root / ("test" if number else "train") / name / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40 + number), tuple(pixel)).save(file)
    return root


class TestExitCodes:
    """Of bundles whose answers are known beforehand."""

    @pytest.mark.parametrize(
        ("a", "b", "margin", "verdict", "code"),
        [
            ((0, 0, 0), (0.1, 0, 0), 10, "not worse", 0),  # 45 images show no less
            ((0, 0, 0), (0.1, 0, 0), 1, "can't tell", 4),
            ((3, 3, 0), (0, 0, 0), 1, "better", 0),
            ((0, 0, 0), (3, 3, 0), 1, "worse", 3),
            ((3, 0, 0), (0, 3, 0), 1, "can't tell", 4),  # each takes the dark ones of the others for its own
        ],
    )
    def test_they_are_the_verdict(
        self,
        colours: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        a: tuple[float, ...],
        b: tuple[float, ...],
        margin: int,
        verdict: str,
        code: int,
    ) -> None:
        first, second = leaning(tmp_path / "a", *a), leaning(tmp_path / "b", *b)
        asked = ["compare", str(first), str(second), "--data", str(colours), "--split", "test"]
        asked += ["--margin", str(margin)]
        assert run([*asked, "--out", str(tmp_path / "out"), "--json", "--set", "measure=false"]) == code
        found = json.loads(capsys.readouterr().out)
        assert found["verdict"] == verdict
        assert (found["needed_images"] is not None) == (verdict == "can't tell")


class TestBundles:
    def test_a_bundle_is_not_worse_than_itself(self, tuned: TrainResult, tmp_path: Path) -> None:
        config = CompareConfig(measure=False)
        found = compare(tuned.folder, tuned.folder, config=config, out=tmp_path / "same")
        assert (found.verdict, found.flips, found.difference.value) == ("not worse", (), 0.0)
        page = (tmp_path / "same" / "compare.html").read_text()
        assert "They agree on every image" in page
        assert Comparison.model_validate_json((tmp_path / "same" / "compare.json").read_text()) == found

    def test_differing_images_are_shown(self, tuned: TrainResult, probe: TrainResult, tmp_path: Path) -> None:
        done = subprocess.run(
            [
                sys.executable, "-m", "holotype", "compare", str(probe.folder), str(tuned.folder), "--json",
                "--out", str(tmp_path / "two"), "--split", "train", "--set", "measure=false",
            ],
            capture_output=True,
            text=True,
            check=False,
        )  # fmt: skip
        found = json.loads(done.stdout)
        codes = {"better": 0, "not worse": 0, "worse": 3, "can't tell": 4}
        assert done.returncode == codes[found["verdict"]]
        page = (tmp_path / "two" / "compare.html").read_text()
        assert page.count("<img") == min(len(found["flips"]), 60)

    def test_classes_are_matched_by_name(self, tuned: TrainResult, tmp_path: Path) -> None:
        manifest = tuned.bundle.manifest
        other = manifest.model_copy(update={"classes": (*manifest.classes[:-1], "something else")})
        files = {name: tuned.best / payload.path for name, payload in manifest.payloads.items()}
        files.pop("baseline")
        write_bundle(tmp_path / "other", other, files=files)
        with pytest.raises(BundleError, match="knows other classes"):
            compare(tuned.folder, tmp_path / "other")
        assert open_bundle(tmp_path / "other").manifest.classes[-1] == "something else"

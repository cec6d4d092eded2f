"""The loop from a confusion to its images and back into training, on real photos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from holotype import TrainResult, evaluate, load, train
from holotype.config import DatasetConfig, EvaluateConfig, HardSamplesConfig, TrainConfig, resolve_config
from holotype.dataset import Split, open_dataset
from holotype.fit import open_session
from holotype.fit.sampling import order_epoch
from holotype.hard_samples import HardSamples, hard_samples
from holotype.report import Report
from holotype.scoring import score

PHOTOS = Path(__file__).parents[2] / "shared" / "data" / "clothing-small.tar"
PAIR = ("shirt", "t-shirt")
SETTINGS: dict[str, Any] = {"preset": "fast", "data": {"size": 64}, "fit": {"epochs": 1}}
JUDGED: tuple[Split, ...] = ("validation", "test")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PHOTOS.is_file(), reason=f"{PHOTOS} is not on this machine"),
]


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return train(PHOTOS, name="before", overrides=SETTINGS, runs=tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def hard(before: TrainResult) -> HardSamples:
    """The hardest validation images, of which enough are of the pair."""
    found = hard_samples(before.folder, config=HardSamplesConfig(count=100))
    assert any({sample.label, sample.predicted} == set(PAIR) for sample in found.samples)
    return found


@pytest.fixture(scope="module")
def after(before: TrainResult, hard: HardSamples) -> TrainResult:
    focused = resolve_config(TrainConfig, overrides={**SETTINGS, "fit": {"epochs": 1, "focus": hard.file}})
    return train(PHOTOS, name="after", config=focused, runs=before.folder.parent)


def judged(run: TrainResult, split: Split) -> Report:
    config = EvaluateConfig(split=split)
    return evaluate(run.best, config=config, out=run.folder / f"judged-{split}")


def confused(report: Report) -> dict[str, int]:
    """How many of each of the pair were called the other, by the confusion matrix."""
    place = {name: at for at, name in enumerate(report.confusion.classes)}
    return {
        f"{label} called {other}": report.confusion.counts[place[label]][place[other]]
        for label, other in (PAIR, PAIR[::-1])
    }


def counted(run: TrainResult, split: Split) -> tuple[dict[str, int], tuple[str, ...]]:
    """The same from single answers, and the images that were judged."""
    predictor = load(run.best)
    dataset = open_dataset(PHOTOS, spec=run.bundle.manifest.preprocess, config=DatasetConfig())
    answers = score(predictor, dataset, split=split)
    names = np.array(answers.classes)
    said, labels = names[answers.predicted], names[answers.labels]
    found = {
        f"{label} called {other}": int(((labels == label) & (said == other)).sum())
        for label, other in (PAIR, PAIR[::-1])
    }
    return found, tuple(answers.paths)


def test_the_pair_before_and_after(
    before: TrainResult, after: TrainResult, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = []
    for split in JUDGED:
        images = []
        for run in (before, after):
            report = judged(run, split)
            single, paths = counted(run, split)
            assert confused(report) == single
            assert sum(map(sum, report.confusion.counts)) == len(paths)
            images.append((report.dataset.root_hash, paths))
            right = report.metrics.accuracy.value
            lines.append(f"{split} {run.folder.name}: {single}, accuracy {right:.3f}")
        assert images[0] == images[1], "both are judged on the same images"
    with capsys.disabled():
        print("", *lines, sep="\n")


def test_the_list_is_of_training_images_that_are_drawn_more_often(hard: HardSamples) -> None:
    config = resolve_config(TrainConfig, overrides={**SETTINGS, "fit": {"epochs": 1, "focus": hard.file}})
    session = open_session(PHOTOS, config, device="cpu")
    rows = session.dataset.rows("train")
    paths = np.array(session.dataset.paths(rows))
    assert hard.training_images <= set(paths)
    listed = np.isin(paths, sorted(hard.training_images))
    assert session.draw_weights is not None
    shown = np.zeros(len(rows))
    for epoch in (1, 2):
        order = order_epoch(rows, weights=session.draw_weights, seed=config.fit.seed, epoch=epoch)
        np.add.at(shown, np.searchsorted(rows, order.rows), 1)
    assert shown.sum() == 2 * len(rows)
    assert shown[listed].mean() / shown[~listed].mean() == pytest.approx(config.fit.focus_weight, rel=0.05)
    of_pair = [sample for sample in hard.samples if {sample.label, sample.predicted} == set(PAIR)]
    assert {near.label for sample in of_pair for near in sample.same_label} <= set(PAIR)

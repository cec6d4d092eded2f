"""What drawing hard samples' neighbours more often does to a confused pair of classes.

    python benchmarks/confusion_loop.py DATA --pair shirt t-shirt --seeds 0 1 2

DATA has train/, validation/ and test/. For each seed: train, find the hardest images of validation, train
again with the same seed and settings but --focus on the training images near to them. Prints, for validation
and test, how many images of either class are called the other, before and after, and the accuracy, each
difference with a paired 95 % interval over the images of all seeds. Only test says what it is worth: the
images to focus on were chosen by the labels of validation.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from holotype import load, train
from holotype.config import DatasetConfig, HardSamplesConfig
from holotype.dataset import open_dataset
from holotype.hard_samples import hard_samples
from holotype.metrics import Predictions
from holotype.scoring import score

Split = Literal["validation", "test"]
SPLITS: tuple[Split, ...] = ("validation", "test")
RESAMPLES = 10_000


@dataclass(frozen=True)
class Answers:
    """What the models of a seed, before and after, said about a split."""

    before: Predictions
    after: Predictions


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--pair", nargs=2, default=("shirt", "t-shirt"), metavar="CLASS")
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--count", type=int, default=50, help="hardest images of validation")
    parser.add_argument("--neighbours", type=int, default=3, help="training images near to each")
    parser.add_argument("--weight", type=float, default=3.0, help="fit.focus_weight")
    parser.add_argument("--size", type=int, help="data.size; default: the weights' own")
    parser.add_argument("--runs", type=Path, help="keep the runs here; default: a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        runs = arguments.runs or Path(scratch)
        rounds = [one_round(arguments, seed=seed, runs=runs) for seed in arguments.seeds]
    print(f"\n{arguments.preset}, {len(rounds)} seed(s), pair {' / '.join(arguments.pair)}\n")
    print(
        "| split | measure | before | after | difference | paired 95 % interval |\n|---|---|---|---|---|---|"
    )
    for split in SPLITS:
        for name, before, after in measures([one[split] for one in rounds], pair=arguments.pair):
            print(row(split, name, before, after))


def one_round(arguments: argparse.Namespace, *, seed: int, runs: Path) -> dict[Split, Answers]:
    """Train, find what is hard, train again; what both models say about validation and test."""
    settings: dict[str, Any] = {"fit": {"seed": seed}, "data": {"size": arguments.size}}
    first = train(
        arguments.data, name=f"before-{seed}", preset=arguments.preset, overrides=settings, runs=runs
    )
    config = HardSamplesConfig(count=arguments.count, neighbours=arguments.neighbours)
    hard = hard_samples(first.folder, config=config, out=runs / f"hard-{seed}.csv")
    focused = {**settings, "fit": {"seed": seed, "focus": hard.file, "focus_weight": arguments.weight}}
    second = train(
        arguments.data, name=f"after-{seed}", preset=arguments.preset, overrides=focused, runs=runs
    )
    print(
        f"seed {seed}: {len(hard.training_images)} training images drawn {arguments.weight:g} times as often"
    )
    if first.interrupted or second.interrupted:
        raise SystemExit("interrupted: the two runs cannot be compared")
    models = [load(run.best) for run in (first, second)]
    spec = models[0].bundle.manifest.preprocess
    dataset = open_dataset(arguments.data, spec=spec, config=DatasetConfig())
    return {split: Answers(*(score(model, dataset, split=split) for model in models)) for split in SPLITS}


Errors = npt.NDArray[np.float64]


def measures(rounds: Sequence[Answers], *, pair: Sequence[str]) -> list[tuple[str, Errors, Errors]]:
    """Name, and errors before and after, 0 or 1 for each image and seed, `float64[seeds, images]`."""
    classes = rounds[0].before.classes
    first, second = (classes.index(label) for label in pair)
    labels = rounds[0].before.labels
    before, after = (
        np.stack([getattr(one, name).predicted for one in rounds]) for name in ("before", "after")
    )
    inside = np.flatnonzero((labels == first) | (labels == second))
    other = np.where(labels[inside] == first, second, first)

    def confused(said: npt.NDArray[np.int64]) -> Errors:
        return np.asarray(said[:, inside] == other, dtype=np.float64)

    def wrong(said: npt.NDArray[np.int64]) -> Errors:
        return np.asarray(said != labels, dtype=np.float64)

    return [
        (f"{pair[0]} / {pair[1]} confused", confused(before), confused(after)),
        ("wrong answers", wrong(before), wrong(after)),
    ]


def row(split: Split, name: str, before: Errors, after: Errors) -> str:
    """A line of the table: errors per seed, and their difference with an interval over the images.

    Percentile bootstrap of the images, the seeds of an image kept together.
    """
    change = (after - before).mean(axis=0)
    rng = np.random.default_rng(0)
    draws = change[rng.integers(0, len(change), (RESAMPLES, len(change)))].sum(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    cells = (f"{errors.sum() / len(errors):.1f} of {errors.shape[1]}" for errors in (before, after))
    return f"| {split} | {name} | {' | '.join(cells)} | {change.sum():+.1f} | {low:+.1f} to {high:+.1f} |"


if __name__ == "__main__":
    main()

"""Balanced accuracy of a long-tailed training set: every remedy of `fit.imbalance` against none.

    python benchmarks/long_tail.py CIFAR10 [--ratio 100] [--seeds 0 1 2 3 4]
    python benchmarks/long_tail.py CIFAR10 --fine-tune [--preset balanced] [--set data.size=96 ...]

CIFAR10 holds class folders, in splits or not. Of all its images every class gives as many as the smallest
has: a fifth of them are the test split, a tenth validation, both balanced. Of the rest the classes keep
ratio ** (-rank / (C - 1)), their ranks drawn by the seed: from all down to 1 / ratio. Without --fine-tune a
head is fitted on features of the default backbone, for each seed; with it, `holotype.train` runs once per
remedy, for the first seed. Both choose what is best by balanced accuracy on validation.

Prints the balanced accuracy on test and its difference to that of none, with the 95 % interval of a paired
bootstrap over seeds and, within each class, over images.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import holotype
from holotype.config import DataConfig, FitConfig, ModelConfig, merge, parse_assignments
from holotype.dataset import Dataset, open_dataset
from holotype.embeddings import Backbone, embed
from holotype.head import Features, fit_head
from holotype.models import input_spec
from holotype.runlog import RunLog
from holotype.scoring import score

REMEDIES = ("none", "weights", "sampler", "focal", "logit-adjust", "auto")


@dataclass(frozen=True)
class Tail:
    """Rows of a dataset, `int64[N]`, by split."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def main() -> None:
    arguments = read_arguments()
    spec = input_spec(ModelConfig(), DataConfig())
    dataset = open_dataset(arguments.data, spec=spec, config=DataConfig())
    seeds = arguments.seeds[:1] if arguments.fine_tune else arguments.seeds
    tails = [cut(dataset, ratio=arguments.ratio, seed=seed) for seed in seeds]
    labels = dataset.labels(np.arange(len(dataset.table)))
    counts = np.sort(np.bincount(labels[tails[0].train]))[::-1]
    print(f"training images by class: {' '.join(map(str, counts))}", flush=True)
    right: dict[str, list[np.ndarray]] = {}
    if arguments.fine_tune:
        settings = parse_assignments(arguments.set)
        for remedy in REMEDIES:
            right[remedy] = [fine_tune(dataset, tails[0], remedy, preset=arguments.preset, settings=settings)]
            print(f"{remedy:12} {right[remedy][0].mean():.1%}", flush=True)
    else:
        values = embed(dataset, backbone=Backbone(ModelConfig(), spec))
        for remedy in REMEDIES:
            right[remedy] = [fit(values, labels, tail, remedy) for tail in tails]
    report(right, classes=len(dataset.classes))


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--ratio", type=float, default=100.0, help="largest over smallest class")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--fine-tune", action="store_true", help="train the network, not only a head")
    parser.add_argument("--preset", default="balanced", help="of --fine-tune")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of --fine-tune")
    return parser.parse_args()


def cut(dataset: Dataset, *, ratio: float, seed: int) -> Tail:
    """A long-tailed training set, and validation and test with as many images of each class."""
    generator = np.random.default_rng(seed)
    labels = dataset.labels(np.arange(len(dataset.table)))
    classes = len(dataset.classes)
    rows = [generator.permutation(np.flatnonzero(labels == label)) for label in range(classes)]
    each = min(len(own) for own in rows)
    test, validation = each // 5, each // 10
    most = each - test - validation
    ranks = generator.permutation(classes)
    kept = [max(round(most * ratio ** (-rank / (classes - 1))), 1) for rank in ranks]
    return Tail(
        train=np.concatenate([own[each - most :][:n] for own, n in zip(rows, kept, strict=True)]),
        validation=np.concatenate([own[test : test + validation] for own in rows]),
        test=np.concatenate([own[:test] for own in rows]),
    )


def fit(values: np.ndarray, labels: np.ndarray, tail: Tail, remedy: str) -> np.ndarray:
    """Which test images a head gets right, `bool[N]`, class by class."""
    features = [Features(values[rows], labels[rows]) for rows in (tail.train, tail.validation)]
    head = fit_head(
        *features,
        classes=int(labels.max()) + 1,
        config=FitConfig(imbalance=remedy, metric="balanced_accuracy"),
        log=RunLog(None),
    )
    logits = values[tail.test] @ head.weight.numpy().T + head.bias.numpy()
    return logits.argmax(axis=1) == labels[tail.test]


def fine_tune(
    dataset: Dataset, tail: Tail, remedy: str, *, preset: str, settings: Mapping[str, object]
) -> np.ndarray:
    """As `fit`, of a whole `holotype.train`."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        for split in ("train", "validation", "test"):
            link(dataset, getattr(tail, split), data / split)
        wanted = {"fit": {"imbalance": remedy, "metric": "balanced_accuracy"}}
        result = holotype.train(
            data, preset=preset, overrides=merge(settings, wanted), runs=Path(folder) / "runs"
        )
        predictor = holotype.load(result.best)
        judged = open_dataset(data, spec=predictor.bundle.manifest.preprocess, config=DataConfig())
        found = score(predictor, judged, split="test")
    right = found.predicted == found.labels
    return right[np.argsort(found.labels, kind="stable")]


def link(dataset: Dataset, rows: np.ndarray, target: Path) -> None:
    """Class folders with a link to, or else a copy of, every image of `rows`."""
    labels = dataset.table["label"].gather(rows)
    for row, path, label in zip(rows, dataset.paths(rows), labels, strict=True):
        file = target / label / f"{row:06}{Path(path).suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            file.hardlink_to(dataset.file(path))
        except OSError:
            shutil.copy2(dataset.file(path), file)


def report(right: Mapping[str, Sequence[np.ndarray]], *, classes: int) -> None:
    print(f"\n{'':12} {'balanced':>8}  difference to none")
    for remedy, own in right.items():
        mean = np.mean([one.mean() for one in own])
        print(f"{remedy:12} {mean:8.1%}  {difference(own, right['none'], classes=classes)}")
    best = max((r for r in right if r != "auto"), key=lambda r: np.mean([one.mean() for one in right[r]]))
    print(f"\nauto less {best}, the best: {difference(right['auto'], right[best], classes=classes)}")


def difference(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], *, classes: int) -> str:
    """Of balanced accuracies, in points, with its interval; every class has as many images."""
    gaps = np.stack([a.astype(float) - b for a, b in zip(ours, theirs, strict=True)])
    gaps = gaps.reshape(len(ours), classes, -1)
    generator = np.random.default_rng(0)
    draws = np.empty(2000)
    for i in range(len(draws)):
        chosen = gaps[generator.integers(0, len(gaps), len(gaps))]
        places = generator.integers(0, gaps.shape[2], chosen.shape)
        draws[i] = np.take_along_axis(chosen, places, axis=2).mean()
    low, high = np.quantile(draws, [0.025, 0.975])
    return f"{100 * gaps.mean():+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"


if __name__ == "__main__":
    main()

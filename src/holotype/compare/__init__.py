"""`holotype compare`: two bundles on the same images, with a verdict."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from holotype.bundle import home_of, write_text
from holotype.compare.contract import ClassDifference, Comparison, Flip, Side, Verdict
from holotype.compare.page import write_page
from holotype.config import CompareConfig
from holotype.dataset import (
    Dataset,
    Split,
    as_trained,
    dataset_name,
    open_dataset,
    recorded_source,
    tell_splits,
    thumbnailer,
)
from holotype.errors import BundleError, DatasetError
from holotype.machine import machine_name
from holotype.metrics import (
    Interval,
    Predictions,
    confusion_matrix,
    images_needed,
    macro_f1,
    mcnemar,
    paired_accuracy,
    paired_metric,
    with_exact_ends,
)
from holotype.predictor import Predictor, load
from holotype.progress import note
from holotype.report import Estimate
from holotype.runtime import choose, served_bytes
from holotype.scoring import choose_split, score
from holotype.timing import Setup, Timing, race

__all__ = ["Comparison", "compare", "judge"]


def compare(
    a: Path | str,
    b: Path | str,
    data: Path | str | None = None,
    *,
    config: CompareConfig | None = None,
    out: Path | str | None = None,
) -> Comparison:
    """Say whether bundle or run folder `b` is better than `a`, on the same images of `data`.

    `data` defaults to what `a` was trained on; each sees the images as it was trained to. Writes compare.json
    and compare.html to `out`, by default `compare-DATA-SPLIT` beside B. `BundleError` where the classes
    differ.
    """
    config = config or CompareConfig()
    sides = load(a), load(b)
    _check_classes(*sides)
    source = Path(data) if data is not None else recorded_source(sides[0].bundle)
    datasets, split = _datasets(sides, source, config)
    predictions = [score(side, dataset, split=split) for side, dataset in zip(sides, datasets, strict=True)]
    first, second = _aligned(*predictions, classes=sides[0].classes)
    timings = _race(sides) if config.measure else None
    comparison = judge(
        first,
        second,
        sides=[
            _side(side, one, None if timings is None else timings[place])
            for place, (side, one) in enumerate(zip(sides, (first, second), strict=True))
        ],
        dataset=str(source),
        split=split,
        margin=config.margin / 100,
    )
    folder = Path(out) if out is not None else home_of(b) / f"compare-{dataset_name(source)}-{split}"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "compare.json", comparison.model_dump_json(indent=1))
    write_page(folder / "compare.html", comparison, thumbnail=thumbnailer(datasets[0]))
    return comparison


def _datasets(
    sides: tuple[Predictor, Predictor], source: Path, config: CompareConfig
) -> tuple[list[Dataset], Split]:
    """The images as each side sees them, split as A was trained, and the split that decides."""
    own, other = (as_trained(side.bundle, source, config=config.data) for side in sides)
    tell_splits(sides[0].bundle, source, own)
    specs = [side.bundle.manifest.preprocess for side in sides]
    datasets = [open_dataset(source, spec=spec, config=own) for spec in specs]
    split = choose_split(datasets[0], wanted=config.split)
    known = {} if other.split_revision is None else {"split_revision": other.split_revision}
    theirs = own.model_copy(update={"validation": other.validation, "test": other.test, **known})
    if theirs != own and split != "train":
        judged, dataset = datasets[1], open_dataset(source, spec=specs[1], config=theirs)
        learned = set(dataset.paths(dataset.rows("train")))
        seen = len(learned & set(judged.paths(judged.rows(split))))
        if seen:
            images = len(judged.rows(split))
            note(
                f"B was trained with other splits: by those, {seen} of the {images} {split} images are for"
                " training"
            )
    return datasets, split


def judge(
    first: Predictions,
    second: Predictions,
    *,
    sides: list[Side],
    dataset: str,
    split: Split,
    margin: float,
) -> Comparison:
    """The verdict about two sets of answers to the same images, in the same order and classes."""
    same = sides[0].hash == sides[1].hash  # then nothing can be lost, however few images there are
    right = first.predicted == first.labels, second.predicted == second.labels
    only_a, only_b = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    images = len(first.labels)
    accuracy = paired_metric(first, second, metric="accuracy")
    if not same:
        accuracy = with_exact_ends(accuracy, *right)
    verdict = _verdict(accuracy, margin=margin)
    needed = (
        images_needed(accuracy.value, (only_a + only_b) / images, margin=margin)
        if verdict == "can't tell"
        else None
    )
    return Comparison(
        verdict=verdict,
        reason=_reason(verdict, accuracy, images=images, margin=margin, needed=needed),
        a=sides[0],
        b=sides[1],
        dataset=dataset,
        split=split,
        images=images,
        margin=margin,
        difference=_estimate(accuracy),
        macro_f1=_estimate(paired_metric(first, second, metric="macro_f1")),
        mcnemar_p=mcnemar(only_a, only_b),
        only_a=only_a,
        only_b=only_b,
        needed_images=needed,
        classes=tuple(_classes(first, second, same=same)),
        flips=tuple(_flips(first, second)),
        machine=machine_name(),
    )


def _verdict(difference: Interval, *, margin: float) -> Verdict:
    if difference.low > 0:
        return "better"
    if difference.high < 0 and difference.low <= -margin:
        return "worse"
    return "not worse" if difference.low > -margin else "can't tell"


def _reason(verdict: Verdict, difference: Interval, *, images: int, margin: float, needed: int | None) -> str:
    value, low, high = (100 * part for part in (difference.value, difference.low, difference.high))
    found = f"B is right {value:+.2f} points more often [{low:+.2f}, {high:+.2f}] on {images} images"
    if verdict == "better":
        return f"{found}: the interval is above 0"
    if verdict == "not worse":
        return f"{found}: less than the margin of {100 * margin:g} points is lost"
    if verdict == "worse":
        return f"{found}: the interval is below 0, and reaches the margin of {100 * margin:g} points"
    more = f"about {needed} images would tell" if needed is not None else "no number of images would tell"
    return f"{found}; {more}"


def _check_classes(a: Predictor, b: Predictor) -> None:
    odd = sorted(set(a.classes) ^ set(b.classes))
    if odd:
        raise BundleError(
            f"knows other classes than {a.bundle.path}: {', '.join(odd[:3])}",
            where=b.bundle.path,
            fix="compare bundles of one task",
        )


def _aligned(
    first: Predictions, second: Predictions, *, classes: tuple[str, ...]
) -> tuple[Predictions, Predictions]:
    """Both in the classes and the order of the first."""
    if first.paths != second.paths:
        raise DatasetError("gives both bundles different images", fix="name the dataset with --data")
    place = {name: i for i, name in enumerate(second.classes)}
    columns = np.array([place[name] for name in classes])
    back = np.argsort(columns)
    return first, Predictions(
        classes=classes,
        paths=second.paths,
        labels=back[second.labels],
        probabilities=second.probabilities[:, columns],
    )


def _race(sides: tuple[Predictor, Predictor]) -> list[Timing]:
    setups = []
    for side in sides:
        choice = choose(side.bundle)
        setups.append(Setup(side.bundle.path, choice.runtime, choice.precision, choice.threads))
    return race(setups)


def _side(side: Predictor, predictions: Predictions, timing: Timing | None) -> Side:
    choice = choose(side.bundle)
    matrix = confusion_matrix(predictions.labels, predictions.predicted, classes=len(predictions.classes))
    return Side(
        bundle=str(side.bundle.path),
        hash=side.bundle.hash,
        accuracy=float((predictions.predicted == predictions.labels).mean()),
        macro_f1=float(macro_f1(matrix[None])[0]),
        bytes=served_bytes(side.bundle, choice.runtime),
        runtime=choice.runtime,
        precision=choice.precision,
        latency_ms=None if timing is None else timing.batches[1].p50,
        throughput=None if timing is None else timing.batches[8].images_per_second,
    )


def _estimate(interval: Interval) -> Estimate:
    return Estimate(value=interval.value, low=interval.low, high=interval.high)


def _classes(first: Predictions, second: Predictions, *, same: bool) -> Iterator[ClassDifference]:
    for place, name in enumerate(first.classes):
        own = first.labels == place
        if own.any():
            before, after = first.predicted[own] == place, second.predicted[own] == place
            yield ClassDifference(
                name=name,
                images=int(own.sum()),
                recall_a=float(before.mean()),
                recall_b=float(after.mean()),
                difference=_estimate(paired_accuracy(before, after, same=same)),
            )


def _flips(first: Predictions, second: Predictions) -> Iterator[Flip]:
    """The images that get different labels, those that one alone gets right first."""
    differ = np.flatnonzero(first.predicted != second.predicted)
    right_a = first.predicted[differ] == first.labels[differ]
    right_b = second.predicted[differ] == second.labels[differ]
    for row in differ[np.argsort(~(right_a | right_b), kind="stable")].tolist():
        said = int(first.predicted[row]), int(second.predicted[row])
        yield Flip(
            path=first.paths[row],
            label=first.classes[int(first.labels[row])],
            a=first.classes[said[0]],
            b=first.classes[said[1]],
            probability_a=float(first.probabilities[row, said[0]]),
            probability_b=float(second.probabilities[row, said[1]]),
        )

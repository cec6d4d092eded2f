"""The contract of `report.json`, and how `Predictions` become one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from holotype.errors import DatasetError
from holotype.fields import Count, Share, Text
from holotype.metrics import (
    Predictions,
    confusion_matrix,
    evaluate_predictions,
    most_confused,
    per_class,
)

__all__ = [
    "BundleSummary",
    "ClassScore",
    "ConfusedPair",
    "Confusion",
    "DatasetSummary",
    "Estimate",
    "Fault",
    "Finding",
    "HistoryRow",
    "Leaked",
    "Metrics",
    "Mistake",
    "Report",
    "Split",
    "Sureness",
    "UnreadableFile",
    "build_report",
]

_PAIRS = 12
_EXAMPLES = 4
_MISTAKES = 24


HistoryRow = dict[str, float | int | str]
Split = Literal["train", "validation", "test"]
Fault = Literal[
    "overfitting",
    "underfitting",
    "learning-rate-high",
    "learning-rate-low",
    "exploding-gradients",
    "vanishing-gradients",
    "dead-layer",
    "norm-mismatch",
    "label-noise",
    "input-bound",
]


class _Part(BaseModel):
    # A diverged loss in the history is NaN: JSON has no such number, so it is written as the string "NaN".
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Estimate(_Part):
    """A metric with its bootstrap 95 % interval."""

    value: float
    low: float
    high: float


class Metrics(_Part):
    """The headline metrics; all in [0, 1] but `log_loss`, which is in nats."""

    accuracy: Estimate
    balanced_accuracy: Estimate
    macro_f1: Estimate
    weighted_f1: Estimate
    log_loss: Estimate
    ece: Estimate


class Sureness(_Part):
    """What the bundle's policy makes of the images, distances apart: how many answers are sure, how many of
    these are right, and, where classes are left open, how often the label is among them."""

    rule: Text
    share: Share
    accuracy: Share | None
    held: Share | None


class ClassScore(_Part):
    """Precision, recall and F1 of one class (0 where undefined); `support` is its number of images."""

    precision: Share
    recall: Share
    f1: Share
    support: Count


class Confusion(_Part):
    """`counts[i][j]` images of `classes[i]` were called `classes[j]`."""

    classes: tuple[Text, ...]
    counts: tuple[tuple[Count, ...], ...]


class UnreadableFile(_Part):
    """A file of the dataset that gave no pixels, and why."""

    path: Text
    error: Text


class DatasetSummary(_Part):
    """The dataset behind the predictions.

    `counts` maps class → split → images. `deviation` is, by class, the largest difference between the share
    of its images that a split got and the share it was to get (0.02 is two percentage points); None where
    the split was given, not made.
    """

    path: Text
    root_hash: str
    images: Count
    counts: dict[Text, dict[str, Count]]
    unreadable: tuple[UnreadableFile, ...] = ()
    deviation: dict[Text, float] | None = None


class BundleSummary(_Part):
    """The bundle that made the predictions."""

    hash: str
    path: Text


class ConfusedPair(_Part):
    """`count` images of class `label` were called `predicted`; `paths` are the 4 most certain of them."""

    label: Text
    predicted: Text
    count: Count
    paths: tuple[Text, ...]


class Mistake(_Part):
    """A wrong answer: its probability, and the probability that the true class got."""

    path: Text
    label: Text
    predicted: Text
    probability: Share
    label_probability: Share


class Leaked(_Part):
    """Images of the split that have a copy in an earlier one, by the dataset's audit, and what they do.

    `accuracy_without` leaves them out; None where nothing else is left.
    """

    images: Count
    accuracy_without: Estimate | None


class Finding(_Part):
    """What held a run back: the numbers that show it, what they mean, and settings that address it.

    A `warning` costs accuracy or time, a `note` may. `settings` are assignments for `train --set` with values
    that follow from the run's own, the first choice first.
    """

    name: Fault
    severity: Literal["warning", "note"]
    evidence: Text
    meaning: Text
    settings: tuple[Text, ...] = ()


class Report(_Part):
    """Contents of `report.json`.

    `mistakes` holds up to 24 wrong answers, the most certain first; `confused` up to 12 pairs, the most
    frequent first; `history` the rows of `metrics.csv`, empty where nothing was trained; `seconds` is the
    time from the start of the command to this report. `leaked` is None where exactly this dataset was not
    audited. `diagnosis` is of the training in `history`, warnings first; `looked_for` what it could show.
    """

    metrics: Metrics
    sureness: Sureness | None = None
    per_class: dict[Text, ClassScore]
    confusion: Confusion
    confused: tuple[ConfusedPair, ...]
    mistakes: tuple[Mistake, ...]
    dataset: DatasetSummary
    bundle: BundleSummary
    runtime: str
    split: Split
    seconds: Annotated[float, Field(ge=0)]
    leaked: Leaked | None = None
    history: tuple[HistoryRow, ...] = ()
    diagnosis: tuple[Finding, ...] = ()
    looked_for: tuple[Fault, ...] = ()

    @property
    def images(self) -> int:
        """How many images were predicted."""
        return sum(map(sum, self.confusion.counts))


def build_report(
    predictions: Predictions,
    *,
    dataset: DatasetSummary,
    bundle: BundleSummary,
    runtime: str,
    split: Split,
    seconds: float,
    leaked: Collection[str] | None = None,
    history: Iterable[Mapping[str, float | int | str]] = (),
    diagnosis: Iterable[Finding] = (),
    looked_for: Iterable[Fault] = (),
) -> Report:
    """Measure `predictions`; the same input gives the same report. `DatasetError` where there are none.

    `leaked` are the paths that an audit of the dataset found to have a copy in an earlier split.
    """
    if not predictions.paths:
        raise DatasetError(
            f"the {split} split has no images to measure on", where=dataset.path, fix="use another split"
        )
    classes = predictions.classes
    matrix = confusion_matrix(predictions.labels, predictions.predicted, classes=len(classes))
    intervals = evaluate_predictions(predictions)
    wrong = _wrong(predictions)
    return Report(
        metrics=Metrics(
            **{name: Estimate(value=i.value, low=i.low, high=i.high) for name, i in intervals.items()}
        ),
        per_class={
            name: ClassScore(precision=c.precision, recall=c.recall, f1=c.f1, support=c.support)
            for name, c in zip(classes, per_class(matrix), strict=True)
        },
        confusion=Confusion(classes=classes, counts=matrix.tolist()),
        confused=tuple(
            _pair(predictions, wrong, label=true, predicted=said, count=count)
            for true, said, count in most_confused(matrix, limit=_PAIRS)
        ),
        mistakes=tuple(_mistake(predictions, row) for row in wrong[:_MISTAKES]),
        dataset=dataset,
        bundle=bundle,
        runtime=runtime,
        split=split,
        seconds=seconds,
        leaked=None if leaked is None else _leaked(predictions, leaked),
        history=tuple(dict(row) for row in history),
        diagnosis=tuple(diagnosis),
        looked_for=tuple(looked_for),
    )


def _leaked(predictions: Predictions, paths: Collection[str]) -> Leaked:
    known = frozenset(paths)
    clean = np.array([path not in known for path in predictions.paths], dtype=np.bool_)
    if not clean.any():
        return Leaked(images=len(clean), accuracy_without=None)
    rest = Predictions(
        classes=predictions.classes,
        paths=tuple(path for path, kept in zip(predictions.paths, clean, strict=True) if kept),
        labels=predictions.labels[clean],
        probabilities=predictions.probabilities[clean],
    )
    accuracy = evaluate_predictions(rest)["accuracy"]
    return Leaked(
        images=int((~clean).sum()),
        accuracy_without=Estimate(value=accuracy.value, low=accuracy.low, high=accuracy.high),
    )


def _wrong(predictions: Predictions) -> list[int]:
    """Rows with a wrong answer, the most certain first; equal certainty in the order of the paths."""
    rows = np.flatnonzero(predictions.predicted != predictions.labels).tolist()
    certainty = predictions.probabilities.max(axis=1)
    return sorted(rows, key=lambda row: (-certainty[row], predictions.paths[row]))


def _mistake(predictions: Predictions, row: int) -> Mistake:
    label, said = predictions.labels[row], predictions.predicted[row]
    return Mistake(
        path=predictions.paths[row],
        label=predictions.classes[label],
        predicted=predictions.classes[said],
        probability=predictions.probabilities[row, said],
        label_probability=predictions.probabilities[row, label],
    )


def _pair(
    predictions: Predictions, wrong: list[int], *, label: int, predicted: int, count: int
) -> ConfusedPair:
    said = predictions.predicted
    rows = [row for row in wrong if predictions.labels[row] == label and said[row] == predicted]
    return ConfusedPair(
        label=predictions.classes[label],
        predicted=predictions.classes[predicted],
        count=count,
        paths=tuple(predictions.paths[row] for row in rows[:_EXAMPLES]),
    )

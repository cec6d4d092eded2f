"""Metrics of a classifier on `Predictions`, in numpy, each with a bootstrap 95 % interval."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

__all__ = [
    "ClassMetrics",
    "Interval",
    "Predictions",
    "ReliabilityBins",
    "binomial_bounds",
    "confusion_matrix",
    "evaluate_predictions",
    "expected_calibration_error",
    "images_needed",
    "log_loss",
    "macro_f1",
    "mcnemar",
    "most_confused",
    "paired_accuracy",
    "paired_metric",
    "per_class",
    "reliability_bins",
    "with_exact_ends",
]

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

_RESAMPLES = 2000
_DRAWN = 4_000_000  # counts that are in memory at a time
_ONE_SIDED = 0.975  # of each end of an interval of 95 %
_BINS = 15


@dataclass(frozen=True)
class Predictions:
    """What a model said about labelled images.

    `labels` is `int64[N]` with positions in `classes`; `probabilities` is `float64[N, C]`; `paths` are as
    the dataset names them.
    """

    classes: tuple[str, ...]
    paths: tuple[str, ...]
    labels: Counts
    probabilities: Floats

    @property
    def predicted(self) -> Counts:
        """`int64[N]`, the most probable class of each image."""
        return np.asarray(self.probabilities.argmax(axis=1), dtype=np.int64)


@dataclass(frozen=True)
class Interval:
    """A value with the 2.5 % and 97.5 % quantiles of its bootstrap distribution."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ClassMetrics:
    """Precision, recall and F1 of one class (0 where undefined) and its number of images."""

    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class ReliabilityBins:
    """Equal-width bins of top-1 confidence over [0, 1], in order; `float64[15]` and `int64[15]`.

    `confidence` and `accuracy` are means over the images of a bin, NaN where `count` is 0.
    """

    confidence: Floats
    accuracy: Floats
    count: Counts


def confusion_matrix(labels: Counts, predicted: Counts, *, classes: int) -> Counts:
    """`int64[C, C]`, rows are true classes, columns predicted ones."""
    flat = np.bincount(labels * classes + predicted, minlength=classes * classes)
    return np.asarray(flat.reshape(classes, classes), dtype=np.int64)


def evaluate_predictions(predictions: Predictions, *, seed: int = 0) -> dict[str, Interval]:
    """Accuracy, balanced accuracy, macro and weighted F1, log loss and calibration error with intervals.

    Percentile bootstrap over images (Efron 1979), 2,000 resamples. A resample of the confusion matrix is a
    multinomial draw of its occupied cells, which is the same distribution as resampling images, at a cost
    that grows with neither N nor C squared.
    """
    classes = len(predictions.classes)
    matrix = confusion_matrix(predictions.labels, predictions.predicted, classes=classes)
    rng = np.random.default_rng(seed)
    observed, draws = _margins(matrix[None]), _resample(matrix, rng=rng)
    by_margins: dict[str, Callable[[_Margins], Floats]] = {
        "accuracy": _accuracy,
        "balanced_accuracy": _balanced_accuracy,
        "macro_f1": _macro_f1,
        "weighted_f1": _weighted_f1,
    }
    result = {
        name: _interval(float(function(observed)[0]), function(draws))
        for name, function in by_margins.items()
    }
    losses = _losses(predictions.labels, predictions.probabilities)
    confidence = predictions.probabilities.max(axis=1)
    correct = (predictions.predicted == predictions.labels).astype(np.float64)
    loss_draws, ece_draws = _bootstrap_images(losses, confidence, correct, rng=rng)
    result["log_loss"] = _interval(float(losses.mean()), loss_draws)
    result["ece"] = _interval(
        expected_calibration_error(predictions.labels, predictions.probabilities), ece_draws
    )
    return result


def per_class(matrix: Counts) -> list[ClassMetrics]:
    """Precision, recall, F1 and support of each class from an `int64[C, C]` confusion matrix."""
    right = np.diag(matrix)
    precision = _ratio(right, matrix.sum(axis=0))
    recall = _ratio(right, matrix.sum(axis=1))
    f1 = _ratio(2 * right, matrix.sum(axis=0) + matrix.sum(axis=1))
    return [
        ClassMetrics(float(p), float(r), float(f), int(n))
        for p, r, f, n in zip(precision, recall, f1, matrix.sum(axis=1), strict=True)
    ]


def log_loss(labels: Counts, probabilities: Floats) -> float:
    """Mean of -ln p(true class), probabilities clipped at 1e-12."""
    return float(_losses(labels, probabilities).mean())


def expected_calibration_error(labels: Counts, probabilities: Floats) -> float:
    """ECE of the top prediction over 15 equal-width bins (Guo et al. 2017), in [0, 1]."""
    confidence = probabilities.max(axis=1)
    correct = (probabilities.argmax(axis=1) == labels).astype(np.float64)
    gap = np.bincount(_bin(confidence), weights=correct - confidence, minlength=_BINS)
    return float(np.abs(gap).sum() / len(labels))


def reliability_bins(labels: Counts, probabilities: Floats) -> ReliabilityBins:
    """The bins of a reliability diagram; `expected_calibration_error` is their mean gap, by count."""
    confidence = probabilities.max(axis=1)
    correct = (probabilities.argmax(axis=1) == labels).astype(np.float64)
    count = np.bincount(_bin(confidence), minlength=_BINS)
    means = [
        np.divide(
            np.bincount(_bin(confidence), weights=values, minlength=_BINS),
            count,
            out=np.full(_BINS, np.nan),
            where=count > 0,
        )
        for values in (confidence, correct)
    ]
    return ReliabilityBins(confidence=means[0], accuracy=means[1], count=count)


def most_confused(matrix: Counts, *, limit: int) -> list[tuple[int, int, int]]:
    """(true, predicted, count) of the largest off-diagonal cells, largest first."""
    off = matrix.copy()
    np.fill_diagonal(off, 0)
    order = np.argsort(-off, axis=None, kind="stable")[:limit]
    cells = [(int(i // len(off)), int(i % len(off))) for i in order]
    return [(i, j, int(off[i, j])) for i, j in cells if off[i, j] > 0]


def macro_f1(matrices: npt.NDArray[np.int64]) -> Floats:
    """`float64[B]` of `int64[B, C, C]`: mean F1 over the classes that occur as label or prediction."""
    return _macro_f1(_margins(matrices))


@dataclass(frozen=True)
class _Margins:
    """What metrics need of B confusion matrices: diagonal, row sums and column sums, each `int64[B, C]`."""

    right: Counts
    labelled: Counts
    predicted: Counts


def _margins(matrices: npt.NDArray[np.int64]) -> _Margins:
    right = np.diagonal(matrices, axis1=1, axis2=2)
    return _Margins(right=right, labelled=matrices.sum(axis=2), predicted=matrices.sum(axis=1))


def _resample(matrix: Counts, *, rng: np.random.Generator) -> _Margins:
    """Margins of 2,000 bootstrap resamples of `int64[C, C]`; never 2,000 whole matrices in memory."""
    true, predicted = np.nonzero(matrix)
    parts = [
        (
            _sum_by_class(draws * (true == predicted), true, classes=len(matrix)),
            _sum_by_class(draws, true, classes=len(matrix)),
            _sum_by_class(draws, predicted, classes=len(matrix)),
        )
        for draws in _draws(matrix[true, predicted], rng=rng)
    ]
    return _Margins(*(np.concatenate(margin) for margin in zip(*parts, strict=True)))


def _draws(counts: Counts, *, rng: np.random.Generator) -> Iterator[Counts]:
    """2,000 multinomial resamples of `int64[K]`, some at a time: `int64[B, K]`."""
    total, block = int(counts.sum()), max(_DRAWN // len(counts), 1)
    for start in range(0, _RESAMPLES, block):
        drawn = rng.multinomial(total, counts / total, size=min(block, _RESAMPLES - start))
        yield np.asarray(drawn, dtype=np.int64)


def _sum_by_class(draws: Counts, owner: Counts, *, classes: int) -> Counts:
    """`int64[B, classes]`: the columns of `int64[B, K]` summed by their class, `int64[K]`."""
    order = np.argsort(owner, kind="stable")
    present, starts = np.unique(owner[order], return_index=True)
    sums = np.zeros((len(draws), classes), dtype=np.int64)
    sums[:, present] = np.add.reduceat(draws[:, order], starts, axis=1)
    return sums


def _accuracy(margins: _Margins) -> Floats:
    return np.asarray(margins.right.sum(axis=1) / margins.labelled.sum(axis=1), dtype=np.float64)


def _balanced_accuracy(margins: _Margins) -> Floats:
    return _mean_where(_ratio(margins.right, margins.labelled), margins.labelled > 0)


def _macro_f1(margins: _Margins) -> Floats:
    both = margins.labelled + margins.predicted
    return _mean_where(_ratio(2 * margins.right, both), both > 0)


def _weighted_f1(margins: _Margins) -> Floats:
    f1 = _ratio(2 * margins.right, margins.labelled + margins.predicted)
    support = margins.labelled
    return np.asarray((f1 * support).sum(axis=1) / support.sum(axis=1), dtype=np.float64)


def _ratio(top: npt.NDArray[Any], bottom: npt.NDArray[np.integer]) -> Floats:
    return np.asarray(
        np.divide(top, bottom, out=np.zeros(top.shape, dtype=np.float64), where=bottom > 0), dtype=np.float64
    )


def _mean_where(values: Floats, present: npt.NDArray[np.bool_]) -> Floats:
    return np.asarray((values * present).sum(axis=1) / present.sum(axis=1), dtype=np.float64)


def _losses(labels: Counts, probabilities: Floats) -> Floats:
    chosen = probabilities[np.arange(len(labels)), labels]
    return np.asarray(-np.log(np.clip(chosen, 1e-12, None)), dtype=np.float64)


def _bin(confidence: Floats) -> Counts:
    return np.minimum((confidence * _BINS).astype(np.int64), _BINS - 1)


def _bootstrap_images(
    losses: Floats, confidence: Floats, correct: Floats, *, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """Bootstrap distributions of mean loss and ECE; one resample at a time, so memory stays O(N)."""
    count = len(losses)
    gap_by_bin = np.zeros((count, _BINS))
    gap_by_bin[np.arange(count), _bin(confidence)] = correct - confidence
    columns = np.column_stack([losses, gap_by_bin])
    # Beyond 20,000 images 200 resamples place the quantiles as well as anybody will read them.
    resamples = _RESAMPLES if count <= 20_000 else 200
    sums = np.empty((resamples, columns.shape[1]))
    for row in range(resamples):
        weights = np.bincount(rng.integers(0, count, count), minlength=count)
        sums[row] = weights @ columns
    return sums[:, 0] / count, np.abs(sums[:, 1:]).sum(axis=1) / count


def _interval(value: float, draws: Floats) -> Interval:
    low, high = np.quantile(draws, [0.025, 0.975])
    # The calibration error of a resample is biased upwards, so for a well calibrated model even its 2.5 %
    # quantile can lie above the value; an interval never excludes the value it belongs to.
    return Interval(value, min(float(low), value), max(float(high), value))


def paired_accuracy(
    before: npt.NDArray[np.bool_], after: npt.NDArray[np.bool_], *, same: bool = False
) -> Interval:
    """How much more often `after: bool[N]` is right than `before: bool[N]` on the same images, in [-1, 1].

    The interval is a bootstrap over images, both answers of an image together, `with_exact_ends`; without
    them where both are of the `same` model, which can lose nothing however few images there are.
    """
    difference = after.astype(np.float64) - before.astype(np.float64)
    # Only how many images were won, lost and neither matters: a resample is a multinomial draw of the three.
    shares = np.array([(difference > 0).mean(), (difference < 0).mean(), (difference == 0).mean()])
    draws = np.random.default_rng(0).multinomial(len(difference), shares, size=_RESAMPLES) / len(difference)
    found = _interval(float(difference.mean()), draws[:, 0] - draws[:, 1])
    return found if same else with_exact_ends(found, before, after)


def binomial_bounds(successes: int, trials: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Exact one-sided bounds of a proportion: with `confidence` it is above the lower, as with the upper.

    Quantiles of beta distributions (Clopper & Pearson 1934). (0, 1) where there were no trials.
    """
    from scipy.special import betaincinv

    failures = trials - successes
    low = float(betaincinv(successes, failures + 1, 1 - confidence)) if successes else 0.0
    high = float(betaincinv(successes + 1, failures, confidence)) if failures else 1.0
    return low, high


def with_exact_ends(found: Interval, before: npt.NDArray[np.bool_], after: npt.NDArray[np.bool_]) -> Interval:
    """The interval of a paired accuracy of `bool[N]`, as wide at least as what exact bounds leave open.

    A bootstrap knows only what was seen: where no image is lost, it says that none ever is, however few
    there were. Not more is lost than the upper 97.5 % bound of the share that `before` alone gets right
    (Clopper & Pearson), less what was won; and the other way round.
    """
    images, lost, won = len(before), int((before & ~after).sum()), int((after & ~before).sum())
    most_lost, most_won = (binomial_bounds(count, images, confidence=_ONE_SIDED)[1] for count in (lost, won))
    low, high = won / images - most_lost, most_won - lost / images
    return Interval(found.value, min(found.low, low), max(found.high, high))


def paired_metric(
    first: Predictions, second: Predictions, *, metric: Literal["accuracy", "macro_f1"], seed: int = 0
) -> Interval:
    """How much better `second` is than `first` on the same images, with a paired bootstrap 95 % interval.

    Images are resampled with both answers together: a resample is a multinomial draw of the occupied cells
    (label, first answer, second answer).
    """
    classes = len(first.classes)
    cells, counts = np.unique(
        np.stack([first.labels, first.predicted, second.predicted]), axis=1, return_counts=True
    )
    labels, answers = cells[0], (cells[1], cells[2])
    function = {"accuracy": _accuracy, "macro_f1": _macro_f1}[metric]

    def value(draws: Counts) -> Floats:
        scores = []
        for said in answers:
            right = _sum_by_class(draws * (labels == said), labels, classes=classes)
            labelled = _sum_by_class(draws, labels, classes=classes)
            predicted = _sum_by_class(draws, said, classes=classes)
            scores.append(function(_Margins(right, labelled, predicted)))
        return scores[1] - scores[0]

    counts = counts.astype(np.int64)
    drawn = [value(draws) for draws in _draws(counts, rng=np.random.default_rng(seed))]
    return _interval(float(value(counts[None])[0]), np.concatenate(drawn))


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p of McNemar's test: of the images that one alone got right, each is a fair coin."""
    from scipy.special import bdtr

    total = only_first + only_second
    return min(2 * float(bdtr(min(only_first, only_second), total, 0.5)), 1.0) if total else 1.0


def images_needed(difference: float, discordant: float, *, margin: float) -> int | None:
    """About how many images would settle a difference: two-sided 95 %, power 80 % (Connor 1987).

    `discordant` is the share of images that one alone gets right. What is to be shown is the nearer of: not
    worse by `margin`, and better than nothing. Never fewer than exact bounds need for the margin where not
    one image is lost. None where no number would do.
    """
    least = _images_without_a_loss(margin)
    distance = max(abs(difference), abs(difference + margin))
    if distance == 0 or discordant == 0:
        return least
    spread = max(discordant - difference**2, 0.0)
    return max(int(np.ceil((1.96 + 0.84) ** 2 * spread / distance**2)), least or 0)


def _images_without_a_loss(margin: float) -> int | None:
    """The smallest N of which 0 show, at 97.5 %, that fewer than `margin` are: (1 - margin)^N < 2.5 %."""
    if margin <= 0:
        return None
    return 1 if margin >= 1 else int(np.floor(np.log(1 - _ONE_SIDED) / np.log1p(-margin))) + 1

"""Rules over the epochs: what was learned, from which images, and what the time went to."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from holotype.diagnosis.evidence import Evidence, column, finding_of, percent, standard_error
from holotype.diagnosis.remedies import (
    cache_size,
    cheaper_changes,
    less_to_read,
    more_freedom,
    more_robust,
    more_variety,
    round_rate,
)
from holotype.report import Finding

__all__ = ["input_bound", "label_noise", "overfitting", "underfitting"]

# The thresholds and what speaks for them. "Healthy" are runs on clothing-small and on digits that ended well.
_GAP = 0.05  # points of accuracy between training and validation, beyond twice the latter's standard error
_WIDE = 0.1  # a gap that is worth a warning even where validation gets no worse
_RISE = 0.05  # of the validation loss: more than it wavers by in an epoch
_STALL = 0.1  # in the last third of the epochs: a loss that falls by less has come to its end
_LEARNT = 0.95  # a training accuracy from which on more steps only make the network surer
_UNLEARNT = 0.5  # less than half of what the largest class leaves to be learned
_FALLING = 0.01  # per epoch: half as slow is a loss that stands still
_TIMID = 3e-4  # an update ratio that leaves room for larger steps
_WRONG = (0.02, 0.05)  # share of the training images: below, what any collection has
_ABOVE = 0.75  # suspects whose loss is above those of fewer others are not what the network resists
_TAIL = 0.05  # a share that hard images alone hardly reach
_WAITING = (0.1, 0.25)  # share of the time: worth a note, worth a warning (a quarter of the run)

_NOISE = (
    "A label that contradicts all similar images is learned last or never, and teaches what is wrong"
    " (Arpit et al. 2017)."
)


def overfitting(evidence: Evidence) -> Finding | None:
    """A gap, and a validation loss that rises, or that hardly falls while there is nothing left to learn."""
    rows = evidence.epochs
    losses, training = column(rows, "validation_loss"), column(rows, "train_loss")
    if not np.isfinite(losses).all():
        return None
    scores = column(rows, "validation_accuracy")
    train, validation, images = evidence.train_accuracy, float(scores[-1]), evidence.images("validation")
    best, peak = int(np.argmin(losses)), float(np.nanmax(scores))
    gap = train - validation
    beyond = gap - 2 * standard_error(validation, images)
    third = max(len(rows) // 3, 1)
    rises = losses[-1] >= (1 + _RISE) * losses[best] and training[-1] < training[best]
    stands = losses[-1] >= (1 - _STALL) * losses[-1 - third] and train >= _LEARNT
    if beyond < _GAP or not (rises or stands):
        return None
    # A loss may rise because wrong answers get surer, while more and more are right.
    worse = rises and validation < peak - standard_error(peak, images)
    epoch, before = (int(float(rows[row]["epoch"])) for row in (best, -1 - third))
    trend = (
        f"since epoch {epoch} the validation loss rose from {losses[best]:.3g} to {losses[-1]:.3g} while the"
        " training loss fell"
        if rises
        else f"the validation loss, {losses[-1 - third]:.3g} in epoch {before}, ended at {losses[-1]:.3g}"
    )
    return finding_of(
        "overfitting",
        f"Training accuracy {percent(train)}, validation accuracy {percent(validation)}: a gap of"
        f" {100 * gap:.1f} points, and {trend}.",
        "The network learns its training images by heart instead of what they have in common.",
        more_variety(evidence.config, epochs=epoch if worse else None),
        severity="warning" if worse or beyond >= _WIDE else "note",
    )


def underfitting(evidence: Evidence) -> Finding | None:
    """Training images that are not learned either."""
    rows = evidence.epochs
    train, validation = evidence.train_accuracy, column(rows, "validation_accuracy")
    sizes = [by_split.get("train", 0) for by_split in evidence.counts.values()]
    largest = max(sizes) / max(sum(sizes), 1)
    reached = max(train, float(np.nanmax(validation)))
    if reached >= largest + _UNLEARNT * (1 - largest):
        return None
    losses = column(rows, "train_loss")
    falling = losses[-1] < (1 - _FALLING) * losses[-2]
    trend = "and the training loss was still falling" if falling else "and the training loss stood still"
    config = evidence.config
    longer = [f"fit.epochs={2 * max(len(rows), config.fit.epochs)}"]
    if float(np.nanmax(column(rows, "update_ratio"), initial=0.0)) < _TIMID:
        longer.append(f"fit.optimizer.learning_rate={round_rate(3 * config.fit.optimizer.learning_rate)}")
    return finding_of(
        "underfitting",
        f"After {len(rows)} epochs {percent(train)} of the training images are right, {trend}.",
        "The network is too small, too constrained or too briefly trained for these images.",
        [*longer, *more_freedom(config)] if falling else [*more_freedom(config), *longer],
    )


def label_noise(evidence: Evidence) -> Finding | None:
    """Images that resist: the audit's suspects, or without an audit a heavy tail of losses."""
    losses = evidence.sample_losses
    if losses is None:
        raise AssertionError("a rule was asked without what it needs")
    shown = np.isfinite(losses)
    if evidence.suspects is None:
        return _heavy_tail(evidence, losses[shown])
    suspects = evidence.suspects[shown]
    resisting = losses[shown] > math.log(2)
    wrong = suspects & resisting
    note, warning = _WRONG
    if wrong.mean() < note or not (~suspects).any():
        return None
    doubted, others = losses[shown][suspects], losses[shown][~suspects]
    if np.searchsorted(np.sort(others), doubted).mean() < _ABOVE * len(others):
        return None
    return finding_of(
        "label-noise",
        f"The audit doubts the label of {int(suspects.sum())} training images, and in the last epoch"
        f" {int(wrong.sum())} of them ({percent(float(wrong.mean()))} of all) still got less than half of the"
        f" probability: a mean loss of {doubted.mean():.2g}, of the others {others.mean():.2g}. holotype"
        " agree adjudicate shows them for relabelling.",
        _NOISE,
        more_robust(evidence.config),
        severity="warning" if wrong.mean() >= warning else "note",
    )


def _heavy_tail(evidence: Evidence, losses: npt.NDArray[np.float32]) -> Finding | None:
    """Images whose label is less likely than by guessing, after epochs of training on them."""
    guess, config = math.log(max(len(evidence.counts), 2)), evidence.config
    share, median = float((losses > guess).mean()), float(np.median(losses))
    if share < _TAIL or median > guess / 2:
        return None
    return finding_of(
        "label-noise",
        f"{percent(share)} of the training images have a loss above that of guessing in the last epoch, the"
        f" median is {median:.2g}. Whether their labels are wrong is for holotype audit to say.",
        _NOISE,
        more_robust(config),
        severity="note",
    )


def input_bound(evidence: Evidence) -> Finding | None:
    """Time spent on reading and augmenting, the first epoch aside, which may have to read more."""
    rows = [row for row in evidence.timings if row.get("stage") == "fine-tune"]
    rows = rows[1:] or rows
    seconds = float(np.nansum(column(rows, "seconds")))
    waiting, changing = (
        float(np.nansum(column(rows, name))) / seconds if seconds else 0.0
        for name in ("data_wait_seconds", "augment_seconds")
    )
    note, warning = _WAITING
    if waiting + changing < note:
        return None
    why = "; the folder of the cache (HOLOTYPE_CACHE) is slower than the network"
    if evidence.uncached:
        why = f"; {evidence.uncached:,} of them are decoded each time, as the cache may not hold more"
    more = [f"data.cache_limit_gb={cache_size(evidence)}"] if evidence.uncached else []
    parts = ((waiting, more or less_to_read(evidence.config)), (changing, cheaper_changes(evidence.config)))
    parts = parts if waiting >= changing else parts[::-1]
    settings = [setting for share, remedy in parts if share >= note / 2 for setting in remedy]
    return finding_of(
        "input-bound",
        f"{percent(waiting)} of the training time was spent on waiting for images and {percent(changing)} on"
        f" augmenting them{why if waiting >= note / 2 else ''}.",
        "The network idles while images are read and changed.",
        list(dict.fromkeys(settings)),
        severity="warning" if waiting + changing >= warning else "note",
    )

"""Rules over the optimizer steps: their size, their gradients, and what the layers gave out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from holotype.config import TrainConfig
from holotype.diagnosis.evidence import (
    LEAST_EPOCHS,
    Evidence,
    Floats,
    by_stage,
    column,
    finding_of,
    percent,
    ratios_of,
    standard_error,
    thirds,
)
from holotype.diagnosis.remedies import even_rates, pretrained_weights, round_rate, slower, unfrozen
from holotype.models import DEFAULT
from holotype.report import Finding
from holotype.runlog import Row

__all__ = ["dead_layer", "exploding", "norm_mismatch", "rate_too_high", "rate_too_low", "vanishing"]

# The thresholds and what speaks for them. "Healthy" are runs on clothing-small and on digits that ended well.
_HIGH_RATIO = 0.03  # an update ratio of 1e-3 is healthy (Karpathy 2019), 1e-2 seen from scratch, never 3e-2
_LOW_RATIO = 3e-5  # fine-tuning at a thirtieth of the usual rate still has it; below, weights stand still
_STILL = 0.02  # a loss that falls by less than 2 % from the first to the last third stands still
_LEARNT = 0.98  # what is known by heart need not be learned: a training accuracy beyond which nothing is low
_HARDLY = 0.8  # of the first loss: what a run with steps too large comes down to when the rate falls
_JUMP = 1.2  # the first steps of a healthy run waver by less
_POINTS = 0.02  # of accuracy that must be lost before it counts
_HUGE = 100.0  # healthy norms are 0.1 to 10
_GROWTH = 10.0  # healthy gradient norms fall or double; ten times the start is another regime
_SPIKE = 100.0  # healthy norms stay within ten times their median after warm-up
_VANISHED = 1e-4  # healthy stages are within a hundred times of each other
_DEAD = 0.9  # healthy pretrained layers reach 0.8 on odd images: units that wait for other subjects
_MISMATCH = 3.0  # photos 0.2 to 1.6, digits 1 to 2.6, and random weights with fresh statistics 6
_SCALE_FREE = "fit.optimizer={name: adamw, learning_rate: 0.0003}"
_OVERSHOOTS = 3e-3  # an update ratio that can undo in a few steps what a head had


def rate_too_high(evidence: Evidence) -> Finding | None:
    """Steps that are large against the weights and make the loss worse, or undo what the head had."""
    steps = evidence.finite_steps
    ratios, losses = ratios_of(steps), column(steps, "loss")
    if not len(ratios):
        return None
    meaning = "Each step overshoots: what one batch teaches, the next one has to undo."
    largest, usual = float(np.max(ratios)), float(np.median(ratios))
    if evidence.diverged and largest >= _HIGH_RATIO:
        last = evidence.steps[-1]
        said = (
            f"The loss became {float(last['loss']):.3g}, the gradient norm {float(last['gradient_norm']):.3g}"
            f" in step {int(float(last['step']))}, after steps that changed the weights of a stage by up to"
            f" {largest:.2g} times their size (0.001 is usual)."
        )
        return finding_of("learning-rate-high", said, meaning, slower(evidence.config, ratio=usual))
    late = thirds(losses)[1]
    if len(losses) >= LEAST_EPOCHS and usual >= _HIGH_RATIO and late >= _HARDLY * losses[0]:
        said = (
            f"The training loss ended at {late:.3g}, it began at {losses[0]:.3g}; a step changes the weights"
            f" of a stage by {usual:.2g} times their size (0.001 is usual)."
        )
        return finding_of("learning-rate-high", said, meaning, slower(evidence.config, ratio=usual))
    return _head_undone(evidence, losses, meaning) if largest >= _OVERSHOOTS else None


def _head_undone(evidence: Evidence, losses: Floats, meaning: str) -> Finding | None:
    """Fine-tuning that began by losing what the head on frozen features could, and never got it back."""
    heads = [row for row in evidence.metrics if row.get("stage") == "head"]
    huge = float(column(evidence.finite_steps, "gradient_norm")[0]) >= _HUGE  # whatever the rate
    if not heads or len(evidence.epochs) < 2 or huge or len(losses) < LEAST_EPOCHS:
        return None
    head = float(np.nanmax(column(heads, "validation_accuracy")))
    best = float(np.nanmax(column(evidence.epochs, "validation_accuracy")))
    # The first row is of one batch, so a single later one tells nothing.
    early = float(np.median(losses[1 : 1 + max(len(losses) // 3, 2)]))
    lost = head - best > max(2 * standard_error(best, evidence.images("validation")), _POINTS)
    if not lost or early < _JUMP * losses[0]:
        return None
    said = (
        f"The head on frozen features was right on {percent(head)} of validation, the best epoch of"
        f" fine-tuning on {percent(best)}; first the training loss rose from {losses[0]:.3g} to"
        f" {early:.3g}."
    )
    return finding_of("learning-rate-high", said, meaning, slower(evidence.config, ratio=1e-2))


def rate_too_low(evidence: Evidence) -> Finding | None:
    """Steps that are tiny against the weights, and a loss that stands still though there is much to learn."""
    ratios, losses = ratios_of(evidence.finite_steps), column(evidence.finite_steps, "loss")
    if not len(ratios):
        return None
    usual, (early, late) = float(np.median(ratios)), thirds(losses)
    accuracy = float(column(evidence.finite_steps, "accuracy")[-1])
    if usual >= _LOW_RATIO or late <= (1 - _STILL) * early or accuracy >= _LEARNT:
        return None
    fit = evidence.config.fit
    if float(np.nanmedian(column(evidence.finite_steps, "update_ratio/head"))) >= _LOW_RATIO:
        settings = even_rates(evidence.config)
        if not settings:
            return None  # the head learns: its rate is not what is too low
        return finding_of(
            "learning-rate-low",
            f"The training loss went from {early:.3g} to {late:.3g} only; a step changes the weights of a"
            f" stage by {usual:.1g} times their size (1e-3 is usual), while the head moves.",
            "The backbone's rates are too small a share of the head's for it to learn anything.",
            settings,
        )
    factor = min(max(1e-3 / max(usual, 1e-9), 3.0), 1e4)
    return finding_of(
        "learning-rate-low",
        f"The training loss went from {early:.3g} to {late:.3g} only; a step changes the weights of a stage"
        f" by {usual:.1g} times their size (1e-3 is usual).",
        "The steps are too small to get anywhere in the epochs there are.",
        [f"fit.optimizer.learning_rate={round_rate(fit.optimizer.learning_rate * factor)}"],
    )


def exploding(evidence: Evidence) -> Finding | None:
    """A gradient that is no number, is huge, grows tenfold, or spikes to a hundred times the usual."""
    config = evidence.config
    said, severe = (
        _not_a_number(evidence)
        if evidence.diverged
        else _abnormal(evidence.finite_steps, gradual=config.fit.gradual > 0)
    )
    if said is None:
        return None
    settings = ["fit.precision=fp32"] if config.fit.precision == "fp16" else []
    meaning = "A few batches throw the weights far away from where all others had brought them."
    if evidence.never_stepped:
        meaning = "What is no number comes from the weights, a teacher or the images as they are."
    else:
        settings += slower(config, ratio=3e-3)
    return finding_of(
        "exploding-gradients",
        said,
        meaning,
        settings,
        severity="warning" if severe or config.fit.clip_norm is None else "note",
    )


def _not_a_number(evidence: Evidence) -> tuple[str, bool]:
    steps, last = evidence.finite_steps, evidence.steps[-1]
    when, before = "in the first step, before any change", ""
    if steps:
        when = f"in step {int(float(last['step']))}"
        before = f"; the largest norm before it was {np.max(column(steps, 'gradient_norm_max')):.3g}"
    loss, norm = float(last["loss"]), float(last["gradient_norm"])
    return f"Loss {loss:.3g} and gradient norm {norm:.3g} {when}{before}.", True


def _abnormal(steps: Sequence[Row], *, gradual: bool) -> tuple[str | None, bool]:
    """What is wrong with finite norms, and whether it is so whatever the clipping.

    Where stages are unfrozen one by one the norm grows with their number.
    """
    norms, peaks = column(steps, "gradient_norm"), column(steps, "gradient_norm_max")
    (early, late), settled = thirds(norms), len(steps) // 3
    usual, peak = float(np.median(norms[settled:])), float(np.max(peaks[settled:]))
    if usual >= _HUGE:
        return f"The gradient norm is {usual:.3g} in the usual step; of a mean loss, 0.1 to 10 is.", True
    if late >= _GROWTH * early and late >= 1 and not gradual:
        return f"The gradient norm grew from {early:.3g} to {late:.3g} in the course of the run.", False
    if peak >= _SPIKE * usual > 0:
        return f"A step had a gradient norm of {peak:.3g}, {usual:.3g} is usual in this run.", False
    return None, False


def vanishing(evidence: Evidence) -> Finding | None:
    """An early stage whose gradient is nothing beside that of a later one."""
    share, name = _weakest(evidence.finite_steps)
    if share >= _VANISHED:
        return None
    config, fit = evidence.config, evidence.config.fit
    settings = [
        *(["fit.freeze_norm=false"] if fit.freeze_norm is True else []),
        *([_SCALE_FREE] if fit.optimizer.name == "sgd" else []),
        *even_rates(config),
        *pretrained_weights(config),
    ]
    return finding_of(
        "vanishing-gradients",
        f"The gradient of {name} has {share:.1g} of the norm of a later stage's.",
        "What the loss asks for does not reach the first layers: they stay as they were.",
        # What is left are units between that large steps have pushed out of where they pass anything on.
        settings or slower(config, ratio=3e-3),
    )


def _weakest(steps: Sequence[Row]) -> tuple[float, str]:
    """The stage with the least gradient norm as a share of the largest of later stages, and that share."""
    norms = by_stage(steps, "gradient_norm")
    names = list(norms)
    shares = [
        (norms[name] / largest, name)
        for place, name in enumerate(names[:-1])
        if (largest := max(norms[later] for later in names[place + 1 :])) > 0
    ]
    return min(shares, default=(1.0, ""))


def dead_layer(evidence: Evidence) -> Finding | None:
    """A layer nearly all of whose units give the same for every image."""
    steps, config = evidence.finite_steps, evidence.config
    shares = by_stage(steps[-max(len(steps) // 3, 1) :], "dead")
    if not shares or max(shares.values()) < _DEAD:
        return None
    name = max(shares, key=lambda stage: shares[stage])
    begin = float(column(steps, f"dead/{name}")[0])
    if begin < _DEAD and (_weakest(steps[:1])[0] < _VANISHED or rate_too_high(evidence)):
        return None  # it died of that: where no signal arrives, or any step is too large
    if begin < _DEAD:
        how, settings = f"at the start {percent(begin)} were", slower(config, ratio=3e-3)
    else:
        how, settings = "they were so from the start", _revived(config)
    return finding_of(
        "dead-layer",
        f"{percent(shares[name])} of the units of a layer in {name} give the same output for every image;"
        f" {how}.",
        "Such a layer passes nothing on and has no gradient, so it cannot come back by itself.",
        settings,
    )


def _revived(config: TrainConfig) -> list[str]:
    """Against units that are dead from the start: other weights, or inputs that may still change."""
    fit = config.fit
    settings = [
        *pretrained_weights(config),
        *(["fit.freeze_norm=false"] if fit.freeze_norm is True else []),
        *unfrozen(config),
        *(["fit.scale=1.0"] if isinstance(fit.scale, float) and fit.scale < 1 else []),
    ]
    other = f"fit.seed={fit.seed + 1}" if config.model.weights == "none" else f"model.name={DEFAULT}"
    return settings or ([] if other == f"model.name={config.model.name}" else [other])


def norm_mismatch(evidence: Evidence) -> Finding | None:
    """Frozen batch-norm statistics that are those of other images, from the first step on."""
    steps = evidence.finite_steps
    usual = by_stage(steps, "norm_mismatch")
    begun = by_stage(steps[:1], "norm_mismatch")
    lasting = {name: min(value, begun[name]) for name, value in usual.items() if name in begun}
    if not lasting or max(lasting.values()) < _MISMATCH:
        return None
    name = max(lasting, key=lambda stage: lasting[stage])
    fit = evidence.config.fit
    settings = ["fit.freeze_norm=false"] if fit.freeze_norm is not False else []
    if name not in by_stage(steps, "gradient_norm") or evidence.config.model.attention != "none":
        # What is frozen keeps its statistics too, also around attention modules that are trained.
        settings += unfrozen(evidence.config)
    settings += ["fit.scale=1.0"] if fit.scale not in ("auto", 1.0) else []
    return finding_of(
        "norm-mismatch",
        f"In {name} the batches are {usual[name]:.1f} away from the frozen batch-norm statistics, in shifts"
        " by a standard deviation and scalings by e; up to 2 is usual.",
        "The statistics come from images of another kind, and what is normalised by them is not.",
        settings,
    )

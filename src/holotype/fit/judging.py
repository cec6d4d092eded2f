"""The end of an epoch: scores on validation, what is written and told, the best weights, going on or not."""

from __future__ import annotations

import shlex
import time

import numpy as np
import numpy.typing as npt
import torch

from holotype.diagnosis import Evidence, diagnose
from holotype.errors import TrainingError
from holotype.fit.processes import Processes
from holotype.fit.run import Best, Plan, Position, Tools, Watch
from holotype.head import Floats, Scores, batches_of, better, score_logits, validation_columns
from holotype.metrics import macro_f1
from holotype.models import weights_of
from holotype.progress import note
from holotype.runlog import RunLog

__all__ = ["diverged", "judge", "merge_counts", "recalled"]

_RECALLED = 1000


def judge(tools: Tools, plan: Plan, position: Position, *, log: RunLog, watch: Watch | None) -> None:
    """Score an epoch on validation, write it down, keep the best weights, and say whether to go on."""
    fit, dataset = plan.config.fit, plan.feed.dataset
    begun = time.perf_counter()
    merge_counts(position, tools.processes)
    rows = dataset.rows("validation")
    # Each process has seen other images: where batch norms learn, one network is judged and kept.
    tools.processes.share_buffers(tools.judged)
    logits = _answers(rows, tools, plan)
    if not np.isfinite(logits).all():
        raise diverged(f"answers that are no numbers after epoch {position.epoch}", tools, plan)
    scores = score_logits(logits, dataset.labels(rows))
    _write(
        tools, position, scores, log=log, validated=time.perf_counter() - begun, done=plan.number(position)
    )
    _tell(plan, position, scores, tools=tools)
    if better(scores, position.best.scores if position.best else None, metric=fit.metric):
        position.best = Best(weights_of(tools.judged), scores, logits)
    improved = better(scores, position.tuned, metric=fit.metric)
    if improved:
        position.tuned, position.waiting = scores, 0
    else:
        position.waiting += 1
    tools.schedule.judge(improved)
    if position.waiting >= fit.patience:
        note(f"stopped early: no better {fit.metric} in {position.waiting} epochs")
        position.stopped = True
    if watch is not None and tools.processes.from_first(watch(position.epoch, scores)):
        position.stopped = True


def merge_counts(position: Position, processes: Processes) -> None:
    """Let the first process know what all of them saw in this epoch; the others start again from nothing."""
    if processes.count == 1:
        return
    everywhere = processes.gather((position.losses, position.confusion, position.broken))
    for _, _, broken in everywhere:
        position.broken.update(broken)
    if processes.first:
        losses = np.stack([losses for losses, _, _ in everywhere])
        seen = ~np.isnan(losses)
        position.losses[:] = np.where(seen.any(0), np.nanmax(np.where(seen, losses, -np.inf), axis=0), np.nan)
        position.confusion[:] = sum(confusion for _, confusion, _ in everywhere)
    else:
        position.forget()


def recalled(tools: Tools, plan: Plan) -> float:
    """Accuracy on up to a thousand training images, evenly chosen, as validation shows them."""
    rows = plan.feed.rows
    rows = rows[:: -(-len(rows) // _RECALLED)]
    logits = _answers(rows, tools, plan)
    return float((logits.argmax(axis=1) == plan.feed.dataset.labels(rows)).mean())


def _answers(rows: npt.NDArray[np.int64], tools: Tools, plan: Plan) -> Floats:
    """Logits `float32[N, C]` of `rows` by the judged network, computed in shares."""
    classifier, accelerator, processes = tools.judged.eval(), tools.accelerator, tools.processes
    parts = [np.zeros((0, len(plan.feed.dataset.classes)), dtype=np.float32)]
    with torch.inference_mode():
        batches = list(batches_of(processes.share(rows), size=plan.feed.micro_batch))
        for images in plan.feed.dataset.pixels(batches, instead=plan.feed.quarantine):
            with accelerator.autocast():
                logits, _ = classifier(torch.from_numpy(images).to(accelerator.device))
            parts.append(logits.float().cpu().numpy())
    return processes.join_shares(np.concatenate(parts), total=len(rows))


def _write(
    tools: Tools, position: Position, scores: Scores, *, log: RunLog, validated: float, done: int
) -> None:
    sums = position.sums
    metrics: dict[str, float | int | str] = {
        "stage": "fine-tune",
        "epoch": position.epoch,
        "learning_rate": max(tools.rates),
        "train_loss": sums["loss"] / sums["seen"],
        "train_accuracy": sums["right"] / sums["seen"],
        "train_macro_f1": float(macro_f1(position.confusion[None])[0]) if position.confusion.any() else 0.0,
        "gradient_norm": sums.get("norm", 0.0) / max(sums.get("taken", 0.0), 1),
        **validation_columns(scores),
        **tools.monitor.epoch_metrics(position.epoch),
    }
    timings = dict(tools.monitor.epoch_timings(position.epoch))
    timings.update(stage="fine-tune", epoch=position.epoch, validation_seconds=validated)
    log.add(metrics, timings)
    numbers = {key: value for key, value in {**metrics, **timings}.items() if not isinstance(value, str)}
    # The steps that are behind us: trackers take no step below one they have had.
    tools.accelerator.log({f"epoch/{key}": value for key, value in numbers.items()}, step=done)


def _tell(plan: Plan, position: Position, scores: Scores, *, tools: Tools) -> None:
    sums, fit = position.sums, plan.config.fit
    timings = tools.monitor.epoch_timings(position.epoch)
    speed = float(timings.get("images_per_second", 0.0))
    left = (fit.epochs - position.epoch) * len(plan.feed.rows) / speed if speed else 0.0
    note(
        f"epoch {position.epoch}/{fit.epochs}  loss {sums['loss'] / sums['seen']:.3f}"
        f"  accuracy {scores.accuracy:.1%}  macro-F1 {scores.macro_f1:.1%}  {speed:.0f} images/s"
        f"  about {left:.0f} s left"
    )


def diverged(what: str, tools: Tools, plan: Plan) -> TrainingError:
    """The error with the likeliest cause, as the steps so far show it, and the settings against that."""
    evidence = Evidence(
        plan.config, metrics=(), steps=tools.monitor.rows, timings=(), counts=plan.feed.dataset.counts()
    )
    causes = [finding for finding in diagnose(evidence) if finding.severity == "warning"][:1]
    settings = [setting for finding in causes for setting in finding.settings]
    fixes = [" ".join(f"--set {shlex.quote(setting)}" for setting in settings)] if settings else []
    if evidence.never_stepped:
        what = f"{what}; it was the first step, so that is no matter of the rate"
        teacher = ["distill.teacher"] if plan.teacher is not None else []
        fixes.append(f"check {', '.join(['model.weights', *teacher])} and these images")
    elif not settings:
        fixes.append("lower fit.optimizer.learning_rate, set fit.clip_norm, or look at these images")
    return TrainingError(
        "; ".join([what, *(finding.evidence.rstrip(".") for finding in causes)]), fix=", or ".join(fixes)
    )

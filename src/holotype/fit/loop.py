"""Stage 2 of training: the loop that fine-tunes the last blocks, or all, from the fitted head.

It reads top to bottom: `fine_tune` is the epochs, `_epoch` one of them, `_step` the optimizer's steps,
`_part` one forward and backward. What a checkpoint must hold is in `Position`; everything else is a pure
function of the settings and of the numbers in it, so that a resumed run is the run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from timm.utils.model_ema import ModelEmaV3
from torch import nn

from holotype.augment import draw_training_batch
from holotype.config import TrainConfig
from holotype.dataset import Shape
from holotype.diagnosis import Evidence, diagnose
from holotype.errors import TrainingError
from holotype.fit.batches import Batch, Feed, feed_epoch
from holotype.fit.freeze import apply_freezing, training_mode
from holotype.fit.interrupt import Interrupt, interruptible
from holotype.fit.monitor import Monitor
from holotype.fit.optimizer import add_l2, build_optimizer
from holotype.fit.processes import Processes
from holotype.fit.schedule import Schedule, build_schedule
from holotype.fit.teacher import Teacher
from holotype.head import Floats, Scores, batches_of, better, score_logits, validation_columns
from holotype.loss import Criterion, distilled
from holotype.metrics import macro_f1
from holotype.models import Classifier, weights_of
from holotype.progress import Tracker, note, track
from holotype.runlog import Row, RunLog

__all__ = [
    "Best",
    "Learned",
    "Plan",
    "Position",
    "Tools",
    "Watch",
    "fine_tune",
    "merge_counts",
    "prepare_tools",
]

State = dict[str, torch.Tensor]

Watch = Callable[[int, Scores], bool]
"""Called with each epoch and its scores on validation (0: the head); True stops the run."""

# A half precision run may overflow while the scale of its loss is found; beyond this many steps it diverges.
_OVERFLOWS = 20


@dataclass(frozen=True)
class Plan:
    """What the loop works on: batches, their size in each epoch, the loss, and the settings."""

    config: TrainConfig
    feed: Feed
    size: Callable[[int], Shape]
    criterion: Criterion
    teacher: Teacher | None
    folder: Path | None

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        return math.ceil(len(self.feed.rows) / self.config.fit.batch_size)

    def number(self, position: Position) -> int:
        """How many optimizer steps of the run come before the next one."""
        return (position.epoch - 1) * self.steps + position.step


@dataclass(frozen=True)
class Best:
    """The weights that are best so far, and their scores and logits `float32[N, C]` on validation."""

    state: State
    scores: Scores
    logits: Floats


@dataclass(frozen=True)
class Learned:
    """What training ended with, and what was seen on the way; `interrupted` by Ctrl-C or SIGTERM.

    `losses: float32[N]` are of the training images in the last epoch, NaN where not shown; `steps` the rows
    of steps.csv; both None where nothing was fine-tuned.
    """

    best: Best
    interrupted: bool = False
    losses: npt.NDArray[np.float32] | None = None
    steps: Sequence[Row] | None = None

    @property
    def scores(self) -> Scores:
        """Of the best weights, on validation."""
        return self.best.scores


@dataclass(frozen=True)
class Tools:
    """What is trained and what trains it; a checkpoint holds their states."""

    classifier: Classifier
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    average: ModelEmaV3 | None
    monitor: Monitor
    accelerator: Accelerator
    processes: Processes

    @property
    def judged(self) -> Classifier:
        """The network that validation sees: the averaged one where there is one."""
        return cast("Classifier", self.average.module) if self.average is not None else self.classifier

    @property
    def rates(self) -> list[float]:
        """The learning rate of every parameter group."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]


@dataclass
class Position:
    """How far a run is, and what it has seen: everything beside the tools that the next step depends on.

    `step` counts optimizer steps within the epoch. `losses: float32[N]` are of the training images (NaN
    where not shown in this epoch), `confusion: int64[C, C]` of what was trained on in it.
    """

    best: Best | None
    losses: npt.NDArray[np.float32]
    confusion: npt.NDArray[np.int64]
    epoch: int = 1
    step: int = 0
    waiting: int = 0
    overflows: int = 0
    stopped: bool = False
    sums: dict[str, float] = field(default_factory=dict)

    def forget(self) -> None:
        """Begin the epoch's losses and confusion anew."""
        self.losses[:] = np.nan
        self.confusion[:] = 0


def fine_tune(
    tools: Tools,
    plan: Plan,
    position: Position,
    *,
    log: RunLog,
    save: Callable[[Tools, Position], None],
    watch: Watch | None = None,
) -> Learned:
    """Train from `position` to the last epoch, an early stop or an interruption; returns the best weights."""
    fit = plan.config.fit
    with interruptible() as interrupt:
        while position.epoch <= fit.epochs and not position.stopped:
            apply_freezing(tools.classifier, fit, epoch=position.epoch)
            if not _epoch(tools, plan, position, interrupt=interrupt, save=save):
                save(tools, position)
                note(f"interrupted in epoch {position.epoch}: saved, keeping the best weights so far")
                return _result(tools, position, interrupted=True)
            _judge(tools, plan, position, log=log, watch=watch)
            position.epoch, position.step, position.sums = position.epoch + 1, 0, {}
            save(tools, position)
    return _result(tools, position, interrupted=False)


def prepare_tools(
    classifier: Classifier,
    plan: Plan,
    *,
    monitor: Monitor,
    accelerator: Accelerator,
    processes: Processes,
) -> Tools:
    """The optimizer, the schedule and the averaged weights of a fresh run."""
    fit = plan.config.fit
    optimizer = build_optimizer(classifier, fit)
    return Tools(
        classifier=classifier,
        optimizer=cast("torch.optim.Optimizer", accelerator.prepare(optimizer)),
        schedule=build_schedule(fit, steps_per_epoch=plan.steps),
        average=ModelEmaV3(classifier, decay=fit.ema, use_warmup=True) if fit.ema else None,
        monitor=monitor,
        accelerator=accelerator,
        processes=processes,
    )


def _epoch(
    tools: Tools,
    plan: Plan,
    position: Position,
    *,
    interrupt: Interrupt,
    save: Callable[[Tools, Position], None],
) -> bool:
    """Train on what is left of an epoch; False where somebody asked to stop before its end."""
    fit, processes = plan.config.fit, tools.processes
    training_mode(tools.classifier, freeze_norm=bool(fit.freeze_norm))
    if position.step == 0:
        position.forget()
    saved = began = time.perf_counter()
    batches = feed_epoch(
        plan.feed,
        epoch=position.epoch,
        size=plan.size(position.epoch),
        done=position.step,
        processes=processes,
        device=tools.accelerator.device,
    )
    shown = len(plan.feed.rows)
    with track(f"epoch {position.epoch}/{fit.epochs}", total=shown) as progress:
        progress.advance(min(position.step * fit.batch_size, shown))
        for parts in _steps(batches):
            if plan.folder is not None and position.epoch == 1 and position.step == 0:
                _show_batch(plan, parts[0])
            stop = _step(tools, plan, position, parts, asked=interrupt.asked)
            now = time.perf_counter()
            _advance(progress, position, images=parts[0].total, speed=now - began)
            if stop and position.step < plan.steps:
                return False
            if now - saved > fit.checkpoint_seconds and position.step < plan.steps:
                save(tools, position)
                saved = time.perf_counter()
    return True


def _steps(batches: Iterator[Batch]) -> Iterator[list[Batch]]:
    """The parts of each optimizer step; each is made only when it is asked for."""
    parts: list[Batch] = []
    for batch in batches:
        parts.append(batch)
        if batch.last:
            yield parts
            parts = []


def _step(tools: Tools, plan: Plan, position: Position, parts: list[Batch], *, asked: bool) -> bool:
    """One optimizer step; True where any process was asked to stop."""
    fit, processes = plan.config.fit, tools.processes
    number = plan.number(position)
    begun = time.perf_counter()
    tools.schedule.set_rates(tools.optimizer, number)
    # (1) losses and gradients of every part
    loss, right = 0.0, 0.0
    tools.monitor.begin_step(number)
    for place, part in enumerate(parts):
        # Dropout and stochastic depth draw from torch's generator: seeded here, it depends on no past.
        torch.manual_seed(_mixed(fit.seed, number, place, processes.rank))
        part_loss, part_right = _part(tools, plan, position, part)
        loss, right = loss + part_loss, right + part_right
    # (2) the same numbers and gradients in every process
    trained = [p for p in tools.classifier.parameters() if p.requires_grad]
    summed = processes.sum_gradients(trained, torch.tensor([loss, right, float(asked)], dtype=torch.float64))
    loss, right, stop = (float(value) for value in summed)
    # (3) step
    if fit.l2:
        tools.accelerator.unscale_gradients()  # in fp16 the gradients are still those of the scaled loss
        add_l2(tools.classifier, fit.l2)
    norm = _clip(tools.accelerator, trained, limit=fit.clip_norm)
    _check_finite(loss, norm, tools=tools, plan=plan, position=position, parts=parts)
    before = tools.monitor.before_step(number)
    tools.optimizer.step()
    # (4) what happened
    total = parts[0].total
    tools.monitor.after_step(
        number,
        epoch=position.epoch,
        loss=loss,
        accuracy=right / total,
        gradient_norm=norm,
        rates=tools.rates,
        before=before,
        images=total,
        seconds=time.perf_counter() - begun,
        waited=sum(part.waited for part in parts),
    )
    tools.optimizer.zero_grad()
    if tools.average is not None:
        tools.average.update(tools.classifier, step=number)
    position.step += 1
    for name, value in (("loss", loss * total), ("right", right), ("seen", total), ("norm", norm)):
        position.sums[name] = position.sums.get(name, 0.0) + value
    return stop > 0


def _part(tools: Tools, plan: Plan, position: Position, batch: Batch) -> tuple[float, float]:
    """Forward and backward of a micro-batch; its share of the step's mean loss, and its right answers."""
    with tools.accelerator.autocast():
        logits, _ = tools.classifier(batch.images)
    logits = logits.float()
    losses = plan.criterion(logits, batch.targets)
    if plan.teacher is not None:
        losses = distilled(losses, logits, plan.teacher(batch.images), config=plan.config.distill)
    loss = (losses * batch.weights).sum() / batch.total
    tools.accelerator.backward(loss)
    real = batch.weights.cpu().numpy() > 0
    said = logits.detach().argmax(1).cpu().numpy()[real]
    # A mixed image counts for the class that most of it shows.
    labels = batch.targets.argmax(1).cpu().numpy()[real]
    rows = np.searchsorted(plan.feed.rows, batch.samples.rows[real])
    position.losses[rows] = losses.detach().float().cpu().numpy()[real]
    np.add.at(position.confusion, (labels, said), 1)
    return float(loss.detach()), float((said == labels).sum())


def _show_batch(plan: Plan, batch: Batch) -> None:
    """`train_batch.jpg`: what the network is fed first, with the labels as they are mixed."""
    names = plan.feed.dataset.classes
    captions = []
    for target in batch.targets.cpu().numpy():
        shown = [place for place in np.argsort(-target, kind="stable")[:2] if target[place] > 0]
        alone = len(shown) == 1
        captions.append(
            " + ".join(names[place] if alone else f"{names[place]} {target[place]:.2f}" for place in shown)
        )
    draw_training_batch(batch.images.cpu().numpy(), captions, cast("Path", plan.folder) / "train_batch.jpg")


def _mixed(*numbers: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _clip(accelerator: Accelerator, parameters: list[nn.Parameter], *, limit: float | None) -> float:
    norm = accelerator.clip_grad_norm_(parameters, limit if limit is not None else math.inf)
    return 0.0 if norm is None else float(norm)


def _check_finite(
    loss: float, norm: float, *, tools: Tools, plan: Plan, position: Position, parts: list[Batch]
) -> None:
    """Stop before a step that is no number; in fp16 only when it is no overflow of the scaled loss."""
    if math.isfinite(loss) and math.isfinite(norm):
        position.overflows = 0
        return
    position.overflows += 1
    if math.isfinite(loss) and tools.accelerator.scaler is not None and position.overflows <= _OVERFLOWS:
        return
    tools.monitor.fail_step(
        plan.number(position), epoch=position.epoch, loss=loss, gradient_norm=norm, rates=tools.rates
    )
    rows = np.concatenate([part.samples.rows for part in parts])
    names = ", ".join(plan.feed.dataset.paths(rows)[:8])
    raise _diverged(
        f"loss {loss:g}, gradient norm {norm:g} in epoch {position.epoch}, batch of {names}", tools, plan
    )


def _diverged(what: str, tools: Tools, plan: Plan) -> TrainingError:
    """The error with the likeliest cause, as the steps so far show it, and the settings against that."""
    evidence = Evidence(
        plan.config, metrics=(), steps=tools.monitor.rows, timings=(), counts=plan.feed.dataset.counts()
    )
    causes = [finding for finding in diagnose(evidence) if finding.severity == "warning"][:1]
    settings = [setting for finding in causes for setting in finding.settings]
    return TrainingError(
        "; ".join([what, *(finding.evidence.rstrip(".") for finding in causes)]),
        fix=", ".join(f"--set {setting}" for setting in settings)
        or "lower fit.optimizer.learning_rate, set fit.clip_norm, or look at these images",
    )


def _advance(progress: Tracker, position: Position, *, images: int, speed: float) -> None:
    sums = position.sums
    progress.advance(
        images,
        status=f"loss {sums['loss'] / sums['seen']:.3f}  accuracy {sums['right'] / sums['seen']:.1%}"
        f"  {sums['seen'] / speed:.0f} images/s",
    )


def _judge(tools: Tools, plan: Plan, position: Position, *, log: RunLog, watch: Watch | None) -> None:
    """Score an epoch on validation, write it down, keep the best weights, and say whether to go on."""
    fit, dataset = plan.config.fit, plan.feed.dataset
    begun = time.perf_counter()
    merge_counts(position, tools.processes)
    logits = validate(tools.judged, plan, accelerator=tools.accelerator, processes=tools.processes)
    if not np.isfinite(logits).all():
        raise _diverged(f"answers that are no numbers after epoch {position.epoch}", tools, plan)
    scores = score_logits(logits, dataset.labels(dataset.rows("validation")))
    _write(tools, position, scores, log=log, validated=time.perf_counter() - begun)
    _tell(plan, position, scores, tools=tools)
    improved = better(scores, position.best.scores if position.best else None, metric=fit.metric)
    if improved:
        position.best, position.waiting = Best(weights_of(tools.judged), scores, logits), 0
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
    everywhere = processes.gather((position.losses, position.confusion))
    if processes.first:
        losses = np.stack([losses for losses, _ in everywhere])
        seen = ~np.isnan(losses)
        position.losses[:] = np.where(seen.any(0), np.nanmax(np.where(seen, losses, -np.inf), axis=0), np.nan)
        position.confusion[:] = sum(confusion for _, confusion in everywhere)
    else:
        position.forget()


def validate(classifier: Classifier, plan: Plan, *, accelerator: Accelerator, processes: Processes) -> Floats:
    """Logits `float32[N, C]` of the validation split, computed in shares."""
    classifier.eval()
    rows = plan.feed.dataset.rows("validation")
    parts = [np.zeros((0, len(plan.feed.dataset.classes)), dtype=np.float32)]
    with torch.inference_mode():
        batches = list(batches_of(processes.share(rows), size=plan.feed.micro_batch))
        for images in plan.feed.dataset.pixels(batches):
            with accelerator.autocast():
                logits, _ = classifier(torch.from_numpy(images).to(accelerator.device))
            parts.append(logits.float().cpu().numpy())
    return processes.join_shares(np.concatenate(parts), total=len(rows))


def _write(tools: Tools, position: Position, scores: Scores, *, log: RunLog, validated: float) -> None:
    sums = position.sums
    metrics: dict[str, float | int | str] = {
        "stage": "fine-tune",
        "epoch": position.epoch,
        "learning_rate": max(tools.rates),
        "train_loss": sums["loss"] / sums["seen"],
        "train_accuracy": sums["right"] / sums["seen"],
        "train_macro_f1": float(macro_f1(position.confusion[None])[0]) if position.confusion.any() else 0.0,
        "gradient_norm": sums["norm"] / position.step,
        **validation_columns(scores),
        **tools.monitor.epoch_metrics(position.epoch),
    }
    timings = dict(tools.monitor.epoch_timings(position.epoch))
    timings.update(stage="fine-tune", epoch=position.epoch, validation_seconds=validated)
    log.add(metrics, timings)
    numbers = {key: value for key, value in metrics.items() if isinstance(value, float)}
    tools.accelerator.log(numbers, step=position.epoch)


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


def _result(tools: Tools, position: Position, *, interrupted: bool) -> Learned:
    if position.best is None:
        raise TrainingError(
            "interrupted before the first epoch was judged: there is no model yet", fix="resume the run"
        )
    return Learned(position.best, interrupted, losses=position.losses, steps=tools.monitor.rows)

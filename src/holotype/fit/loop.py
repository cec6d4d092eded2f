"""Stage 2 of training: the loop that fine-tunes the last blocks, or all, from the fitted head.

It reads top to bottom: `fine_tune` is the epochs, `_epoch` one of them, `_step` the optimizer's steps,
`_part` one forward and backward. What a checkpoint must hold is in `Position`; everything else is a pure
function of the settings and of the numbers in it, so that a resumed run is the run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from accelerate import Accelerator
from timm.utils.model_ema import ModelEmaV3
from torch import nn
from torch.nn import functional

from holotype.augment import draw_training_batch
from holotype.errors import TrainingError
from holotype.fit.batches import Batch, feed_epoch
from holotype.fit.freeze import apply_freezing, training_mode
from holotype.fit.interrupt import Interrupt, interruptible
from holotype.fit.judging import diverged, judge, recalled
from holotype.fit.monitor import Monitor, Step, Weights
from holotype.fit.optimizer import add_l2, build_optimizer
from holotype.fit.processes import Processes
from holotype.fit.run import Learned, Plan, Position, Tools, Watch
from holotype.fit.schedule import build_schedule
from holotype.loss import distilled
from holotype.models import Classifier
from holotype.progress import Tracker, note, track
from holotype.runlog import RunLog

__all__ = ["fine_tune", "prepare_tools"]

# A half precision run may overflow while the scale of its loss is found; beyond this many steps it diverges.
_OVERFLOWS = 20


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
            judge(tools, plan, position, log=log, watch=watch)
            position.epoch, position.step, position.sums = position.epoch + 1, 0, {}
            save(tools, position)
    # A search judges by validation alone.
    return _result(tools, position, recall=recalled(tools, plan) if watch is None else None)


def prepare_tools(
    classifier: Classifier,
    plan: Plan,
    *,
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
        monitor=Monitor(classifier, plan.config.monitor, steps=plan.steps * fit.epochs, folder=plan.folder),
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
        begun = time.perf_counter()
        for parts in _steps(batches):
            if plan.folder is not None and position.epoch == 1 and position.step == 0:
                _show_batch(plan, parts[0])
            due = time.perf_counter() - saved > fit.checkpoint_seconds
            stop, save_now = _step(
                tools, plan, position, parts, asked=interrupt.asked, due=due and processes.first, begun=begun
            )
            now = time.perf_counter()
            _advance(progress, position, images=parts[0].total, speed=now - began)
            if stop and position.step < plan.steps:
                return False
            if save_now and position.step < plan.steps:
                save(tools, position)
                saved = time.perf_counter()
            begun = time.perf_counter()
    return True


def _steps(batches: Iterator[Batch]) -> Iterator[list[Batch]]:
    """The parts of each optimizer step; each is made only when it is asked for."""
    parts: list[Batch] = []
    for batch in batches:
        parts.append(batch)
        if batch.last:
            yield parts
            parts = []


def _step(
    tools: Tools,
    plan: Plan,
    position: Position,
    parts: list[Batch],
    *,
    asked: bool,
    due: bool,
    begun: float,
) -> tuple[bool, bool]:
    """One optimizer step, whose parts were asked for at `begun`.

    Says whether any process was `asked` to stop, and whether the first one finds a checkpoint `due`: clocks
    differ, and all must do either at the same step.
    """
    fit, processes = plan.config.fit, tools.processes
    number = plan.number(position)
    tools.schedule.set_rates(tools.optimizer, number)
    # (1) losses and gradients of every part
    loss, right = _gradients(tools, plan, position, parts)
    # (2) the same numbers and gradients in every process
    trained = [p for p in tools.classifier.parameters() if p.requires_grad]
    waited = sum(part.waited for part in parts) / processes.count
    told = torch.tensor([loss, right, float(asked), float(due), waited], dtype=torch.float64)
    loss, right, stop, save, waited = (float(value) for value in processes.sum_gradients(trained, told))
    # (3) step
    tools.accelerator.unscale_gradients()  # in fp16 they are still those of the scaled loss
    if fit.l2:
        add_l2(tools.classifier, fit.l2)
    limit = fit.clip_norm if fit.clip_norm is not None else math.inf
    norm = float(nn.utils.clip_grad_norm_(trained, limit))
    seconds = time.perf_counter() - begun
    step = Step(
        number, position.epoch, loss, right, norm, tools.rates, parts[0].total, seconds=seconds, waited=waited
    )
    _check_finite(step, tools=tools, plan=plan, position=position, parts=parts)
    before = tools.monitor.before_step(number)
    tools.optimizer.step()
    # (4) what happened
    step = replace(step, seconds=time.perf_counter() - begun)
    _take_note(step, tools=tools, position=position, before=before)
    return stop > 0, save > 0


def _gradients(tools: Tools, plan: Plan, position: Position, parts: list[Batch]) -> tuple[float, float]:
    """Forward and backward of all parts; this process's share of the mean loss, and its right answers."""
    fit, number = plan.config.fit, plan.number(position)
    loss, right = 0.0, 0.0
    watched = tools.monitor.begin_step(number)
    for place, part in enumerate(parts):
        # Dropout and stochastic depth draw from torch's generator: seeded here, it depends on no past.
        torch.manual_seed(_mixed(fit.seed, number, place, tools.processes.rank))
        # Compiled code would not see that layers are watched in this step.
        with torch.compiler.set_stance("force_eager") if watched and fit.compile else nullcontext():
            part_loss, part_right = _part(tools, plan, position, part)
        loss, right = loss + part_loss, right + part_right
    return loss, right


def _take_note(step: Step, *, tools: Tools, position: Position, before: Weights | None) -> None:
    row = tools.monitor.after_step(step, before=before)
    if row is not None:
        curves = {f"step/{name}": value for name, value in row.items() if isinstance(value, float)}
        tools.accelerator.log(curves, step=step.number)
    tools.optimizer.zero_grad()
    if tools.average is not None:
        tools.average.update(tools.classifier, step=step.number)
    position.count(step)


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
    unlikely = -(functional.log_softmax(logits.detach(), 1) * batch.targets).sum(1)
    position.losses[rows] = unlikely.cpu().numpy()[real]
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


def _check_finite(step: Step, *, tools: Tools, plan: Plan, position: Position, parts: list[Batch]) -> None:
    """Stop before a step that is no number; in fp16 only when it is no overflow of the scaled loss."""
    if math.isfinite(step.loss) and step.taken:
        position.overflows = 0
        return
    position.overflows += 1
    if math.isfinite(step.loss) and tools.accelerator.scaler is not None and position.overflows <= _OVERFLOWS:
        return
    tools.monitor.fail_step(step)
    rows = np.concatenate([part.samples.rows for part in parts])
    names = ", ".join(plan.feed.dataset.paths(rows)[:8])
    raise diverged(
        f"loss {step.loss:g}, gradient norm {step.gradient_norm:g} in epoch {step.epoch}, batch of {names}",
        tools,
        plan,
    )


def _advance(progress: Tracker, position: Position, *, images: int, speed: float) -> None:
    sums = position.sums
    progress.advance(
        images,
        status=f"loss {sums['loss'] / sums['seen']:.3f}  accuracy {sums['right'] / sums['seen']:.1%}"
        f"  {sums['seen'] / speed:.0f} images/s",
    )


def _result(
    tools: Tools, position: Position, *, interrupted: bool = False, recall: float | None = None
) -> Learned:
    if position.best is None:
        raise TrainingError(
            "interrupted before the first epoch was judged: there is no model yet", fix="resume the run"
        )
    return Learned(position.best, interrupted, position.losses, tools.monitor.rows, recall)

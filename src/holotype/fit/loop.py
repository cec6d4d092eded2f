"""Stage 2 of training: the loop that fine-tunes the last blocks, or all, from the fitted head.

It reads top to bottom: `fine_tune` is the epochs, `_epoch` one of them, `_step` the optimizer's steps,
`_part` one forward and backward. What a checkpoint must hold is in `Position`; everything else is a pure
function of the settings and of the numbers in it, so that a resumed run is the run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from timm.utils.model_ema import ModelEmaV3
from torch import nn
from torch.nn import functional

from holotype.augment import draw_training_batch, mixed_captions
from holotype.bundle import write_text
from holotype.errors import TrainingError
from holotype.fit.batches import Batch, feed_epoch
from holotype.fit.dropout import kept_features
from holotype.fit.freeze import FreezePlan, apply_freezing, training_mode
from holotype.fit.interrupt import Interrupt, interruptible
from holotype.fit.judging import diverged, judge, recalled
from holotype.fit.monitor import Monitor, Step, Weights
from holotype.fit.optimizer import add_l2, build_optimizer
from holotype.fit.processes import Processes
from holotype.fit.run import Learned, Plan, Position, Tools, Watch
from holotype.fit.schedule import build_schedule
from holotype.loss import distilled
from holotype.metrics import macro_f1
from holotype.models import Classifier
from holotype.progress import Tracker, note, track
from holotype.runlog import RunLog

__all__ = ["fine_tune", "prepare_tools"]

Rows = npt.NDArray[np.int64]

# A half precision run may overflow while the scale of its loss is found; beyond this many steps it diverges.
_OVERFLOWS = 20
_NAMED = 8


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
    trained: FreezePlan | None = None
    with interruptible() as interrupt:
        while position.epoch <= fit.epochs and not position.stopped:
            before, trained = trained, apply_freezing(tools.classifier, fit, epoch=position.epoch)
            if trained != before:
                note(trained.summary if before is None else trained.opening(before, epoch=position.epoch))
            if not _epoch(tools, plan, position, interrupt=interrupt, save=save):
                save(tools, position)
                note(f"interrupted in epoch {position.epoch}: saved, keeping the best weights so far")
                return _result(tools, plan, position, interrupted=True)
            judge(tools, plan, position, log=log, watch=watch)
            position.epoch, position.step, position.sums = position.epoch + 1, 0, {}
            save(tools, position)
    # A search judges by validation alone.
    return _result(tools, plan, position, recall=recalled(tools, plan) if watch is None else None)


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
            due = time.perf_counter() - saved > fit.checkpoint_seconds
            done = _step(
                tools, plan, position, parts, asked=interrupt.asked, due=due and processes.first, begun=begun
            )
            now = time.perf_counter()
            _advance(progress, position, images=done.images, speed=now - began)
            if done.stop and position.step < plan.steps:
                return False
            if done.save and position.step < plan.steps:
                save(tools, position)
                saved = time.perf_counter()
            begun = time.perf_counter()
    return True


def _steps(batches: Iterator[Batch]) -> Iterator[Iterator[Batch]]:
    """The parts of each optimizer step, to be taken before the next step is asked for.

    Each is made only when it is asked for: however many a step has, one or two of them are in memory.
    """
    for batch in batches:
        parts = _parts(batch, batches)
        del batch  # or it would stay for the whole step
        yield parts


def _parts(batch: Batch, following: Iterator[Batch]) -> Iterator[Batch]:
    """`batch`, which begins a step, and what follows up to the step's last part."""
    yield batch
    while not batch.last:
        batch = next(following)
        yield batch


class _Done(NamedTuple):
    """The images of an optimizer step, and whether any process asks to stop, or the first one to save."""

    images: int
    stop: bool
    save: bool


@dataclass
class _Seen:
    """What the parts of a step add up to in this process.

    `loss` is its share of the mean over the step's `images`; `shown` are the rows of each part; `waited` and
    `augmented` are seconds.
    """

    loss: float = 0.0
    right: float = 0.0
    waited: float = 0.0
    augmented: float = 0.0
    images: int = 0
    shown: list[Rows] = field(default_factory=list)

    def add(self, part: Batch, *, loss: float, right: float) -> None:
        self.loss, self.right = self.loss + loss, self.right + right
        self.waited, self.augmented = self.waited + part.waited, self.augmented + part.augmented
        self.images = part.total
        self.shown.append(part.shown)


def _step(
    tools: Tools,
    plan: Plan,
    position: Position,
    parts: Iterator[Batch],
    *,
    asked: bool,
    due: bool,
    begun: float,
) -> _Done:
    """One optimizer step, whose parts were asked for at `begun`.

    Says whether any process was `asked` to stop, and whether the first one finds a checkpoint `due`: clocks
    differ, and all must do either at the same step.
    """
    fit, processes = plan.config.fit, tools.processes
    number = plan.number(position)
    tools.schedule.set_rates(tools.optimizer, number)
    # (1) losses and gradients of every part
    seen = _gradients(tools, plan, position, parts)
    # (2) the same numbers and gradients in every process
    trained = [p for p in tools.classifier.parameters() if p.requires_grad]
    each = (seen.loss, seen.right, float(asked), float(due), seen.waited, seen.augmented)
    summed = processes.sum_gradients(trained, torch.tensor(each, dtype=torch.float64))
    loss, right, stop, save, waited, augmented = (float(value) for value in summed)
    # (3) step
    tools.accelerator.unscale_gradients()  # in fp16 they are still those of the scaled loss
    if fit.l2:
        add_l2(tools.classifier, fit.l2)
    limit = fit.clip_norm if fit.clip_norm is not None else math.inf
    norm = float(nn.utils.clip_grad_norm_(trained, limit))
    step = Step(
        number, position.epoch, loss, right, norm, tools.rates, seen.images,
        seconds=time.perf_counter() - begun, waited=waited / processes.count,
        augmented=augmented / processes.count,
    )  # fmt: skip
    _check_finite(step, tools=tools, plan=plan, position=position, shown=seen.shown)
    before = tools.monitor.before_step(number)
    tools.optimizer.step()
    # (4) what happened
    step = replace(step, seconds=time.perf_counter() - begun)
    _take_note(step, tools=tools, position=position, before=before)
    return _Done(step.images, stop > 0, save > 0)


def _gradients(tools: Tools, plan: Plan, position: Position, parts: Iterator[Batch]) -> _Seen:
    """Forward and backward of all parts, one after the other."""
    fit, number = plan.config.fit, plan.number(position)
    seen = _Seen()
    watched = tools.monitor.begin_step(number)
    for place, part in enumerate(parts):
        if plan.folder is not None and number == place == 0:
            _show_batch(plan, part)
        # Stochastic depth draws from torch's generator: seeded here, it depends on no past.
        torch.manual_seed(_mixed(fit.seed, number, place, tools.processes.rank))
        # Compiled code would not see that layers are watched in this step.
        with torch.compiler.set_stance("force_eager") if watched and fit.compile else nullcontext():
            loss, right = _part(tools, plan, position, part)
        seen.add(part, loss=loss, right=right)
    return seen


def _take_note(step: Step, *, tools: Tools, position: Position, before: Weights | None) -> None:
    row = tools.monitor.after_step(step, before=before)
    if row is not None:
        curves = {name: value for name, value in row.items() if isinstance(value, float)}
        # In the epoch so far; of several processes the first one's share.
        curves["macro_f1"] = float(macro_f1(position.confusion[None])[0])
        curves |= tools.monitor.speed(step)
        tools.accelerator.log({f"step/{name}": value for name, value in curves.items()}, step=step.number)
    tools.optimizer.zero_grad()
    if tools.average is not None:
        tools.average.update(tools.classifier, step=step.number)
    position.count(step)


def _part(tools: Tools, plan: Plan, position: Position, batch: Batch) -> tuple[float, float]:
    """Forward and backward of a micro-batch; its share of the step's mean loss, and its right answers."""
    with tools.accelerator.autocast(), _enough_for_statistics():
        logits, _ = tools.classifier(batch.images, _kept(tools, plan, position, batch))
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


@contextmanager
def _enough_for_statistics() -> Iterator[None]:
    """`TrainingError` where torch refuses to take batch norm's statistics of a single value."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise TrainingError(
            "batch norm that learns needs more than one image at a time",
            where="fit.micro_batch",
            fix="use fit.micro_batch and fit.batch_size of at least 2, or fit.freeze_norm=true",
        ) from error


def _kept(tools: Tools, plan: Plan, position: Position, batch: Batch) -> torch.Tensor | None:
    """What dropout keeps of each embedding; None where it is off."""
    rate = tools.classifier.architecture.dropout
    if not rate:
        return None
    kept = kept_features(
        batch.samples,
        rate=rate,
        features=tools.classifier.features,
        seed=plan.config.fit.seed,
        epoch=position.epoch,
    )
    return kept.to(batch.images.device)


def _show_batch(plan: Plan, batch: Batch) -> None:
    """`train_batch.jpg`: what the network is fed first, with the labels as they are mixed."""
    labels = mixed_captions(batch.targets.cpu().numpy(), names=plan.feed.dataset.classes)
    draw_training_batch(batch.images.cpu().numpy(), labels, cast("Path", plan.folder) / "train_batch.jpg")


def _mixed(*numbers: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _check_finite(step: Step, *, tools: Tools, plan: Plan, position: Position, shown: list[Rows]) -> None:
    """Stop before a step that is no number; in fp16 only when it is no overflow of the scaled loss."""
    if math.isfinite(step.loss) and step.taken:
        position.overflows = 0
        return
    position.overflows += 1
    if math.isfinite(step.loss) and tools.accelerator.scaler is not None and position.overflows <= _OVERFLOWS:
        return
    tools.monitor.fail_step(step)
    raise diverged(
        f"loss {step.loss:g}, gradient norm {step.gradient_norm:g} in epoch {step.epoch},"
        f" batch of {_named_batch(shown, tools=tools, plan=plan)}",
        tools,
        plan,
    )


def _named_batch(shown: list[Rows], *, tools: Tools, plan: Plan) -> str:
    """The first images of a step, those that others were mixed with too, and where all of them are listed."""
    rows = np.unique(np.concatenate(tools.processes.gather(np.concatenate(shown))))
    names = plan.feed.dataset.paths(rows)
    first = ", ".join(names[:_NAMED])
    if plan.folder is None or len(names) <= _NAMED:
        return first
    listed = plan.folder / "last" / "batch.txt"
    write_text(listed, "".join(f"{name}\n" for name in names))
    return f"{first} and {len(names) - _NAMED} more in {listed}"


def _advance(progress: Tracker, position: Position, *, images: int, speed: float) -> None:
    sums = position.sums
    progress.advance(
        images,
        status=f"loss {sums['loss'] / sums['seen']:.3f}  accuracy {sums['right'] / sums['seen']:.1%}"
        f"  {sums['seen'] / speed:.0f} images/s",
    )


def _result(
    tools: Tools, plan: Plan, position: Position, *, interrupted: bool = False, recall: float | None = None
) -> Learned:
    if position.best is None:
        raise TrainingError(
            "interrupted before the first epoch was judged: there is no model yet", fix=plan.go_on
        )
    return Learned(position.best, interrupted, position.losses, tools.monitor.rows, recall)

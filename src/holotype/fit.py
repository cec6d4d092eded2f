"""Stage 2 of training: the loop that fine-tunes the last blocks, or all, from the fitted head."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from timm.optim._param_groups import param_groups_layer_decay
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.utils.model_ema import ModelEmaV3
from torch import nn
from torch.nn import functional

from holotype.augment import augment, draw
from holotype.config import AdamW, AugmentConfig, FitConfig
from holotype.dataset import Dataset, Shape
from holotype.errors import ConfigError, TrainingError
from holotype.head import Floats, Labels, Scores, batches_of, better, score_logits, validation_columns
from holotype.models import Classifier, blocks, head_of
from holotype.progress import note, track
from holotype.runlog import RunLog

__all__ = ["FineTuned", "Plan", "choose_precision", "fine_tune"]

State = dict[str, torch.Tensor]

# Pixels of a batch are measured for the choice of precision; more would take seconds on a slow CPU.
_PROBE_BATCH = 4
# The first blocks are the slowest (their maps are the largest) and the most general.
_MOST = 0.6


@dataclass(frozen=True)
class Plan:
    """What the loop works on: the data, the view that crops are taken from, their size, and the settings."""

    dataset: Dataset
    view: Shape
    size: Shape
    augment: AugmentConfig
    fit: FitConfig


@dataclass(frozen=True)
class FineTuned:
    """The best weights, their scores and logits `float32[N, C]` on validation; `interrupted` by Ctrl-C."""

    state: State
    scores: Scores
    logits: Floats
    interrupted: bool


@dataclass(frozen=True)
class _Epoch:
    loss: float
    accuracy: float
    gradient_norm: float
    seconds: float
    waited: float


def fine_tune(
    classifier: Classifier, plan: Plan, *, accelerator: Accelerator, start: FineTuned, log: RunLog
) -> FineTuned:
    """Train `classifier` in place; `start` (the fitted head) is what every epoch has to beat."""
    config = plan.fit
    _freeze(classifier, unfreeze=config.unfreeze)
    rows = plan.dataset.rows("train")
    steps = math.ceil(len(rows) / config.batch_size)
    optimizer = _optimizer(classifier, config)
    scheduler = _scheduler(optimizer, config, steps=steps * config.epochs)
    model, optimizer = accelerator.prepare(classifier, optimizer)
    average = ModelEmaV3(classifier, decay=config.ema, use_warmup=True) if config.ema else None
    best, waiting, interrupted = start, 0, False
    for epoch in range(1, config.epochs + 1):
        try:
            result = _train_epoch(
                model, optimizer, scheduler, average, plan,
                accelerator=accelerator, epoch=epoch, first_step=(epoch - 1) * steps,
            )  # fmt: skip
            judged = cast("Classifier", average.module) if average is not None else classifier
            logits = _validate(judged, plan, accelerator=accelerator)
        except KeyboardInterrupt:
            note(f"interrupted in epoch {epoch}: keeping the best weights so far")
            interrupted = True
            break
        scores = score_logits(logits, plan.dataset.labels(plan.dataset.rows("validation")))
        rate = max(float(group["lr"]) for group in optimizer.param_groups)
        _report(epoch, rate, result, scores, plan=plan, images=len(rows), accelerator=accelerator, log=log)
        if better(scores, best.scores, metric=config.metric):
            state = {k: v.detach().cpu().clone() for k, v in judged.network.state_dict().items()}
            best, waiting = FineTuned(state, scores, logits, interrupted=False), 0
        else:
            waiting += 1
        if waiting >= config.patience:
            note(f"stopped early: no better {config.metric} in {waiting} epochs")
            break
    return FineTuned(best.state, best.scores, best.logits, interrupted)


def choose_precision(classifier: Classifier, config: FitConfig, *, device: torch.device) -> str:
    """ "fp32", "bf16" or "fp16": what was asked for, or the faster one of a measured training step.

    A CPU without bf16 instructions emulates them at a tenth of the speed and is not measured.
    """
    if config.precision != "auto":
        if config.precision == "fp16" and device.type == "cpu":
            raise ConfigError("fp16 training needs a GPU", where="fit.precision", fix="use bf16 or fp32")
        return config.precision
    if config.deterministic:
        return "fp32"
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        if not (able.get("avx512_bf16") or able.get("amx_bf16") or able.get("sve_bf16")):
            return "fp32"
    candidate = torch.float16 if device.type == "mps" else torch.bfloat16
    plain = _time_step(classifier, device=device, dtype=None)
    half = _time_step(classifier, device=device, dtype=candidate)
    return "fp32" if plain <= half else ("fp16" if candidate == torch.float16 else "bf16")


def _time_step(classifier: Classifier, *, device: torch.device, dtype: torch.dtype | None) -> float:
    model = copy.deepcopy(classifier).to(device).to(memory_format=torch.channels_last)
    size = classifier.architecture.height, classifier.architecture.width
    images = torch.zeros(_PROBE_BATCH, *size, 3, dtype=torch.uint8, device=device)
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        with torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            loss = model(images)[0].float().sum()
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def _freeze(classifier: Classifier, *, unfreeze: int | str) -> None:
    """Leave gradients to the last `unfreeze` blocks and the head."""
    groups = blocks(classifier)
    named = {"all": len(groups), "most": round(_MOST * len(groups))}
    keep = named[unfreeze] if isinstance(unfreeze, str) else unfreeze
    if not 0 <= keep <= len(groups):
        raise ConfigError(
            f"the backbone has {len(groups)} blocks, {unfreeze} were asked for",
            where="fit.unfreeze",
            fix=f"use 0 to {len(groups)}, most or all",
        )
    for group in groups[: len(groups) - keep]:
        for parameter in group:
            parameter.requires_grad_(False)
    for parameter in head_of(classifier).layer.parameters():
        parameter.requires_grad_(True)


def _optimizer(classifier: Classifier, config: FitConfig) -> torch.optim.Optimizer:
    settings = config.optimizer
    groups = param_groups_layer_decay(
        classifier.network, weight_decay=settings.weight_decay, layer_decay=config.layer_decay
    )
    if isinstance(settings, AdamW):
        return torch.optim.AdamW(groups, lr=settings.learning_rate)
    return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum, nesterov=True)


def _scheduler(optimizer: torch.optim.Optimizer, config: FitConfig, *, steps: int) -> CosineLRScheduler:
    warmup = round(config.warmup * steps)
    return CosineLRScheduler(
        optimizer,
        t_initial=steps,
        lr_min=0.01 * config.optimizer.learning_rate,
        warmup_t=warmup,
        warmup_lr_init=0.01 * config.optimizer.learning_rate,
        t_in_epochs=False,
    )


def _train_epoch(
    model: nn.Module,
    optimizer: Any,
    scheduler: CosineLRScheduler,
    average: ModelEmaV3 | None,
    plan: Plan,
    *,
    accelerator: Accelerator,
    epoch: int,
    first_step: int,
) -> _Epoch:
    config = plan.fit
    _training_mode(model, freeze_norm=config.freeze_norm)
    begun = time.perf_counter()
    loss_sum, right, seen, norms, waited = 0.0, 0, 0, [], 0.0
    rows = plan.dataset.rows("train")
    with track(f"epoch {epoch}/{config.epochs}", total=len(rows)) as progress:
        for step, (batch, images, asked) in enumerate(_batches(plan, rows, epoch=epoch)):
            waited += asked
            scheduler.step_update(first_step + step)
            # (1) pixels: crop and mirror on the device
            draws = draw(plan.augment, seed=config.seed, epoch=epoch, samples=batch)
            pixels = augment(
                images.to(accelerator.device), draws, height=plan.size.height, width=plan.size.width
            )
            labels = torch.from_numpy(plan.dataset.labels(batch)).to(accelerator.device)
            # (2) loss and gradients
            with accelerator.autocast():
                logits, _ = model(pixels)
            loss = functional.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
            accelerator.backward(loss)
            norm = _clip(accelerator, model, limit=config.clip_norm)
            _check_finite(loss, norm, plan=plan, batch=batch, epoch=epoch)
            # (3) step
            optimizer.step()
            optimizer.zero_grad()
            if average is not None:
                average.update(accelerator.unwrap_model(model), step=first_step + step)
            # (4) what happened
            loss_sum += float(loss.detach()) * len(batch)
            right += int((logits.argmax(1) == labels).sum())
            seen += len(batch)
            norms.append(norm)
            speed = seen / (time.perf_counter() - begun)
            rate = max(float(group["lr"]) for group in optimizer.param_groups)
            progress.advance(
                len(batch),
                status=f"loss {loss_sum / seen:.3f}  accuracy {right / seen:.1%}"
                f"  rate {rate:.2g}  {speed:.0f} images/s",
            )
    return _Epoch(
        loss=loss_sum / seen,
        accuracy=right / seen,
        gradient_norm=float(np.mean(norms)),
        seconds=time.perf_counter() - begun,
        waited=waited,
    )


def _batches(plan: Plan, rows: Labels, *, epoch: int) -> Iterator[tuple[Labels, torch.Tensor, float]]:
    """Shuffled batches of an epoch: rows, pixels `uint8[N, H, W, 3]`, seconds spent waiting for them."""
    order = np.random.default_rng([plan.fit.seed, epoch]).permutation(rows)
    batches = list(batches_of(order, size=plan.fit.batch_size))
    source = plan.dataset.pixels(batches, shape=plan.view)
    for batch in batches:
        start = time.perf_counter()
        images = torch.from_numpy(next(source))
        yield batch, images, time.perf_counter() - start


def _training_mode(model: nn.Module, *, freeze_norm: bool) -> None:
    model.train()
    if freeze_norm:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def _clip(accelerator: Accelerator, model: nn.Module, *, limit: float | None) -> float:
    norm = accelerator.clip_grad_norm_(model.parameters(), limit if limit is not None else math.inf)
    return 0.0 if norm is None else float(norm)


def _check_finite(loss: torch.Tensor, norm: float, *, plan: Plan, batch: Labels, epoch: int) -> None:
    if math.isfinite(float(loss.detach())) and math.isfinite(norm):
        return
    names = ", ".join(plan.dataset.paths(batch)[:8])
    raise TrainingError(
        f"loss {float(loss.detach()):g}, gradient norm {norm:g} in epoch {epoch}, batch of {names}",
        fix="lower fit.optimizer.learning_rate, set fit.clip_norm, or look at these images",
    )


def _validate(classifier: Classifier, plan: Plan, *, accelerator: Accelerator) -> Floats:
    """Logits `float32[N, C]` of the validation split."""
    classifier.eval()
    rows = plan.dataset.rows("validation")
    parts = []
    with torch.inference_mode():
        for images in plan.dataset.pixels(list(batches_of(rows, size=plan.fit.batch_size))):
            with accelerator.autocast():
                logits, _ = classifier(torch.from_numpy(images).to(accelerator.device))
            parts.append(logits.float().cpu().numpy())
    return np.concatenate(parts)


def _report(
    epoch: int,
    rate: float,
    result: _Epoch,
    scores: Scores,
    *,
    plan: Plan,
    images: int,
    accelerator: Accelerator,
    log: RunLog,
) -> None:
    metrics: dict[str, float | int | str] = {
        "stage": "fine-tune",
        "epoch": epoch,
        "learning_rate": rate,
        "train_loss": result.loss,
        "train_accuracy": result.accuracy,
        "gradient_norm": result.gradient_norm,
        **validation_columns(scores),
    }
    speed = images / result.seconds
    log.add(
        metrics,
        {
            "stage": "fine-tune",
            "epoch": epoch,
            "seconds": result.seconds,
            "images_per_second": speed,
            "data_wait_seconds": result.waited,
        },
    )
    numbers = {key: value for key, value in metrics.items() if isinstance(value, float)}
    accelerator.log({**numbers, "images_per_second": speed}, step=epoch)
    left = (plan.fit.epochs - epoch) * result.seconds
    note(
        f"epoch {epoch}/{plan.fit.epochs}  loss {result.loss:.3f}  accuracy {scores.accuracy:.1%}"
        f"  macro-F1 {scores.macro_f1:.1%}  rate {rate:.2g}  {speed:.0f} images/s  about {left:.0f} s left"
    )

"""What is settled before an image is learned from: every "auto", the sizes of images, what has no effect."""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

import torch

from holotype.config import FitConfig, OneCycle, TrainConfig, resolve_config
from holotype.dataset import Shape, margin_shape
from holotype.errors import ConfigError
from holotype.fit.memory import settle_micro_batch
from holotype.fit.precision import choose_compile, choose_precision
from holotype.fit.processes import Processes
from holotype.imbalance import Remedy
from holotype.models import Classifier, recipe_of
from holotype.preprocess import Preprocess

__all__ = ["fit_shape", "fit_shapes", "idle_settings", "settle_measured", "settle_untold", "views"]


def settle_untold(config: TrainConfig, *, fresh_stem: bool = False) -> TrainConfig:
    """Settings whose "auto" depends on the network and on whether its weights have learned anything.

    With a `fresh_stem` they are as for random weights: what comes after it was trained on other maps.
    """
    fresh = config.model.weights == "none" or fresh_stem
    fixed = recipe_of(config.model.name).fixed_size
    fit = config.fit
    if fresh and not fit.epochs:
        part, setting = ("first convolution", "stem=small") if fresh_stem else ("backbone", "weights=none")
        raise ConfigError(
            f"a head on a {part} of random weights tells nothing",
            where=f"model.{setting} with fit.epochs=0",
            fix="use weights, or fine-tune: --preset balanced",
        )
    if fixed and fit.epochs and not {fit.scale, fit.scale_start} <= {"auto", 1.0, None}:
        raise ConfigError(
            f"{config.model.name} takes images of one size only",
            where="fit.scale, fit.scale_start",
            fix="leave them out, or choose a convolutional network (holotype models)",
        )
    update: dict[str, Any] = {}
    if fit.unfreeze == "auto":
        update["unfreeze"] = "all" if fresh or fit.freeze is not None else "most"
    if fit.freeze_norm == "auto":
        update["freeze_norm"] = not fresh
    if fit.scale == "auto":
        update["scale"] = 1.0 if fresh or fixed else 0.8
    scale = update.get("scale", fit.scale)
    if fit.scale_start is not None and fit.scale_start > scale:
        raise ConfigError(
            f"images grow from fit.scale_start={fit.scale_start:g} to fit.scale={scale:g}, which is less",
            where="fit.scale_start",
            fix=f"use less than {scale:g}, or set fit.scale too",
        )
    return config.model_copy(update={"fit": fit.model_copy(update=update)})


def settle_measured(
    config: TrainConfig,
    classifier: Classifier,
    *,
    spec: Preprocess,
    device: torch.device,
    processes: Processes,
) -> FitConfig:
    """Arithmetic and images at once, as this machine answers; the same in every process."""
    fit = config.fit
    if not fit.epochs:
        return fit.model_copy(update={"precision": "fp32", "compile": False, "micro_batch": fit.batch_size})
    size = max(fit_shapes(config, spec), key=lambda shape: shape.height * shape.width)
    with processes.first_goes_first():  # measuring beside each other, they would measure each other
        precision = choose_precision(classifier, fit, size=size, device=device)
        compiled = choose_compile(classifier, fit, size=size, device=device, precision=precision)
        fit = fit.model_copy(update={"precision": precision, "compile": compiled})
        count = settle_micro_batch(classifier, fit, size=size, device=device, processes=processes.count)
    return processes.from_first(fit.model_copy(update={"micro_batch": count}))


def fit_shape(config: TrainConfig, spec: Preprocess, *, epoch: int) -> Shape:
    """The size of images in an epoch of fine-tuning, counted from 1: a multiple of 16, or the data's own."""
    fit = config.fit
    scale = float(fit.scale)
    if fit.scale_start is not None and fit.epochs > 1:
        # Growing over the first half, so that the second sees the size it is judged at.
        progress = min(2 * (epoch - 1) / fit.epochs, 1.0)
        scale = fit.scale_start + (scale - fit.scale_start) * progress
    if scale == 1:
        return Shape(spec.height, spec.width)
    return Shape(*(max(16 * round(side * scale / 16), 16) for side in (spec.height, spec.width)))


def fit_shapes(config: TrainConfig, spec: Preprocess) -> frozenset[Shape]:
    """All sizes that images have while fine-tuning; none where nothing is."""
    return frozenset(fit_shape(config, spec, epoch=epoch) for epoch in range(1, config.fit.epochs + 1))


def views(config: TrainConfig, spec: Preprocess) -> tuple[Shape, ...]:
    """The view that training crops are taken from; none where nothing is fine-tuned."""
    if not config.fit.epochs:
        return ()
    return (margin_shape(fit_shape(config, spec, epoch=config.fit.epochs), crop=config.augment.crop),)


_OF_FINE_TUNING = (
    "fit.optimizer", "fit.schedule", "fit.unfreeze", "fit.freeze", "fit.gradual", "fit.layer_decay", "fit.l2",
    "fit.backbone_rate", "fit.clip_norm", "fit.ema", "fit.scale", "fit.batch_size", "model.dropout",
    "model.drop_path", "distill.teacher", "augment.mixup", "augment.cutmix", "augment.policy",
    "augment.erasing", "augment.rotation", "augment.crop", "augment.hue", "augment.saturation",
    "augment.value", "augment.noise", "fit.warmup", "fit.freeze_norm", "fit.patience", "fit.micro_batch",
    "fit.precision", "fit.compile",
)  # fmt: skip


def idle_settings(config: TrainConfig, *, imbalance: Remedy, images: int) -> tuple[str, ...]:
    """What was set and has no effect with so many training `images`; one line each, for people."""
    augment, fit = config.augment, config.fit
    one_cycle = isinstance(fit.schedule, OneCycle)
    conditions = (
        (imbalance == "focal", "fit.imbalance=focal", ("fit.focal_gamma", "fit.focal_alpha")),
        (imbalance == "logit-adjust", "fit.imbalance=logit-adjust", ("fit.logit_tau",)),
        (fit.focus is not None, "fit.focus", ("fit.focus_weight",)),
        (not one_cycle, "a schedule other than one-cycle, which has fit.schedule.rise", ("fit.warmup",)),
        (fit.epochs > 1, "two epochs or more", ("fit.scale_start",)),
        (fit.epochs > 0, "fine-tuning (fit.epochs above 0)", _OF_FINE_TUNING),
        (config.distill.teacher is not None, "distill.teacher", ("distill.weight", "distill.temperature")),
        (augment.crop < 1, "augment.crop below 1", ("augment.aspect",)),
        (
            augment.policy == "randaugment",
            "augment.policy=randaugment",
            ("augment.operations", "augment.magnitude"),
        ),
        (augment.mixup > 0 or augment.cutmix > 0, "augment.mixup or augment.cutmix", ("augment.mixed",)),
    )
    usual = resolve_config(TrainConfig, overrides={"preset": config.preset})
    idle = tuple(
        f"{key} has no effect without {need}"
        for met, need, keys in conditions
        for key in keys
        # A recipe of a run holds what "auto" came to then, which nobody asked for.
        if not met and _value(usual, key) not in (_value(config, key), "auto")
    )
    asked = fit.epochs > 0 and fit.ema != usual.fit.ema
    return (*idle, *_unreached_decay(fit, images=images)) if asked else idle


def _unreached_decay(fit: FitConfig, *, images: int) -> tuple[str, ...]:
    """A line where the run ends before its averaged weights decay as slowly as `fit.ema` allows."""
    if fit.ema is None:
        return ()
    # Where the warm-up of timm's ModelEmaV3, 1 - step^(-2/3), comes to it.
    needed, steps = (1 - fit.ema) ** -1.5, fit.epochs * math.ceil(images / fit.batch_size)
    if steps >= needed:
        return ()
    reached = f"the decay warms up to it in {needed:,.0f} steps, the run has {steps:,}"
    return (f"fit.ema={fit.ema:g} is never reached: {reached}",)


def _value(config: TrainConfig, key: str) -> object:
    return reduce(getattr, key.split("."), config)

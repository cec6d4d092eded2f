"""Settings that address a fault, with values that follow from those of the run."""

from __future__ import annotations

import math

from holotype.config import TrainConfig
from holotype.diagnosis.evidence import Evidence
from holotype.models import has_weights, input_spec, recipe_of

__all__ = [
    "cache_size",
    "cheaper_changes",
    "even_rates",
    "less_to_read",
    "more_freedom",
    "more_robust",
    "more_variety",
    "pretrained_weights",
    "round_rate",
    "slower",
    "unfrozen",
]


def slower(config: TrainConfig, *, ratio: float) -> list[str]:
    """A rate at which the update ratio would be 1e-3 instead of `ratio`, and what eases the start."""
    rate = config.fit.optimizer.learning_rate * min(1e-3 / max(ratio, 1e-9), 1 / 3)
    settings = [f"fit.optimizer.learning_rate={round_rate(rate)}"]
    settings += ["fit.clip_norm=1.0"] if config.fit.clip_norm is None else []
    early = config.fit.warmup < 0.1 and config.fit.schedule.name != "one-cycle"
    return [*settings, *(["fit.warmup=0.1"] if early else [])]


def more_variety(config: TrainConfig, *, epochs: int | None) -> list[str]:
    """Against overfitting. Mirrors are left alone: where they are off, they may be wrong."""
    augment, model = config.augment, config.model
    # A network that learns on much smaller images than it is judged on has a gap of another kind.
    settings = ["fit.scale=1.0"] if isinstance(config.fit.scale, float) and config.fit.scale < 0.75 else []
    settings += ["augment.crop=0.4"] if augment.crop > 0.4 else []
    settings += [f"model.dropout={0.2 if model.dropout < 0.2 else 0.5}"] if model.dropout < 0.5 else []
    settings += ["augment.policy=trivial"] if augment.policy == "none" else []
    settings += ["augment.cutmix=1.0"] if augment.cutmix == augment.mixup == 0 else []
    settings += [f"fit.epochs={epochs}"] if epochs is not None else []
    decay = 5 * config.fit.optimizer.weight_decay
    return [*settings, *([f"fit.optimizer.weight_decay={round_rate(decay)}"] if decay else [])]


def more_freedom(config: TrainConfig) -> list[str]:
    """Against underfitting: more that may change, less that hides the images."""
    settings = unfrozen(config)
    settings += ["model.dropout=0.0"] if config.model.dropout > 0 else []
    augment = config.augment
    settings += [f"augment.{name}=0.0" for name in ("mixup", "cutmix") if getattr(augment, name) > 0]
    return [*settings, *(["augment.policy=none"] if augment.policy != "none" else [])]


def unfrozen(config: TrainConfig) -> list[str]:
    """Against what cannot change, where anything cannot."""
    if config.fit.freeze is not None:
        return ["fit.freeze=0"] if config.fit.freeze else []
    return ["fit.unfreeze=all"] if config.fit.unfreeze != "all" else []


def pretrained_weights(config: TrainConfig) -> list[str]:
    """Against what random weights suffer from, or those of a file, where there are others."""
    others = config.model.weights != "auto" and has_weights(config.model.name)
    return ["model.weights=auto"] if others else []


def even_rates(config: TrainConfig) -> list[str]:
    """Against stages that hardly move: no smaller share of the head's rate than the others have."""
    held = (("backbone_rate", config.fit.backbone_rate), ("layer_decay", config.fit.layer_decay))
    return [f"fit.{name}=1.0" for name, value in held if value < 1]


def less_to_read(config: TrainConfig) -> list[str]:
    """Against reading that is too slow though all is cached: fewer images for each shown, a smaller view."""
    augment, scale = config.augment, config.fit.scale
    settings = [f"augment.{name}=0.0" for name in ("mixup", "cutmix") if getattr(augment, name) > 0]
    if augment.crop < 0.8:
        return [*settings, "augment.crop=0.8"]  # the view has 1 / crop times the area that is shown
    if isinstance(scale, float) and not recipe_of(config.model.name).fixed_size:
        settings.append(f"fit.scale={0.8 * scale:.2g}")
    return settings


def cheaper_changes(config: TrainConfig) -> list[str]:
    """Against augmentation that is too slow: without what takes longest, or else on smaller images."""
    augment = config.augment
    settings = ["augment.policy=none"] if augment.policy != "none" else []
    colours = [name for name in ("hue", "saturation", "value") if getattr(augment, name) > 0]
    settings += [f"augment.{name}=0.0" for name in colours]
    settings += ["augment.noise=null"] if augment.noise is not None else []
    return settings or less_to_read(config)


def more_robust(config: TrainConfig) -> list[str]:
    """What makes single labels weigh less (Zhang et al. 2018, Lukasik et al. 2020)."""
    settings = ["fit.label_smoothing=0.1"] if config.fit.label_smoothing < 0.1 else []
    return [*settings, *(["augment.mixup=0.2"] if config.augment.mixup == 0 else [])]


def cache_size(evidence: Evidence) -> int:
    """Gigabytes, rounded up, that hold every image at the size of the input and at that of the crops."""
    config = evidence.config
    spec = input_spec(config.model, config.data)
    scale = config.fit.scale if isinstance(config.fit.scale, float) else 1.0
    pixels = spec.height * spec.width * (1 + scale**2 / config.augment.crop)
    images = sum(sum(by_split.values()) for by_split in evidence.counts.values())
    return math.ceil(3 * pixels * images / 1e9)


def round_rate(rate: float) -> str:
    """One digit: nobody knows a learning rate better than that."""
    return f"{float(f'{rate:.0e}'):g}"

"""What is minimised: cross-entropy on soft targets, its remedies against unequal classes, and a teacher."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from holotype.config import DistillConfig, FitConfig
from holotype.errors import ConfigError
from holotype.imbalance import Remedy, class_weights

__all__ = ["Criterion", "criterion", "distilled"]

Criterion = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Logits `float[N, C]` and targets `float32[N, C]` → losses `float[N]`, at least in single precision.

Targets are rows of probabilities: one-hot or mixed, before label smoothing.
"""


def criterion(
    config: FitConfig,
    *,
    imbalance: Remedy,
    shown: npt.NDArray[np.float64],
    classes: tuple[str, ...],
    device: torch.device,
) -> Criterion:
    """The loss of every image by itself, whatever else is in its batch.

    L(z, q) = -sum_c w_c q_c (1 - p_c)^gamma ((1 - s) log p_c + s sum_k u_k log p_k), p = softmax(z + tau log
    prior): of each class the weight, the focus and the smoothed cross-entropy (Szegedy et al. 2016). L is
    linear in q, so a mixed image has the mixed loss of its parts (Zhang et al. 2018). The focus is that of
    the labelled class: if the smoothed terms of the others, whose 1 - p is near 1, were weighed by their own,
    the label would be damped and they would not, and the best p of ten classes with s = 0.1 were 0.69.
    - none, sampler: w = 1, gamma = tau = 0, u = 1 / C: cross-entropy.
    - weights: w_c = N / (C n_c) of the n_c = `shown: float64[C]` images of each class in an epoch, N in all
      (`imbalance.shown_counts`), so that the mean weight of what is shown is 1.
    - focal: gamma and alpha = w of `config` (Lin et al. 2017).
    - logit-adjust: prior = n_c / N and tau of `config` (Menon et al. 2021), in the loss only, and u = softmax
      (tau log prior). Evenly smoothed, a rare class must be likelier everywhere than it is, which the
      adjustment would multiply by 1 / prior; so it stays a constant that changes no answer.
    `ConfigError` where `config.focal_alpha` names other classes than `classes`.
    """
    weights = np.ones(len(shown))
    if imbalance == "weights":
        weights = class_weights(shown)
    elif imbalance == "focal":
        weights = _focal_alpha(config, shown=shown, classes=classes)
    tau = config.logit_tau if imbalance == "logit-adjust" else 0.0
    adjustment = torch.from_numpy(tau * np.log(shown / shown.sum()))
    return partial(
        _losses,
        smoothing=config.label_smoothing,
        spread=adjustment.softmax(0).float().to(device),
        weights=torch.from_numpy(weights).float().to(device),
        adjustment=adjustment.float().to(device),
        gamma=config.focal_gamma if imbalance == "focal" else 0.0,
    )


def distilled(
    own: torch.Tensor, logits: torch.Tensor, teacher_logits: torch.Tensor, *, config: DistillConfig
) -> torch.Tensor:
    """(1 - w) own + w T^2 KL(teacher at T || student at T) of each image, `float[N]` (Hinton et al. 2015).

    `own: float[N]` are its losses by the criterion, in whose precision all is computed; logits are
    `float[N, C]`. T^2 keeps the size of the gradient whatever the temperature T.
    """
    student, teacher = (
        functional.log_softmax(some.to(own.dtype) / config.temperature, 1)
        for some in (logits, teacher_logits)
    )
    apart = functional.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
    return (1 - config.weight) * own + config.weight * config.temperature**2 * apart


def _losses(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    smoothing: float,
    spread: torch.Tensor,
    weights: torch.Tensor,
    adjustment: torch.Tensor,
    gamma: float,
) -> torch.Tensor:
    log_p = functional.log_softmax(logits + adjustment, 1)  # in single precision, as the adjustment is
    smoothed = (1 - smoothing) * log_p + smoothing * (spread * log_p).sum(1, keepdim=True)
    terms = targets * weights * smoothed
    if gamma:
        # Where 1 - p rounds to 0 the slope of a power below 1 would be infinite, and infinity times 0 NaN.
        terms = terms * (-torch.expm1(log_p)).clamp(min=torch.finfo(log_p.dtype).tiny) ** gamma
    return -terms.sum(1)


def _focal_alpha(
    config: FitConfig, *, shown: npt.NDArray[np.float64], classes: tuple[str, ...]
) -> npt.NDArray[np.float64]:
    alpha = config.focal_alpha
    if alpha == "none":
        return np.ones(len(shown))
    if alpha == "balanced":
        return class_weights(shown)
    wrong = sorted(set(classes) ^ set(alpha))
    if wrong:
        verb = "lacks the class" if wrong[0] in classes else "names what is no class:"
        raise ConfigError(f"{verb} {wrong[0]!r}", where="fit.focal_alpha", fix="give each class one weight")
    return np.array([alpha[name] for name in classes])

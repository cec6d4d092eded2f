"""From logits to an answer: temperature and softmax, in numpy, the same over every runtime."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Policy", "fit_temperature", "probabilities"]


class Policy(BaseModel):
    """How a bundle turns logits into probabilities; stored in the bundle, applied nowhere else."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float = Field(
        1.0, gt=0, description="logits are divided by it; fitted on the validation split (Guo et al. 2017)"
    )


def probabilities(logits: npt.NDArray[np.floating], *, policy: Policy) -> npt.NDArray[np.float64]:
    """softmax(logits / temperature) of `float[N, C]`, in double precision; rows sum to 1."""
    scaled = np.asarray(logits, dtype=np.float64) / policy.temperature
    scaled -= scaled.max(axis=1, keepdims=True)
    exponent = np.exp(scaled)
    return np.asarray(exponent / exponent.sum(axis=1, keepdims=True), dtype=np.float64)


def fit_temperature(logits: npt.NDArray[np.floating], labels: npt.NDArray[np.int64]) -> float:
    """The temperature in [0.05, 20] that minimises the log loss of `float[N, C]` logits (Guo et al. 2017).

    Against targets of 1 - 1 / (N + 2) for the label and the rest for the other classes (Platt 1999): N images
    that are all right do not make a model certain of the next one. The loss has one minimum, so a grid on a
    log scale is narrowed around its best point three times.
    """
    count, classes = logits.shape
    doubt = 1 / (count + 2)
    targets = np.full((count, classes), doubt / max(classes - 1, 1))
    targets[np.arange(count), labels] = 1 - doubt
    low, high = np.log(0.05), np.log(20.0)
    best = 0.0
    for _ in range(3):
        grid = np.linspace(low, high, 41)
        losses = []
        for exponent in grid:
            chances = probabilities(logits, policy=Policy(temperature=float(np.exp(exponent))))
            losses.append(-(targets * np.log(np.clip(chances, 1e-12, None))).sum(axis=1).mean())
        best = float(grid[int(np.argmin(losses))])
        step = grid[1] - grid[0]
        low, high = best - step, best + step
    return float(np.exp(best))

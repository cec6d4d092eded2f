"""From logits to an answer: temperature, softmax, and when to say "not sure"; in numpy, over every runtime.

A policy never changes which class is most probable. It adds whether that answer should be trusted: by a
threshold for the class it names, or by the set of classes that conformal prediction leaves open, and by how
far the embedding is from those the classifier learned from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "Abstain",
    "Doubt",
    "Judgement",
    "Policy",
    "conformal_threshold",
    "fit_temperature",
    "judge",
    "judge_probabilities",
    "probabilities",
    "score_thresholds",
    "total_variation",
]

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

Abstain = Literal["none", "score", "conformal"]

Doubt = Literal["improbable", "several", "none", "unfamiliar"]
"""Why an answer is not sure: below the threshold of its class; several classes or none are left open by
conformal prediction; or the image is unlike any that was learned from."""

_FEWEST = 5  # predictions that a threshold of a class is fitted on; with fewer it is that of all classes
_NEVER = 2.0  # a threshold that no probability reaches; a softmax of far logits does reach 1


class Policy(BaseModel):
    """How a bundle turns logits into an answer; stored in the bundle, applied nowhere else."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float = Field(
        1.0, gt=0, description="logits are divided by it; fitted on the validation split (Guo et al. 2017)"
    )
    abstain: Abstain = Field("none", description="by which rule an answer is not sure")
    thresholds: dict[str, float] = Field(
        {}, description="score: the least probability at which a class, when it is named, is sure"
    )
    open_above: float | None = Field(
        None, ge=0, le=1, description="conformal: every class with this probability or more is left open"
    )
    coverage: float | None = Field(
        None, gt=0, lt=1, description="conformal: share of images whose class is among those left open"
    )
    familiar: float | None = Field(
        None, gt=0, description="largest distance of an embedding that is not unfamiliar"
    )


@dataclass(frozen=True)
class Judgement:
    """What a policy makes of one image: probabilities `float64[C]`, and why the answer is not sure.

    `left_open` are the places of the classes that conformal prediction leaves open, None by another rule;
    `distance` is that of the embedding, None where the bundle has no baseline.
    """

    probabilities: Floats
    doubts: tuple[Doubt, ...]
    left_open: tuple[int, ...] | None
    distance: float | None

    @property
    def sure(self) -> bool:
        return not self.doubts


def judge(
    logits: npt.NDArray[np.floating],
    *,
    policy: Policy,
    classes: Sequence[str],
    distances: Floats | None = None,
) -> list[Judgement]:
    """Apply `policy` to logits `float[N, C]`, and to the distances `float64[N]` of the embeddings."""
    return judge_probabilities(
        probabilities(logits, policy=policy), policy=policy, classes=classes, distances=distances
    )


def judge_probabilities(
    chances: Floats, *, policy: Policy, classes: Sequence[str], distances: Floats | None = None
) -> list[Judgement]:
    """The same from probabilities `float64[N, C]` that have the policy's temperature."""
    limits = np.array([policy.thresholds.get(name, 0.0) for name in classes])
    judged = []
    for place, row in enumerate(chances):
        distance = None if distances is None else float(distances[place])
        best = int(row.argmax())
        doubts: list[Doubt] = []
        left_open = None
        if policy.abstain == "score" and row[best] < limits[best]:
            doubts.append("improbable")
        if policy.abstain == "conformal" and policy.open_above is not None:
            left_open = tuple(np.flatnonzero(row >= policy.open_above).tolist())
            if len(left_open) != 1:
                doubts.append("several" if left_open else "none")
        if policy.familiar is not None and distance is not None and not distance <= policy.familiar:
            doubts.append("unfamiliar")
        judged.append(Judgement(row, tuple(doubts), left_open, distance))
    return judged


def probabilities(logits: npt.NDArray[np.floating], *, policy: Policy) -> Floats:
    """softmax(logits / temperature) of `float[N, C]`, in double precision; rows sum to 1."""
    scaled = np.asarray(logits, dtype=np.float64) / policy.temperature
    scaled -= scaled.max(axis=1, keepdims=True)
    exponent = np.exp(scaled)
    return np.asarray(exponent / exponent.sum(axis=1, keepdims=True), dtype=np.float64)


def total_variation(before: Floats, after: Floats) -> float:
    """Mean over the rows of two `float64[N, C]` of half their L1 distance: in 0 ... 1 for probabilities."""
    return float(np.abs(before - after).sum(axis=1).mean() / 2)


def fit_temperature(logits: npt.NDArray[np.floating], labels: Labels) -> float:
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


def conformal_threshold(chances: Floats, labels: Labels, *, coverage: float) -> float:
    """The largest t such that the sets {c: p_c >= t} hold the label of a new image with `coverage`.

    Split conformal prediction with the score 1 - p_label (Sadinle et al. 2019): the ceil((N + 1) coverage)-th
    smallest of N scores; 0, all classes, where N is too small for it.
    """
    # Never by way of 1 - p: 1 - (1 - p) may be above p, and would close the very class it was taken from.
    falling = -np.sort(-chances[np.arange(len(labels)), labels])
    place = int(np.ceil((len(falling) + 1) * coverage))
    return float(falling[place - 1]) if place <= len(falling) else 0.0


def score_thresholds(
    chances: Floats, labels: Labels, *, classes: Sequence[str], precision: float
) -> Mapping[str, float]:
    """For each class the least probability from which on `precision` of its namings are right.

    2, which none reaches, where no probability will do. A class that is named fewer than five times has the
    threshold of all classes together.
    """
    named = chances.argmax(axis=1)
    best, right = chances.max(axis=1), named == labels
    overall = _threshold(best, right, precision=precision)
    thresholds = {}
    for place, name in enumerate(classes):
        own = named == place
        enough = own.sum() >= _FEWEST
        thresholds[name] = _threshold(best[own], right[own], precision=precision) if enough else overall
    return thresholds


def _threshold(best: Floats, right: npt.NDArray[np.bool_], *, precision: float) -> float:
    order = np.argsort(-best, kind="stable")
    falling = best[order]
    share = np.cumsum(right[order]) / np.arange(1, len(order) + 1)
    # Equal probabilities, usual with INT8's 256 levels, are sure together or not at all.
    whole = np.append(falling[1:] != falling[:-1], True)
    inside = np.flatnonzero(whole & (share >= precision))
    return float(falling[inside[-1]]) if len(inside) else _NEVER

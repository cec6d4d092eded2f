"""The parity gate: two runtimes must say the same about real images."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from holotype.bundle import Golden, Precision
from holotype.dataset import Dataset, Split
from holotype.errors import ParityError
from holotype.policy import Policy, probabilities, total_variation
from holotype.preprocess import Pixels
from holotype.runtime import Runtime

__all__ = [
    "LEAST_IMAGES",
    "LIMITS",
    "Flip",
    "Limits",
    "Parity",
    "check_enough",
    "check_parity",
    "choose_golden",
    "parity_record",
    "sample_rows",
]

LEAST_IMAGES = 64


@dataclass(frozen=True)
class Limits:
    """How far a candidate may be from its reference.

    `flips` is the share of labels that may change where the reference's margin exceeds `margin`; `shift` the
    largest mean total variation distance of probabilities; `gap` the largest difference of any.
    """

    flips: float
    margin: float
    shift: float
    gap: float


LIMITS: dict[Precision, Limits] = {
    # Sums in another order: two classes closer than 2e-4 may swap places, nothing else.
    "fp32": Limits(flips=0.0, margin=2e-4, shift=1e-4, gap=1e-4),
    "fp16": Limits(flips=0.01, margin=0.0, shift=0.01, gap=1.0),
    "bf16": Limits(flips=0.02, margin=0.0, shift=0.02, gap=1.0),
    "int8": Limits(flips=0.03, margin=0.0, shift=0.05, gap=1.0),
}
"""By the arithmetic of the less exact side."""

_ORDER: tuple[Split, ...] = ("validation", "test", "train")


@dataclass(frozen=True)
class Flip:
    """An image that the two runtimes give different labels."""

    path: str
    reference: str
    candidate: str
    margin: float


@dataclass(frozen=True)
class Parity:
    """The outcome of a gate that was passed.

    `flips` are within its `limits`; `ties` are labels that changed where the reference's two best classes
    were within `limits.margin`, which are no flips. `shift` is the mean total variation distance.
    """

    images: int
    largest_difference: float
    shift: float
    flips: tuple[Flip, ...]
    reference: str
    candidate: str
    ties: tuple[Flip, ...]
    limits: Limits


def check_parity(
    reference: Runtime,
    candidate: Runtime,
    *,
    images: Pixels,
    paths: Sequence[str],
    classes: Sequence[str],
    policy: Policy,
    limits: Limits = LIMITS["fp32"],
) -> Parity:
    """Push `uint8[N, H, W, 3]` (N >= 64) through both, in batches of several sizes.

    Raises `ParityError` where `limits` are exceeded; the error lists the flips.
    """
    check_enough(len(images))
    sure = probabilities(_run(reference, images, sizes=(16,)), policy=policy)
    # The candidate also shows that its batch dimension is dynamic.
    tried = probabilities(_run(candidate, images, sizes=(1, 16, 7)), policy=policy)
    ordered = np.sort(sure, axis=1)
    margin = ordered[:, -1] - ordered[:, -2]
    before, after = sure.argmax(axis=1), tried.argmax(axis=1)
    changed = [
        Flip(paths[i], classes[before[i]], classes[after[i]], float(margin[i]))
        for i in np.flatnonzero(before != after).tolist()
    ]
    ties = tuple(flip for flip in changed if flip.margin <= limits.margin)
    flips = tuple(flip for flip in changed if flip not in ties)
    gap = float(np.abs(sure - tried).max())
    shift = total_variation(sure, tried)
    inside = len(flips) <= limits.flips * len(images) and shift <= limits.shift and gap <= limits.gap
    if not inside:  # as for NaN
        listed = (
            ", ".join(f"{flip.path} ({flip.reference} → {flip.candidate})" for flip in flips[:10]) or "none"
        )
        listed += f"; {len(ties)} ties are not counted" if ties else ""
        raise ParityError(
            f"{candidate.name} differs from {reference.name} by {gap:.2g} in probability (limit"
            f" {limits.gap:g}), by {shift:.2g} on average (limit {limits.shift:g}), and flips {len(flips)} of"
            f" {len(images)} labels (limit {limits.flips:.0%}): {listed}",
            fix="the export is refused; report the architecture and library versions",
        )
    return Parity(len(images), gap, shift, flips, reference.name, candidate.name, ties, limits)


def parity_record(parity: Parity) -> dict[str, Any]:
    """What a manifest keeps of a gate that was passed: its figures and limits, flips and ties as numbers."""
    return asdict(parity) | {"flips": len(parity.flips), "ties": len(parity.ties)}


def choose_golden(runtime: Runtime, images: Pixels) -> Golden:
    """Four of `uint8[N, H, W, 3]` to keep with their logits: the two least certain, and two others.

    A model that has gone wrong shows it first where it was unsure.
    """
    logits = _run(runtime, images, sizes=(16,))
    ordered = np.sort(logits, axis=1)
    unsure = np.argsort(ordered[:, -1] - ordered[:, -2], kind="stable")
    rows = np.unique(np.concatenate([unsure[:2], [0, len(images) - 1]]))
    return Golden(images[rows], logits[rows])


def check_enough(images: int) -> None:
    """`ParityError` where a dataset has fewer real images than the gate needs."""
    if images < LEAST_IMAGES:
        raise ParityError(
            f"the parity gate needs {LEAST_IMAGES} real images, the dataset has {images}",
            fix="add images",
        )


def sample_rows(dataset: Dataset, *, count: int, without: Collection[int] = ()) -> npt.NDArray[np.int64]:
    """`count` rows for the gate, spread over classes: of validation, then of the other splits.

    `without` are rows whose files have broken since the dataset was read.
    """
    chosen: list[npt.NDArray[np.int64]] = []
    for split in _ORDER:
        lacking = count - sum(len(rows) for rows in chosen)
        if lacking > 0 and split in dataset.splits:
            rows = np.setdiff1d(dataset.rows(split), list(without))
            chosen.append(
                rows[np.linspace(0, len(rows) - 1, min(lacking, len(rows))).round().astype(np.int64)]
            )
    return np.concatenate(chosen)


def _run(runtime: Runtime, images: Pixels, *, sizes: Sequence[int]) -> npt.NDArray[np.float32]:
    parts = [runtime.run(images[start:stop]).logits for start, stop in _cuts(len(images), sizes)]
    return np.concatenate(parts)


def _cuts(total: int, sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    start, turn = 0, 0
    while start < total:
        stop = min(start + sizes[turn % len(sizes)], total)
        yield start, stop
        start, turn = stop, turn + 1

"""The parity gate: two runtimes must say the same about real images."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from holotype.bundle import Golden
from holotype.dataset import Dataset, Split
from holotype.errors import ParityError
from holotype.policy import Policy, probabilities
from holotype.preprocess import Pixels
from holotype.runtime import Runtime

__all__ = [
    "LEAST_IMAGES",
    "MARGIN",
    "TOLERANCE",
    "Flip",
    "Parity",
    "check_enough",
    "check_parity",
    "choose_golden",
    "sample_rows",
]

LEAST_IMAGES = 64
MARGIN = 2e-4
"""Two classes closer than this in probability may swap places."""
TOLERANCE = 1e-4
"""Largest difference of any probability, for fp32 models."""


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
    """The outcome of a gate that was passed."""

    images: int
    largest_difference: float
    reference: str
    candidate: str


def check_parity(
    reference: Runtime,
    candidate: Runtime,
    *,
    images: Pixels,
    paths: Sequence[str],
    classes: Sequence[str],
    policy: Policy,
) -> Parity:
    """Push `uint8[N, H, W, 3]` (N >= 64) through both, in batches of several sizes.

    Raises `ParityError` unless the labels agree wherever the reference's margin exceeds 2e-4 and every
    probability is within 1e-4; the error lists the flips.
    """
    check_enough(len(images))
    sure = probabilities(_run(reference, images, sizes=(16,)), policy=policy)
    # The candidate also shows that its batch dimension is dynamic.
    tried = probabilities(_run(candidate, images, sizes=(1, 16, 7)), policy=policy)
    ordered = np.sort(sure, axis=1)
    margin = ordered[:, -1] - ordered[:, -2]
    before, after = sure.argmax(axis=1), tried.argmax(axis=1)
    flips = [
        Flip(paths[i], classes[before[i]], classes[after[i]], float(margin[i]))
        for i in np.flatnonzero((before != after) & (margin > MARGIN)).tolist()
    ]
    gap = float(np.abs(sure - tried).max())
    if flips or not gap <= TOLERANCE:  # also true for NaN
        listed = (
            ", ".join(f"{flip.path} ({flip.reference} → {flip.candidate})" for flip in flips[:10]) or "none"
        )
        raise ParityError(
            f"{candidate.name} differs from {reference.name} by {gap:.2g} in probability"
            f" (limit {TOLERANCE:g}) and flips {len(flips)} of {len(images)} labels: {listed}",
            fix="the export is refused; report the architecture and library versions",
        )
    return Parity(len(images), gap, reference.name, candidate.name)


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

"""What was recorded of a run, and the numbers that the rules take from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from holotype.config import TrainConfig
from holotype.report import Fault, Finding
from holotype.review import read_suspects
from holotype.runlog import Row

__all__ = [
    "LEAST_EPOCHS",
    "LEAST_ROWS",
    "Evidence",
    "Floats",
    "by_stage",
    "column",
    "finding_of",
    "percent",
    "ratios_of",
    "standard_error",
    "suspect_paths",
    "thirds",
]

Floats = npt.NDArray[np.float64]

LEAST_EPOCHS = 3
"""Epochs, or rows of steps.csv, below which a trend is none."""
LEAST_ROWS = 6
"""Rows of steps.csv, of which the first third settles and the last is compared with it."""


@dataclass(frozen=True)
class Evidence:
    """What was recorded of a run with `config`.

    Rows as in metrics.csv, steps.csv and timings.csv; `counts` of images by class and split. Of the training
    images, in the dataset's order: `sample_losses: float32[N]`, -ln of the label's probability in the last
    epoch (NaN where not shown), and `suspects: bool[N]`, whether an audit doubts the label (None: exactly
    this data has no audit). `recall` is the accuracy of the last weights on training images as validation
    shows them, without augmentation and dropout; `uncached` how many images the cache does not hold.
    """

    config: TrainConfig
    metrics: Sequence[Row]
    steps: Sequence[Row]
    timings: Sequence[Row]
    counts: Mapping[str, Mapping[str, int]]
    sample_losses: npt.NDArray[np.float32] | None = None
    suspects: npt.NDArray[np.bool_] | None = None
    recall: float | None = None
    uncached: int = 0
    interrupted: bool = False

    @property
    def epochs(self) -> list[Row]:
        """The rows of fine-tuning; a fitted head has no steps to diagnose."""
        return [row for row in self.metrics if row.get("stage") == "fine-tune"]

    @property
    def diverged(self) -> bool:
        """Whether the run ended with a loss or gradient that is no number."""
        last = self.steps[-1] if self.steps else {}
        return not all(math.isfinite(float(last.get(name, 0.0))) for name in ("loss", "gradient_norm"))

    @property
    def finite_steps(self) -> Sequence[Row]:
        return self.steps[:-1] if self.diverged else self.steps

    @property
    def train_accuracy(self) -> float:
        """`recall`, or else the mean over the last epoch, of augmented images and changing weights."""
        return self.recall if self.recall is not None else float(self.epochs[-1]["train_accuracy"])

    @property
    def never_stepped(self) -> bool:
        """Whether the very first step gave no number: whatever it comes from, no step has made it."""
        return self.diverged and not self.finite_steps

    @property
    def tells_labels(self) -> bool:
        """Whether there are losses of single labels: those of mixed images are of two."""
        mixed = self.config.augment.mixup > 0 or self.config.augment.cutmix > 0
        return not mixed and self.sample_losses is not None and bool(np.isfinite(self.sample_losses).any())

    def images(self, split: str) -> int:
        return sum(by_split.get(split, 0) for by_split in self.counts.values())


def suspect_paths(folder: Path, root_hash: str) -> frozenset[str] | None:
    """The images whose label an audit doubts, from a dataset's cache folder; None without such an audit."""
    found = read_suspects(folder)
    if found is None or found.root_hash != root_hash:
        return None
    return frozenset(item.path for item in found.items)


def finding_of(
    name: Fault, evidence: str, meaning: str, settings: Sequence[str], *, severity: str = "warning"
) -> Finding:
    """A finding; one that no setting addresses is a note, for nobody can act on a warning of it."""
    severity = severity if settings else "note"
    return Finding.model_validate(
        {"name": name, "severity": severity, "evidence": evidence, "meaning": meaning, "settings": settings}
    )


def column(rows: Sequence[Row], name: str) -> Floats:
    """`float64[rows]`, NaN where a row has no such number."""
    return np.array([float(row.get(name, math.nan)) for row in rows], dtype=np.float64)


def by_stage(rows: Sequence[Row], kind: str) -> dict[str, float]:
    """The median over the rows of `KIND/STAGE`, by stage in the order of the network."""
    names = {name for row in rows for name in row if name.startswith(f"{kind}/")}
    stages = sorted((name.partition("/")[2] for name in names), key=_depth)
    return {stage: float(np.nanmedian(column(rows, f"{kind}/{stage}"))) for stage in stages}


def _depth(stage: str) -> tuple[int, int]:
    """Where a stage is: while they are unfrozen one by one, the last ones are recorded first."""
    order = {"stem": 0, "final": 2, "head": 3}
    return order.get(stage, 1), int(stage.rpartition(" ")[2]) if stage.startswith("stage ") else 0


def ratios_of(rows: Sequence[Row]) -> Floats:
    """Of each row that has them the median of its stages' update ratios: no stage of odd size decides it."""
    found = [[float(v) for name, v in row.items() if name.startswith("update_ratio/")] for row in rows]
    ratios = np.array([np.median(values) for values in found if values], dtype=np.float64)
    return ratios[np.isfinite(ratios)]


def thirds(values: Floats) -> tuple[float, float]:
    """The medians of the first and of the last third."""
    third = max(len(values) // 3, 1)
    return float(np.nanmedian(values[:third])), float(np.nanmedian(values[-third:]))


def standard_error(share: float, images: int) -> float:
    """Of a share of so many images, as if two more had been seen, one right and one wrong."""
    smoothed = (share * images + 1) / (images + 2)
    return math.sqrt(smoothed * (1 - smoothed) / (images + 2))


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"

"""Which split an image belongs to: by a hash, so that adding files never moves the others."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from holotype.dataset.listing import SPLITS, Split
from holotype.errors import DatasetError

__all__ = ["Fractions", "check_classes", "choose_split", "deviation"]


@dataclass(frozen=True)
class Fractions:
    """Shares in [0, 1) of validation and test; the rest is train."""

    validation: float
    test: float


def choose_split(group: str, *, fractions: Fractions) -> Split:
    """The split of a group: fixed thresholds on a uniform hash of its name.

    The lowest part of the range is test, the next validation, the rest train, so changing one share moves
    only the images at that threshold.
    """
    digest = hashlib.sha256(f"holotype split\0{group}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    if position < fractions.test:
        return "test"
    return "validation" if position < fractions.test + fractions.validation else "train"


def deviation(labels: Sequence[str], splits: Sequence[Split], *, fractions: Fractions) -> dict[str, float]:
    """For each class, the largest gap between a split's actual and wanted share of it, in [0, 1]."""
    wanted = {
        "train": 1 - fractions.validation - fractions.test,
        "validation": fractions.validation,
        "test": fractions.test,
    }
    totals = Counter(labels)
    cells = Counter(zip(labels, splits, strict=True))
    return {
        label: max(abs(cells[label, split] / total - wanted[split]) for split in SPLITS)
        for label, total in sorted(totals.items())
    }


def check_classes(labels: Sequence[str], splits: Sequence[Split]) -> None:
    """`DatasetError` where there are fewer than two classes, or a class has no image in a used split."""
    classes = sorted(set(labels))
    if len(classes) < 2:
        raise DatasetError(
            f"has only one class ({classes[0]!r})" if classes else "has no readable images",
            fix="a classifier needs two or more class folders",
        )
    cells = Counter(zip(labels, splits, strict=True))
    totals = Counter(labels)
    used = [split for split in SPLITS if split in set(splits)]
    lacking = [(label, split) for split in used for label in classes if not cells[label, split]]
    if lacking:
        label, split = lacking[0]
        more = f" (and {len(lacking) - 1} more such gaps)" if len(lacking) > 1 else ""
        raise DatasetError(
            f"class {label!r} has no image in {split}: it has {totals[label]} in all{more}",
            fix="add images of it, or place them yourself in train/, validation/ and test/ folders",
        )

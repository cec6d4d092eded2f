"""Balance of the classes: counts, what they are worth, and what to do where they differ."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from holotype.audit.contract import Balance
from holotype.dataset import SPLITS, Split
from holotype.imbalance import remedies

__all__ = ["balance"]


def balance(labels: Sequence[str], splits: Sequence[Split], *, rule: float) -> Balance:
    """Count N images by class and split and compare the largest class with the smallest.

    `rule` is the largest allowed max/min ratio. `collect` counts the images that a class lacks for it, given
    that the largest class stays as it is. The remedies are chosen by the training images, for nothing else is
    trained on; see `imbalance.remedies`.
    """
    counts = Counter(labels)
    cells = Counter(zip(labels, splits, strict=True))
    names = sorted(counts)
    present = [split for split in SPLITS if split in set(splits)]
    train = [cells[name, "train"] if "train" in present else counts[name] for name in names]
    largest = max(counts.values(), default=0)
    # Less a hair: 21 / 1.4 is a little above 15 in floats.
    least = math.ceil(largest / rule - 1e-9)
    return Balance(
        counts={name: counts[name] for name in names},
        by_split={name: {split: cells[name, split] for split in present} for name in names},
        max_min_ratio=largest / min(counts.values()) if counts else None,
        entropy=_entropy(counts),
        effective=_effective(counts),
        remedies=tuple(
            f"fit.imbalance={remedy}" for remedy in remedies(np.array(train, dtype=np.int64), rule=rule)
        ),
        collect={name: least - counts[name] for name in names if counts[name] < least},
    )


def _entropy(counts: Mapping[str, int]) -> float:
    """Shannon entropy of the classes over that of as many equal ones."""
    if len(counts) < 2:
        return 1.0
    total = sum(counts.values())
    entropy = -sum(n / total * math.log(n / total) for n in counts.values())
    return min(entropy / math.log(len(counts)), 1.0)


def _effective(counts: Mapping[str, int]) -> dict[str, float]:
    """(1 - b^n) / (1 - b) with b = 1 - 1/N for n of N images: how many of them still told something new."""
    total = sum(counts.values())
    if total < 2:
        return {name: float(n) for name, n in sorted(counts.items())}
    log_b = math.log1p(-1 / total)
    return {name: -math.expm1(n * log_b) * total for name, n in sorted(counts.items())}

"""Balance of the classes: counts, what they are worth, and what to do where they differ."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from holotype.audit.contract import Balance
from holotype.dataset import SPLITS, Split

__all__ = ["balance"]

# Largest over smallest class up to which a remedy is the first choice.
_WEIGHTS, _ADJUST = 5.0, 20.0


def balance(labels: Sequence[str], splits: Sequence[Split], *, rule: float) -> Balance:
    """Count N images by class and split and compare the largest class with the smallest.

    `rule` is the largest allowed max/min ratio. `collect` counts the images that a class lacks for it, given
    that the largest class stays as it is. The remedies are chosen by the training images, for nothing else is
    trained on; see `_remedies`.
    """
    counts = Counter(labels)
    cells = Counter(zip(labels, splits, strict=True))
    names = sorted(counts)
    present = [split for split in SPLITS if split in set(splits)]
    train = {name: cells[name, "train"] for name in names} if "train" in present else counts
    largest = max(counts.values(), default=0)
    # Less a hair: 21 / 1.4 is a little above 15 in floats.
    least = math.ceil(largest / rule - 1e-9)
    return Balance(
        counts={name: counts[name] for name in names},
        by_split={name: {split: cells[name, split] for split in present} for name in names},
        max_min_ratio=largest / min(counts.values()) if counts else None,
        entropy=_entropy(counts),
        effective=_effective(counts),
        remedies=_remedies(train, rule=rule),
        collect={name: least - counts[name] for name in names if counts[name] < least},
    )


def _remedies(counts: Mapping[str, int], *, rule: float) -> tuple[str, ...]:
    """Settings of `train` against the imbalance of its images, the first choice first.

    Within `rule`: none. Up to 5: class-balanced weights (Cui et al. 2019, Class-Balanced Loss Based on
    Effective Number of Samples); a weight this small costs no stability. Beyond: logit adjustment (Menon et
    al. 2021, Long-tail learning via logit adjustment), which stays consistent for the balanced error however
    large the ratio is, where a large weight only makes a separable training set converge elsewhere (Byrd and
    Lipton 2019, What is the Effect of Importance Weighting in Deep Learning?), and was better than weights,
    focal loss and sampling at ratios of 100 to 500. Beyond 20 drawing the classes evenly is worth a second
    run: on a frozen backbone it is the cRT of Kang et al. 2020, Decoupling Representation and Classifier.
    Focal loss weighs hard images, not rare classes, so no ratio calls for it.
    """
    smallest, largest = min(counts.values(), default=0), max(counts.values(), default=0)
    if smallest == 0:
        return ()  # no setting trains a class without images
    ratio = largest / smallest
    if ratio <= rule:
        return ()
    if ratio <= _WEIGHTS:
        return ("fit.imbalance=weights",)
    return ("fit.imbalance=logit-adjust", *(("fit.imbalance=sampler",) if ratio > _ADJUST else ()))


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

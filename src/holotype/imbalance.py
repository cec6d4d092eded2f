"""Unequal classes: what an image of each weighs, and the one rule for what is done about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from holotype.bundle import write_text
from holotype.config import GatesConfig

__all__ = ["Remedy", "class_weights", "read_rule", "remedies", "settle", "shown_counts", "write_rule"]

Remedy = Literal["none", "weights", "sampler", "focal", "logit-adjust"]

Counts = npt.NDArray[np.int64]
Shown = npt.NDArray[np.float64]


def shown_counts(labels: npt.NDArray[np.int64], *, classes: int, weights: Shown | None) -> Shown:
    """How many images of each class an epoch shows in the mean, `float64[C]`.

    `labels: int64[N]` are of the training images, `weights: float64[N]` how often each is drawn, None once.
    What a loss does about unequal classes must go by these: a prior or a frequency is that of the drawn data.
    """
    return np.bincount(labels, weights=weights, minlength=classes).astype(np.float64)


def class_weights(counts: Counts | Shown) -> npt.NDArray[np.float64]:
    """N / (C n_c) for N images, n_c of each of C classes, every one above 0: inverse frequency.

    The mean weight of the N images is 1, and all classes weigh the same as a whole.
    """
    return np.asarray(counts.sum() / (len(counts) * counts), dtype=np.float64)


def remedies(counts: Counts, *, rule: float) -> tuple[Remedy, ...]:
    """Settings of `fit.imbalance` against `int64[C]` training images per class, the first choice first.

    Within `rule`, the largest max/min ratio that counts as equal: none. Beyond: logit adjustment (Menon et
    al. 2021, Long-tail learning via logit adjustment), which is consistent for the balanced error however
    large the ratio is, where large weights only make a separable training set converge elsewhere (Byrd and
    Lipton 2019, What is the Effect of Importance Weighting in Deep Learning?). Measured on heads at ratios
    of 2 to 100 (benchmarks/long_tail.py) no other remedy is better, from 20 on all are worse. From there
    drawing the classes evenly is worth a second run: on a frozen backbone it is the cRT of Kang et al. 2020,
    Decoupling Representation and Classifier. Focal loss weighs hard images, not rare classes, so no ratio
    calls for it. A class without images has no remedy.
    """
    smallest, largest = int(counts.min(initial=np.iinfo(np.int64).max)), int(counts.max(initial=0))
    if smallest == 0 or largest / smallest <= rule:
        return ()
    return ("logit-adjust", "sampler") if largest / smallest > 20 else ("logit-adjust",)


def settle(value: Remedy | Literal["auto"], counts: Counts, *, rule: float | None = None) -> Remedy:
    """What `fit.imbalance` means for `int64[C]` training images per class.

    "auto" is what an audit advises, by the `rule` that was its gate for the balance, or else by the default.
    """
    if value != "auto":
        return value
    return next(iter(remedies(counts, rule=GatesConfig().balance if rule is None else rule)), "none")


def write_rule(folder: Path, root_hash: str, rule: float) -> None:
    """Keep the rule by which an audit judged the dataset `root_hash` in its cache folder."""
    write_text(_file(folder, root_hash), json.dumps({"balance": rule}))


def read_rule(folder: Path, root_hash: str) -> float | None:
    """The rule of the last audit of exactly this dataset; None without one."""
    try:
        return float(json.loads(_file(folder, root_hash).read_text())["balance"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _file(folder: Path, root_hash: str) -> Path:
    return folder / f"balance-{root_hash[:16]}.json"

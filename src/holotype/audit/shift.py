"""Distribution shift between splits: can a classifier tell a training image from one of another split?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from holotype.audit.contract import Shift
from holotype.dataset import Split

__all__ = ["split_shift"]

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]

_FOLDS = 5
_LEAST = 50
_MOST = 2_000
_COMPONENTS = 64


def split_shift(
    embeddings: Floats, is_train: Flags, *, groups: Sequence[int] | Counts, seed: int, split: Split
) -> Shift | None:
    """Cross-validated AUC of a classifier of train against `split`; None where that cannot be measured.

    `embeddings` is `float32[N, D]` of the images of both, `is_train` `bool[N]`, `groups` `int64[N]`: copies
    of one image share a number and never lie on both sides of a fold. At most 2,000 images of each side are
    drawn; with less than 50 of a side, or copies of a handful of images, nothing is measured. A logistic
    regression on 64 principal components is fitted in five folds (a classifier two-sample test: Lopez-Paz and
    Oquab 2017). The AUC is the mean over folds and its 95 % interval normal, with the variance of DeLong et
    al. 1988 of each fold divided by the square of their number (LeDell et al. 2015).
    """
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold

    rows = _draw(is_train, seed=seed)
    if rows is None:
        return None
    inputs, target, owner = embeddings[rows], is_train[rows], np.asarray(groups)[rows]
    if len(np.unique(owner)) < _FOLDS or not np.ptp(inputs, axis=0).any():
        return None
    # Which side an image is on takes no part in this, so it may see the images of the fold that is left out.
    parts = min(_COMPONENTS, inputs.shape[1], len(inputs) // 2)
    inputs = PCA(parts, whiten=True, svd_solver="covariance_eigh").fit_transform(inputs)
    folds = StratifiedGroupKFold(_FOLDS, shuffle=True, random_state=seed)
    model = LogisticRegression(C=0.1, max_iter=1000)
    results = []
    for train, test in folds.split(inputs, target, owner):
        # A cluster of copies may be so large that it leaves a fold nothing to compare.
        if min(np.bincount(target[side], minlength=2).min() for side in (train, test)) < 2:
            continue
        model.fit(inputs[train], target[train])
        results.append(_auc(model.decision_function(inputs[test]), target[test]))
    if not results:
        return None
    auc = sum(value for value, _ in results) / len(results)
    spread = 1.96 * sum(variance for _, variance in results) ** 0.5 / len(results)
    return Shift(split=split, auc=auc, low=max(auc - spread, 0.0), high=min(auc + spread, 1.0))


def _draw(is_train: Flags, *, seed: int) -> Counts | None:
    """At most 2,000 rows of each side, in order; None where one has too few to say anything."""
    rng = np.random.default_rng(seed)
    sides = [np.flatnonzero(is_train), np.flatnonzero(~is_train)]
    if min(len(side) for side in sides) < _LEAST:
        return None
    drawn = [rng.choice(side, min(len(side), _MOST), replace=False) for side in sides]
    return np.sort(np.concatenate(drawn)).astype(np.int64)


def _auc(scores: Doubles, positive: Flags) -> tuple[float, float]:
    """Area under the ROC curve and its variance, by the structural components of DeLong et al. 1988.

    Of m positives and n negatives, V10 of a positive is the share of negatives below it (a tie counts half),
    V01 of a negative the share of positives above it. AUC = mean V10 = mean V01; its variance is
    var V10 / m + var V01 / n.
    """
    high, low = scores[positive], scores[~positive]
    share_below = _share_below(high, low)
    share_above = 1 - _share_below(low, high)
    variance = share_below.var(ddof=1) / len(high) + share_above.var(ddof=1) / len(low)
    return float(share_below.mean()), float(variance)


def _share_below(values: Doubles, others: Doubles) -> Doubles:
    """For each of `values` the share of `others` that are smaller, equal ones counting half."""
    others = np.sort(others)
    both = np.searchsorted(others, values, "left") + np.searchsorted(others, values, "right")
    return np.asarray(both / (2 * len(others)), dtype=np.float64)

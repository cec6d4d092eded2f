"""Agreement between annotators on nominal labels, in numpy, each coefficient with a bootstrap interval.

Every function takes a table of votes, `int64[N, R]`: the class that each of R annotators gave to each of N
images, -1 where there is no vote. In the formulas n_ik is the number of votes for class k on image i, and
m_i the number of all votes on it; an image is compared where m_i >= 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from holotype.metrics import Interval

__all__ = [
    "Coefficients",
    "PairAgreement",
    "cohen_kappa",
    "confusions",
    "count_votes",
    "disagreements",
    "fleiss_kappa",
    "gwet_ac1",
    "krippendorff_alpha",
    "leave_one_out_alpha",
    "measure_agreement",
    "observed_agreement",
    "specific_agreement",
]

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

_Statistic = Callable[[Floats], Floats]
"""Weights of the rows of a table, `float64[B, N]`, → one or more coefficients of each, `float64[B, S]`."""

_BLOCK = 4_000_000


@dataclass(frozen=True)
class PairAgreement:
    """Two annotators, by position, on the `images` that both voted on. `agreement` is NaN where none."""

    first: int
    second: int
    images: int
    agreement: float
    kappa: Interval


@dataclass(frozen=True)
class Coefficients:
    """All coefficients of a table; NaN where undefined. Tuples are by class or by annotator, in order."""

    observed: Interval
    cohen: Interval
    fleiss: Interval
    alpha: Interval
    ac1: Interval
    class_observed: tuple[Interval, ...]
    class_alpha: tuple[Interval, ...]
    with_others: tuple[Interval, ...]
    alpha_without: tuple[Interval, ...]
    pairs: tuple[PairAgreement, ...]


def measure_agreement(votes: Counts, *, classes: int, samples: int = 2000, seed: int = 0) -> Coefficients:
    """Every coefficient of `int64[N, R]` with its 95 % interval.

    Percentile bootstrap over compared images, the interval found to cover best for nominal coefficients by
    Zapf et al. (2016, BMC Med. Res. Methodol. 16:93). A sample for which a coefficient is undefined is left
    out of its interval.
    """
    rows, weights = _distinct(votes)
    counts = count_votes(rows, classes=classes)
    pairs = _pairs(rows)
    statistics: dict[str, _Statistic] = {
        "observed": _observed(counts),
        "alpha": _alpha(counts),
        "fixed": _fixed_chance(counts),
        "cohen": _cohen(rows, pairs, classes=classes),
        "with_others": _with_others(rows, counts),
        "alpha_without": _leave_one_out(rows, classes=classes),
    }
    values = {name: statistic(weights[None])[0] for name, statistic in statistics.items()}
    draws: dict[str, list[Floats]] = {name: [] for name in statistics}
    for block in _resample(weights, samples=samples, rng=np.random.default_rng(seed)):
        for name, statistic in statistics.items():
            draws[name].append(statistic(block))
    intervals = {name: _intervals(values[name], np.concatenate(parts)) for name, parts in draws.items()}
    observed, alpha, cohen = intervals["observed"], intervals["alpha"], intervals["cohen"]
    fleiss, ac1 = intervals["fixed"]
    return Coefficients(
        observed=observed[0],
        cohen=cohen[0],
        fleiss=fleiss,
        alpha=alpha[0],
        ac1=ac1,
        class_observed=observed[1:],
        class_alpha=alpha[1:],
        with_others=intervals["with_others"],
        alpha_without=intervals["alpha_without"],
        pairs=tuple(
            _pair_agreement(votes, pair, kappa=kappa) for pair, kappa in zip(pairs, cohen[1:], strict=True)
        ),
    )


def count_votes(votes: Counts, *, classes: int) -> Counts:
    """`int64[N, classes]`: n_ik, the number of votes for each class on each image."""
    counts = np.zeros((len(votes), classes), dtype=np.int64)
    for column in votes.T:
        rows = np.flatnonzero(column >= 0)
        counts[rows, column[rows]] += 1
    return counts


def observed_agreement(votes: Counts, *, classes: int) -> float:
    """Raw agreement: the share of pairs of votes on one image that are equal, in [0, 1].

    Σ_i Σ_k n_ik (n_ik - 1) / Σ_i m_i (m_i - 1).
    """
    return float(_all(_observed(count_votes(votes, classes=classes)), len(votes))[0])


def specific_agreement(votes: Counts, *, classes: int) -> Floats:
    """`float64[classes]`: where one annotator chose class k, the chance that another did too.

    Σ_i n_ik (n_ik - 1) / Σ_i n_ik (m_i - 1), the proportion of specific agreement (Fleiss 1981, Statistical
    Methods for Rates and Proportions; Cicchetti & Feinstein 1990 for two annotators). NaN for a class without
    votes on compared images.
    """
    return _all(_observed(count_votes(votes, classes=classes)), len(votes))[1:]


def krippendorff_alpha(votes: Counts, *, classes: int) -> float:
    """Krippendorff's alpha for nominal data (Krippendorff 2011, Computing Krippendorff's Alpha-Reliability).

    1 - D_o / D_e = 1 - (n - 1) Σ_i Σ_k n_ik (m_i - n_ik) / (m_i - 1) / Σ_k n_k (n - n_k), over compared
    images; n_k is the number of votes for class k there, n that of all. 1: perfect, 0: as by chance. NaN
    where all votes are of one class or no image is compared.
    """
    return float(_all(_alpha(count_votes(votes, classes=classes)), len(votes))[0])


def leave_one_out_alpha(votes: Counts, *, classes: int) -> Floats:
    """`float64[R]`: alpha of the votes of all annotators but one; above the alpha of all, that one is odd."""
    return _all(_leave_one_out(votes, classes=classes), len(votes))


def fleiss_kappa(votes: Counts, *, classes: int) -> float:
    """Fleiss' kappa (Fleiss 1971, Psychol. Bull. 76:378), for unequal numbers of votes as in Gwet (2014).

    (P - P_e) / (1 - P_e), over compared images: P is the mean of Σ_k n_ik (n_ik - 1) / (m_i (m_i - 1)), P_e
    is Σ_k π_k² with π_k the mean of n_ik / m_i. With equal m_i that is Fleiss' own. NaN where all votes are
    of one class or no image is compared. Gwet (2014, Handbook of Inter-Rater Reliability) lets images with
    one vote into π_k; here every coefficient is of the same images.
    """
    return float(_all(_fixed_chance(count_votes(votes, classes=classes)), len(votes))[0])


def gwet_ac1(votes: Counts, *, classes: int) -> float:
    """Gwet's AC1 (Gwet 2008, Br. J. Math. Stat. Psychol. 61:29), with missing votes as in `fleiss_kappa`.

    (P - P_e) / (1 - P_e) with P and π_k as in `fleiss_kappa` and P_e = Σ_k π_k (1 - π_k) / (classes - 1).
    Unlike the kappas it does not fall when one class is far more frequent than the others. NaN where
    `classes` is 1 or no image is compared.
    """
    return float(_all(_fixed_chance(count_votes(votes, classes=classes)), len(votes))[1])


def cohen_kappa(votes: Counts, *, classes: int) -> Floats:
    """`float64[R, R]`: Cohen's kappa (Cohen 1960) of each pair of annotators on the images both voted on.

    (p_o - p_e) / (1 - p_e), p_e = Σ_k p_ak p_bk of their shares of class k there. NaN where both used only
    one and the same class, where they share no image, and on the diagonal.
    """
    pairs = _pairs(votes)
    kappas = _all(_cohen(votes, pairs, classes=classes), len(votes))[1:]
    matrix = np.full((votes.shape[1], votes.shape[1]), np.nan)
    for (first, second), kappa in zip(pairs, kappas, strict=True):
        matrix[first, second] = matrix[second, first] = kappa
    return matrix


def disagreements(votes: Counts, *, classes: int) -> Counts:
    """`int64[classes, classes]`: how many pairs of votes on one image are for these two classes.

    Symmetric, each unordered pair of votes counted once at [a, b] and at [b, a]; the diagonal is 0.
    """
    counts = count_votes(votes, classes=classes)
    matrix = counts.T @ counts
    np.fill_diagonal(matrix, 0)
    return np.asarray(matrix, dtype=np.int64)


def confusions(votes: Counts, reference: Counts, *, classes: int) -> Counts:
    """`int64[R, classes, classes]`: rows are the classes of `reference`, `int64[N]`, columns the votes.

    Images without a reference (-1) are left out.
    """
    result = np.zeros((votes.shape[1], classes, classes), dtype=np.int64)
    for matrix, column in zip(result, votes.T, strict=True):
        both = (column >= 0) & (reference >= 0)
        np.add.at(matrix, (reference[both], column[both]), 1)
    return result


def _observed(counts: Counts) -> _Statistic:
    """[:, 0] raw agreement, [:, 1:] specific agreement of each class: the sums of all, and of each."""
    votes = counts.sum(axis=1, keepdims=True)
    features = np.hstack([counts * (counts - 1), counts * (votes - 1)]).astype(np.float64)

    def statistic(weights: Floats) -> Floats:
        equal, pairs = np.hsplit(weights @ features, 2)
        return np.hstack([_ratio(equal.sum(axis=1), pairs.sum(axis=1))[:, None], _ratio(equal, pairs)])

    return statistic


def _alpha(counts: Counts) -> _Statistic:
    """[:, 0] alpha, [:, 1:] alpha of each class against the rest.

    Both the observed and the expected disagreement of all classes are sums of those of each class against
    the rest, so one pair of sums by class gives both.
    """
    votes = counts.sum(axis=1, keepdims=True)
    compared = votes >= 2
    unequal = counts * (votes - counts) / np.maximum(votes - 1, 1)
    features = np.hstack([unequal * compared, counts * compared])

    def statistic(weights: Floats) -> Floats:
        observed, by_class = np.hsplit(weights @ features, 2)
        total = by_class.sum(axis=1, keepdims=True)
        expected = by_class * (total - by_class)
        observed = (total - 1) * observed
        return 1 - np.hstack(
            [_ratio(observed.sum(axis=1), expected.sum(axis=1))[:, None], _ratio(observed, expected)]
        )

    return statistic


def _fixed_chance(counts: Counts) -> _Statistic:
    """[:, 0] Fleiss' kappa, [:, 1] Gwet's AC1: one observed agreement, two ideas of chance."""
    votes = counts.sum(axis=1, keepdims=True)
    pairs = votes * (votes - 1)
    agreement = (counts * (counts - 1)).sum(axis=1, keepdims=True) / np.maximum(pairs, 1)
    compared = pairs > 0
    features = np.hstack([agreement, compared, counts / np.maximum(votes, 1) * compared])
    classes = counts.shape[1]

    def statistic(weights: Floats) -> Floats:
        sums = weights @ features
        observed, shares = _ratio(sums[:, 0], sums[:, 1]), _ratio(sums[:, 2:], sums[:, 1:2])
        fleiss = (shares**2).sum(axis=1)
        gwet = _ratio((shares * (1 - shares)).sum(axis=1), np.full(len(sums), classes - 1.0))
        return np.column_stack([_ratio(observed - chance, 1 - chance) for chance in (fleiss, gwet)])

    return statistic


def _cohen(votes: Counts, pairs: list[tuple[int, int]], *, classes: int) -> _Statistic:
    """[:, 0] mean over the pairs for which it is defined (Light 1971), [:, 1:] Cohen's kappa of each pair."""
    eye = np.eye(classes)
    parts = []
    for first, second in pairs:
        rows = np.flatnonzero((votes[:, first] >= 0) & (votes[:, second] >= 0))
        a, b = votes[rows, first], votes[rows, second]
        parts.append((rows, np.hstack([(a == b)[:, None], eye[a], eye[b]])))

    def statistic(weights: Floats) -> Floats:
        kappas = np.empty((len(weights), len(pairs)))
        for column, (rows, features) in enumerate(parts):
            sums = weights[:, rows] @ features
            margins = sums[:, 1 : classes + 1], sums[:, classes + 1 :]
            total = margins[0].sum(axis=1)
            chance = (margins[0] * margins[1]).sum(axis=1)
            kappas[:, column] = _ratio(total * sums[:, 0] - chance, total**2 - chance)
        defined = ~np.isnan(kappas)
        mean = _ratio(np.where(defined, kappas, 0).sum(axis=1), defined.sum(axis=1))
        return np.hstack([mean[:, None], kappas])

    return statistic


def _with_others(votes: Counts, counts: Counts) -> _Statistic:
    """[:, r] share of the pairs of a vote of annotator r and another's on the same image that are equal."""
    present = votes >= 0
    same = np.take_along_axis(counts, np.maximum(votes, 0), axis=1) - 1
    others = counts.sum(axis=1, keepdims=True) - 1
    features = np.hstack([same * present, others * present]).astype(np.float64)

    def statistic(weights: Floats) -> Floats:
        return _ratio(*np.hsplit(weights @ features, 2))

    return statistic


def _leave_one_out(votes: Counts, *, classes: int) -> _Statistic:
    """[:, r] alpha without annotator r."""
    without = []
    for annotator in range(votes.shape[1]):
        others = np.delete(votes, annotator, axis=1)
        without.append(_alpha(count_votes(others, classes=classes)))

    def statistic(weights: Floats) -> Floats:
        return np.column_stack([alpha(weights)[:, 0] for alpha in without])

    return statistic


def _all(statistic: _Statistic, images: int) -> Floats:
    """`float64[S]`: the coefficients of all images, each once."""
    return np.asarray(statistic(np.ones((1, images)))[0], dtype=np.float64)


def _pairs(votes: Counts) -> list[tuple[int, int]]:
    return [(a, b) for a in range(votes.shape[1]) for b in range(a + 1, votes.shape[1])]


def _pair_agreement(votes: Counts, pair: tuple[int, int], *, kappa: Interval) -> PairAgreement:
    first, second = votes[:, pair[0]], votes[:, pair[1]]
    both = (first >= 0) & (second >= 0)
    images = int(both.sum())
    agreement = float((first[both] == second[both]).mean()) if images else float("nan")
    return PairAgreement(first=pair[0], second=pair[1], images=images, agreement=agreement, kappa=kappa)


def _distinct(votes: Counts) -> tuple[Counts, Floats]:
    """The distinct rows of compared images, and how often each occurs: all that resampling needs to know."""
    compared = (votes >= 0).sum(axis=1) >= 2
    rows, weights = np.unique(votes[compared], axis=0, return_counts=True)
    return rows, weights.astype(np.float64)


def _resample(weights: Floats, *, samples: int, rng: np.random.Generator) -> Iterator[Floats]:
    """Blocks of bootstrap weights, `float64[B, N]`, `samples` rows in all.

    Drawing how often each distinct row occurs is drawing images with replacement.
    """
    images = weights.sum()
    if not images:
        yield np.zeros((samples, 0))
        return
    block = max(_BLOCK // len(weights), 1)
    for start in range(0, samples, block):
        size = min(block, samples - start)
        yield rng.multinomial(int(images), weights / images, size=size).astype(np.float64)


def _intervals(values: Floats, draws: Floats) -> tuple[Interval, ...]:
    """The 2.5 % and 97.5 % quantiles of each column of `float64[B, S]`; NaN where the value is."""
    return tuple(
        _interval(float(value), column[~np.isnan(column)])
        for value, column in zip(values, draws.T, strict=True)
    )


def _interval(value: float, draws: Floats) -> Interval:
    if np.isnan(value) or not len(draws):
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(value, min(float(low), value), max(float(high), value))


def _ratio(top: npt.NDArray[np.generic], bottom: npt.NDArray[np.generic]) -> Floats:
    """Quotient, NaN where the divisor is 0."""
    numbers, divisors = np.broadcast_arrays(
        np.asarray(top, dtype=np.float64), np.asarray(bottom, dtype=np.float64)
    )
    return np.asarray(
        np.divide(numbers, divisors, out=np.full(numbers.shape, np.nan), where=divisors != 0),
        dtype=np.float64,
    )

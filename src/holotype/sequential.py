"""Tests that one may look at after every answer: anytime-valid confidence sequences for two arms.

For a stream of right and wrong answers, the Beta mixture of likelihoods over the likelihood at p,

    M(p) = B(r + 1/2, w + 1/2) / B(1/2, 1/2) / (p^r (1 - p)^w)      r right, w wrong,

is a martingale with mean 1 where p is the true rate (Robbins 1970; Howard, Ramdas, McAuliffe, Sekhon 2021,
Time-uniform, nonparametric, nonasymptotic confidence sequences, section 3). Of two independent arms the
product of both is one too, so by Ville's inequality the pairs (p, q) with M(p) M'(q) < 1 / alpha contain the
true pair at all times with probability 1 - alpha. The interval of a difference is what these pairs allow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import lgamma, log
from typing import Literal

import numpy as np
import numpy.typing as npt

__all__ = [
    "Arm",
    "Sequence",
    "SequentialVerdict",
    "difference",
    "happens_more",
    "log_evidence",
    "paired_difference",
    "rate",
    "ratio_is_off",
    "sequential_verdict",
]

Counts = npt.NDArray[np.int64]

_EDGE = 1e-9
_STEPS = 60
_HALF = 2 * lgamma(0.5) - lgamma(1.0)  # log B(1/2, 1/2)

SequentialVerdict = Literal["better", "not worse", "worse", "undecided"]


@dataclass(frozen=True)
class Arm:
    """Right and wrong answers of one arm."""

    right: int
    wrong: int

    @property
    def total(self) -> int:
        return self.right + self.wrong

    @property
    def rate(self) -> float:
        return self.right / self.total if self.total else 0.5


@dataclass(frozen=True)
class Sequence:
    """A difference now, and the interval that holds the true one at all times, with probability 1 - alpha."""

    value: float
    low: float
    high: float


def difference(champion: Arm, challenger: Arm, *, alpha: float) -> Sequence:
    """How much more often the challenger is right, in [-1, 1]."""

    def evidence(shift: float) -> float:
        return _least_evidence(champion, challenger, shift)

    best = challenger.rate - champion.rate
    limit = log(1 / alpha)
    return Sequence(
        value=best,
        low=_crossing(evidence, best, -1.0, limit),
        high=_crossing(evidence, best, 1.0, limit),
    )


def rate(arm: Arm, *, alpha: float) -> Sequence:
    """How often one arm is right, in [0, 1]."""
    low, high = _rate(arm, alpha=alpha)
    return Sequence(arm.rate, low, high)


def paired_difference(
    both: int, only_champion: int, only_challenger: int, neither: int, *, alpha: float
) -> Sequence:
    """The same of arms that answered the same images, from the four counts of who was right.

    A pair of Beta-mixture martingales, of alpha / 2 each: how often the arms differ, and who is right then.
    """
    total = both + only_champion + only_challenger + neither
    if not total:
        return Sequence(0.0, -1.0, 1.0)
    differ = only_champion + only_challenger
    often = _rate(Arm(differ, total - differ), alpha=alpha / 2)
    wins = _rate(Arm(only_challenger, only_champion), alpha=alpha / 2)
    corners = [share * (2 * won - 1) for share in often for won in wins]
    value = (only_challenger - only_champion) / total
    return Sequence(value, min(corners), max(corners))


def sequential_verdict(found: Sequence, *, margin: float) -> SequentialVerdict:
    """What may be said now, and not be taken back: `margin` is the loss that is still not worse."""
    if found.low > 0:
        return "better"
    if found.high < -margin:
        return "worse"
    return "not worse" if margin > 0 and found.low > -margin else "undecided"


def log_evidence(
    right: Counts, wrong: Counts, other_right: Counts, other_wrong: Counts
) -> npt.NDArray[np.float64]:
    """Log of the evidence against equal rates of two arms, element by element.

    M(p) M'(p) at the common p that explains both best: above log(1 / alpha), equality is rejected at alpha.
    """
    together = right + other_right
    total = together + wrong + other_wrong
    p = np.clip(together / np.maximum(total, 1), _EDGE, 1 - _EDGE)
    likelihood = together * np.log(p) + (total - together) * np.log(1 - p)
    return np.asarray(_log_beta(right, wrong) + _log_beta(other_right, other_wrong) - likelihood)


def ratio_is_off(challenger: int, total: int, *, share: float, alpha: float = 1e-3) -> bool:
    """Whether the challenger's part of all keys contradicts `share`, so routing is broken.

    The multinomial mixture martingale of Lindon & Malek 2022, for two arms.
    """
    return _evidence(Arm(challenger, total - challenger), share) > log(1 / alpha)


def happens_more(challenger: int, champion: int, *, share: float, alpha: float) -> bool:
    """Whether something rare, such as a failure, comes to the challenger more often than to the champion.

    Where both have the same rate, each event is the challenger's with chance `share`, its part of the keys
    (Lindon & Malek 2022): an exact test, however rare the events are, and however often one looks.
    """
    events = Arm(challenger, champion)
    return events.rate > share and _evidence(events, share) > log(1 / alpha)


def _rate(arm: Arm, *, alpha: float) -> tuple[float, float]:
    """The confidence sequence of one rate."""
    limit = log(1 / alpha)
    return (
        _crossing(lambda p: _evidence(arm, p), arm.rate, 0.0, limit),
        _crossing(lambda p: _evidence(arm, p), arm.rate, 1.0, limit),
    )


def _evidence(arm: Arm, p: float) -> float:
    """log M(p)."""
    p = min(max(p, _EDGE), 1 - _EDGE)
    beta = lgamma(arm.right + 0.5) + lgamma(arm.wrong + 0.5) - lgamma(arm.total + 1)
    return beta - _HALF - arm.right * log(p) - arm.wrong * log(1 - p)


def _log_beta(right: Counts, wrong: Counts) -> npt.NDArray[np.float64]:
    table = _log_gamma_table(int(max((right + wrong).max(initial=0), 1)) + 2)
    # B(r + 1/2, w + 1/2) / B(1/2, 1/2)
    return np.asarray(table[0][right] + table[0][wrong] - table[1][right + wrong] - _HALF, dtype=np.float64)


def _log_gamma_table(size: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """lgamma(k + 1/2) and lgamma(k + 1) for k < size, as running sums of logs."""
    k = np.arange(1, size, dtype=np.float64)
    half = np.concatenate([[lgamma(0.5)], lgamma(0.5) + np.cumsum(np.log(k - 0.5))])
    whole = np.concatenate([[0.0], np.cumsum(np.log(k))])
    return half, whole


def _least_evidence(champion: Arm, challenger: Arm, shift: float) -> float:
    """Of all pairs (p, p + shift), the least evidence against one: log M is convex in p, so a bisection of
    its derivative."""
    low, high = max(_EDGE, _EDGE - shift), min(1 - _EDGE, 1 - _EDGE - shift)
    for _ in range(_STEPS if low < high else 0):
        p = (low + high) / 2
        q = p + shift
        slope = (
            -champion.right / p + champion.wrong / (1 - p) - challenger.right / q + challenger.wrong / (1 - q)
        )
        low, high = (low, p) if slope > 0 else (p, high)
    p = (low + high) / 2
    return _evidence(champion, p) + _evidence(challenger, p + shift)


def _crossing(evidence: Callable[[float], float], inside: float, outside: float, limit: float) -> float:
    """Where the evidence, growing from `inside` to `outside`, passes `limit`; `outside` where it does not."""
    if evidence(outside) <= limit:
        return outside
    near, far = inside, outside
    for _ in range(_STEPS):
        middle = (near + far) / 2
        near, far = (middle, far) if evidence(middle) <= limit else (near, middle)
    return far

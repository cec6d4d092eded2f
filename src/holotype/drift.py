"""Whether a stream of images has drifted from a bundle's baseline: what moved, and by how much."""

from __future__ import annotations

import base64
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import erf, erfc, exp, sqrt

import numpy as np
import numpy.typing as npt

from holotype.baseline import Baseline

__all__ = ["Drift", "Movement", "Seen"]

_LEAST_IMAGES = 50
_CERTAIN = 1e-4  # chance of a false alarm of one statistic at one look

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Seen:
    """What the server knows of an answered image: its class, and values as `Baseline` has them."""

    label: int
    confidence: float
    brightness: float
    distance: float | None


@dataclass(frozen=True)
class Movement:
    """A statistic of recent images against validation.

    `effect` is a distance of two distributions in [0, 1] (Kolmogorov-Smirnov, or total variation), `chance`
    that of so much by chance, `moved` whether both say that it counts; `told` is a sentence.
    """

    what: str
    effect: float
    chance: float
    moved: bool
    told: str


class Drift:
    """A sliding window over the latest `window` images; used from one thread."""

    def __init__(self, baseline: Baseline, *, classes: Sequence[str], window: int, effect: float) -> None:
        self._baseline = baseline
        self._classes = classes
        self._effect = effect
        self._seen: deque[Seen] = deque(maxlen=window)
        self._sums: deque[tuple[int, Floats]] = deque()
        self._window = window

    @property
    def images(self) -> int:
        """In the window now."""
        return len(self._seen)

    def add(self, seen: Seen) -> None:
        self._seen.append(seen)

    def add_embeddings(self, count: int, sums: str) -> None:
        """Sum and sum of squares of `count` embeddings, base64 of `float64[2, D]`; others are left out."""
        values = np.frombuffer(base64.b64decode(sums), dtype=np.float64)
        if values.size != 2 * len(self._baseline.mean) or not np.isfinite(values).all():
            return
        self._sums.append((count, values.reshape(2, -1)))
        while sum(number for number, _ in self._sums) - self._sums[0][0] >= self._window:
            self._sums.popleft()

    def movements(self) -> tuple[Movement, ...]:
        """Every statistic; empty while there are fewer than 50 images."""
        if len(self._seen) < _LEAST_IMAGES:
            return ()
        confidence = np.array([one.confidence for one in self._seen])
        brightness = np.array([one.brightness for one in self._seen])
        found = [
            self._rates(),
            self._compared("confidence", confidence, self._baseline.confidence, "the answers' probability"),
            self._compared("brightness", brightness, self._baseline.brightness, "the images' brightness"),
        ]
        far = np.array([one.distance for one in self._seen if one.distance is not None])
        if len(far) >= _LEAST_IMAGES:
            found.append(
                self._compared("distance", far, self._baseline.distance, "the distance from what was learned")
            )
        embedding = self._embedding()
        return (*found, embedding) if embedding is not None else tuple(found)

    def _compared(self, what: str, now: Floats, before: npt.NDArray[np.float32], name: str) -> Movement:
        """Two-sample Kolmogorov-Smirnov: the largest gap between both distribution functions."""
        now, base = np.sort(now), before.astype(np.float64)
        places = np.concatenate([now, base])
        gaps = np.searchsorted(now, places, side="right") / len(now) - np.searchsorted(
            base, places, side="right"
        ) / len(base)
        effect = float(np.abs(gaps).max())
        chance = min(2 * exp(-2 * effect**2 * len(now) * len(base) / (len(now) + len(base))), 1.0)
        told = f"{name}: median {np.median(now):.2f}, at validation {np.median(base):.2f}"
        return Movement(what, effect, chance, self._counts(effect, chance), told)

    def _rates(self) -> Movement:
        """Total variation of how often each class is answered, and a chi-squared test of homogeneity."""
        total, known = len(self._seen), len(self._baseline.confidence)
        now = np.bincount([one.label for one in self._seen], minlength=len(self._classes)).astype(np.float64)
        base = self._baseline.rates.astype(np.float64) * known
        shares, usual = now / total, base / known
        effect = float(np.abs(shares - usual).sum() / 2)
        both = (now + base) / (total + known)
        present = both > 0
        squared = sum(
            float(((counts[present] - size * both[present]) ** 2 / (size * both[present])).sum())
            for counts, size in ((now, total), (base, known))
        )
        chance = _chi_squared_tail(squared, int(present.sum()) - 1)
        most = int(np.abs(shares - usual).argmax())
        name = repr(self._classes[most])
        told = f"the classes answered: {name} {shares[most]:.0%}, at validation {usual[most]:.0%}"
        return Movement("classes", effect, chance, self._counts(effect, chance), told)

    def _embedding(self) -> Movement | None:
        """How far the mean embedding has moved, in standard deviations, less what chance would move it."""
        count = sum(number for number, _ in self._sums)
        if count < _LEAST_IMAGES:
            return None
        mean = sum((sums[0] for _, sums in self._sums), np.zeros(len(self._baseline.mean))) / count
        shift = (mean - self._baseline.mean) / np.sqrt(self._baseline.variance)
        noise = 1 / count + 1 / len(self._baseline.confidence)
        excess = float((shift**2).mean()) - noise
        distance = sqrt(max(excess, 0.0))
        effect = erf(distance / (2 * sqrt(2)))  # total variation of two normals that far apart
        # Features are correlated: as if a tenth of them, at least one, were independent.
        free = max(len(shift) // 10, 1)
        chance = _chi_squared_tail(float((shift**2).mean()) / noise * free, free)
        told = f"the embeddings: moved by {distance:.2f} standard deviations"
        return Movement("embedding", effect, chance, self._counts(effect, chance), told)

    def _counts(self, effect: float, chance: float) -> bool:
        return effect >= self._effect and chance < _CERTAIN


def _chi_squared_tail(value: float, freedom: int) -> float:
    """P(X > value), by the cube root of Wilson & Hilferty 1931: right to a few per cent, enough here."""
    if freedom < 1:
        return 1.0
    spread = 2 / (9 * freedom)
    return 0.5 * erfc(((value / freedom) ** (1 / 3) - (1 - spread)) / sqrt(2 * spread))

"""What a run came to, how runs are kept, and the difference between two sides."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Point:
    """Accuracy on validation reached after some seconds from the start of the command."""

    seconds: float
    accuracy: float


@dataclass(frozen=True)
class Outcome:
    """A run that was given `minutes`.

    `seconds` is the time it took, `epochs` of its schedule, `mode` the flags it was raced with, `peak_mb` the
    peak memory of its process tree, `firm_mb` without pages of mapped files; `wrong` are paths among the
    `judged` images.
    """

    who: str
    seed: int
    minutes: float
    epochs: int
    mode: tuple[str, ...]
    seconds: float
    peak_mb: float
    firm_mb: float
    points: tuple[Point, ...]
    judged: int
    wrong: tuple[str, ...]

    @property
    def accuracy(self) -> float:
        """Of the images judged."""
        return 1 - len(self.wrong) / self.judged


@dataclass(frozen=True)
class Difference:
    """Our accuracy less theirs with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:+.1f} points [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


def append_outcome(file: Path, outcome: Outcome) -> None:
    """Add a run as one line of JSON."""
    with file.open("a") as stream:
        stream.write(json.dumps(asdict(outcome)) + "\n")


def read_outcomes(file: Path) -> list[Outcome]:
    """The runs of a file, none where there is no file."""
    outcomes = []
    for line in file.read_text().splitlines() if file.exists() else ():
        values = json.loads(line)
        values["points"] = tuple(Point(**point) for point in values["points"])
        values["mode"], values["wrong"] = tuple(values["mode"]), tuple(values["wrong"])
        outcomes.append(Outcome(**values))
    return outcomes


def of(outcomes: Sequence[Outcome], who: str, *, minutes: float) -> list[Outcome]:
    """The runs of one contestant that had so much time, by seed."""
    chosen = [outcome for outcome in outcomes if (outcome.who, outcome.minutes) == (who, minutes)]
    return sorted(chosen, key=lambda outcome: outcome.seed)


def paired_difference(ours: Sequence[Outcome], theirs: Sequence[Outcome]) -> Difference:
    """Our mean accuracy less theirs; of the bootstrap all seeds of an image are drawn together."""
    judged = {outcome.judged for outcome in (*ours, *theirs)}
    if len(judged) != 1:
        sys.exit(f"not the same images were judged: {sorted(judged)}")
    images = sorted({path for outcome in (*ours, *theirs) for path in outcome.wrong})
    place = {path: i for i, path in enumerate(images)}
    differences = np.zeros(judged.pop())  # images that nobody gets wrong differ in nothing
    for sign, side in ((-1, ours), (1, theirs)):
        for outcome in side:
            differences[[place[path] for path in outcome.wrong]] += sign / len(side)
    return mean_difference(differences)


def mean_difference(differences: np.ndarray) -> Difference:
    """The mean over images, with a bootstrap over them (Efron 1979): 10,000 resamples, percentiles."""
    rng = np.random.default_rng(0)
    means = [rng.choice(differences, len(differences)).mean() for _ in range(10_000)]
    low, high = np.quantile(means, [0.025, 0.975])
    return Difference(float(differences.mean()), float(low), float(high))

"""Which images an epoch shows, in which order, and how each step is shared out."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from holotype.augment import Samples
from holotype.config import FitConfig
from holotype.errors import ConfigError
from holotype.imbalance import Remedy, class_weights

__all__ = ["Part", "StepPlan", "draw_weights", "order_epoch", "shards"]

Rows = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Part:
    """What a process computes at once: images, and weights `float32[N]`, 1, or 0 for padding."""

    samples: Samples
    weights: npt.NDArray[np.float32]


@dataclass(frozen=True)
class StepPlan:
    """An optimizer step: the parts of one process, and how many images it has over all processes."""

    parts: tuple[Part, ...]
    images: int


def draw_weights(
    labels: Rows, paths: Sequence[str], *, config: FitConfig, imbalance: Remedy, counts: Rows
) -> Weights | None:
    """How often each training image is shown in an epoch, in the mean `float64[N]`; None: each once.

    `labels: int64[N]` and `paths` are of the training images, `counts: int64[C]` how many each class has.
    The sampler shows all classes equally often, and images in the file `config.focus` are drawn
    `config.focus_weight` times as often as others of their class. With the sampler they are so at the cost
    of these; else their class is shown more often too, which the loss must know (`shown_counts`).
    `ConfigError` where that file is no CSV with a column image_path, or names what is not trained on.
    """
    weights = class_weights(counts)[labels] if imbalance == "sampler" else np.ones(len(labels))
    if config.focus is not None:
        focus = _read_focus(Path(config.focus), paths)
        factors = np.where([path in focus for path in paths], config.focus_weight, 1.0)
        if imbalance == "sampler":
            factors /= (np.bincount(labels, weights=factors, minlength=len(counts)) / counts)[labels]
        weights = weights * factors
    if (weights == weights[0]).all():
        return None
    return np.asarray(weights / weights.mean(), dtype=np.float64)


def order_epoch(
    rows: Rows, *, labels: Rows | None = None, weights: Weights | None, seed: int, epoch: int
) -> Samples:
    """The N showings of an epoch, a pure function of its arguments; without weights a permutation of `rows`.

    With weights `float64[N]` of mean 1 a row is shown as often as its weight says, rounded down or up at
    random: systematic resampling (Madow 1949, On the theory of systematic sampling II). So are all rows of
    one label of `labels` `int64[N]` together: with a sampler, classes differ by rounding, not by chance.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(rows))
    if weights is None:
        return Samples(rows[order], np.zeros_like(rows))
    strata = labels if labels is not None else np.zeros_like(rows)
    order = order[np.lexsort((weights[order], strata[order]))]
    ends = np.cumsum(weights[order])
    marks = (np.arange(len(rows)) + generator.random()) * (ends[-1] / len(rows))
    shown = order[np.searchsorted(ends[:-1], marks, side="right")]
    shown = rows[generator.permutation(shown)]
    return Samples(shown, _turns(shown))


def shards(
    samples: Samples, *, batch_size: int, processes: int, rank: int, micro_batch: int
) -> list[StepPlan]:
    """The steps of one process: at most `batch_size` images each over all processes, `micro_batch` per part.

    Every process has as many steps and parts as the others. Images are spread evenly over steps and parts: a
    rest of one image would weigh as much as a batch, and has no batch statistics. A part without an image has
    one of the step's again, at weight 0.
    """
    steps = -(-len(samples) // batch_size)
    plans = []
    for step in np.array_split(np.arange(len(samples)), steps):
        parts = -(-len(step) // (processes * micro_batch))
        shares = np.array_split(step, processes * parts)[rank * parts : (rank + 1) * parts]
        plans.append(StepPlan(tuple(_part(samples, share, spare=step[:1]) for share in shares), len(step)))
    return plans


def _part(samples: Samples, share: Rows, *, spare: Rows) -> Part:
    places = share if len(share) else spare
    return Part(samples[places], np.full(len(places), float(len(share) > 0), dtype=np.float32))


def _turns(rows: Rows) -> Rows:
    """How often each row came before in `rows`, `int64[N]`."""
    order = np.argsort(rows, kind="stable")
    sorted_rows = rows[order]
    turns = np.empty_like(rows)
    turns[order] = np.arange(len(rows)) - np.searchsorted(sorted_rows, sorted_rows)
    return turns


def _read_focus(file: Path, paths: Sequence[str]) -> frozenset[str]:
    fix = "give a CSV with a column image_path, as hard-samples writes"
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            if "image_path" not in (reader.fieldnames or ()):
                raise ConfigError("has no column image_path", where=file, fix=fix)
            listed = [row["image_path"] for row in reader]
    except OSError as error:
        raise ConfigError(f"cannot be read ({error.strerror})", where=file, fix="check fit.focus") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError("is not a CSV in UTF-8", where=file, fix=fix) from error
    if not listed:
        raise ConfigError("lists no image", where=file, fix="add some, or leave fit.focus out")
    known = frozenset(paths)
    unknown = next((path for path in listed if path not in known), None)
    if unknown is not None:
        raise ConfigError(
            f"{unknown!r} is no training image of this dataset",
            where=file,
            fix=f"name images as the dataset does, such as {paths[0]!r}",
        )
    return frozenset(listed)

"""What range of values each activation of a float graph takes on real images, read in three ways."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx

from holotype.dataset import Dataset, check_splits
from holotype.preprocess import Pixels
from holotype.progress import track
from holotype.quantize.prefix import float_pixels

__all__ = ["CALIBRATIONS", "Calibration", "Ranges", "calibration_rows", "observe"]

Calibration = Literal["min-max", "percentile", "entropy"]
CALIBRATIONS: tuple[Calibration, ...] = ("min-max", "percentile", "entropy")

Counts = npt.NDArray[np.int64]

_BINS = 4096  # of a histogram from the least to the largest possible value, both signs
_TAIL = 1e-5  # share of values that "percentile" leaves out, half of it on each side
_LEVELS = 256
_BATCH = 8  # images whose activations are all in memory at once
_STRIDE = 7  # every seventh value goes into the histogram; least and largest are of all


@dataclass(frozen=True)
class Ranges:
    """Least and largest value of each tensor, as each calibration reads them; all contain 0."""

    tensors: Mapping[Calibration, Mapping[str, tuple[float, float]]]


@dataclass
class _Seen:
    """A tensor so far: its extremes, and a histogram over [-reach, reach]."""

    low: float
    high: float
    reach: float
    counts: Counts


def calibration_rows(dataset: Dataset, *, count: int, seed: int) -> npt.NDArray[np.int64]:
    """`int64[count]` rows of the training split, equally many of each class as far as there are; sorted.

    `DatasetError` where there is none.
    """
    check_splits(dataset, "train")
    rows = dataset.rows("train")
    labels = dataset.labels(rows)
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(rows))
    # The how-manieth of its class each image is: first all firsts, then all seconds, ...
    turn = np.empty(len(rows), dtype=np.int64)
    for label in np.unique(labels):
        places = shuffled[labels[shuffled] == label]
        turn[places] = np.arange(len(places))
    chosen = np.argsort(turn, kind="stable")[: min(count, len(rows))]
    return np.sort(rows[chosen])


def observe(model: onnx.ModelProto, images: Pixels, *, threads: int) -> Ranges:
    """Run `uint8[N, H, W, 3]` through a float model and read the range of every activation.

    "min-max" is all that was seen; "percentile" leaves out 1e-5 of the values; "entropy" clips where 256
    levels lose the least information, by the Kullback-Leibler divergence (Migacz 2017).
    """
    seen: dict[str, _Seen] = {}
    with track("calibrating", total=len(images)) as progress:
        for batch, values in _activations(model, images, threads=threads):
            for name, value in values:
                seen[name] = _merge(seen.get(name), value)
            progress.advance(batch)
    # Pixels need no range: their 256 values are the levels.
    start = float_pixels(model)
    pixels = {} if start is None else {start: (0.0, 255.0)}
    return Ranges(
        {
            "min-max": {name: _with_zero(found.low, found.high) for name, found in seen.items()} | pixels,
            "percentile": {name: _quantiles(found) for name, found in seen.items()} | pixels,
            "entropy": {name: _least_divergence(found) for name, found in seen.items()} | pixels,
        }
    )


def _activations(
    model: onnx.ModelProto, images: Pixels, *, threads: int
) -> Iterator[tuple[int, Iterator[tuple[str, npt.NDArray[np.float32]]]]]:
    """For each batch, the number of its images and every float tensor that the graph computes."""
    import onnxruntime

    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    given = {output.name for output in model.graph.output}
    floats = [
        info
        for info in model.graph.value_info
        if info.type.tensor_type.elem_type == onnx.TensorProto.FLOAT and info.name not in given
    ]
    watched.graph.output.extend(floats)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        watched.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in watched.graph.output]
    for start in range(0, len(images), _BATCH):
        batch = images[start : start + _BATCH]
        yield len(batch), zip(names, session.run(names, {"images": batch}), strict=True)


def _merge(seen: _Seen | None, value: npt.NDArray[np.float32]) -> _Seen:
    low, high = float(value.min()), float(value.max())
    some = value.reshape(-1)[::_STRIDE]
    reach = max(abs(low), abs(high), 1e-12)
    if seen is None:
        return _Seen(low, high, reach, _histogram(some, reach))
    counts = seen.counts
    while seen.reach < reach:
        # Twice as wide: pairs of bins become one, in the middle half of the new histogram.
        pairs = counts.reshape(-1, 2).sum(axis=1)
        counts = np.pad(pairs, _BINS // 4)
        seen.reach *= 2
    seen.counts = counts + _histogram(some, seen.reach)
    seen.low, seen.high = min(seen.low, low), max(seen.high, high)
    return seen


def _histogram(values: npt.NDArray[np.float32], reach: float) -> Counts:
    places = ((values + reach) * (_BINS / (2 * reach))).astype(np.int32)
    np.clip(places, 0, _BINS - 1, out=places)
    return np.bincount(places, minlength=_BINS)


def _edges(seen: _Seen) -> npt.NDArray[np.float64]:
    return np.linspace(-seen.reach, seen.reach, _BINS + 1)


def _quantiles(seen: _Seen) -> tuple[float, float]:
    share = np.cumsum(seen.counts) / seen.counts.sum()
    edges = _edges(seen)
    low = float(edges[np.searchsorted(share, _TAIL / 2)])
    high = float(edges[np.searchsorted(share, 1 - _TAIL / 2) + 1])
    return _with_zero(max(low, seen.low), min(high, seen.high))


def _least_divergence(seen: _Seen) -> tuple[float, float]:
    """Both ends are drawn in together, by the same share of the reach; a positive tensor keeps its 0."""
    counts = seen.counts.astype(np.float64)
    # A spike at 0, as after a ReLU, is kept exactly by every range and would outweigh all else.
    middle = _BINS // 2
    counts[middle] = counts[middle + 1]
    if seen.low < 0:
        counts[middle - 1] = counts[middle - 2]
    positive = seen.low >= 0
    best, kept = np.inf, _BINS // 2
    smallest = _LEVELS if positive else _LEVELS // 2
    for half in range(smallest, _BINS // 2 + 1, 8):
        start = middle if positive else middle - half
        loss = _divergence(counts, start, middle + half)
        if loss < best:
            best, kept = loss, half
    reach = seen.reach * kept / (_BINS // 2)
    return _with_zero(max(-reach, seen.low), min(reach, seen.high))


def _divergence(counts: npt.NDArray[np.float64], start: int, stop: int) -> float:
    """KL(clipped || clipped and rounded to 256 levels), of a histogram cut to the bins [start, stop)."""
    inside = counts[start:stop]
    clipped = inside.copy()
    clipped[0] += counts[:start].sum()
    clipped[-1] += counts[stop:].sum()
    level = np.arange(len(inside)) * _LEVELS // len(inside)
    filled = inside > 0
    total = np.bincount(level, inside, minlength=_LEVELS)
    bins = np.bincount(level, filled, minlength=_LEVELS)
    rounded = np.where(filled, total[level] / np.maximum(bins, 1)[level], 0.0)
    if not rounded.sum():
        return np.inf
    p, q = clipped / clipped.sum(), rounded / rounded.sum()
    both = (p > 0) & (q > 0)
    lost = p[(p > 0) & (q == 0)].sum()
    return float((p[both] * np.log(p[both] / q[both])).sum() + lost * np.log(1e6))


def _with_zero(low: float, high: float) -> tuple[float, float]:
    """0 is a level of every quantized tensor: padding is made of it."""
    return min(low, 0.0), max(high, 0.0)

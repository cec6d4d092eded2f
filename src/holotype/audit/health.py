"""Health of single images: what is odd about their files and pixels, and what of it betrays the class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt
from PIL import Image

from holotype.audit.contract import Issue, Shortcut, Trait
from holotype.config import HealthConfig
from holotype.dataset.listing import file_and_region
from holotype.preprocess import Pixels

__all__ = [
    "FileFacts",
    "Measures",
    "find_issues",
    "join_measures",
    "measure",
    "named_columns",
    "shortcuts",
    "unreadable_issues",
]

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

_JPEG = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"})
_ENDINGS = {
    "JPEG": _JPEG,
    "MPO": _JPEG,
    "PNG": frozenset({".png", ".apng"}),
    "WEBP": frozenset({".webp"}),
    "AVIF": frozenset({".avif", ".avifs"}),
    "BMP": frozenset({".bmp", ".dib"}),
    "GIF": frozenset({".gif"}),
    "TIFF": frozenset({".tif", ".tiff"}),
    "HEIF": frozenset({".heic", ".heif", ".hif"}),
}
"""File name endings by Pillow's name of the format."""

# a / b in `_sharpness` of a straight ramp, the smoothest thing that has edges at all, and of an ideal step.
_RAMP, _STEP = 1 / 4, 2 / 3
# What rounding to whole levels (variance 1/12 a pixel) adds to a and b, in squared levels.
_ROUNDING_A, _ROUNDING_B = 2 / 12, 2 / 48
# Below this b of both axes an image has no edges to judge by.
_FLAT = 0.5
_LEAST_SIDE = 8

# A difference between classes that chance makes as often as this is not told.
_SIGNIFICANCE = 1e-3


@dataclass(frozen=True)
class Measures:
    """What pixels told; every field `float32[N]`, levels from 0 (black) to 1 (white).

    `shadows` and `highlights` are the 5th and 95th percentile of the grey level, `brightness` its mean and
    `contrast` its standard deviation. `sharpness` is 0 for a smooth ramp, 1 for an ideal step edge, more for
    fine texture, NaN where the image is flat or too small to tell. `information` is the Shannon entropy of
    the grey levels, 0 to 8 bits. `colourfulness` is the mean of the largest minus the smallest channel.
    """

    shadows: Floats
    highlights: Floats
    brightness: Floats
    contrast: Floats
    sharpness: Floats
    information: Floats
    colourfulness: Floats


@dataclass(frozen=True)
class FileFacts:
    """What N files told: Pillow's names of format and mode, upright size of the image or part, and bytes."""

    format: Sequence[str]
    mode: Sequence[str]
    width: Counts
    height: Counts
    bytes: Counts


def measure(pixels: Pixels, *, width: Counts, height: Counts) -> Measures:
    """Measure `uint8[N, H, W, 3]`, images stretched to the model's input from `width` x `height`, `int64[N]`.

    Sharpness is that at the smaller of the two sizes, so that a small image which was enlarged for the model
    is not blurry for that.
    """
    rows = [
        _measure_one(image, size=(int(w), int(h))) for image, w, h in zip(pixels, width, height, strict=True)
    ]
    columns = np.array(rows, dtype=np.float32).reshape(len(rows), len(fields(Measures))).T
    return Measures(*columns)


def join_measures(parts: Iterable[Measures]) -> Measures:
    """The measures of batches as those of all their images, in order."""
    parts = list(parts)
    return Measures(
        *(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Measures))
    )


def _measure_one(pixels: Pixels, *, size: tuple[int, int]) -> tuple[float, ...]:
    """The fields of `Measures`, in order, of one `uint8[H, W, 3]`."""
    grey = Image.fromarray(pixels).convert("L")
    share = np.array(grey.histogram()) / (grey.width * grey.height)
    levels = np.arange(256) / 255
    mean = float(share @ levels)
    shadows, highlights = np.searchsorted(share.cumsum(), (0.05, 0.95)) / 255
    occupied = share[share > 0]
    sparse = pixels[::2, ::2]  # a mean needs no more
    return (
        shadows,
        highlights,
        mean,
        float(np.sqrt(share @ (levels - mean) ** 2)),
        _sharpness(grey, size=size),
        float(-(occupied * np.log2(occupied)).sum()),
        float((sparse.max(axis=2) - sparse.min(axis=2)).mean()) / 255,
    )


def _sharpness(grey: Image.Image, *, size: tuple[int, int]) -> float:
    """How fast edges are, from 0 (a ramp) over 1 (a step), at the resolution of `size` or of `grey`.

    Of the mean square difference between neighbours a and that of 2 x 2 means two pixels apart b, along each
    axis, a / b is 1/4 for a ramp and 2/3 for a step, whatever the contrast. For photos it hardly depends on
    their size, since their spectra follow a power law (Field 1987, Relations between the statistics of
    natural images and the response properties of cortical cells). The blurrier axis counts, so that motion
    shows; an axis with few edges says little and is drawn towards the ratio of both.
    """
    size = min(size[0], grey.width), min(size[1], grey.height)
    if min(size) < _LEAST_SIDE:
        return float("nan")
    if size != grey.size:
        grey = grey.resize(size, Image.Resampling.BOX)
    fine = np.asarray(grey).astype(np.int16)
    coarse = fine[1:] + fine[:-1]
    coarse = coarse[:, 1:] + coarse[:, :-1]
    a = np.array([_mean_square(fine[:, 1:] - fine[:, :-1]), _mean_square(fine[1:] - fine[:-1])])
    b = np.array([_mean_square(coarse[:, 2:] - coarse[:, :-2]), _mean_square(coarse[2:] - coarse[:-2])]) / 16
    a, b = np.maximum(a - _ROUNDING_A, 0), np.maximum(b - _ROUNDING_B, 0)
    if b.sum() < _FLAT:
        return float("nan")
    weight = 0.02 * b.sum()
    slower = ((a + weight * a.sum() / b.sum()) / (b + weight)).min()
    return float((slower - _RAMP) / (_STEP - _RAMP))


def _mean_square(values: npt.NDArray[np.int16]) -> float:
    flat = values.ravel().astype(np.float32)
    return float(flat @ flat) / len(flat)


def find_issues(
    paths: Sequence[str], facts: FileFacts, measures: Measures, *, config: HealthConfig
) -> tuple[tuple[Issue, ...], tuple[Trait, ...]]:
    """What is odd about each of N images, in order of issue and path, and what is so of the whole set.

    An issue of more than `config.trait` of the images (and of more than one) is a trait, listed once.
    """
    issues: list[Issue] = []
    traits: list[Trait] = []
    for name, (flags, values) in _checks(paths, facts, measures, config=config).items():
        rows = np.flatnonzero(flags).tolist()
        if len(rows) > max(config.trait * len(paths), 1):
            traits.append(Trait(issue=name, images=len(rows), prevalence=len(rows) / len(paths)))
        else:
            rows.sort(key=lambda row: paths[row])
            issues += (Issue(path=paths[row], issue=name, value=_plain(values[row])) for row in rows)
    return tuple(issues), tuple(traits)


def unreadable_issues(unreadable: Iterable[tuple[str, str]]) -> tuple[Issue, ...]:
    """An issue for each (path, error): `empty`, `truncated` or `unreadable`, with the error as its value."""
    return tuple(
        Issue(
            path=path,
            issue=next((w for w in ("empty", "truncated") if w in error), "unreadable"),
            value=error,
        )
        for path, error in unreadable
    )


def named_columns(paths: Sequence[str], facts: FileFacts, measures: Measures) -> dict[str, Doubles]:
    """The measures that could betray a class, each `float64[N]`, NaN where an image has none."""
    pixels = facts.width.astype(np.float64) * facts.height
    whole = np.array([file_and_region(path)[1] is None for path in paths], dtype=np.bool_)
    columns = {
        "width": facts.width,
        "height": facts.height,
        "aspect": facts.width / facts.height,
        # The bytes of a file say nothing about a part of its image.
        "bytes per pixel": np.where(whole, facts.bytes / pixels, np.nan),
        "brightness": measures.brightness,
        "contrast": measures.contrast,
        "sharpness": measures.sharpness,
        "information": measures.information,
        "colourfulness": measures.colourfulness,
    }
    return {name: np.asarray(values, dtype=np.float64) for name, values in columns.items()}


def shortcuts(columns: Mapping[str, Doubles], labels: Sequence[str]) -> tuple[Shortcut, ...]:
    """How strongly each measure goes with the class, the strongest first; those that do not are left out.

    `columns` as of `named_columns`; `labels`, the classes of the same N images. Correlation ratio of ranks,
    so that a few extreme images neither make nor hide it: the square root of epsilon squared =
    (SSb - (k - 1) MSw) / SSt (Kelley 1935, An unbiased correlation ratio measure), which unlike eta squared =
    SSb / SSt does not grow with the number of classes k. Left out is what chance does in one set of 1,000, by
    the test of Kruskal and Wallis (1952): (n - 1) SSb / SSt is chi squared with k - 1 degrees of freedom.
    """
    found = (_shortcut(name, values, np.asarray(labels)) for name, values in columns.items())
    return tuple(sorted(filter(None, found), key=lambda shortcut: -shortcut.correlation))


def _shortcut(name: str, values: Doubles, labels: npt.NDArray[np.str_]) -> Shortcut | None:
    from scipy.special import chdtrc

    known = np.isfinite(values)
    values = values[known]
    classes, owner = np.unique(labels[known], return_inverse=True)
    n, k = len(values), len(classes)
    ranks = _ranks(values) - (n + 1) / 2
    total = float(ranks @ ranks)
    if k < 2 or n <= k or total == 0:
        return None
    size = np.bincount(owner)
    between = float((np.bincount(owner, weights=ranks) ** 2 / size).sum())
    if chdtrc(k - 1, (n - 1) * between / total) > _SIGNIFICANCE:
        return None
    squared = (between - (k - 1) * (total - between) / (n - k)) / total
    means = np.bincount(owner, weights=values) / size
    return Shortcut(
        measure=name,
        correlation=min(max(squared, 0.0) ** 0.5, 1.0),
        low=str(classes[means.argmin()]),
        high=str(classes[means.argmax()]),
    )


def _ranks(values: Doubles) -> Doubles:
    """Ranks from 1, equal values sharing their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((counts.cumsum() - (counts - 1) / 2)[inverse], dtype=np.float64)


def _checks(
    paths: Sequence[str], facts: FileFacts, measures: Measures, *, config: HealthConfig
) -> dict[str, tuple[Flags, Sequence[object] | npt.NDArray[np.generic]]]:
    """By issue: which images have it, and the value to tell of each. NaN is never odd."""
    side = np.sqrt(facts.width.astype(np.float64) * facts.height)
    middle = float(np.median(side)) if len(side) else 0.0
    aspect = np.maximum(facts.width, facts.height) / np.minimum(facts.width, facts.height)
    return {
        "wrong extension": (_wrong_endings(paths, facts.format), facts.format),
        "unusual mode": (_unusual_modes(facts.mode), facts.mode),
        "odd size": (
            (side > middle * config.size) | (side * config.size < middle),
            [f"{width}x{height}" for width, height in zip(facts.width, facts.height, strict=True)],
        ),
        "odd aspect": (aspect > config.aspect, aspect),
        "dark": (measures.highlights < config.dark, measures.highlights),
        "light": (measures.shadows > config.light, measures.shadows),
        "blurry": (measures.sharpness < config.blur, measures.sharpness),
        "low information": (measures.information < config.information, measures.information),
        "grey": (measures.colourfulness < config.grey, measures.colourfulness),
    }


def _wrong_endings(paths: Sequence[str], formats: Sequence[str]) -> Flags:
    """Where a file's name says another format than its bytes; a name without an ending says none."""
    endings = [PurePosixPath(file_and_region(path)[0]).suffix.lower() for path in paths]
    pairs = zip(endings, formats, strict=True)
    return np.array([bool(e) and e not in _ENDINGS.get(f, {e}) for e, f in pairs], dtype=np.bool_)


def _unusual_modes(modes: Sequence[str]) -> Flags:
    """Where a mode loses something on the way to 8-bit RGB that most images of the set do not lose."""
    kinds = np.array([_kind(mode) for mode in modes], dtype=np.str_)
    names, counts = np.unique(kinds, return_counts=True)
    most = names[counts.argmax()] if len(names) else ""
    return np.asarray((kinds != "") & (kinds != most), dtype=np.bool_)


def _kind(mode: str) -> str:
    """What of an image in Pillow's `mode` 8-bit RGB cannot hold; "" where nothing."""
    if ";16" in mode or mode in ("I", "F"):
        return "depth"
    if mode in ("CMYK", "LAB", "HSV", "YCbCr"):
        return "colour space"
    return "palette" if mode in ("P", "PA", "1") else ""


def _plain(value: object) -> float | str:
    return value if isinstance(value, str) else float(value)  # type: ignore[arg-type]

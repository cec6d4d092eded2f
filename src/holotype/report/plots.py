"""Figures of a report as PNG files: confusion matrix, reliability diagram, training curves.

In a confusion matrix blue is right and orange is wrong: the two stay apart for every common colour blindness.
"""

from __future__ import annotations

import functools
import itertools
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from holotype.metrics import Predictions, ReliabilityBins, expected_calibration_error, reliability_bins
from holotype.report.contract import Confusion, HistoryRow
from holotype.report.style import LIGHT, Theme, new_figure, ramp, save_figure, tidy, title_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize

__all__ = ["confusion_png", "history_png", "reliability_png"]

Floats = npt.NDArray[np.float64]

_POINTS = 72  # per inch
_LEGIBLE = 5.5  # points


def confusion_png(confusion: Confusion, file: Path, *, theme: Theme = LIGHT) -> None:
    """Two heat maps, images and share of the true class; legible from 2 to about 100 classes.

    Side by side while both fit on a slide, stacked beyond. Cells carry numbers while those are readable,
    colour bars take over after that; beyond 120 classes only every n-th is named.
    """
    counts = np.asarray(confusion.counts, dtype=np.float64)
    support = counts.sum(axis=1, keepdims=True)
    shares = np.divide(100 * counts, support, out=np.zeros_like(counts), where=support > 0)
    labels = [_label(name, position=i) for i, name in enumerate(confusion.classes)]
    grid = _grid(labels)
    figure = new_figure(*grid.size, theme=theme)
    for panel, (values, title) in enumerate(((counts, "Images"), (shares, "Share of the true class, %"))):
        axes = figure.add_axes(grid.place(panel), facecolor=theme.tile)
        _heat_map(axes, values, grid=grid, theme=theme, percent=panel == 1)
        _name_axes(axes, labels, grid=grid, theme=theme, rows=panel == 0 or not grid.beside)
        axes.set_title(title, loc="left", **title_style(theme))
    save_figure(figure, file, theme=theme)


def reliability_png(predictions: Predictions, file: Path, *, theme: Theme = LIGHT) -> None:
    """Accuracy against confidence in 15 bins, with 95 % intervals (Wilson 1927) and the images in each."""
    bins = reliability_bins(predictions.labels, predictions.probabilities)
    figure = new_figure(5.9, 6.2, theme=theme)
    upper = figure.add_axes((0.13, 0.37, 0.8, 0.55))
    lower = figure.add_axes((0.13, 0.1, 0.8, 0.18))
    _reliability_bars(upper, bins, theme=theme)
    _bin_counts(lower, bins.count, theme=theme)
    error = expected_calibration_error(predictions.labels, predictions.probabilities)
    accuracy = float((predictions.predicted == predictions.labels).mean())
    confidence = float(predictions.probabilities.max(axis=1).mean())
    means = f"accuracy {accuracy:.1%}, mean confidence {confidence:.1%}".replace("%", " %")
    upper.set_title(f"ECE {error:.1%}".replace("%", " %"), loc="left", **title_style(theme))
    upper.set_title(means, color=theme.soft, fontsize=8.5, loc="right", pad=8)
    save_figure(figure, file, theme=theme)


def history_png(history: Sequence[HistoryRow], file: Path, *, theme: Theme = LIGHT) -> bool:
    """Curves of loss and validation scores; beneath them accuracy, gradient norm and rate of the last stage.

    One row per epoch, in order; runs of the same `stage` are marked. Columns that are missing are left out;
    False and no file where nothing is left to draw.
    """
    large = _panels(history, _LARGE)
    # Without its first curve a small panel would only repeat a large one.
    small = [panel for panel in _panels(_last_stage(history), _SMALL) if panel[0][0][0] in panel[1]]
    if not large:
        return False
    width = 10.4 if max(len(large), len(small)) > 1 else 5.4
    figure = new_figure(width, 3.9 + (2.9 if small else 0), theme=theme)
    parts = figure.subfigures(1 + bool(small), 1, height_ratios=(3.9, 2.9)[: 1 + bool(small)], squeeze=False)
    for number, (names, curves) in enumerate(large):
        axes = parts[0, 0].add_subplot(1, len(large), number + 1)
        stages = [str(row.get("stage", "")) for row in history]
        _curves(axes, curves, theme=theme, names=names, stages=stages)
        _number_epochs(axes, history)
        _mark_stages(axes, stages, theme=theme)
        title = "Loss" if names is _LOSSES else _best(curves, history)
        axes.set_title(title, loc="left", **title_style(theme) | {"pad": 22})
    parts[0, 0].subplots_adjust(left=0.07, right=0.98, top=0.84, bottom=0.13, wspace=0.16)
    for number, (names, curves) in enumerate(small):
        axes = parts[1, 0].add_subplot(1, len(small), number + 1)
        _curves(axes, curves, theme=theme, names=names)
        axes.set_title(_SMALL[names], loc="left", **title_style(theme) | {"fontsize": 10})
        parts[1, 0].subplots_adjust(left=0.07, right=0.98, top=0.86, bottom=0.18, wspace=0.22)
    for part in parts.flat:
        part.set_facecolor(theme.paper)
    save_figure(figure, file, theme=theme)
    return True


# --- confusion matrix -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Grid:
    """Where the two panels go, in inches."""

    classes: int
    cell: float
    beside: bool
    label: float  # width of the widest class name

    @property
    def panel(self) -> float:
        return self.classes * self.cell

    @property
    def gaps(self) -> tuple[float, float, float, float]:
        """Left, top, between, bottom."""
        if self.beside:
            return self.label + 0.5, 0.5, 0.45, self.label + 0.5
        return self.label + 0.5, 0.5, self.label + 1.2, self.label + 0.5

    @property
    def size(self) -> tuple[float, float]:
        left, top, between, bottom = self.gaps
        across, down = (2, 1) if self.beside else (1, 2)
        width = left + across * self.panel + (across - 1) * between + (0.2 if self.beside else 1.4)
        return width, top + down * self.panel + (down - 1) * between + bottom

    def place(self, panel: int) -> tuple[float, float, float, float]:
        """Left, bottom, width and height of panel 0 or 1 as fractions of the figure."""
        width, height = self.size
        left, _, between, bottom = self.gaps
        step = self.panel + between
        x = left + (panel * step if self.beside else 0)
        y = bottom + (0 if self.beside else (1 - panel) * step)
        return x / width, y / height, self.panel / width, self.panel / height

    @property
    def font(self) -> float:
        """Points of the class names."""
        return min(9.0, max(_LEGIBLE, 0.72 * self.cell * _POINTS))


def _grid(labels: Sequence[str]) -> _Grid:
    classes = len(labels)
    beside = classes <= 14
    cell = min(1.4, 4.6 / classes) if beside else min(max(9.6 / classes, 0.125), 0.5)
    if classes > 120:
        cell = 15 / classes
    grid = _Grid(classes=classes, cell=cell, beside=beside, label=0)
    widest = max(map(_ems, labels)) * grid.font / _POINTS
    return _Grid(classes=classes, cell=cell, beside=beside, label=widest)


def _heat_map(axes: Axes, values: Floats, *, grid: _Grid, theme: Theme, percent: bool) -> None:
    """Tiles: the diagonal blue on a linear scale, mistakes orange on a root scale, so that few still show."""
    from matplotlib.colors import Normalize, PowerNorm

    longest = max(len(_cell(value, percent=percent)) for value in np.unique(values))
    font = min(10.0, 0.42 * grid.cell * _POINTS, 1.45 * grid.cell * _POINTS / longest)
    diagonal = np.eye(len(values), dtype=bool)
    most = 100.0 if percent else float(values.max())
    # Where only colour speaks, mistakes get the whole of their ramp, and the bar beside it tells the scale.
    most_wrong = most if font >= _LEGIBLE else float(values[~diagonal].max(initial=0)) or 1.0
    layers: tuple[tuple[npt.NDArray[np.bool_], Colormap, Normalize], ...] = (
        (diagonal, ramp(theme.right), Normalize(0, most)),
        (~diagonal, ramp(theme.wrong), PowerNorm(0.5, 0, most_wrong)),
    )
    for layer, (mask, colours, norm) in enumerate(layers):
        shown = mask & (values > 0)
        axes.imshow(np.ma.array(values, mask=~shown), cmap=colours, norm=norm, interpolation="nearest")
        if font >= _LEGIBLE:
            for i, j in np.argwhere(shown):
                colour = _readable_on(colours(norm(values[i, j])))
                number = _cell(values[i, j], percent=percent)
                axes.text(j, i, number, ha="center", va="center", fontsize=font, color=colour)
        else:
            _colour_bar(axes, colours, norm, position=layer, theme=theme, panel=grid.panel)
    if grid.cell > 0.12:
        edges = np.arange(len(values) + 1) - 0.5
        axes.hlines(edges, -0.5, len(values) - 0.5, color=theme.paper, linewidth=min(1.2, grid.cell * 4))
        axes.vlines(edges, -0.5, len(values) - 0.5, color=theme.paper, linewidth=min(1.2, grid.cell * 4))


def _cell(value: float, *, percent: bool) -> str:
    if percent and 0 < value < 0.5:
        return "<1"
    return f"{value:.0f}"


def _colour_bar(
    axes: Axes, colours: Colormap, norm: Normalize, *, position: int, theme: Theme, panel: float
) -> None:
    from matplotlib.cm import ScalarMappable

    height = 3.2 / panel
    where = axes.inset_axes((1 + (0.2 + 0.65 * position) / panel, 0.97 - height, 0.14 / panel, height))
    bar = axes.figure.colorbar(ScalarMappable(norm, colours), cax=where)
    bar.outline.set_visible(False)
    where.tick_params(labelsize=7, colors=theme.soft, length=2)
    where.set_title(("right", "wrong")[position], fontsize=8, color=theme.soft, pad=5)


def _name_axes(axes: Axes, labels: Sequence[str], *, grid: _Grid, theme: Theme, rows: bool) -> None:
    """Class names along both sides: plain texts, since a hundred ticks cost seconds to lay out."""
    axes.xaxis.set_visible(False)
    axes.yaxis.set_visible(False)
    axes.spines[:].set_visible(False)
    style: dict[str, Any] = {"fontsize": grid.font, "color": theme.ink, "fontfamily": list(_fonts())}
    style["parse_math"] = False  # a dollar sign in a class name is no formula
    fits = max(map(_ems, labels)) * grid.font < grid.cell * _POINTS - 4
    turn = 0 if fits else 45 if grid.beside else 90
    across: dict[str, Any] = {"rotation": turn, "va": "top", "ha": "right" if turn == 45 else "center"}
    if turn == 45:
        across |= {"rotation_mode": "anchor"}
    edge, gap = len(labels) - 0.5, 0.06 / grid.cell
    for position in range(0, len(labels), -(-len(labels) // 120)):
        axes.text(position, edge + gap, labels[position], **across, **style)
        if rows:
            axes.text(-0.5 - gap, position, labels[position], ha="right", va="center", **style)
    depth = {0: 1.2 * grid.font / _POINTS, 45: 0.68 * grid.label, 90: 0.95 * grid.label}[turn]
    aside: dict[str, Any] = {"fontsize": 9, "color": theme.soft}
    middle = len(labels) / 2 - 0.5
    axes.text(
        middle, edge + 2 * gap + (depth + 0.08) / grid.cell, "predicted", ha="center", va="top", **aside
    )
    if rows:
        left = -0.5 - gap - (0.95 * grid.label + 0.08) / grid.cell
        axes.text(left, middle, "true", ha="right", va="center", rotation=90, **aside)


_FAMILIES = (
    "DejaVu Sans",  # comes with matplotlib
    "Noto Sans",
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "WenQuanYi Micro Hei",
    "Hiragino Sans",
    "PingFang SC",
    "Yu Gothic",
    "Microsoft YaHei",
    "Malgun Gothic",
    "Arial Unicode MS",
)


@functools.cache
def _fonts() -> dict[str, frozenset[int]]:
    """Installed font families for class names, in order of preference, each with the characters it has."""
    from matplotlib.font_manager import FontProperties, fontManager, get_font

    installed = set(fontManager.get_font_names())
    return {
        family: frozenset(get_font(fontManager.findfont(FontProperties(family=family))).get_charmap())
        for family in _FAMILIES
        if family in installed
    }


def _label(name: str, *, position: int) -> str:
    """A class name of at most 22 characters; its number where no installed font can write it."""
    shown = "".join(c if c.isprintable() else " " for c in name).strip()
    drawable = frozenset().union(*_fonts().values())
    if not shown or not {ord(c) for c in shown} <= drawable:
        return f"#{position}"
    return shown if len(shown) <= 22 else f"{shown[:12]}…{shown[-9:]}"


def _ems(label: str) -> float:
    """Width of a label in units of its font size, rather too much than too little."""
    wide = {c for c in label if c in "mwMW@%" or unicodedata.east_asian_width(c) in "WF"}
    return sum(1.0 if c in wide else 0.75 if c.isupper() else 0.6 for c in label)


def _readable_on(colour: tuple[float, ...]) -> str:
    """Black or white, whichever contrasts more (relative luminance of WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.179 else "#ffffff"


# --- reliability diagram ----------------------------------------------------------------------------------


def _reliability_bars(axes: Axes, bins: ReliabilityBins, *, theme: Theme) -> None:
    centre, width = _centres(len(bins.count))
    used = bins.count > 0
    x, accuracy, confidence = centre[used], bins.accuracy[used], bins.confidence[used]
    axes.bar(x, accuracy, width=0.92 * width, color=theme.right[0], label="accuracy", zorder=2)
    axes.hlines(
        confidence,
        x - 0.46 * width,
        x + 0.46 * width,
        color=theme.wrong[1],
        linewidth=2.6,
        label="mean confidence",
        zorder=4,
    )
    low, high = _wilson(accuracy, bins.count[used])
    axes.vlines(x, low, high, color=theme.ink, linewidth=1.2, label="95 % interval of accuracy", zorder=5)
    axes.plot([0, 1], [0, 1], color=theme.soft, linestyle=(0, (4, 3)), linewidth=1.2, zorder=3)
    axes.set(xlim=(0, 1), ylim=(0, 1.005))
    tidy(axes, theme=theme, percent="both")
    axes.set_ylabel("accuracy", color=theme.soft, fontsize=9)
    axes.legend(loc="upper left", frameon=False, fontsize=8.5, labelcolor=theme.ink)


def _bin_counts(axes: Axes, count: npt.NDArray[np.int64], *, theme: Theme) -> None:
    centre, width = _centres(len(count))
    axes.bar(centre, count, width=0.92 * width, color=theme.soft, zorder=2)
    for x, images in zip(centre, count, strict=True):
        if images:
            text = f"{images}" if images < 10_000 else f"{images / 1000:.0f}k"
            axes.annotate(
                text,
                (x, images),
                (0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=7.5,
                color=theme.ink,
            )
    axes.set(xlim=(0, 1), ylim=(0, 1.18 * count.max()))
    tidy(axes, theme=theme, percent="x")
    axes.set_ylabel("images", color=theme.soft, fontsize=9)
    axes.set_xlabel("confidence (probability of the answer)", color=theme.soft, fontsize=9)


def _centres(bins: int) -> tuple[Floats, float]:
    return (np.arange(bins) + 0.5) / bins, 1 / bins


def _wilson(share: Floats, count: npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Wilson's score interval at 95 %: it stays inside [0, 1] and means something for a single image."""
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * np.sqrt(share * (1 - share) / count + z * z / (4 * count**2)) / (1 + z * z / count)
    return middle - half, middle + half


# --- training curves --------------------------------------------------------------------------------------

# By column: its name in the legend.
_Names = tuple[tuple[str, str], ...]
_LOSSES: _Names = (("train_loss", "train"), ("validation_loss", "validation"))
_SCORES: _Names = (("validation_macro_f1", "macro F1"), ("validation_accuracy", "accuracy"))
_GAP: _Names = (("train_accuracy", "train"), ("validation_accuracy", "validation"))
_NORM: _Names = (("gradient_norm", "gradient norm"),)
_RATE: _Names = (("learning_rate", "learning rate"),)
_LARGE = (_LOSSES, _SCORES)
_SMALL = {_GAP: "Accuracy", _NORM: "Gradient norm", _RATE: "Learning rate"}


def _panels(
    history: Sequence[HistoryRow], panels: Iterable[_Names]
) -> list[tuple[_Names, dict[str, Floats]]]:
    """The panels that have a curve, each with its curves by column."""
    found: list[tuple[_Names, dict[str, Floats]]] = []
    for names in panels:
        curves = {name: _column(history, name) for name, _ in names}
        curves = {name: values for name, values in curves.items() if np.isfinite(values).any()}
        found += [(names, curves)] if curves else []
    return found


def _last_stage(history: Sequence[HistoryRow]) -> list[HistoryRow]:
    """The rows of the stage that came last."""
    return [row for row in history if row.get("stage") == history[-1].get("stage")]


def _best(curves: Mapping[str, Floats], history: Sequence[HistoryRow]) -> str:
    """Title of the panel of scores, with the best accuracy and its epoch."""
    accuracy = curves.get("validation_accuracy")
    if accuracy is None:
        return "Validation"
    best = int(np.nanargmax(accuracy))
    epoch, stage = history[best].get("epoch", best + 1), history[best].get("stage")
    where = f"{stage} epoch {epoch}" if stage else f"epoch {epoch}"
    return f"Validation, best {100 * accuracy[best]:.1f} % at {where}"


def _column(history: Sequence[HistoryRow], name: str) -> Floats:
    """`float64[rows]` of a column; NaN where a row has no number there."""
    values = np.full(len(history), np.nan)
    for row, cells in enumerate(history):
        try:
            values[row] = float(cells.get(name, "nan"))
        except ValueError:
            continue
    return values


def _curves(
    axes: Axes, curves: Mapping[str, Floats], *, theme: Theme, names: _Names, stages: Sequence[str] = ()
) -> None:
    """Lines over the rows, broken where a stage ends: what a head reached does not become the next epoch."""
    ends = [row for row in range(1, len(stages)) if stages[row] != stages[row - 1]]
    first, last = names[0][0], names[-1][0]
    for name, label in names:
        if name not in curves:
            continue
        values = curves[name]
        axes.plot(
            np.insert(np.arange(1.0, len(values) + 1), ends, np.nan),
            np.insert(values, ends, np.nan),
            color=theme.right[1] if name == last else theme.other,
            linestyle="-" if name == last else (0, (5, 1.6)),
            marker="o" if len(values) <= 40 else "",
            markersize=4,
            linewidth=1.8,
            label=label,
        )
    axes.set_xlim(0.5, len(next(iter(curves.values()))) + 0.5)
    axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
    tidy(axes, theme=theme, percent="y" if names in (_SCORES, _GAP) else "")
    axes.set_xlabel("epoch", color=theme.soft, fontsize=9)
    if first != last:
        axes.legend(frameon=False, fontsize=9, labelcolor=theme.ink)


def _number_epochs(axes: Axes, history: Sequence[HistoryRow]) -> None:
    """Ticks with the epochs' own numbers, which begin anew with each stage."""
    every = max(round(len(history) / 16), 1)
    rows = range(0, len(history), every)
    axes.set_xticks([row + 1 for row in rows], [str(history[row].get("epoch", row + 1)) for row in rows])


def _mark_stages(axes: Axes, stages: Sequence[str], *, theme: Theme) -> None:
    """Name each run of equal stages above the axes and draw a line where it begins."""
    start = 0
    for stage, run in itertools.groupby(stages):
        length = len(list(run))
        if start:
            axes.axvline(start + 0.5, color=theme.soft, linewidth=1, linestyle=(0, (2, 2)))
        axes.annotate(
            stage,
            (start + length / 2 + 0.5, 1),
            (0, 4),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
            color=theme.soft,
            parse_math=False,
        )
        start += length


# --- shared -----------------------------------------------------------------------------------------------

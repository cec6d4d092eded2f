"""Figures of a study as PNG files: its course, what matters, each setting alone, and all of them together.

The best trial is orange, complete ones are blue, and those that were stopped early are grey rings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from holotype.head import LOWER_IS_BETTER
from holotype.report.style import Theme, new_figure, ramp, save_figure, tidy, title_style
from holotype.tune.results import TrialRow, short_names, shown, shown_value
from holotype.tune.space import Axis, Choices, Label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["history_png", "importance_png", "parallel_png", "slice_png"]

Floats = npt.NDArray[np.float64]

_ACROSS = 3
_LONGEST = 20


@dataclass(frozen=True)
class _Scale:
    """The part of the values that is drawn: far outliers would press the others together."""

    low: float
    high: float
    metric: str

    @property
    def percent(self) -> bool:
        return self.metric != "log_loss"

    def clip(self, values: Floats) -> Floats:
        return np.clip(values, self.low, self.high)

    def outside(self, values: Floats) -> npt.NDArray[np.bool_]:
        return (values < self.low) | (values > self.high)


def history_png(rows: Sequence[TrialRow], file: Path, *, metric: str, theme: Theme) -> None:
    """The value of each trial in order, and the best so far."""
    scale = _scale(rows, metric)
    figure = new_figure(10.4, 3.7, theme=theme)
    axes = figure.add_axes((0.08, 0.14, 0.9, 0.76))
    done = sorted((row for row in rows if row.state == "complete"), key=lambda row: row.number)
    numbers = np.array([row.number for row in done], dtype=np.float64)
    best = (np.minimum if metric in LOWER_IS_BETTER else np.maximum).accumulate(_values(done))
    last = max(row.number for row in rows if row.value is not None)
    axes.step(
        [*numbers, last], scale.clip(np.append(best, best[-1])), where="post", color=theme.wrong[1],
        linewidth=1.8, label="best so far",
    )  # fmt: skip
    _marks(axes, rows, [row.number for row in rows], scale=scale, theme=theme)
    axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
    _value_axis(axes, scale, theme=theme)
    axes.set_xlabel("trial", color=theme.soft, fontsize=9)
    beside: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1, 0.985), "borderaxespad": 0}
    axes.legend(frameon=False, fontsize=8.5, labelcolor=theme.ink, ncols=6, columnspacing=1.2, **beside)
    title = f"Best {metric.replace('_', ' ')} {shown_value(rows[0].value, metric)}, trial {rows[0].number}"
    axes.set_title(title, loc="left", **title_style(theme))
    save_figure(figure, file, theme=theme)


def importance_png(importances: Mapping[str, float], file: Path, *, theme: Theme) -> None:
    """A bar for each setting, the longest at the top."""
    names = short_names(list(importances))
    ordered = sorted(importances.items(), key=lambda item: item[1])
    bars = 0.38 * len(ordered)
    figure = new_figure(10.4, bars + 0.9, theme=theme)
    axes = figure.add_axes((0.25, 0.3 / (bars + 0.9), 0.65, bars / (bars + 0.9)))
    shares = [share for _, share in ordered]
    axes.barh([names[key] for key, _ in ordered], shares, height=0.62, color=theme.right[1], zorder=2)
    for place, share in enumerate(shares):
        axes.annotate(
            f"{100 * share:.0f} %", (share, place), (5, 0), textcoords="offset points", va="center",
            fontsize=9, color=theme.ink,
        )  # fmt: skip
    axes.set(xlim=(0, max(1.02 * max(shares), 0.05)), ylim=(-0.6, len(ordered) - 0.4))
    tidy(axes, theme=theme, percent="x")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", labelsize=9.5, colors=theme.ink)
    save_figure(figure, file, theme=theme)


def slice_png(
    rows: Sequence[TrialRow], axes_of: Sequence[Axis], file: Path, *, metric: str, theme: Theme
) -> None:
    """A panel for each setting: the value of each trial over what it tried."""
    scale = _scale(rows, metric)
    across = 2 if len(axes_of) in (2, 4) else min(_ACROSS, len(axes_of))
    down = -(-len(axes_of) // across)
    figure = new_figure(10.4, 3.1 * down, theme=theme)
    names = short_names([axis.key for axis in axes_of])
    for number, axis in enumerate(axes_of):
        panel = figure.add_subplot(down, across, number + 1)
        tried = [row for row in rows if axis.key in row.params]
        _marks(
            panel, tried, [_position(axis, row.params[axis.key]) for row in tried], scale=scale, theme=theme
        )
        _value_axis(panel, scale, theme=theme)
        if number % across:
            panel.set_ylabel("")
        _setting_axis(panel, axis)
        panel.set_title(
            names[axis.key], loc="left", **title_style(theme) | {"fontsize": 10, "parse_math": False}
        )
    figure.subplots_adjust(
        left=0.07, right=0.985, top=1 - 0.3 / (3.1 * down), bottom=0.45 / (3.1 * down),
        wspace=0.24, hspace=0.42,
    )  # fmt: skip
    save_figure(figure, file, theme=theme)


def parallel_png(
    rows: Sequence[TrialRow], axes_of: Sequence[Axis], file: Path, *, metric: str, theme: Theme
) -> None:
    """A line for each trial through all its settings and its value, the better the darker."""
    scale = _scale(rows, metric)
    figure = new_figure(10.4, 4.4, theme=theme)
    panel = figure.add_axes((0.06, 0.08, 0.86, 0.78))
    panel.set_axis_off()
    panel.set(xlim=(0, len(axes_of)), ylim=(-0.03, 1.03))
    colours = ramp(theme.right)
    for row in reversed([row for row in rows if row.value is not None]):
        height = float(_height(row.value, scale))
        line = [*(_share(axis, row.params[axis.key]) for axis in axes_of), height]
        style: dict[str, Any] = {"color": colours(height if metric not in LOWER_IS_BETTER else 1 - height)}
        style |= {"linewidth": 1.5, "zorder": 3}
        if row.state == "pruned":
            style = {"color": theme.soft, "linewidth": 0.8, "linestyle": (0, (2, 2)), "zorder": 2}
        elif row is rows[0]:
            style = {"color": theme.wrong[1], "linewidth": 3, "zorder": 4}
        panel.plot(range(len(line)), line, solid_capstyle="round", **style)
    names = short_names([axis.key for axis in axes_of])
    for place, axis in enumerate(axes_of):
        _upright(panel, place, names[axis.key], _ticks(axis), theme=theme)
    ends = [(0.0, shown_value(scale.low, metric)), (1.0, shown_value(scale.high, metric))]
    _upright(panel, len(axes_of), metric.replace("_", " "), ends, theme=theme)
    save_figure(figure, file, theme=theme)


def _scale(rows: Sequence[TrialRow], metric: str) -> _Scale:
    """From the best value to the worst that is not far from the middle half (Tukey's fences)."""
    values = _values([row for row in rows if row.state == "complete"])
    quarter, three = np.quantile(values, [0.25, 0.75])
    reach = 1.5 * (three - quarter)
    near = values[(values >= quarter - reach) & (values <= three + reach)]
    low, high = float(near.min()), float(near.max())
    if metric in LOWER_IS_BETTER:
        low = float(values.min())
    else:
        high = float(values.max())
    if low == high:
        low, high = low - 0.01, high + 0.01
    return _Scale(low, high, metric)


def _values(rows: Sequence[TrialRow]) -> Floats:
    return np.array([np.nan if row.value is None else row.value for row in rows], dtype=np.float64)


def _marks(
    axes: Axes, rows: Sequence[TrialRow], places: Sequence[float], *, scale: _Scale, theme: Theme
) -> None:
    """A mark for each trial that has a value; triangles at the edge for those outside the scale."""
    best = min(row.number for row in rows[:1])
    x, y = np.array(places, dtype=np.float64), _values(rows)
    groups = {
        "complete": [row.state == "complete" and row.number != best for row in rows],
        "stopped early": [row.state == "pruned" for row in rows],
        "best": [row.number == best for row in rows],
    }
    styles: dict[str, dict[str, Any]] = {
        "complete": {"color": theme.right[1], "s": 34, "zorder": 3},
        "stopped early": {"facecolors": "none", "edgecolors": theme.soft, "s": 26, "zorder": 2},
        "best": {"color": theme.wrong[1], "s": 70, "zorder": 4},
    }
    for name, chosen in groups.items():
        label = name
        for outside in (False, True):
            picked = np.array(chosen) & (scale.outside(y) == outside) & np.isfinite(y)
            if picked.any():
                marker = "o" if not outside else "^" if scale.metric in LOWER_IS_BETTER else "v"
                axes.scatter(x[picked], scale.clip(y[picked]), marker=marker, label=label, **styles[name])
                label = ""


def _value_axis(axes: Axes, scale: _Scale, *, theme: Theme) -> None:
    from matplotlib.ticker import PercentFormatter

    margin = 0.06 * (scale.high - scale.low)
    axes.set_ylim(scale.low - margin, scale.high + margin)
    tidy(axes, theme=theme, percent="")
    if scale.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    axes.set_ylabel(scale.metric.replace("_", " "), color=theme.soft, fontsize=9)


def _setting_axis(axes: Axes, axis: Axis) -> None:
    ticks = _ticks(axis)
    if isinstance(axis, Choices):
        axes.set_xlim(-0.5, len(ticks) - 0.5)
        places = [float(place) for place in range(len(ticks))]
    else:
        span = _number(axis, axis.high) - _number(axis, axis.low)
        places = [_number(axis, axis.low) + share * span for share, _ in ticks]
        axes.set_xlim(places[0] - 0.05 * span, places[-1] + 0.05 * span)
    crowded = sum(len(text) for _, text in ticks) > 30
    axes.set_xticks(places, [text for _, text in ticks], parse_math=False)
    axes.tick_params(axis="x", rotation=20 if crowded else 0)


def _ticks(axis: Axis) -> list[tuple[float, str]]:
    """What is written along an axis: a share of its length, and the text there."""
    if isinstance(axis, Choices):
        return [(_share(axis, label), _text(label)) for label in axis.labels]
    low, high = _number(axis, axis.low), _number(axis, axis.high)
    middle = (low + high) / 2
    numbers = [axis.low, 10**middle if axis.log else middle, axis.high]
    return [(share, f"{number:.3g}") for share, number in zip((0.0, 0.5, 1.0), numbers, strict=True)]


def _text(label: Label) -> str:
    text = shown(label)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _number(axis: Axis, value: float) -> float:
    return float(np.log10(value)) if not isinstance(axis, Choices) and axis.log else value


def _position(axis: Axis, label: Label) -> float:
    """Where a label is on its axis, in the units of the axis."""
    if isinstance(axis, Choices):
        return float(axis.labels.index(label))
    return _number(axis, float(label or 0))


def _share(axis: Axis, label: Label) -> float:
    """Where a label is on its axis, from 0 to 1."""
    if isinstance(axis, Choices):
        return axis.labels.index(label) / (len(axis.labels) - 1) if len(axis.labels) > 1 else 0.5
    low, high = _number(axis, axis.low), _number(axis, axis.high)
    return (_position(axis, label) - low) / (high - low)


def _height(value: float | None, scale: _Scale) -> float:
    clipped = float(scale.clip(np.array(value, dtype=np.float64)))
    return (clipped - scale.low) / (scale.high - scale.low)


def _upright(axes: Axes, place: int, name: str, ticks: Sequence[tuple[float, str]], *, theme: Theme) -> None:
    """An axis of the parallel coordinates, its name above it and its ticks beside it."""
    axes.axvline(place, color=theme.soft, linewidth=1, zorder=1)
    style: dict[str, Any] = {"parse_math": False, "zorder": 6}
    axes.text(place, 1.08, name, ha="center", fontsize=9.5, weight="bold", color=theme.ink, **style)
    for share, text in ticks:
        axes.annotate(
            text, (place, share), (5, 0), textcoords="offset points", va="center", fontsize=8.5,
            color=theme.ink, bbox={"facecolor": theme.paper, "edgecolor": "none", "pad": 0.8, "alpha": 0.75},
            **style,
        )  # fmt: skip

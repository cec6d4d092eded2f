"""Figures of a search as PNG files: what each candidate costs and keeps, what rounding a layer costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from holotype.compress.contract import Candidate, Compressed, Layer
from holotype.report.style import Theme, new_figure, save_figure, tidy, title_style

__all__ = ["pareto_png", "sensitivity_png"]

_SHOWN_LAYERS = 20


def pareto_png(outcome: Compressed, file: Path, *, theme: Theme) -> None:
    """Latency against accuracy; the area of a mark is the size of the file, the chosen one is orange."""
    rows = [outcome.parent, *outcome.candidates]
    chosen = None if outcome.chosen is None else outcome.chosen.method
    figure = new_figure(10.4, 4.6, theme=theme)
    axes = figure.add_axes((0.08, 0.13, 0.9, 0.77))
    largest = max(row.bytes for row in rows)
    for row in rows:
        best = row.method == chosen
        inside = (
            best
            or row.method == "parent"
            or all(reason.startswith("fits") for reason in row.rejected_because)
        )
        colour = theme.wrong[1] if best else theme.right[1]
        axes.scatter(
            row.latency_ms, row.accuracy, s=40 + 900 * row.bytes / largest, zorder=3, linewidth=1.4,
            facecolor=colour if inside else "none", edgecolor=colour if inside else theme.soft, alpha=0.85,
        )  # fmt: skip
    _frontier(rows, axes, theme=theme)
    _names(rows, axes, theme=theme)
    _limits(outcome, axes, theme=theme)
    axes.set_xlim(0, 1.12 * max(row.latency_ms for row in rows))  # names are centred on their marks
    axes.margins(y=0.18)
    tidy(axes, theme=theme, percent="y")
    axes.set_xlabel("median latency of one image here, ms", color=theme.soft, fontsize=9)
    axes.set_ylabel("accuracy on validation", color=theme.soft, fontsize=9)
    axes.set_title("What each candidate costs and keeps", loc="left", **title_style(theme))
    save_figure(figure, file, theme=theme)


def sensitivity_png(layers: Sequence[Layer], file: Path, *, theme: Theme) -> None:
    """A bar for each of the layers whose rounding shifts probabilities most, the worst at the top."""
    worst = sorted(layers, key=lambda layer: layer.shift)[-_SHOWN_LAYERS:]
    bars = 0.3 * len(worst)
    figure = new_figure(10.4, bars + 0.9, theme=theme)
    axes = figure.add_axes((0.3, 0.4 / (bars + 0.9), 0.6, bars / (bars + 0.9)))
    axes.barh(
        [_short(layer.name) for layer in worst], [layer.shift for layer in worst], height=0.62,
        color=theme.right[1], zorder=2,
    )  # fmt: skip
    for place, layer in enumerate(worst):
        told = f"{layer.drop:+.1f} points" if layer.drop else ""
        axes.annotate(
            told,
            (layer.shift, place),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=theme.ink,
        )
    axes.set_ylim(-0.6, len(worst) - 0.4)
    tidy(axes, theme=theme, percent="x")
    axes.set_xlabel(
        "probability that moves to other classes when this layer alone is rounded",
        color=theme.soft,
        fontsize=9,
    )
    save_figure(figure, file, theme=theme)


def _frontier(rows: Sequence[Candidate], axes: object, *, theme: Theme) -> None:
    """A step through the candidates that nothing beats in both."""
    best, points = -1.0, []
    for row in sorted(rows, key=lambda row: (row.latency_ms, -row.accuracy)):
        if row.accuracy > best:
            best = row.accuracy
            points.append((row.latency_ms, row.accuracy))
    axes.step(  # type: ignore[attr-defined]
        [x for x, _ in points],
        [y for _, y in points],
        where="post",
        color=theme.grid,
        linewidth=1.6,
        zorder=1,
    )


def _names(rows: Sequence[Candidate], axes: object, *, theme: Theme) -> None:
    """Names beside the marks; of neighbours that would overlap, every other one below."""
    ordered = sorted(rows, key=lambda row: (row.latency_ms, row.accuracy))
    for place, row in enumerate(ordered):
        above = place % 2 == 0
        axes.annotate(  # type: ignore[attr-defined]
            f"{row.method}  {row.bytes / 1e6:.1f} MB", (row.latency_ms, row.accuracy),
            (0, 16 if above else -22), textcoords="offset points", ha="center", fontsize=8,
            color=theme.ink, zorder=4,
        )  # fmt: skip


def _limits(outcome: Compressed, axes: object, *, theme: Theme) -> None:
    budget = outcome.budget
    style = {"color": theme.wrong[1], "linewidth": 1.0, "linestyle": (0, (4, 3)), "zorder": 0}
    if budget.drop is not None:
        axes.axhline(outcome.parent.accuracy - budget.drop / 100, **style)  # type: ignore[attr-defined]
    if budget.latency is not None:
        axes.axvline(budget.latency, **style)  # type: ignore[attr-defined]


def _short(name: str) -> str:
    return name.removeprefix("node_")

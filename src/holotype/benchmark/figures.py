"""What a benchmark measured, and its figures: latency and images per second of every setup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from holotype.metrics import Interval
from holotype.report.style import LIGHT, new_figure, save_figure, tidy, title_style
from holotype.timing import Timing

__all__ = ["Row", "draw"]


@dataclass(frozen=True)
class Row:
    """A setup with what it costs; `accuracy` on test (else validation), None without data."""

    bundle: str
    method: str
    runtime: str
    precision: str
    threads: int | None
    timing: Timing
    bytes: int
    accuracy: Interval | None


def draw(rows: Sequence[Row], file: Path) -> None:
    """Bars of the median latency of one image with a line to its 95 % quantile, and of images per second."""
    theme = LIGHT
    names = [
        f"{Path(row.bundle).name} {row.method}\n{row.runtime} {row.precision}"
        + ("" if row.threads is None else f", {row.threads} threads")
        for row in rows
    ]
    height = 0.45 * len(rows) + 0.9
    figure = new_figure(10.4, height, theme=theme)
    batches = sorted(rows[0].timing.batches)
    least, most = batches[0], batches[-1]
    left = figure.add_axes((0.26, 0.5 / height, 0.34, 1 - 1.0 / height))
    right = figure.add_axes((0.64, 0.5 / height, 0.34, 1 - 1.0 / height))
    places = list(range(len(rows)))[::-1]
    calls = [row.timing.batches[least] for row in rows]
    left.barh(places, [call.p50 for call in calls], height=0.6, color=theme.right[1], zorder=2)
    left.hlines(places, [call.p50 for call in calls], [call.p95 for call in calls], color=theme.ink, zorder=3)
    speeds = [row.timing.batches[most].images_per_second for row in rows]
    right.barh(places, speeds, height=0.6, color=theme.wrong[1], zorder=2)
    for place, call, speed in zip(places, calls, speeds, strict=True):
        style = {"textcoords": "offset points", "va": "center", "fontsize": 8.5, "color": theme.ink}
        left.annotate(f"{call.p50:.2f}", (call.p95, place), (5, 0), **style)  # type: ignore[arg-type]
        right.annotate(f"{speed:.0f}", (speed, place), (5, 0), **style)  # type: ignore[arg-type]
    left.set_yticks(places, names)
    right.set_yticks([])
    left.set_title(
        f"ms for {least} image{'s' if least > 1 else ''}, to the 95 % quantile",
        loc="left",
        **title_style(theme),
    )
    right.set_title(f"images per second, {most} at once", loc="left", **title_style(theme))
    for axes in (left, right):
        axes.set_xlim(right=1.15 * axes.get_xlim()[1])
        tidy(axes, theme=theme, percent="none")
    save_figure(figure, file, theme=theme)

"""The house style of figures: colours for light and dark, axes without clutter, small PNG files.

Drawn with Agg through matplotlib's object interface, so nothing here touches pyplot's global state.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageChops, ImageOps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

__all__ = ["DARK", "DPI", "LIGHT", "Theme", "new_figure", "ramp", "save_figure", "tidy", "title_style"]

DPI = 144


@dataclass(frozen=True)
class Theme:
    """Colours of a figure; `right` and `wrong` are ramps from few to many, `other` is a second curve."""

    paper: str
    tile: str
    ink: str
    soft: str
    grid: str
    right: tuple[str, str]
    wrong: tuple[str, str]
    other: str


LIGHT = Theme(
    paper="#ffffff",
    tile="#f3f5f8",
    ink="#1b1f24",
    soft="#57606a",
    grid="#d5dbe1",
    right=("#a9cdec", "#0a4d8c"),
    wrong=("#fbc58d", "#b34700"),
    other="#a3418a",
)
DARK = Theme(
    paper="#14181d",
    tile="#1e242b",
    ink="#e8edf2",
    soft="#a3adb8",
    grid="#363e47",
    right=("#1d4f80", "#7cc0ff"),
    wrong=("#7d3d0a", "#ffb066"),
    other="#e89bd2",
)


def new_figure(width: float, height: float, *, theme: Theme) -> Figure:
    """An empty figure of this size, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, facecolor=theme.paper)


def title_style(theme: Theme) -> dict[str, Any]:
    """Keywords for `set_title`."""
    return {"color": theme.ink, "fontsize": 11, "weight": "bold", "pad": 8}


def ramp(ends: tuple[str, str]) -> Colormap:
    """Colours from few to many."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("ramp", ends)


def tidy(axes: Axes, *, theme: Theme, percent: str) -> None:
    """Axes without a box, a faint grid behind the data, and percent signs on the axes that are shares."""
    from matplotlib.ticker import PercentFormatter

    axes.set_facecolor(theme.paper)
    axes.grid(visible=True, color=theme.grid, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.soft, labelsize=8.5, length=0)
    axes.spines[:].set_visible(False)
    if percent in ("x", "both"):
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    if percent in ("y", "both"):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))


def save_figure(figure: Figure, file: Path, *, theme: Theme) -> None:
    """Draw once, cut the margins to the ink, and write a PNG of 256 colours.

    Flat figures lose nothing visible by the palette and shrink to a third.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    drawn = np.asarray(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
    image = Image.fromarray(drawn).convert("RGB")
    ink = ImageChops.difference(image, Image.new("RGB", image.size, theme.paper)).getbbox()
    image = ImageOps.expand(image.crop(ink), border=DPI // 8, fill=theme.paper)
    flat = image.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    flat.save(file, format="PNG", dpi=(DPI, DPI))

"""One self-contained HTML page about a search, and its Pareto plot as a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from holotype.compress.contract import Candidate, Compressed, FlippedImage
from holotype.compress.plots import pareto_png, sensitivity_png
from holotype.report import Figure, Thumbnail, data_uri, embed_figure, write_html
from holotype.report.style import DARK, LIGHT

__all__ = ["write_page"]

_SHOWN_IMAGES = 48
_SHOWN_CLASSES = 60


def write_page(folder: Path, outcome: Compressed, *, thumbnail: Thumbnail) -> None:
    """Write `pareto.png` and `compress.html` into `folder`.

    `thumbnail` gives PNG or JPEG bytes for the path of an image, or None. `MissingExtraError` where
    matplotlib or Jinja2 is missing.
    """
    write_html(
        folder / "compress.html",
        "compress.html.j2",
        package="holotype.compress",
        filters={"points": lambda value: f"{value:+.2f}", "megabytes": _megabytes},
        content={
            "outcome": outcome,
            "rows": (outcome.parent, *outcome.candidates),
            "figures": _figures(folder, outcome),
            "layers": sorted(outcome.sensitivity, key=lambda layer: -layer.shift),
            "changed": [one for one in outcome.classes if one.flipped],
            "pictures": _pictures(outcome.flips, thumbnail),
            "deltas": _deltas(outcome),
            "zeros": [row for row in outcome.candidates if _has_zeros(row)],
            "limits": _limits(outcome),
        },
    )


def _figures(folder: Path, outcome: Compressed) -> dict[str, Figure | None]:
    scratch = folder / "candidates"
    light, dark = folder / "pareto.png", scratch / "pareto_dark.png"
    pareto_png(outcome, light, theme=LIGHT)
    pareto_png(outcome, dark, theme=DARK)
    figures: dict[str, Figure | None] = {"pareto": embed_figure(light, dark), "sensitivity": None}
    if outcome.sensitivity:
        light = folder / "sensitivity.png"
        sensitivity_png(outcome.sensitivity, light, theme=LIGHT)
        sensitivity_png(outcome.sensitivity, dark, theme=DARK)
        figures["sensitivity"] = embed_figure(light, dark)
    dark.unlink()
    return figures


def _limits(outcome: Compressed) -> list[str]:
    budget = outcome.budget
    told = [
        (budget.drop, "at most {:g} points of accuracy lost"),
        (budget.class_drop, "at most {:g} points of any class's recall lost"),
        (None if budget.size is None else budget.size / 1e6, "at most {:g} MB served"),
        (budget.latency, "at most {:g} ms per image here"),
    ]
    return [text.format(value) for value, text in told if value is not None]


def _pictures(flips: Sequence[FlippedImage], thumbnail: Thumbnail) -> list[tuple[FlippedImage, str | None]]:
    """The first images whose label changed, those first that were right before."""
    ordered = sorted(flips, key=lambda flip: flip.before != flip.label)
    return [(flip, data_uri(thumbnail(flip.path))) for flip in ordered[:_SHOWN_IMAGES]]


def _deltas(outcome: Compressed) -> list[tuple[str, list[float | None]]]:
    """Of each class, what each candidate does to its recall in points; the classes that lose most first."""
    rows = [
        (one.name, [row.class_drops.get(one.name) for row in outcome.candidates]) for one in outcome.classes
    ]
    ordered = sorted(rows, key=lambda row: -max((drop or 0.0 for drop in row[1]), default=0.0))
    return [
        (name, [None if drop is None else 0.0 - drop for drop in drops])
        for name, drops in ordered[:_SHOWN_CLASSES]
    ]


def _has_zeros(row: Candidate) -> bool:
    return row.method.startswith("magnitude")


def _megabytes(value: int) -> str:
    return f"{value / 1e6:.2f}\N{NO-BREAK SPACE}MB"

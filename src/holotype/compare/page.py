"""One self-contained HTML page about a comparison, with the images on which the two differ."""

from __future__ import annotations

from pathlib import Path

from holotype.compare.contract import Comparison
from holotype.report import Thumbnail, data_uri, write_html

__all__ = ["write_page"]

_SHOWN = 60


def write_page(file: Path, comparison: Comparison, *, thumbnail: Thumbnail) -> None:
    """Write the page atomically; `MissingExtraError` where Jinja2 is missing."""
    shown = [(flip, _picture(thumbnail(flip.path))) for flip in comparison.flips[:_SHOWN]]
    write_html(
        file,
        "compare.html.j2",
        package="holotype.compare",
        filters={
            "points": lambda value: f"{100 * value:+.2f}",
            "megabytes": lambda value: f"{value / 1e6:.2f}\N{NO-BREAK SPACE}MB",
        },
        content={"comparison": comparison, "shown": shown},
    )


def _picture(jpeg: bytes | None) -> str | None:
    return None if jpeg is None else data_uri(jpeg)

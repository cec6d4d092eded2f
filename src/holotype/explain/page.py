"""An explanation as one self-contained HTML page and one picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from holotype.bundle import write_bytes
from holotype.explain.contract import Explanation, Shown
from holotype.fields import printable
from holotype.preprocess import Pixels
from holotype.report import data_uri, percent, write_html

__all__ = ["Group", "write_page", "write_picture"]

_SIDE, _GAP, _TITLE, _COLUMNS = 144, 8, 40, 4
_PAPER, _INK, _SOFT = (255, 255, 255), (27, 31, 36), (87, 96, 106)
_COARSE = 128
"""Inputs below this side are shown pixel by pixel, not smoothed by the browser."""


@dataclass(frozen=True)
class Group:
    """Images of a class that were called one class; both None where images were named.

    `panels` is `uint8[N, 3, H, W, 3]`: the input, and the evidence for the two classes of each of `shown`.
    """

    label: str | None
    said: str | None
    shown: tuple[Shown, ...]
    panels: Pixels

    @property
    def title(self) -> str:
        if self.label is None:
            return "The two most probable classes"
        return f"{self.label}, recognised" if self.label == self.said else f"{self.label} called {self.said}"


def write_page(file: Path, explanation: Explanation, groups: Sequence[Group]) -> None:
    """Write the page atomically; `groups` are four for each pair, or one."""
    write_html(
        file,
        "explain.html.j2",
        package="holotype.explain",
        filters={},
        content={
            "explanation": explanation,
            "groups": [(group, _embedded(group)) for group in groups],
            "coarse": min(groups[0].panels.shape[2:4]) < _COARSE,
        },
    )


def _embedded(group: Group) -> list[tuple[Shown, list[str | None]]]:
    pictures = ([data_uri(_encode(panel)) for panel in panels] for panels in group.panels)
    return list(zip(group.shown, pictures, strict=True))


def _encode(pixels: Pixels) -> bytes:
    """PNG for small pictures, whose pixels are to be seen, else JPEG."""
    buffer = io.BytesIO()
    if min(pixels.shape[:2]) < _COARSE:
        Image.fromarray(pixels).save(buffer, "PNG")
    else:
        Image.fromarray(pixels).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def write_picture(file: Path, groups: Sequence[Group]) -> None:
    """Write one PNG with every image: the input and its two maps, with classes and probabilities."""
    shown = [group for group in groups if group.shown]
    columns = min(_COLUMNS, max(len(group.shown) for group in shown))
    strips = [[_strip(*one) for one in zip(group.shown, group.panels, strict=True)] for group in shown]
    across, down = (side + gap for side, gap in zip(strips[0][0].size, (2 * _GAP, _GAP), strict=True))
    rows = sum(-(-len(group.shown) // columns) for group in shown)
    extent = (max(columns * across + _GAP, 640), rows * down + _TITLE * len(shown) + _GAP)
    sheet = Image.new("RGB", extent, _PAPER)
    draw, font = ImageDraw.Draw(sheet), _font(18)
    top = 0
    for group, pictures in zip(shown, strips, strict=True):
        draw.text((_GAP, top + 10), _fitting(group.title, font, extent[0] - 2 * _GAP), _INK, font=font)
        top += _TITLE
        for number, strip in enumerate(pictures):
            row, column = divmod(number, columns)
            sheet.paste(strip, (_GAP + column * across, top + row * down))
        top += -(-len(pictures) // columns) * down
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    write_bytes(file, buffer.getvalue())


def _strip(shown: Shown, panels: Pixels) -> Image.Image:
    """Three panels beside each other, over what they show."""
    height, width = panels.shape[1:3]
    size = _SIDE, round(_SIDE * height / width)
    kernel = Image.Resampling.NEAREST if min(height, width) < _COARSE else Image.Resampling.LANCZOS
    strip = Image.new("RGB", (3 * _SIDE + 4, size[1] + 20), _PAPER)
    draw, font = ImageDraw.Draw(strip), _font(12)
    captions = [(shown.path.replace("\\", "/").rpartition("/")[2], "", _SOFT)]
    captions += [(part.label, f" {percent(part.probability)}", _INK) for part in shown.evidence]
    for column, (panel, (name, value, colour)) in enumerate(zip(panels, captions, strict=True)):
        left = column * (_SIDE + 2)
        strip.paste(Image.fromarray(panel).resize(size, kernel), (left, 0))
        text = _fitting(name, font, _SIDE - 4 - font.getlength(value)) + value
        draw.text((left, size[1] + 3), text, colour, font=font)
    return strip


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """`text` on one line, its end cut to `width` pixels."""
    text = " ".join(printable(text).split())[:300]
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib."""
    import matplotlib as mpl

    return ImageFont.truetype(Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)

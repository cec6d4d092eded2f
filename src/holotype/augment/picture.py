"""`train_batch.jpg`: what the network is fed, to look at."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from holotype.bundle import write_bytes
from holotype.fields import printable

__all__ = ["draw_training_batch", "mixed_captions"]

_MOST, _TILE, _GAP, _LINES = 32, 176, 8, 2
_FONT_SIZE, _LINE_HEIGHT = 14, 18
_PAPER, _INK = (255, 255, 255), (20, 20, 20)


def mixed_captions(targets: npt.NDArray[np.float32], *, names: Sequence[str]) -> list[str]:
    """The label of each image of `targets: float32[N, C]`, or both of a mixed one with their shares."""
    found = []
    for target in targets:
        shown = [place for place in np.argsort(-target, kind="stable")[:2] if target[place] > 0]
        alone = len(shown) == 1
        found.append(
            " + ".join(names[place] if alone else f"{names[place]} {target[place]:.2f}" for place in shown)
        )
    return found


def draw_training_batch(images: npt.NDArray[np.uint8], captions: Sequence[str], file: Path) -> None:
    """Write a sheet of the first 32 images `uint8[N, H, W, 3]`, at their proportions, with their captions.

    A caption such as "shirt 0.71 + dress 0.29" has a line for each label. `OSError` if it cannot be written.
    """
    count = min(len(images), _MOST)
    columns = math.ceil(math.sqrt(2 * count))
    height, width = images.shape[1:3]
    # Small images are enlarged by whole factors, pixel by pixel: they are shown as they are.
    scale = max(_TILE // max(height, width), 1) if max(height, width) <= _TILE else _TILE / max(height, width)
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    step = max(size[0], _TILE) + _GAP, size[1] + _LINES * _LINE_HEIGHT + _GAP
    sheet = Image.new("RGB", (columns * step[0] + _GAP, math.ceil(count / columns) * step[1] + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_FONT_SIZE)
    for number, (image, caption) in enumerate(zip(images[:count], captions[:count], strict=True)):
        left, top = _GAP + number % columns * step[0], _GAP + number // columns * step[1]
        resample = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BILINEAR
        sheet.paste(Image.fromarray(image).resize(size, resample), (left, top))
        lines = caption.split(" + ", _LINES - 1)
        for line, text in enumerate(lines):
            shown = _fitting(f"+ {text}" if line else text, step[0] - _GAP, font)
            draw.text((left, top + size[1] + 1 + line * _LINE_HEIGHT), shown, _INK, font=font)
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=90)
    write_bytes(file, buffer.getvalue())


def _fitting(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """`text` in one line of `width` pixels: its middle left out where it is longer, its share kept."""
    text = printable(text)
    shown, kept = text, len(text)
    while font.getlength(shown) > width and kept > 1:
        kept -= 1
        shown = f"{text[: kept - kept // 2]}...{text[len(text) - kept // 2 :]}"
    return shown

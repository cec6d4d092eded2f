"""What a person sees of an example: the upright image, or a part of it with its surroundings."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, ImageDraw

from holotype.dataset.listing import file_and_region
from holotype.preprocess import Box, Limits, Preprocess, facts, read_pixels

__all__ = ["render"]

_SIDE = 1280
_AROUND_PART, _AROUND_IMAGE = 0.6, 0.1
_LOSSLESS = 256


def render(root: Path, name: str, *, limits: Limits) -> tuple[bytes, str]:
    """The bytes of a PNG or JPEG of at most 1280 pixels a side, and its media type.

    A part of an image is framed and shown with what is around it: 60 % of its size or a tenth of the image's
    shorter side, whichever is more. Raises an `ImageError` or OSError where the file cannot be read.
    """
    path, region = file_and_region(name)
    data = (root / path).read_bytes()
    found = facts(data, limits=limits)
    extent = Box(0, 0, found.width, found.height)
    shown = extent if region is None else _surroundings(region, extent)
    width, height = shown.right - shown.left, shown.bottom - shown.top
    scale = _SIDE / max(width, height, 1.0)
    if region is None:
        scale = min(scale, 1.0)
    wide, high = max(round(width * scale), 1), max(round(height * scale), 1)
    spec = Preprocess(
        height=max(high, 8), width=max(wide, 8), resize="squash" if min(wide, high) >= 8 else "letterbox"
    )
    image = Image.fromarray(read_pixels(data, spec=spec, region=shown, limits=limits))
    if region is not None:
        _frame(image, [scale * (a - b) for a, b in zip(region, (shown.left, shown.top) * 2, strict=True)])
    buffer = io.BytesIO()
    if max(image.size) <= _LOSSLESS:
        image.save(buffer, "PNG")
        return buffer.getvalue(), "image/png"
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue(), "image/jpeg"


def _surroundings(region: Box, extent: Box) -> Box:
    least = _AROUND_IMAGE * min(extent.right, extent.bottom)
    across = max(_AROUND_PART * (region.right - region.left), least)
    down = max(_AROUND_PART * (region.bottom - region.top), least)
    return Box(
        max(region.left - across, extent.left),
        max(region.top - down, extent.top),
        min(region.right + across, extent.right),
        min(region.bottom + down, extent.bottom),
    )


def _frame(image: Image.Image, box: list[float]) -> None:
    """A line that is seen on any ground, outside of what it frames."""
    draw = ImageDraw.Draw(image)
    for distance, colour in ((6, "black"), (4, "white")):
        left, top, right, bottom = box
        draw.rectangle(
            (left - distance, top - distance, right + distance, bottom + distance), outline=colour, width=3
        )

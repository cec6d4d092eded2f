"""Small pictures of a dataset's examples, for reports."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from holotype.dataset.examples import read_example
from holotype.dataset.index import Dataset
from holotype.errors import ImageError
from holotype.preprocess import Limits, Preprocess

__all__ = ["thumbnailer", "thumbnailer_below"]

_SIDE = 160


def thumbnailer(dataset: Dataset) -> Callable[[str], bytes | None]:
    """`thumbnailer_below` for the examples of `dataset`."""
    return thumbnailer_below(dataset.root, limits=dataset.limits)


def thumbnailer_below(root: Path, *, limits: Limits | None = None) -> Callable[[str], bytes | None]:
    """A function from an example's name to a JPEG of 160 pixels a side; None where it cannot be read."""
    spec = Preprocess(height=_SIDE, width=_SIDE, resize="letterbox", filter="bilinear")

    def thumbnail(name: str) -> bytes | None:
        try:
            pixels = read_example(root, name, spec=spec, limits=limits)
        except (OSError, ImageError):
            return None
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=85)
        return buffer.getvalue()

    return thumbnail

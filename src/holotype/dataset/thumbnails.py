"""Small pictures of a dataset's examples, for reports."""

from __future__ import annotations

import io
from collections.abc import Callable

from PIL import Image

from holotype.dataset.index import Dataset
from holotype.errors import ImageError
from holotype.preprocess import Preprocess

__all__ = ["thumbnailer"]


def thumbnailer(dataset: Dataset, *, side: int = 160) -> Callable[[str], bytes | None]:
    """A function from an example's path to a JPEG of at most `side` pixels a side; None where unreadable."""
    spec = Preprocess(height=side, width=side, resize="letterbox", filter="bilinear")

    def thumbnail(path: str) -> bytes | None:
        try:
            pixels = dataset.view(path, spec=spec)
        except (OSError, ImageError):
            return None
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=85)
        return buffer.getvalue()

    return thumbnail

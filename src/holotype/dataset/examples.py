"""The pixels of one example: of an image file, or of the part of it that its name says."""

from __future__ import annotations

from pathlib import Path

from holotype.dataset.listing import file_and_region
from holotype.preprocess import Limits, Pixels, Preprocess, read_pixels

__all__ = ["read_example"]


def read_example(root: Path, name: str, *, spec: Preprocess, limits: Limits | None = None) -> Pixels:
    """`uint8[H, W, 3]`, the example `name` below `root` as `spec` shows it.

    Raises an `ImageError` or OSError where it cannot be read.
    """
    path, region = file_and_region(name)
    return read_pixels((root / path).read_bytes(), spec=spec, region=region, limits=limits)

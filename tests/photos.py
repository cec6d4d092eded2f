"""Real photos for tests: pieces of the two that scikit-learn ships, none overlapping another; and copies."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]


@cache
def pieces(*, side: int = 64, contrast: float = 25.0) -> dict[str, tuple[Pixels, ...]]:
    """`uint8[side, side, 3]` by photo, `china` and `flower`, none whose deviation is below `contrast`.

    At 64 pixels there are 37 and 23.
    """
    from sklearn.datasets import load_sample_images

    found: dict[str, tuple[Pixels, ...]] = {}
    for name, photo in zip(("china", "flower"), load_sample_images().images, strict=True):
        places = [
            (top, left)
            for top in range(0, photo.shape[0] - side + 1, side)
            for left in range(0, photo.shape[1] - side + 1, side)
        ]
        cut = (photo[top : top + side, left : left + side] for top, left in places)
        found[name] = tuple(piece for piece in cut if piece.std(axis=(0, 1)).mean() >= contrast)
    return found


def _cropped(image: Image.Image) -> Image.Image:
    """95 % of each side, from the lower right."""
    width, height = image.size
    return image.crop((width - round(width * 0.95), height - round(height * 0.95), width, height))


ALTERED: dict[str, Callable[[Image.Image], Image.Image]] = {
    "encoded": lambda image: image,
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "turned": lambda image: image.rotate(90, expand=True),
    "cropped": _cropped,
}


def jpeg(image: Pixels | Image.Image, *, quality: int = 80, **options: object) -> bytes:
    buffer = io.BytesIO()
    opened = image if isinstance(image, Image.Image) else Image.fromarray(image)
    opened.save(buffer, "JPEG", quality=quality, **options)
    return buffer.getvalue()


def altered(image: Pixels, name: str, *, quality: int = 80) -> bytes:
    """A near copy as a JPEG file."""
    return jpeg(ALTERED[name](Image.fromarray(image)), quality=quality)


def put(file: Path, data: bytes | Pixels) -> Path:
    """Write bytes, or pixels in the format of the file's ending, with the folders above it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(data, bytes):
        file.write_bytes(data)
    else:
        Image.fromarray(data).save(file)
    return file

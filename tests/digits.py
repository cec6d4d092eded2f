"""A small real dataset for tests: some of scikit-learn's handwritten digits as class folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_digits(
    folder: Path, *, classes: int = 3, train: int = 24, validation: int = 8, test: int = 8
) -> Path:
    """PNG files `folder/SPLIT/DIGIT/NUMBER.png` of the first digits of each class, 32 x 32."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for label in range(classes):
        rows = np.flatnonzero(digits.target == label)
        places = ["train"] * train + ["validation"] * validation + ["test"] * test
        for row, split in zip(rows, places, strict=False):
            target = folder / split / str(label) / f"{row:04d}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            grey = (255 - digits.images[row] * 255 / 16).astype(np.uint8)
            Image.fromarray(grey).resize((32, 32), Image.Resampling.NEAREST).save(target)
    return folder


def write_flat(folder: Path, *, classes: int = 3, images: int = 40) -> Path:
    """PNG files `folder/DIGIT/NUMBER.png`, without splits."""
    write_digits(folder, classes=classes, train=images, validation=0, test=0)
    for child in (folder / "train").iterdir():
        child.rename(folder / child.name)
    (folder / "train").rmdir()
    return folder

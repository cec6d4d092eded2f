"""Files that break while they are trained on: left out, replaced by a neighbour, and counted."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from holotype.dataset import Dataset
from holotype.errors import DatasetError
from holotype.progress import note

__all__ = ["Quarantine"]

Rows = npt.NDArray[np.int64]


class Quarantine:
    """Called with a row that cannot be read and why: says which one to show instead.

    That is the next readable one of the same class in order of path, so that the same broken files give the
    same run. It raises `DatasetError` above the share `allowed` of the training images, and for what is not
    trained on: nothing is judged by another image.
    """

    def __init__(self, dataset: Dataset, *, allowed: float) -> None:
        self.dataset = dataset
        self.allowed = allowed
        self.errors: dict[int, str] = {}

    def __call__(self, row: int, error: str) -> int:
        """The row to show instead of `row`."""
        (path,) = self.dataset.paths(np.array([row]))
        rows = self.dataset.rows("train")
        if row not in rows:
            raise self.dataset.lost(row, error)
        if row not in self.errors:
            self.errors[row] = error
            note(f"{path} broke while training and is left out: {error}")
        if len(self.errors) > self.allowed * len(rows):
            raise DatasetError(
                f"{len(self.errors)} of {len(rows)} training images broke on the way, last {path}: {error}",
                where=self.dataset.source,
                fix="restore them and resume, or raise --set data.max_unreadable",
            )
        alike = rows[self.dataset.labels(rows) == self.dataset.labels(np.array([row]))[0]]
        place = int(np.searchsorted(alike, row))
        for other in np.roll(alike, -place - 1):
            if int(other) not in self.errors:
                return int(other)
        raise DatasetError(
            "no readable training image of its class is left", where=path, fix="restore the files and resume"
        )

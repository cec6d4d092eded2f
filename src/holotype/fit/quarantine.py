"""Files that break while they are trained on: left out, replaced by a neighbour, and counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import polars as pl

from holotype.dataset import Dataset, Unreadable
from holotype.errors import DatasetError
from holotype.progress import note

__all__ = ["Quarantine", "regain"]

Rows = npt.NDArray[np.int64]


class Quarantine:
    """Called with a row that cannot be read and why: says which one to show instead.

    That is the next readable one of the same class in order of path, so that the same broken files give the
    same run. It raises `DatasetError` above the share `allowed` of the training images, and for what is not
    trained on: nothing is judged by another image. `lost` are rows known to be broken, see `regain`.
    """

    def __init__(self, dataset: Dataset, *, allowed: float, lost: Mapping[int, str]) -> None:
        self.dataset = dataset
        self.allowed = allowed
        self.errors: dict[int, str] = dict(lost)

    @property
    def left(self) -> Dataset:
        """The dataset with the files that broke among its unreadable ones, as a report shows it."""
        rows = sorted(self.errors)
        names = self.dataset.paths(np.array(rows, dtype=np.int64))
        broken = (Unreadable(name, self.errors[row]) for name, row in zip(names, rows, strict=True))
        return replace(self.dataset, unreadable=(*self.dataset.unreadable, *broken))

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


def regain(dataset: Dataset, before: pl.DataFrame, *, allowed: float) -> tuple[Dataset, dict[int, str]]:
    """`dataset` as it was when a run began with the table `before`, and why rows of it are lost since then.

    Lost are files that cannot be read any more, up to the share `allowed` of the training images and none of
    what is judged, as a `Quarantine` allows. Where anything else has changed, `dataset` comes back as it is.
    """
    whole = dataset.returned_to(before)
    if whole is None:
        return dataset, {}
    reasons = {file.path: file.error for file in dataset.unreadable}
    known = set(dataset.table["path"])
    lost = {row: reasons.get(path, "is gone") for row, path in enumerate(before["path"]) if path not in known}
    training = set(whole.rows("train").tolist())
    if not lost.keys() <= training or len(lost) > allowed * len(training):
        return dataset, {}
    for row, error in lost.items():
        note(f"{before['path'][row]} broke since the run began and is left out: {error}")
    return whole, lost

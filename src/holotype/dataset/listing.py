"""What a dataset says before any image is opened: one `Record` for each labelled file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["SPLITS", "SPLIT_NAMES", "Listing", "Record", "Split"]

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

SPLIT_NAMES: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}
"""How folders and CSV files call the splits, in lower case."""


@dataclass(frozen=True)
class Record:
    """One labelled file. `path` is POSIX and relative to the listing's root (or absolute, from a CSV)."""

    path: str
    label: str
    split: Split | None = None
    group: str | None = None
    annotator: str | None = None


@dataclass(frozen=True)
class Listing:
    """All records of a dataset, sorted by path, and the names of files that were passed over."""

    root: Path
    records: tuple[Record, ...]
    ignored: tuple[str, ...] = ()

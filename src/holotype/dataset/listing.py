"""What a dataset says before any image is opened: one `Record` for each labelled example."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from holotype.errors import DatasetError
from holotype.preprocess import Box

__all__ = [
    "SPLITS",
    "SPLIT_NAMES",
    "Listing",
    "Problem",
    "Record",
    "Split",
    "example_name",
    "file_and_region",
    "problems_error",
]

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

_FRAGMENT = re.compile(r"#xywh=([-+.\de]+),([-+.\de]+),([-+.\de]+),([-+.\de]+)$")


@dataclass(frozen=True)
class Record:
    """One labelled example. `path` is POSIX and relative to the listing's root (or absolute, from a CSV).

    An example that is a part of an image is named `path#xywh=left,top,width,height`, in pixels of the upright
    image, as in W3C Media Fragments: a name that any table can hold and that no image file has.
    """

    path: str
    label: str
    split: Split | None = None
    group: str | None = None
    annotator: str | None = None


@dataclass(frozen=True)
class Problem:
    """One record of a source that cannot be used; `where` names the file, and the line or place in it."""

    where: str
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.fix}"


@dataclass(frozen=True)
class Listing:
    """All records of a dataset, sorted by path, what was passed over, and the bad records.

    Passed over (`ignored`) are files that give no example, and folders that hold no image.
    """

    root: Path
    records: tuple[Record, ...]
    ignored: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()


def example_name(path: str, region: Box | None) -> str:
    """The name of a part of an image (None: of all of it)."""
    if region is None:
        return path
    width, height = region.right - region.left, region.bottom - region.top
    return f"{path}#xywh={region.left:.6g},{region.top:.6g},{width:.6g},{height:.6g}"


def file_and_region(name: str) -> tuple[str, Box | None]:
    """The inverse of `example_name`: the path of the image file, and the part of it or None."""
    found = _FRAGMENT.search(name) if "#" in name else None
    if found is None:
        return name, None
    try:
        left, top, width, height = (float(number) for number in found.groups())
    except ValueError:
        return name, None
    return name[: found.start()], Box(left, top, left + width, top + height)


def problems_error(source: Path, problems: tuple[Problem, ...], *, total: int) -> DatasetError:
    """All that is wrong with a source in one error; the first five in words."""
    shown = "; ".join(f"{problem.where}: {problem.what}" for problem in problems[:5])
    more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
    return DatasetError(
        f"{len(problems)} of {total} records cannot be used: {shown}{more}",
        where=source,
        fix=problems[0].fix,
    )

"""Class folders: `root/<class>/*`, or `root/{train,val|valid|validation,test}/<class>/*`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from holotype.dataset.listing import SPLIT_NAMES, Listing, Record, Split
from holotype.errors import DatasetError
from holotype.preprocess import SUFFIXES

__all__ = ["DEBRIS", "files_below", "read_folders"]

DEBRIS = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information"})
"""Folders that archives and desktops leave behind; never classes."""


def read_folders(root: Path) -> Listing:
    """List a class folder. The class is the first folder below the root or split; deeper ones are searched.

    Hidden files are skipped; files that are not named like images are returned as `ignored`.
    """
    children = _subfolders(root)
    if not children:
        raise DatasetError(
            "has no class folders",
            where=root,
            fix="expected DATA/CLASS/image.jpg, DATA/{train,validation,test}/CLASS/image.jpg, or annotations"
            " as Pascal VOC, YOLO, CreateML, COCO or Label Studio write them",
        )
    splits = {name: SPLIT_NAMES[name.lower()] for name in children if name.lower() in SPLIT_NAMES}
    ignored: list[str] = [entry.name for entry in os.scandir(root) if entry.is_file()]
    records: list[Record] = []
    if "train" in splits.values():
        stray = sorted(set(children) - set(splits))
        if stray:
            raise DatasetError(
                f"has split folders ({', '.join(sorted(splits))}) and beside them {stray[0]!r}",
                where=root,
                fix="move it into a split, or out of the dataset",
            )
        for folder, split in splits.items():
            _read_classes(root, root / folder, split=split, records=records, ignored=ignored)
    elif splits and len(splits) == len(children):
        raise DatasetError(
            "has no train folder", where=root, fix=f"add one beside {', '.join(sorted(splits))}"
        )
    else:
        _read_classes(root, root, split=None, records=records, ignored=ignored)
    if not records:
        raise DatasetError(
            "holds no images", where=root, fix=f"expected files such as {root}/CLASS/image.jpg"
        )
    return Listing(root, tuple(sorted(records, key=lambda r: r.path)), tuple(sorted(ignored)))


def _read_classes(
    root: Path, folder: Path, *, split: Split | None, records: list[Record], ignored: list[str]
) -> None:
    for label in _subfolders(folder):
        for file in files_below(folder / label):
            relative = Path(file).relative_to(root).as_posix()
            if os.path.splitext(file)[1].lower() in SUFFIXES:  # noqa: PTH122  (called once per file)
                records.append(Record(relative, label, split))
            else:
                ignored.append(relative)


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(
            entry.name
            for entry in entries
            if entry.is_dir() and not entry.name.startswith(".") and entry.name not in DEBRIS
        )


def files_below(folder: Path) -> Iterator[str]:
    """Every file below `folder`, in order of folders; nothing hidden, and not what archives leave behind."""
    for parent, names, files in os.walk(folder):
        names[:] = sorted(name for name in names if not name.startswith(".") and name not in DEBRIS)
        for name in sorted(files):
            if not name.startswith("."):
                yield f"{parent}/{name}"

"""Class folders: `root/<class>/*`, or `root/{train,val|valid|validation,test}/<class>/*`."""

from __future__ import annotations

import os
from collections import deque
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

    Hidden files are skipped; files that are not named like images, and class folders without any, are
    returned as `ignored`. For links see `files_below`.
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
    ignored = {entry.name for entry in _entries(root) if entry.is_file()}
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
    root: Path, folder: Path, *, split: Split | None, records: list[Record], ignored: set[str]
) -> None:
    for label in _subfolders(folder):
        images = 0
        for file in files_below(folder / label, root=root):
            relative = Path(file).relative_to(root).as_posix()
            if os.path.splitext(file)[1].lower() in SUFFIXES:  # noqa: PTH122  (called once per file)
                records.append(Record(relative, label, split))
                images += 1
            else:
                ignored.add(relative)
        if not images:
            ignored.add((folder / label).relative_to(root).as_posix())


def _subfolders(folder: Path) -> list[str]:
    return sorted(
        entry.name
        for entry in _entries(folder)
        if entry.is_dir() and not entry.name.startswith(".") and entry.name not in DEBRIS
    )


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise _unreadable(error) from error


def files_below(folder: Path, *, root: Path) -> Iterator[str]:
    """Every file below `folder`, in order of folders; nothing hidden, and not what archives leave behind.

    Links to folders are followed, after all that needs none. A folder that was seen before, or has `root` or
    `folder` in it, is not entered, and given itself. `DatasetError` where a folder cannot be read.
    """
    seen = _around(folder) if folder == root else {*_around(folder), *_around(root), os.path.realpath(root)}
    waiting = deque([str(folder)])
    while waiting:
        start = waiting.popleft()
        real = os.path.realpath(start)
        if real in seen:
            yield start
            continue
        for parent, names, files in os.walk(start, onerror=_refuse):
            place = real + parent[len(start) :]
            seen.add(place)
            names[:] = sorted(name for name in names if not name.startswith(".") and name not in DEBRIS)
            waiting += [path for name in names if os.path.islink(path := f"{parent}/{name}")]  # noqa: PTH114
            # What a link leads to may have folders in it that another link led to before.
            known = [name for name in names if os.path.join(place, name) in seen]  # noqa: PTH118
            names[:] = [name for name in names if name not in known]
            yield from (f"{parent}/{name}" for name in known)
            for name in sorted(files):
                if not name.startswith("."):
                    yield f"{parent}/{name}"


def _around(folder: Path) -> set[str]:
    """The real paths of the folders that `folder` lies in."""
    return {str(parent) for parent in Path(os.path.realpath(folder)).parents}


def _refuse(error: OSError) -> None:
    raise _unreadable(error) from error


def _unreadable(error: OSError) -> DatasetError:
    fix = "make it readable, or move it out of the dataset"
    return DatasetError(f"cannot be read ({error.strerror})", where=error.filename, fix=fix)

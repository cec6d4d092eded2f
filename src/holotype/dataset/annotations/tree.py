"""The files of an annotated dataset, and which image an annotation means."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from holotype.dataset.folders import files_below
from holotype.dataset.listing import SPLIT_NAMES, Split
from holotype.errors import DatasetError
from holotype.preprocess import SUFFIXES

__all__ = [
    "Images",
    "Tree",
    "images_among",
    "list_files",
    "reference_parts",
    "split_of_folders",
    "split_of_name",
]

_FOREIGN = re.compile(r"[/\\]|[A-Za-z]:[/\\]|[A-Za-z][A-Za-z0-9+.-]+://")


@dataclass(frozen=True)
class Images:
    """The image files below `root`, as POSIX paths relative to it. What is not among them does not exist."""

    root: Path
    paths: frozenset[str] = field(repr=False)

    @cached_property
    def by_name(self) -> dict[str, list[str]]:
        return _grouped(self.paths, key=posixpath.basename)

    @cached_property
    def by_stem(self) -> dict[str, list[str]]:
        """By path without suffix."""
        return _grouped(self.paths, key=lambda path: posixpath.splitext(path)[0])

    @cached_property
    def folders(self) -> frozenset[str]:
        """Folders that hold an image directly; "" is the root."""
        return frozenset(posixpath.dirname(path) for path in self.paths)

    def find(self, name: str, *, folders: Sequence[str]) -> str:
        """The image that `name` means in the first of `folders` that has it.

        A bare file name is searched everywhere where none of `folders` holds images at all; the directories
        of another machine (absolute paths, URLs) are dropped one by one. `DatasetError` where there is no
        such image, or more than one.
        """
        if _FOREIGN.match(name):
            return self.find_foreign(name, folders=folders)
        name = name.replace("\\", "/")
        for folder in folders:
            path = posixpath.normpath(posixpath.join(folder, name))
            if path in self.paths:
                return path
        if "/" in name or self.folders & set(folders):
            raise _missing(name)
        return self._only(name)

    def find_stem(self, stem: str, *, folders: Sequence[str]) -> str | None:
        """The image named `stem` with any image suffix, in the first of `folders` that has one."""
        for folder in folders:
            found = self.by_stem.get(posixpath.join(folder, stem), [])
            if len(found) > 1:
                raise DatasetError(f"may mean {found[0]} or {found[1]}", fix="remove one of them")
            if found:
                return found[0]
        return None

    def find_foreign(self, reference: str, *, folders: Sequence[str]) -> str:
        """The image that a path or URL of another machine means: the longest end of it that is here."""
        parts = reference_parts(reference)
        for start in range(len(parts)):
            for folder in folders:
                path = posixpath.normpath(posixpath.join(folder, *parts[start:]))
                if path in self.paths:
                    return path
        if not parts:
            raise _missing(reference)
        return self._only(parts[-1])

    def _only(self, name: str) -> str:
        found = self.by_name.get(name, [])
        if len(found) > 1:
            raise DatasetError(
                f"{name} may be {found[0]} or {found[1]}", fix="name the folder: --set data.images=FOLDER"
            )
        if not found:
            raise _missing(name)
        return found[0]


@dataclass(frozen=True)
class Tree:
    """A dataset's files: annotations and the like below `root` (POSIX, relative), and the images."""

    root: Path
    files: tuple[str, ...]
    images: Images

    def named(self, suffix: str) -> list[str]:
        """The files whose name ends with `suffix`, in any case."""
        return [name for name in self.files if name.lower().endswith(suffix)]


def list_files(root: Path) -> tuple[str, ...]:
    """All files below `root`, POSIX and relative to it; for links see `files_below`."""
    length = len(str(root).rstrip("/\\")) + 1
    return tuple(
        file[length:].replace("\\", "/") if os.sep == "\\" else file[length:]
        for file in files_below(root, root=root)
    )


def images_among(root: Path, files: Iterable[str]) -> Images:
    """The images among `files` of `root`."""
    return Images(root, frozenset(f for f in files if posixpath.splitext(f)[1].lower() in SUFFIXES))


def reference_parts(reference: str) -> list[str]:
    """The path of a file on another machine, in parts: of `/a/b.jpg`, `C:\\a\\b.jpg`, `s3://bucket/a/b.jpg`.

    Label Studio's `/data/local-files/?d=a/b.jpg` names its file in the query.
    """
    path = reference
    if "://" in reference or "?d=" in reference:
        try:
            url = urlsplit(reference)
        except ValueError:
            return []
        path = parse_qs(url.query).get("d", [unquote(url.path)])[0]
    parts = re.split(r"[/\\]", re.sub(r"^[A-Za-z]:", "", path))
    return [part for part in parts if part not in ("", ".", "..")]


def split_of_folders(path: str) -> Split | None:
    """The split that the first folder of `path` named like one says: `images/train2017/a.jpg` is of train."""
    for folder in path.split("/")[:-1]:
        split = SPLIT_NAMES.get(re.sub(r"[-_]?\d+$", "", folder).lower())
        if split is not None:
            return split
    return None


def split_of_name(path: str) -> Split | None:
    """The split in the name of an annotation file, `instances_train2017.json`, or in those of its folders."""
    stem = posixpath.basename(path).rpartition(".")[0]
    found = {SPLIT_NAMES[word] for word in re.findall(r"[a-z]+", stem.lower()) if word in SPLIT_NAMES}
    return found.pop() if len(found) == 1 else split_of_folders(path)


def _grouped(paths: Iterable[str], *, key: Callable[[str], str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for path in sorted(paths):
        groups.setdefault(key(path), []).append(path)
    return groups


def _missing(name: str) -> DatasetError:
    return DatasetError(
        f"image {name!r} is not there", fix="restore it, or name its folder: --set data.images=FOLDER"
    )

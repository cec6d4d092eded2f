"""What the files of a dataset hold now, and whether that is still what something was said about.

Revisions and decisions name examples by path. Another dataset may lie at the same path one day, with the same
usual names: what was said about a picture must not be taken for something about another one.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from holotype.bundle import hash_file
from holotype.dataset.ingest import read_index
from holotype.dataset.listing import file_and_region

__all__ = ["Remark", "file_hash", "file_hashes", "outdated"]

_State = tuple[int, int]
"""Size of a file, and time of its last change in ns."""


class Remark(Protocol):
    """Something that was said about an example, whose file had the content `sha256` then; None: not known."""

    @property
    def path(self) -> str: ...

    @property
    def sha256(self) -> str | None: ...


def outdated(remarks: Iterable[Remark], *, root: Path, folder: Path) -> frozenset[tuple[str, str | None]]:
    """`(path, sha256)` of all remarks about files that have other content now.

    Nothing is known to be outdated of what has no hash, or whose file cannot be read.
    """
    said = {(remark.path, remark.sha256) for remark in remarks if remark.sha256 is not None}
    now = file_hashes((path for path, _ in said), root=root, folder=folder)
    return frozenset((path, then) for path, then in said if now.get(path, then) != then)


def file_hashes(names: Iterable[str], *, root: Path, folder: Path) -> dict[str, str]:
    """By example: the SHA-256 of the file that it is (a part of); none for files that cannot be read.

    The dataset's indexes in `folder` are believed for files of the same size and time; others are read.
    """
    files = {name: file_and_region(name)[0] for name in names}
    states = {file: state for file in files.values() if (state := _state(root / file)) is not None}
    found = _indexed(files, states, folder)
    for file in states.keys() - found.keys():
        digest = file_hash(file, root=root)
        if digest is not None:
            found[file] = digest
    return {name: found[file] for name, file in files.items() if file in found}


def file_hash(name: str, *, root: Path) -> str | None:
    """The SHA-256 of the file that an example is (a part of), read now; None where it cannot be."""
    try:
        return hash_file(root / file_and_region(name)[0])
    except OSError:
        return None


def _state(file: Path) -> _State | None:
    try:
        status = file.stat()
    except (OSError, ValueError):  # gone, or a name that no file can have
        return None
    return status.st_size, status.st_mtime_ns


def _indexed(files: dict[str, str], states: dict[str, _State], folder: Path) -> dict[str, str]:
    """What any of the indexes, which differ by pixel path, knows about these files as they are."""
    found: dict[str, str] = {}
    for index in folder.glob("index-*.parquet"):
        if len(found) == len(states):
            break
        rows = read_index(index).select("path", "size", "mtime_ns", "sha256")
        for name, size, time, digest in rows.iter_rows():
            file = files.get(name)
            if file is not None and digest and states.get(file) == (size, time):
                found[file] = digest
    return found

"""The pixel cache: images decoded once into memory maps, named by what they hold, replaced atomically."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from holotype.bundle import write_text
from holotype.dataset.scan import View
from holotype.machine import cache_root
from holotype.preprocess import Pixels, Preprocess

__all__ = [
    "Shape",
    "Store",
    "affordable_rows",
    "cache_folder",
    "copy_rows",
    "create_view",
    "dataset_name",
    "find_store",
    "make_room",
    "publish",
]

_FREE_SHARE = 0.2
_ABANDONED_SECONDS = 24 * 3600
_DAMAGED = (OSError, ValueError, LookupError, TypeError)
"""What reading an index raises that is not there, or is not what was written."""


@dataclass(frozen=True)
class Shape:
    """Size of a view, in pixels."""

    height: int
    width: int

    @property
    def bytes(self) -> int:
        return self.height * self.width * 3


class _OpenFile:
    """A file that stays open for as long as anybody has this."""

    def __init__(self, file: Path) -> None:
        self.descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self.descriptor)


@dataclass(frozen=True)
class Store:
    """A finished memory map: `rows[what an example shows]` is the row of its pixels in `view`.

    Its file is held open, so that it can still be read when another process has put a newer one in its place.
    """

    view: View
    rows: dict[str, int]
    held: _OpenFile = field(compare=False, repr=False)

    def open(self) -> Pixels:
        """The memory map `uint8[rows, height, width, 3]`."""
        shape = (self.view.rows, self.view.height, self.view.width, 3)
        with open(self.held.descriptor, "rb", closefd=False) as stream:
            return np.memmap(stream, dtype=np.uint8, mode="r", shape=shape)

    def read(self, batches: Iterable[npt.NDArray[np.int64]]) -> Iterator[Pixels]:
        """Copies of its rows, batch by batch; the next one is read while the caller works on this one."""

        def copy(rows: npt.NDArray[np.int64]) -> Pixels:
            # Mapped anew for each batch: pages that were read do not add up in the process's memory.
            return np.asarray(self.open()[rows])

        with ThreadPoolExecutor(1, thread_name_prefix="pixels") as pool:
            coming: Future[Pixels] | None = None
            for rows in batches:
                here, coming = coming, pool.submit(copy, rows)
                if here is not None:
                    yield here.result()
            if coming is not None:
                yield coming.result()


def cache_folder(source: Path) -> Path:
    """Where everything derived from the dataset at `source` is kept: below HOLOTYPE_CACHE or ~/.cache."""
    token = hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:16]
    folder = cache_root() / f"{dataset_name(source)[:40]}-{token}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def dataset_name(source: Path) -> str:
    """What to call a dataset: the folder's name, or the file's without its ending, `.tar.gz` being one."""
    path = source.resolve()
    return path.name if path.is_dir() else path.stem.removesuffix(".tar")


def affordable_rows(folder: Path, shapes: Sequence[Shape], *, rows: int, limit_gb: float | None) -> int:
    """How many of `rows` images fit under the limit in all `shapes`."""
    return min(rows, int(_limit(folder, limit_gb) // sum(shape.bytes for shape in shapes)))


def make_room(folder: Path, needed: int, *, limit_gb: float | None, keep: Collection[Path]) -> None:
    """Remove the stores that were used the longest ago until so many bytes fit under the limit beside them.

    A process that reads one of them keeps what it has opened.
    """
    indexes = sorted(folder.glob("pixels-*.json"), key=lambda index: index.stat().st_mtime)
    stores = {index: file for index in indexes if (file := _map_of(index)) is not None}
    room = _limit(folder, limit_gb) - needed - sum(_occupied(file) for file in stores.values())
    for index, file in stores.items():
        if room >= 0 or file in keep:
            continue
        room += _occupied(file)
        index.unlink(missing_ok=True)
        file.unlink(missing_ok=True)


def _limit(folder: Path, limit_gb: float | None) -> float:
    """Bytes that all stores of a dataset may take; by default a fifth of the disk that others do not."""
    if limit_gb is not None:
        return limit_gb * 1e9
    taken = sum(_occupied(file) for file in folder.glob("pixels-*.u8"))
    return (shutil.disk_usage(folder).free + taken) * _FREE_SHARE


def _occupied(file: Path) -> int:
    """Bytes on the disk: rows that were never written take none."""
    try:
        status = file.stat()
    except OSError:
        return 0
    return min(status.st_size, getattr(status, "st_blocks", status.st_size) * 512)


def find_store(folder: Path, shape: Shape, *, spec: Preprocess) -> Store | None:
    """The finished store of this view, whatever files it was made for; None where there is none."""
    index = _index_file(folder, shape, spec=spec)
    try:
        content = json.loads(index.read_text())
        rows = {digest: row for row, digest in enumerate(content["sha256"]) if digest}
        view = View(shape.height, shape.width, folder / content["file"], len(content["sha256"]))
        held = _OpenFile(view.file)
        os.utime(index)  # it is in use
    except _DAMAGED:
        return None
    if os.fstat(held.descriptor).st_size != view.rows * shape.bytes:
        return None
    return Store(view, rows, held)


def create_view(folder: Path, shape: Shape, *, rows: int) -> View:
    """An empty memory map of `rows` rows under a name of its own; rows never written cost no disk."""
    _sweep(folder)
    file = folder / f"pixels-{shape.height}x{shape.width}-{uuid.uuid4().hex[:12]}.u8"
    with file.open("wb") as stream:
        stream.truncate(rows * shape.bytes)
    return View(shape.height, shape.width, file, rows)


def publish(folder: Path, view: View, *, spec: Preprocess, digests: Sequence[str]) -> Store:
    """Make a written view the store of its shape and spec; `digests[row]` is "" where a row is empty.

    The map's bytes reach the disk before its name does, so a reader sees the old store or the whole new one.
    """
    memory = view.open("r+")
    memory.flush()  # type: ignore[attr-defined]
    shape = Shape(view.height, view.width)
    previous = find_store(folder, shape, spec=spec)
    content = {"file": view.file.name, "preprocess": str(spec), "sha256": list(digests)}
    write_text(_index_file(folder, shape, spec=spec), json.dumps(content))
    if previous is not None:
        previous.view.file.unlink(missing_ok=True)
    rows = {digest: row for row, digest in enumerate(digests) if digest}
    return Store(view, rows, _OpenFile(view.file))


def copy_rows(source: Store, target: View, *, rows: Sequence[tuple[int, str]]) -> None:
    """Copy the pixels of (target row, sha256) pairs that `source` holds."""
    if not rows:
        return
    old, new = source.open(), target.open("r+")
    for start in range(0, len(rows), 256):
        chunk = rows[start : start + 256]
        new[np.array([row for row, _ in chunk])] = old[np.array([source.rows[sha] for _, sha in chunk])]


def _sweep(folder: Path) -> None:
    """Remove maps that no index names and nobody has written to for a day: their writer was killed."""
    named = {_map_of(index) for index in folder.glob("pixels-*.json")}
    for file in folder.glob("pixels-*.u8"):
        if file not in named and time.time() - file.stat().st_mtime > _ABANDONED_SECONDS:
            file.unlink(missing_ok=True)


def _map_of(index: Path) -> Path | None:
    """The map that an index names; None where it is damaged, as a loss of power may leave it."""
    try:
        return index.with_name(json.loads(index.read_text())["file"])
    except _DAMAGED:
        return None


def _index_file(folder: Path, shape: Shape, *, spec: Preprocess) -> Path:
    return folder / f"pixels-{shape.height}x{shape.width}-{spec.digest[:16]}.json"

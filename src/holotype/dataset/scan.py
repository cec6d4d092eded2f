"""Reading many image files with every core: hash and decode each once, in worker processes."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from holotype.dataset.listing import file_and_region
from holotype.errors import DatasetError, ImageError
from holotype.machine import available_cores
from holotype.preprocess import Box, Facts, Limits, Pixels, Preprocess, facts, read_views

__all__ = ["Decoded", "Scanned", "View", "decode_files", "decode_now", "in_workers", "scan_files"]

_CHUNK = 16
"""Files per task: large enough to hide the cost of a task, small enough to keep all workers busy."""

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True)
class View:
    """A rendering of every image at one size, and the memory map it is written to (row = file number)."""

    height: int
    width: int
    file: Path
    rows: int

    def open(self, mode: str) -> Pixels:
        """The memory map `uint8[rows, height, width, 3]`, `mode` as of numpy.memmap."""
        shape = (self.rows, self.height, self.width, 3)
        return np.memmap(self.file, dtype=np.uint8, mode=mode, shape=shape)  # type: ignore[call-overload, no-any-return]


@dataclass(frozen=True)
class Scanned:
    """What reading an example told: SHA-256 of the file's bytes and of the pixels, sizes, or why it failed.

    `format` and `mode` are Pillow's; `width` and `height` are upright, of the example's part of the image.
    """

    row: int
    sha256: str = ""
    pixels_sha256: str = ""
    bytes: int = 0
    format: str = ""
    mode: str = ""
    width: int = 0
    height: int = 0
    error: str = ""


@dataclass(frozen=True)
class _ScanTask:
    files: tuple[tuple[int, str], ...]
    spec: Preprocess
    limits: Limits
    views: tuple[View, ...]
    stored: frozenset[int]


def scan_files(
    files: Sequence[tuple[int, str]],
    *,
    spec: Preprocess,
    limits: Limits,
    views: Sequence[View],
    stored_rows: int,
) -> Iterator[Scanned]:
    """Hash and decode (row, example name) pairs; rows below `stored_rows` are written into each of `views`.

    The hash of the pixels is that of the exact view, `spec.height` x `spec.width`.
    """
    tasks = [
        _ScanTask(
            files=tuple(files[start : start + _CHUNK]),
            spec=spec,
            limits=limits,
            views=tuple(views),
            stored=frozenset(row for row, _ in files[start : start + _CHUNK] if row < stored_rows),
        )
        for start in range(0, len(files), _CHUNK)
    ]
    for results in in_workers(_scan_chunk, tasks):
        yield from results


@dataclass(frozen=True)
class Decoded:
    """A batch `uint8[N, H, W, 3]`, and by place in it why an example could not be read; its pixels are 0."""

    pixels: Pixels
    errors: dict[int, str]


def decode_files(
    batches: Iterable[Sequence[str]], *, spec: Preprocess, limits: Limits, height: int, width: int
) -> Iterator[Decoded]:
    """Decode batches of examples to `uint8[N, height, width, 3]`, a few ahead, in worker processes."""
    tasks = ((tuple(files), spec, limits, height, width) for files in batches)
    yield from in_workers(_decode_batch, tasks)


def decode_now(files: Sequence[str], *, spec: Preprocess, limits: Limits, height: int, width: int) -> Decoded:
    """As `decode_files`, one batch in this process."""
    return _decode_batch((tuple(files), spec, limits, height, width))


def in_workers(function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
    """Results of `function` over `tasks` in order, by processes, never more than two tasks a core ahead.

    The processes need no `if __name__ == "__main__"` guard in the caller's script, and are kept for reuse.
    """
    from joblib.externals.loky import get_reusable_executor

    cores = available_cores()
    pool: Any = get_reusable_executor(
        max_workers=cores, timeout=60, initializer=_end_with, initargs=(os.getpid(),)
    )
    pending: deque[tuple[Task, Future[Result]]] = deque()
    try:
        for task in tasks:
            pending.append((task, pool.submit(function, task)))
            if len(pending) >= 2 * cores:
                yield pending.popleft()[1].result()
        while pending:
            yield pending.popleft()[1].result()
    except BrokenExecutor as error:
        raise DatasetError(
            "a decoding process was killed: the system ran out of memory, or a file crashes the decoder",
            fix="free memory and run again; a run that had begun goes on with: holotype train --resume RUN",
        ) from error
    finally:
        for _, future in pending:
            future.cancel()


def _end_with(parent: int) -> None:
    """End this process soon after its parent, which may be killed without a word to it, and not before.

    A terminal sends Ctrl-C to all processes, and a job scheduler SIGTERM: the parent decides what follows.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _scan_chunk(task: _ScanTask) -> list[Scanned]:
    maps = [view.open("r+") for view in task.views]
    sizes = ((task.spec.height, task.spec.width), *((view.height, view.width) for view in task.views))
    results = []
    for row, name in task.files:
        file, region = file_and_region(name)
        try:
            data = Path(file).read_bytes()
        except OSError as error:
            results.append(Scanned(row, error=f"cannot be read ({error.strerror})"))
            continue
        digest = hashlib.sha256(data).hexdigest()
        seen = Facts("", "", 0, 0)
        try:
            seen = facts(data, limits=task.limits)
            exact, *rendered = read_views(
                data, spec=task.spec, sizes=sizes, region=region, limits=task.limits
            )
        except ImageError as error:
            broken = Scanned(row, sha256=digest, bytes=len(data), error=str(error))
            results.append(replace(broken, format=seen.format, mode=seen.mode))
            continue
        if row in task.stored:
            for memory, pixels in zip(maps, rendered, strict=True):
                memory[row] = pixels
        width, height = _size(seen, region)
        results.append(
            Scanned(
                row,
                sha256=digest,
                pixels_sha256=hashlib.sha256(exact.tobytes()).hexdigest(),
                bytes=len(data),
                format=seen.format,
                mode=seen.mode,
                width=width,
                height=height,
            )
        )
    return results


def _size(whole: Facts, region: Box | None) -> tuple[int, int]:
    """Width and height of the part of an image that an example shows."""
    if region is None:
        return whole.width, whole.height
    width = min(region.right, whole.width) - max(region.left, 0)
    height = min(region.bottom, whole.height) - max(region.top, 0)
    return max(round(width), 1), max(round(height), 1)


def _decode_batch(task: tuple[tuple[str, ...], Preprocess, Limits, int, int]) -> Decoded:
    names, spec, limits, height, width = task
    batch = np.zeros((len(names), height, width, 3), dtype=np.uint8)
    errors = {}
    for place, name in enumerate(names):
        file, region = file_and_region(name)
        try:
            data = Path(file).read_bytes()
            (batch[place],) = read_views(
                data, spec=spec, sizes=((height, width),), region=region, limits=limits
            )
        except (OSError, ImageError) as error:
            errors[place] = str(error)
    return Decoded(batch, errors)

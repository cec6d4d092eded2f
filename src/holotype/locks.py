"""Processes of one machine that work in the same folder: taking turns, and knowing who is gone.

Each holds a lock on a file of its own for as long as it lives; the system lets go of it however a process
ends. Windows has no such locks: there, as between machines, the heartbeat in the database has to do.
"""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

__all__ = ["claimed", "is_gone", "locked", "lone", "working"]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within, no other process is."""
    with (folder / ".lock").open("w") as file:
        _lock(file, wait=True)
        yield


@contextmanager
def lone(folder: Path) -> Iterator[bool]:
    """Whether no other process is within; if so, none enters until this one has left."""
    with (folder / ".lock").open("w") as file:
        yield _lock(file, wait=False)


@contextmanager
def working(folder: Path) -> Iterator[str]:
    """Yields a name by which others see, within the block, that this process is alive."""
    name = uuid.uuid4().hex
    file = _file(folder, name)
    file.parent.mkdir(exist_ok=True)
    with file.open("w") as held:
        _lock(held, wait=True)
        try:
            yield name
        finally:
            file.unlink()


def is_gone(folder: Path, name: str) -> bool:
    """Whether a process worked in this folder under `name` and ended without a word; False where unknown."""
    file = _file(folder, name)
    if sys.platform == "win32" or not file.is_file():
        return False
    with file.open("r+") as held:
        return _lock(held, wait=False)


def claimed(file: Path) -> IO[str] | None:
    """`file`, open and locked until it is closed; None where another process has it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    held = file.open("w")
    if _lock(held, wait=False):
        return held
    held.close()
    return None


def _file(folder: Path, name: str) -> Path:
    return folder / ".workers" / name


def _lock(file: IO[str], *, wait: bool) -> bool:
    """Take the lock until the file is closed; False where another process has it."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

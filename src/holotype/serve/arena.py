"""Memory that the front and one inference process share: image bytes, one after the other in a ring."""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

from holotype.errors import ServerError

__all__ = ["Arena", "reserve_memory"]


@dataclass
class _Block:
    start: int
    end: int
    free: bool = False


class Arena:
    """Places in a shared memory of `size` bytes; given back in any order, reused in that of taking."""

    def __init__(self, memory: SharedMemory, *, size: int) -> None:
        self.memory = memory
        self._size = size
        self._blocks: deque[_Block] = deque()

    def put(self, content: bytes | bytearray) -> int | None:
        """Copy `content` in and say where it is; None while there is no room."""
        start = self._room(len(content))
        if start is None:
            return None
        self._blocks.append(_Block(start, start + len(content)))
        if self.memory.buf is None:
            raise AssertionError("the memory is closed")
        self.memory.buf[start : start + len(content)] = content
        return start

    def give_back(self, start: int) -> None:
        """What `put` returned is not needed any more."""
        next(block for block in self._blocks if block.start == start and not block.free).free = True
        while self._blocks and self._blocks[0].free:
            self._blocks.popleft()

    def _room(self, size: int) -> int | None:
        if not self._blocks:
            return 0 if size <= self._size else None
        first, head = self._blocks[0].start, self._blocks[-1].end
        if head > first:  # taken in one piece: after it, or else before it
            if head + size <= self._size:
                return head
            # Not up to the very place where the first begins: a full ring must not look like an empty one.
            return 0 if size < first else None
        return head if head + size < first else None


def reserve_memory(size: int) -> SharedMemory:
    """Shared memory whose pages exist: in a full /dev/shm the first write to a promised one kills the writer.

    `ServerError` where there is not enough.
    """
    try:
        memory = SharedMemory(create=True, size=size)
        try:
            _claim(memory, size=size)
        except OSError:
            memory.close()
            memory.unlink()
            raise
    except OSError as error:
        raise ServerError(
            f"no shared memory of {size:,} bytes for an inference process ({error.strerror})",
            fix="free some, enlarge /dev/shm, or lower the number of processes or the body limit",
        ) from error
    return memory


def _claim(memory: SharedMemory, *, size: int) -> None:
    file = Path("/dev/shm") / memory.name  # noqa: S108 - where Linux keeps it, under a name made for us
    if not file.exists():
        return
    descriptor = os.open(file, os.O_RDWR)
    try:
        os.posix_fallocate(descriptor, 0, size)
    finally:
        os.close(descriptor)

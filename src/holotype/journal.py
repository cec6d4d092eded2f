"""Lines on their way to a database: in a file of their own until they are safe there."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from holotype.errors import ConfigError
from holotype.locks import claimed
from holotype.progress import warn

__all__ = ["Journal", "lines_in_journals", "open_journal"]

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
_COMPACT_BYTES = 2**20
_QUIET_SECONDS = 1.0
_PIECE = 2**16


class Journal:
    """A file of lines, from which the oldest are taken once they are safe elsewhere.

    Any thread may append; one alone reads and forgets. A line that was appended survives the end of this
    process by whatever signal, and from the next `sync` on that of the machine. Where the disk refuses, the
    file is opened again at the next `append`. `held` are locks that go with it.
    """

    def __init__(self, file: Path, *, capacity: int, held: Sequence[IO[str]] = ()) -> None:
        self.capacity = capacity
        self._held = held
        self._file = file
        self._lock = threading.Lock()  # of the descriptor and the size; nobody waits for a disk with it
        self._settling = threading.Lock()  # of what is not on the disk yet
        self._descriptor: int | None = None
        self._closed = False
        self._size = self._done = 0
        self._appended = 0.0
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(file, _FLAGS, 0o666)
            self._size = _cut_to_whole_lines(self._descriptor)
        except OSError as error:
            raise _unusable(file, error) from error

    @property
    def pending(self) -> int:
        """Bytes that are not yet safe elsewhere; waits for nothing."""
        return max(self._size - self._done, 0)

    def append(self, lines: Sequence[bytes]) -> int:
        """Add lines without waiting for the disk; how many found room.

        `OSError` where the disk refuses them: then none of them is there.
        """
        with self._lock:
            room = self.capacity - (self._size - self._done)
            taken = 0
            for line in lines:
                room -= len(line) + 1
                if room < 0:
                    break
                taken += 1
            if taken:
                self._write(b"".join(line + b"\n" for line in lines[:taken]))
            return taken

    def sync(self) -> None:
        """Wait until all that was appended is on the disk; `OSError` where it is not."""
        with self._settling:
            with self._lock:
                same = os.dup(self._opened())  # the other one may be closed meanwhile
            try:
                os.fsync(same)
            finally:
                os.close(same)

    def oldest(self, count: int) -> tuple[list[bytes], int]:
        """The next lines to write elsewhere, and the place after them; `OSError` where that fails."""
        place, end = self._done, self._size
        lines: list[bytes] = []
        with self._file.open("rb") as stream:
            stream.seek(place)
            while len(lines) < count and place < end and (line := stream.readline()).endswith(b"\n"):
                lines.append(line.rstrip(b"\n"))
                place += len(line)
        return lines, place

    def forget(self, place: int) -> None:
        """All before `place` is safe elsewhere.

        Where the file cannot be made shorter now, it will be another time.
        """
        self._done = place
        if place <= max(_COMPACT_BYTES, self._size // 2):
            return  # to free the same few blocks again and again would keep those waiting who append
        with suppress(OSError):
            if not self._emptied():
                self._compact()

    def tidy(self) -> None:
        """Make an end of a file of which all is safe elsewhere, if nothing was added for a while."""
        if self._size and not self.pending and time.monotonic() - self._appended > _QUIET_SECONDS:
            with suppress(OSError):
                self._emptied()

    def close(self) -> None:
        with suppress(OSError):
            self._emptied()
        with self._lock:
            self._close()
            self._closed = True
        for lock in self._held:
            lock.close()

    def _emptied(self) -> bool:
        """Whether all was safe elsewhere, and so is gone from here."""
        with self._lock:
            if self._done < self._size:
                return False
            if self._size:
                os.ftruncate(self._opened(), 0)
                self._size = self._done = 0
            return True

    def _write(self, content: bytes) -> None:
        written = 0
        try:
            written = os.write(self._opened(), content)
        finally:
            if written < len(content):
                self._close()  # what was half written is cut off when it is opened again
        if written < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._size += len(content)
        self._appended = time.monotonic()

    def _opened(self) -> int:
        """The descriptor, opened again where it had to be closed."""
        if self._closed:  # another server may have it by now
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if self._descriptor is None:
            opened = os.open(self._file, _FLAGS, 0o666)
            try:
                found = os.fstat(opened).st_size
                if found > self._size:
                    os.ftruncate(opened, self._size)
                elif found < self._size:  # another disk is there now
                    warn(f"the journal is not what it was: {self._size - found} bytes are gone")
                    self._size = _cut_to_whole_lines(opened)
                    self._done = min(self._done, self._size)
            except OSError:
                os.close(opened)
                raise
            self._descriptor = opened
        return self._descriptor

    def _close(self) -> None:
        if self._descriptor is not None:
            with suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None

    def _compact(self) -> None:
        """Write what is left into another file, which takes the place of this one.

        Nobody who appends waits for more than the few lines that came in meanwhile.
        """
        scratch = self._file.with_name(f".{self._file.name}.{uuid.uuid4().hex[:8]}")
        try:
            # Without a buffer: what lies beyond the last whole line may still change.
            with self._settling, self._file.open("rb", buffering=0) as source, scratch.open("xb") as target:
                source.seek(self._done)
                _copy(source, target, until=self._size)
                os.fsync(target.fileno())
                with self._lock:
                    _copy(source, target, until=self._size)
                    target.close()
                    source.close()
                    self._close()
                    scratch.replace(self._file)
                    self._size, self._done = self._size - self._done, 0
                    same = os.dup(self._opened())
                try:
                    os.fsync(same)
                finally:
                    os.close(same)
        finally:
            scratch.unlink(missing_ok=True)


def open_journal(folder: Path, *, url: str, capacity: int) -> Journal:
    """The journal of a database, whichever bundle answers; each of several servers has one of its own.

    What a server that is gone has left in its own is taken over. `ConfigError` where nothing can be written.
    """
    name = _name(url)
    try:
        for number in itertools.count(1):
            file = folder / f"{name}-{number}.jsonl"
            if (lock := claimed(file.with_suffix(".lock"))) is not None:
                journal = Journal(file, capacity=capacity, held=[lock])
                break
        for left in sorted(folder.glob(f"{name}-*.jsonl")):
            if left != file and (lock := claimed(left.with_suffix(".lock"))) is not None:
                with lock:
                    _take_over(left, journal)
    except OSError as error:
        raise _unusable(folder, error) from error
    return journal


def lines_in_journals(folder: Path, *, url: str) -> Iterator[bytes]:
    """Of all journals of a database, whoever keeps them; some of them may be in it already."""
    for file in sorted(folder.glob(f"{_name(url)}-*.jsonl")):
        with suppress(FileNotFoundError), file.open("rb") as stream:
            yield from stream


def _name(url: str) -> str:
    return f"journal-{hashlib.sha256(url.encode()).hexdigest()[:16]}"


def _take_over(left: Path, journal: Journal) -> None:
    lines = left.read_bytes().splitlines()
    if journal.append(lines) == len(lines):
        journal.sync()
        left.unlink()


def _copy(source: IO[bytes], target: IO[bytes], *, until: int) -> None:
    while (left := until - source.tell()) > 0 and (piece := source.read(min(left, _PIECE))):
        target.write(piece)
    target.flush()


def _cut_to_whole_lines(descriptor: int) -> int:
    """Cut off what a power failure left of a last line; returns the bytes that are left."""
    size = os.fstat(descriptor).st_size
    end = size
    while end:
        start = max(end - _PIECE, 0)
        os.lseek(descriptor, start, os.SEEK_SET)
        found = os.read(descriptor, end - start).rfind(b"\n")
        if found >= 0:
            end = start + found + 1
            break
        end = start
    if end < size:
        os.ftruncate(descriptor, end)
        warn(f"the journal ended within a line: {size - end} bytes are cut off")
    return end


def _unusable(file: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot be written ({error.strerror})", where=file, fix="choose another records.journal"
    )

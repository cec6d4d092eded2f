"""What was answered and what turned out to be right, on its way into a database: never lost or in the way.

A row is in a journal (`journal.py`) before its answer is sent: handed to the kernel, not yet on the disk. So
the end of this process, by whatever signal, costs nothing; a machine that loses its power may lose what was
answered in the last moment (`_PAUSE_SECONDS` and the time of an fsync). A label is on a disk before it is
acknowledged. From the journal rows go into the database; where that is down, the journal grows, up to a
capacity, and is written when it returns.

Where the journal cannot be written (a full disk, one that became read-only) rows wait in memory, up to
`_IN_MEMORY`, until it can, or go straight into the database. Where its disk is slow, they wait in memory for
a moment, so that no answer waits for it. Only these a killed process loses. What is dropped is counted.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy
from sqlalchemy.exc import SQLAlchemyError, StatementError

from holotype.database import (
    EXPERIMENTS,
    FEEDBACK,
    PREDICTIONS,
    connect,
    forget_before,
    insert,
    is_refusal,
    parsed,
    prepare,
    short,
)
from holotype.journal import Journal
from holotype.progress import note, warn

__all__ = ["EXPERIMENTS", "FEEDBACK", "PREDICTIONS", "Records", "connect"]

_IN_MEMORY = 20_000  # rows that wait for the journal at most
_AT_ONCE = 500  # rows of one transaction
_PAUSE_SECONDS = 0.05  # also between two fsyncs
_RETRY_SECONDS = 1.0
_SLOW_SECONDS = 0.1  # an append that takes longer has waited for a disk
_SPARED_SECONDS = 1.0  # that rows then go to memory first
_SWEEP_SECONDS = 3600.0
_DAY = 86_400.0
_WAITING = f"wait in memory, {_IN_MEMORY:,} at most, and labels are refused"

_Row = tuple[bytes, Future[bool]]


@dataclass
class Records:
    """Rows on their way into a database. Nothing here waits for it but `close`, and that only a moment.

    `up` and `journal_up` say whether database and journal took what they were given last; `dropped` counts
    rows that are in neither and never will be. With `keep_days` older rows are deleted.
    """

    engine: sqlalchemy.Engine
    journal: Journal
    keep_days: float | None = None
    up: bool | None = None
    journal_up: bool = True
    dropped: int = 0
    written: int = 0
    _held: deque[_Row] = field(default_factory=deque)
    _unsynced: deque[Future[bool]] = field(default_factory=deque)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _wake: threading.Event = field(default_factory=threading.Event)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)
    _spared_until: float = 0.0
    _next_sweep: float = 0.0
    _dropping: bool = False

    def start(self) -> None:
        """Begin to write, what an earlier server left in the journal first."""
        for target in (self._keep_journal, self._keep_database):
            thread = threading.Thread(target=target, daemon=True)
            thread.start()
            self._threads.append(thread)

    @property
    def pending(self) -> int:
        """Bytes that are in the journal only."""
        return self.journal.pending

    @property
    def held(self) -> int:
        """Rows that are in memory only."""
        return len(self._held)

    def add(self, kind: str, row: Mapping[str, Any]) -> Future[bool]:
        """Accept a row; the future says whether it is on a disk.

        It is in the journal when this returns; where that is slow or refuses it, in memory.
        """
        line = json.dumps({"kind": kind, **row}).encode()
        safe: Future[bool] = Future()
        if self._held or time.monotonic() < self._spared_until or not self._append([(line, safe)]):
            self._hold(line, safe)
        if kind == "feedback":
            self._wake.set()  # somebody waits to hear that it is on the disk
        return safe

    def close(self, *, seconds: float = 2.0) -> None:
        """Write what is left, into the database if it is there, else into the journal."""
        self._stop.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(seconds)
        if self._held:
            self._drop([*self._held], "the journal cannot be written")
        self.journal.close()
        self.engine.dispose()

    def _append(self, rows: Sequence[_Row]) -> bool:
        """Into the journal, or dropped where that is full; False where its disk refuses them."""
        began = time.monotonic()
        try:
            taken = self.journal.append([line for line, _ in rows])
        except OSError as error:
            self._tell_journal(error)
            return False
        now = time.monotonic()
        if now - began > _SLOW_SECONDS:
            self._spared_until = now + _SPARED_SECONDS
        self._unsynced.extend(safe for _, safe in rows[:taken])
        if taken < len(rows):
            self._drop(rows[taken:], "the journal is full")
        else:
            self._dropping = False
        return True

    def _hold(self, line: bytes, safe: Future[bool]) -> None:
        if len(self._held) >= _IN_MEMORY:
            self._drop([(line, safe)], f"{_IN_MEMORY:,} rows wait for the journal")
            return
        if not self.journal_up and not self.up:
            self._settle(safe, kept=False)  # it may yet arrive, but nobody can promise it
        self._held.append((line, safe))
        if self.journal_up:
            self._wake.set()

    def _take_held(self) -> list[_Row]:
        rows: list[_Row] = []
        with suppress(IndexError):
            while len(rows) < _AT_ONCE:
                rows.append(self._held.popleft())
        return rows

    def _drop(self, rows: Sequence[_Row], why: str) -> None:
        self._count_dropped(len(rows))
        if not self._dropping:
            self._dropping = True
            warn(f"{why}: answers and labels are lost from here on, and counted")
        for _, safe in rows:
            self._settle(safe, kept=False)

    def _count_dropped(self, count: int) -> None:
        with self._lock:
            self.dropped += count

    def _settle(self, safe: Future[bool], *, kept: bool) -> None:
        with self._lock:
            if not safe.done() and safe.set_running_or_notify_cancel():
                safe.set_result(kept)

    def _keep_journal(self) -> None:
        while True:
            stopping = self._stop.is_set()
            self._write_held()
            self._sync()
            if stopping:
                return
            self._wake.wait(_PAUSE_SECONDS if self.journal_up else _RETRY_SECONDS)
            self._wake.clear()

    def _write_held(self) -> None:
        """Into the journal, what waits in memory."""
        while rows := self._take_held():
            if not self._append(rows):
                self._held.extendleft(reversed(rows))
                if not self.up:
                    for _, safe in [*self._held]:
                        self._settle(safe, kept=False)
                return

    def _sync(self) -> None:
        waiting = [self._unsynced.popleft() for _ in range(len(self._unsynced))]
        if not waiting:
            return
        error = None
        try:
            self.journal.sync()
        except OSError as found:
            error = found
        self._tell_journal(error)
        for safe in waiting:
            self._settle(safe, kept=error is None)

    def _keep_database(self) -> None:
        ready = False
        while True:
            stopping = self._stop.is_set()
            try:
                if not ready:
                    prepare(self.engine)
                    ready = True
                    self._tell(up=True)
                moved = self._move_lines() or self._move_held()
                if moved:
                    self._tell(up=True)
                elif not stopping:
                    self.journal.tidy()
                    self._sweep()
            except SQLAlchemyError as error:
                self._tell(up=False, error=error)
                if stopping or self._stop.wait(_RETRY_SECONDS):
                    return
                continue
            if not moved:
                if stopping:
                    return
                self._stop.wait(_PAUSE_SECONDS)

    def _move_lines(self) -> bool:
        """The oldest of the journal into the database; whether there were any."""
        if not self.journal.pending:
            return False
        try:
            lines, place = self.journal.oldest(_AT_ONCE)
        except OSError as error:
            self._tell_journal(error)
            return False
        if lines:
            self._write(lines)
            self.journal.forget(place)
            self.written += len(lines)
        return bool(lines)

    def _move_held(self) -> bool:
        """What the journal does not take, straight into the database; whether there was any."""
        if self.journal_up or self.journal.pending or not (rows := self._take_held()):
            return False
        try:
            self._write([line for line, _ in rows])
        except SQLAlchemyError:
            self._held.extendleft(reversed(rows))
            raise
        self.written += len(rows)
        for _, safe in rows:
            self._settle(safe, kept=True)
        return True

    def _sweep(self) -> None:
        """Delete some of the rows that are too old, if it is time for that."""
        if self.keep_days is None or time.monotonic() < self._next_sweep:
            return
        if not forget_before(self.engine, time.time() - self.keep_days * _DAY, at_most=_AT_ONCE):
            self._next_sweep = time.monotonic() + _SWEEP_SECONDS

    def _write(self, lines: Sequence[bytes]) -> None:
        rows = [row for row in map(self._parsed, lines) if row is not None]
        try:
            insert(self.engine, rows)
        except StatementError as error:
            if not is_refusal(error):
                raise
            for row in rows:  # one that the database refuses must not hold up the others
                self._insert_alone(row)

    def _insert_alone(self, row: Mapping[str, Any]) -> None:
        try:
            insert(self.engine, [row])
        except StatementError as error:
            if not is_refusal(error):
                raise
            self._count_dropped(1)
            warn(f"the database refuses a row ({short(error)})")

    def _parsed(self, line: bytes) -> dict[str, Any] | None:
        """A row of the journal; None where the disk has made something else of it."""
        row = parsed(line)
        if row is not None:
            return row
        self._count_dropped(1)
        warn("a line of the journal is damaged and is passed over")
        return None

    def _tell(self, *, up: bool, error: Exception | None = None) -> None:
        if up != self.up and not (up and self.up is None):
            where = "go to the journal" if self.journal_up else _WAITING
            if up:
                note("the database is there")
            else:
                warn(f"the database is down ({short(error)}): answers {where}")
        self.up = up

    def _tell_journal(self, error: OSError | None) -> None:
        if error is not None and self.journal_up:
            where = "go straight to the database" if self.up else _WAITING
            warn(f"the journal cannot be written ({error.strerror}): answers {where}")
        elif error is None and not self.journal_up:
            note("the journal can be written again")
        self.journal_up = error is None

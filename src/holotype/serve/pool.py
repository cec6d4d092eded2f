"""Inference processes, each with a thread that feeds it, watches it, and replaces it when it dies."""

from __future__ import annotations

import contextvars
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

from pydantic import ValidationError

from holotype import errors
from holotype.errors import HolotypeError, ServerError
from holotype.progress import note
from holotype.serve.admission import Job, Line
from holotype.serve.answers import REPLY, Reply, Served, failed
from holotype.serve.settings import ServeSettings
from holotype.serve.worker import Order, order_bytes, run

__all__ = ["Pool"]

_LOAD_SECONDS = 120.0
# How long a death in idleness, or the end of the server, may go unnoticed.
_GLANCE_SECONDS = 0.2
# Before one that died is replaced, longer each time it happens again soon.
_PAUSES_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0)
_MAX_REPLY_BYTES = 16 * 2**20


class _WorkerLostError(Exception):
    """The process died, hung, or answered nonsense."""


@dataclass(frozen=True)
class _Worker:
    process: SpawnProcess
    pipe: Connection
    slot: SharedMemory
    served: Served

    @property
    def alive(self) -> bool:
        """False once the process has died: nothing but the end of the pipe is readable between jobs."""
        try:
            return not self.pipe.poll(0)
        except OSError:
            return False


class Pool:
    """The inference processes of one server, fed from `line`.

    `started` has one future for each: what it serves, or the `HolotypeError` that kept it from loading. Only
    a first load that fails is final; a process lost later is replaced until `close`.
    """

    def __init__(self, target: Path, *, settings: ServeSettings, line: Line) -> None:
        self.started: tuple[Future[Served], ...] = tuple(Future() for _ in range(settings.workers))
        for one in self.started:
            one.set_running_or_notify_cancel()  # who waits for it cannot cancel it
        self._line = line
        self._settings = settings
        self._order = Order(
            target=str(target),
            runtime=settings.runtime,
            threads=settings.threads_each,
            max_pixels=settings.max_pixels,
        )
        self._threads = [
            # A copy of the context, so that --quiet holds in the thread too.
            threading.Thread(
                target=contextvars.copy_context().run, args=(self._supervise, first), daemon=True
            )
            for first in self.started
        ]

    @property
    def served(self) -> Served | None:
        """What is served, or None while the first process is loading."""
        ready = (one for one in self.started if one.done() and one.exception() is None)
        return next((one.result() for one in ready), None)

    def start(self) -> None:
        """Begin to load; returns at once."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End every process, the stuck ones by force, and wait until they are gone."""
        self._line.close()
        for thread in self._threads:
            thread.join()

    def _supervise(self, first: Future[Served]) -> None:
        order, failures = self._order, 0
        while not self._line.closed:
            try:
                worker = _start(order, slot_bytes=self._settings.max_body_bytes, line=self._line)
            except HolotypeError as error:
                if not first.done():
                    first.set_exception(error)
                    return
                reason = str(error)
            else:
                order = replace(order, bundle_hash=worker.served.bundle)
                self._line.join()
                if not first.done():
                    first.set_result(worker.served)
                began = time.monotonic()
                reason = self._employ(worker)
                failures = 0 if time.monotonic() - began > 10 else failures
            if not self._line.closed:
                note(f"an inference process is gone ({reason}); starting another")
                self._line.rest(seconds=_PAUSES_SECONDS[min(failures, len(_PAUSES_SECONDS) - 1)])
                failures += 1
        if not first.done():
            first.set_exception(ServerError("stopped while loading"))

    def _employ(self, worker: _Worker) -> str:
        """Feed `worker`, which has joined the line, until it is lost or the line closes; returns why."""
        try:
            while worker.alive and not self._line.closed:
                job = self._line.take(seconds=_GLANCE_SECONDS)
                if job is None:
                    continue
                if not worker.alive:
                    self._line.restore(job)
                    break
                try:
                    reply = self._execute(worker, job)
                except _WorkerLostError as lost:
                    self._line.done(job, failed(503, "the inference process of this image was lost"))
                    return str(lost)
                self._line.done(job, reply)
        finally:
            self._line.leave()
            _stop(worker.process, worker.pipe, worker.slot)
        return f"exit code {worker.process.exitcode}"

    def _execute(self, worker: _Worker, job: Job) -> Reply:
        limit = time.monotonic() + self._settings.stuck_seconds
        try:
            assert worker.slot.buf is not None
            worker.slot.buf[: len(job.image)] = job.image
            worker.pipe.send_bytes(order_bytes(size=len(job.image), top=job.top))
            while not worker.pipe.poll(_GLANCE_SECONDS):
                if self._line.closed:
                    raise _WorkerLostError("the server is shutting down")
                if time.monotonic() > limit:
                    raise _WorkerLostError(f"stuck for {self._settings.stuck_seconds:g} seconds")
            return REPLY.validate_json(worker.pipe.recv_bytes(_MAX_REPLY_BYTES))
        except (EOFError, OSError) as error:
            raise _WorkerLostError("it died at work") from error
        except ValidationError as error:
            raise _WorkerLostError("it answered nonsense") from error


def _start(order: Order, *, slot_bytes: int, line: Line) -> _Worker:
    """Start a process and wait until it has loaded; `HolotypeError` says why it has not."""
    slot = _new_slot(slot_bytes)
    try:
        process, pipe = _spawn(order, slot=slot)
        try:
            served = _wait_loaded(pipe, process, line=line)
        except HolotypeError:
            _stop(process, pipe, slot)
            raise
    finally:
        # The process has it open by now, or never will: with no name left, no way of dying can leak it.
        slot.unlink()
    return _Worker(process=process, pipe=pipe, slot=slot, served=served)


def _spawn(order: Order, *, slot: SharedMemory) -> tuple[SpawnProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=run, args=(theirs, slot.name, order), name="inference", daemon=True)
    try:
        with _signals_held():
            process.start()
    except OSError as error:
        pipe.close()
        slot.close()
        raise ServerError(f"cannot start an inference process ({error.strerror})") from error
    finally:
        theirs.close()  # only the process holds that end, so its death is the end of the pipe
    return process, pipe


def _new_slot(size: int) -> SharedMemory:
    try:
        slot = SharedMemory(create=True, size=size)
        _reserve(slot, size=size)
    except OSError as error:
        raise ServerError(
            f"no shared memory of {size:,} bytes for an inference process ({error.strerror})",
            fix="free some, enlarge /dev/shm, or lower the number of processes or the body limit",
        ) from error
    return slot


def _reserve(slot: SharedMemory, *, size: int) -> None:
    """Claim the memory now: in a full /dev/shm the first write to a promised page kills the writer."""
    file = Path("/dev/shm") / slot.name  # noqa: S108 - where Linux keeps it, under a name made for us
    if not file.exists():
        return
    descriptor = os.open(file, os.O_RDWR)
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError:
        slot.close()
        slot.unlink()
        raise
    finally:
        os.close(descriptor)


def _wait_loaded(pipe: Connection, process: SpawnProcess, *, line: Line) -> Served:
    limit = time.monotonic() + _LOAD_SECONDS
    while not pipe.poll(_GLANCE_SECONDS):
        if line.closed:
            raise ServerError("stopped while loading")
        if time.monotonic() > limit:
            raise ServerError(f"an inference process did not load within {_LOAD_SECONDS:g} seconds")
    try:
        message = json.loads(pipe.recv_bytes(_MAX_REPLY_BYTES))
    except (EOFError, OSError) as error:
        process.join(_GLANCE_SECONDS)
        raise ServerError(
            f"an inference process died while loading (exit code {process.exitcode})"
        ) from error
    if failure := message.get("kind"):
        raise getattr(errors, failure, ServerError)(message["message"])
    return Served.model_validate(message)


def _stop(process: SpawnProcess, pipe: Connection, slot: SharedMemory) -> None:
    """End a process: a closed pipe asks, and a kill follows for one that is stuck."""
    pipe.close()
    process.join(1)
    if process.exitcode is None:
        process.kill()
        process.join()
    slot.close()


@contextmanager
def _signals_held() -> Iterator[None]:
    """Processes started within begin with Ctrl-C and SIGTERM held back, until they ignore them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

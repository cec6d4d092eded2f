"""One inference process as the front sees it: started, fed over a pipe and shared memory, ended."""

from __future__ import annotations

import asyncio
import contextvars
import json
import multiprocessing
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from pydantic import ValidationError

from holotype import errors
from holotype.errors import HolotypeError, ServerError
from holotype.serve.admission import Job
from holotype.serve.answers import News, Served
from holotype.serve.arena import Arena, reserve_memory
from holotype.serve.worker import Assignment, run

__all__ = ["Flight", "Process", "start_process"]

_LOAD_SECONDS = 120.0
_MAX_NEWS_BYTES = 16 * 2**20
_STOP_SECONDS = 1.0  # to end when asked, before it is ended by force
_GLANCE_SECONDS = 0.02  # between two looks at a process that ends, or that takes no orders


@dataclass(eq=False)
class Flight:
    """A job that was handed to a process, where its bytes are, and since when one that came later is done."""

    job: Job
    start: int
    overtaken: float | None = None


class Process:
    """A process that is ready; `on_news` is called in the event loop, `lost` becomes why it ended."""

    def __init__(self, process: SpawnProcess, pipe: Connection, arena: Arena, served: Served) -> None:
        self.served = served
        self.flights: dict[int, Flight] = {}
        self.on_news: Callable[[Process, News], None] = lambda _, __: None
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._process, self._pipe, self._arena = process, pipe, arena
        self._number = 0
        self._moved = time.monotonic()
        self._orders: deque[bytes] = deque()
        self._later: asyncio.TimerHandle | None = None
        loop = asyncio.get_running_loop()
        self._listener = threading.Thread(target=self._listen, args=(loop,), daemon=True)
        self._listener.start()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    @property
    def room(self) -> int:
        """How many more images it takes: one batch is inferred while the next one is decoded."""
        return 2 * self.served.max_batch - len(self.flights)

    @property
    def idle(self) -> bool:
        return not self.flights

    def give(self, job: Job, *, executing: bool) -> bool:
        """Hand over a job; False where the shared memory has no room for its bytes now.

        One that is `executing` from now on needs no word when it begins.
        """
        start = self._arena.put(job.image)
        if start is None:
            return False
        if self.idle:
            self._moved = time.monotonic()
        self._number += 1
        self.flights[self._number] = Flight(job, start)
        self._send(
            {
                "number": self._number,
                "executing": executing,
                "top": job.wish.top,
                "explain": job.wish.explain,
                "show_input": job.wish.show_input,
                "admitted": job.admitted,
                "deadline": job.deadline,
                "start": start,
                "size": len(job.image),
            }
        )
        return True

    def withdraw(self, jobs: Sequence[Job]) -> None:
        """Tell the process that nobody waits for these any more; it says when they are done with."""
        numbers = [number for number, flight in self.flights.items() if flight.job in jobs]
        if numbers:
            self._send({"withdraw": numbers})

    def land(self, number: int) -> Job | None:
        """The job of an order that is done; its memory is free again. None where there is no such order."""
        flight = self.flights.pop(number, None)
        if flight is None:
            return None
        self._arena.give_back(flight.start)
        for earlier, other in self.flights.items():
            if earlier > number:
                break
            other.overtaken = other.overtaken or time.monotonic()
        return flight.job

    def is_stuck(self, *, seconds: float) -> bool:
        """Whether it got no further for so long: with nothing, or with an image that others have overtaken.

        Waiting in a process that is busy with others is not being stuck. A heat map takes its time.
        """
        limit = time.monotonic() - seconds
        if self.flights and self._moved < limit:
            return True
        overtaken = (
            flight.overtaken
            for flight in self.flights.values()
            if not (flight.job.wish.explain and flight.job.stage == "executing")
        )
        return any(at is not None and at < limit for at in overtaken)

    def kill(self, reason: str) -> None:
        """End it by force."""
        if not self.lost.done():
            self.lost.set_result(reason)
        self._process.kill()

    async def end(self) -> None:
        """Ask it to stop, force it where it does not, and wait until it is gone."""
        self._orders.clear()
        self._send({"stop": True})
        limit = time.monotonic() + _STOP_SECONDS
        # Not in threads: of many processes that hang, each would wait for one.
        while self._process.is_alive() or self._listener.is_alive():
            if time.monotonic() > limit:
                self._process.kill()
            await asyncio.sleep(_GLANCE_SECONDS)
        if self._later is not None:
            self._later.cancel()
        self._pipe.close()
        self._arena.memory.close()

    def _send(self, order: dict[str, object]) -> None:
        """Never waits: what the pipe does not take now follows when it does."""
        self._orders.append(json.dumps(order).encode())
        if self._later is None:
            self._send_waiting()

    def _send_waiting(self) -> None:
        self._later = None
        with suppress(OSError):  # a dead reader is told by `lost`
            while self._orders and _has_room(self._pipe):
                self._pipe.send_bytes(self._orders.popleft())
        if self._orders and not self.lost.done():
            # A process that hangs: its orders are no more than it has room for, and as many withdrawals.
            self._later = asyncio.get_running_loop().call_later(_GLANCE_SECONDS, self._send_waiting)

    def _listen(self, loop: asyncio.AbstractEventLoop) -> None:
        """In a thread of its own: pass on what the process says, until it says nothing more."""
        reason = "it died"
        with suppress(RuntimeError):  # the loop is closed: nobody is there to be told
            try:
                while True:
                    message = self._pipe.recv_bytes(_MAX_NEWS_BYTES)
                    news = News.model_validate_json(message)
                    loop.call_soon_threadsafe(self._hear, news)
            except ValidationError:
                reason = "it answered nonsense"
            except (EOFError, OSError):
                pass
            loop.call_soon_threadsafe(self._fall_silent, reason)

    def _hear(self, news: News) -> None:
        self._moved = time.monotonic()
        if not self.lost.done():
            self.on_news(self, news)

    def _fall_silent(self, reason: str) -> None:
        if not self.lost.done():
            self.lost.set_result(reason)


async def start_process(assignment: Assignment, *, memory_bytes: int) -> Process:
    """Start a process and wait until it has loaded; `HolotypeError` says why it has not."""
    # In a thread, with the context so that --quiet holds there: a process takes a while to begin.
    context = contextvars.copy_context()
    spawning = asyncio.ensure_future(asyncio.to_thread(context.run, _spawn, assignment, memory_bytes))
    try:
        process, pipe, arena = await asyncio.shield(spawning)
        loading = asyncio.to_thread(_wait_loaded, pipe, process, arena)
        return Process(process, pipe, arena, await loading)
    except BaseException as error:
        # What was spawned meanwhile must not outlive whoever asked for it.
        with suppress(HolotypeError):
            process, pipe, arena = await spawning
            process.kill()
            await asyncio.to_thread(process.join)
            pipe.close()
            arena.memory.close()
        if isinstance(error, HolotypeError | asyncio.CancelledError):
            raise
        raise ServerError(f"an inference process did not load ({error})") from error


def _spawn(assignment: Assignment, memory_bytes: int) -> tuple[SpawnProcess, Connection, Arena]:
    memory = reserve_memory(memory_bytes)
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(
        target=run, args=(theirs, memory.name, assignment), name="inference", daemon=True
    )
    try:
        with _signals_held():
            process.start()
    except OSError as error:
        pipe.close()
        memory.close()
        memory.unlink()
        raise ServerError(f"cannot start an inference process ({error.strerror})") from error
    finally:
        theirs.close()  # only the process holds that end, so its death is the end of the pipe
    return process, pipe, Arena(memory, size=memory_bytes)


def _wait_loaded(pipe: Connection, process: SpawnProcess, arena: Arena) -> Served:
    try:
        if not pipe.poll(_LOAD_SECONDS):
            raise ServerError(f"an inference process did not load within {_LOAD_SECONDS:g} seconds")
        message = json.loads(pipe.recv_bytes(_MAX_NEWS_BYTES))
    except (EOFError, OSError) as error:
        process.join(1)
        raise ServerError(
            f"an inference process died while loading (exit code {process.exitcode})"
        ) from error
    finally:
        # It has the memory open by now, or never will: with no name left, no way of dying can leak it.
        arena.memory.unlink()
    if failure := message.get("kind"):
        kind = getattr(errors, failure, ServerError)
        raise kind(message["what"], where=message["where"], fix=message["fix"])
    return Served.model_validate(message)


def _has_room(pipe: Connection) -> bool:
    """Whether a pipe takes a small message, of a kilobyte or two, without waiting.

    A socket is not writable before far more than that is free. Where there is no `poll` (Windows), a pipe to
    a process that hangs may be waited for, until the process is replaced.
    """
    if not hasattr(select, "poll"):
        return True
    poll = select.poll()
    poll.register(pipe.fileno(), select.POLLOUT)
    return bool(poll.poll(0))


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

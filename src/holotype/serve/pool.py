"""The inference processes of one bundle: fed from the line, watched, and replaced when they are lost."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from holotype.errors import HolotypeError, ServerError
from holotype.progress import warn
from holotype.serve.admission import Job, Line
from holotype.serve.answers import News, Served
from holotype.serve.process import Process, start_process
from holotype.serve.settings import ServeSettings
from holotype.serve.worker import Assignment

__all__ = ["Pool"]

_GLANCE_SECONDS = 0.2  # how long an image may be stuck beyond its time before anybody looks
# Before a process that was lost is replaced, longer each time it happens again soon.
_PAUSES_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0)
_LONG_LIFE_SECONDS = 10.0
_CLOSING = "the server is shutting down"
_ATTEMPTS = 2  # an image that was decoded in a process when it died may be why

Listener = Callable[[News], None]


class Pool:
    """Processes that answer with one bundle; `served` says what it is, None until the first one is ready.

    Only a first load that fails is final; a process lost later is replaced until `close`. `listener` hears
    all that the processes say.
    """

    def __init__(
        self,
        target: Path,
        *,
        settings: ServeSettings,
        line: Line,
        background: bool = False,
    ) -> None:
        self.served: Served | None = None
        self.listener: Listener = lambda _: None
        self.line = line
        self._settings = settings
        self._assignment = Assignment(
            target=str(target),
            runtime=settings.runtime,
            precision=settings.precision,
            threads=settings.threads if settings.workers == 1 else settings.threads_each,
            max_pixels=settings.max_pixels,
            max_batch=settings.max_batch,
            max_wait_ms=settings.max_wait_ms,
            deadline_seconds=settings.deadline_seconds,
            background=background,
            log=settings.log,
        )
        self._waiting: deque[Job] = deque()
        self._ready: list[Process] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._closing = asyncio.Event()

    @property
    def ready(self) -> int:
        """Processes that answer now."""
        return len(self._ready)

    @property
    def closing(self) -> bool:
        """Whether it is being ended, so that what fails now is no fault of the bundle."""
        return self._closing.is_set()

    @property
    def processes(self) -> list[int | None]:
        """Their ids."""
        return [process.pid for process in self._ready]

    @property
    def idle(self) -> int:
        """Of these, those with nothing to do."""
        return sum(process.idle for process in self._ready)

    async def load(self) -> Served:
        """Start every process and wait until all are ready; `HolotypeError` says what is wrong."""
        firsts = [asyncio.get_running_loop().create_future() for _ in range(self._settings.workers)]
        self._tasks = [asyncio.ensure_future(self._keep_one(first)) for first in firsts]
        self._tasks.append(asyncio.ensure_future(self._watch()))
        results = await asyncio.gather(*firsts, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                await self.close()
                raise result
        if self.served is None:
            raise AssertionError("ready without a process")
        return self.served

    def submit(self, jobs: Sequence[Job]) -> None:
        """Answer these, which were admitted to the line."""
        if self.closing:
            for job in jobs:
                self._over(job, 503, _CLOSING)
            return
        self._waiting.extend(jobs)
        self._dispatch()

    def withdraw(self, jobs: Sequence[Job]) -> None:
        """Nobody waits for these any more: those that are not being inferred yet never will be."""
        left = [job for job in jobs if job.stage == "waiting"]
        for job in left:
            self.line.move(job, "over")
        if left:
            self._waiting = deque(job for job in self._waiting if job.stage != "over")
            for process in self._ready:
                process.withdraw(left)

    async def drain(self) -> None:
        """Wait until nothing that was submitted is left, no longer than it may take."""
        limit = time.monotonic() + self._settings.deadline_seconds
        while (self._waiting or self.idle < self.ready) and time.monotonic() < limit:
            await asyncio.sleep(_GLANCE_SECONDS / 4)

    async def close(self) -> None:
        """End every process, the stuck ones by force, and wait until they are gone."""
        self._closing.set()
        for job in self._waiting:
            self._over(job, 503, _CLOSING)
        self._waiting.clear()
        for process in self._ready:
            if not process.lost.done():
                process.lost.set_result(_CLOSING)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _dispatch(self) -> None:
        while self._waiting:
            free = [process for process in self._ready if process.room > 0]
            if not free:
                return
            job = self._waiting[0]
            if job.deadline <= time.monotonic():
                self._waiting.popleft()
                self._over(job, 504, "the deadline passed while the image was waiting")
                continue
            for process in sorted(free, key=lambda one: len(one.flights)):
                first = process.idle
                if process.give(job, executing=first):
                    break
            else:
                return
            self._waiting.popleft()
            if first:  # it has nothing else to do: this one is executed from now on
                self.line.move(job, "executing")

    def _hear(self, process: Process, news: News) -> None:
        for number in news.begun:
            if (flight := process.flights.get(number)) is not None:
                self.line.move(flight.job, "executing")
        for done in news.done:
            job = process.land(done.order)
            if job is None:
                continue
            self.line.move(job, "over")
            if done.outcome is None:
                job.fail(504, "the deadline passed while the image was waiting")
            else:
                job.settle(done.outcome)
        if news.done:
            self._dispatch()
        self.listener(news)

    def _over(self, job: Job, status: int, detail: str, *, lost: str | None = None) -> None:
        self.line.move(job, "over")
        job.fail(status, detail, lost=lost)

    async def _keep_one(self, first: asyncio.Future[Served]) -> None:
        """Start a process, and another one whenever it is lost."""
        failures = 0
        while not self._closing.is_set():
            began = time.monotonic()
            try:
                reason = await self._live(first)
            except HolotypeError as error:
                if not first.done():
                    first.set_exception(error)
                    return
                reason = str(error)
            failures = 0 if time.monotonic() - began > _LONG_LIFE_SECONDS else failures + 1
            if not self._closing.is_set():
                warn(f"an inference process is gone ({reason}); starting another")
                pause = _PAUSES_SECONDS[min(failures, len(_PAUSES_SECONDS)) - 1] if failures else 0.0
                try:
                    await asyncio.wait_for(self._closing.wait(), pause)
                except TimeoutError:
                    continue
        if not first.done():
            first.set_exception(ServerError("stopped while loading"))

    async def _live(self, first: asyncio.Future[Served]) -> str:
        """The life of a process; returns why it ended. `HolotypeError` where it never began."""
        starting = asyncio.ensure_future(
            start_process(self._assignment, memory_bytes=2 * self._settings.max_body_bytes)
        )
        closing = asyncio.ensure_future(self._closing.wait())
        try:
            await asyncio.wait({starting, closing}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            closing.cancel()
        if self._closing.is_set() and not starting.done():
            starting.cancel()
            raise ServerError("stopped while loading")
        process = starting.result()
        process.on_news = self._hear
        # The same bundle from now on, whatever takes its place on the disk.
        self._assignment = replace(self._assignment, bundle_hash=process.served.bundle)
        self.served = self.served or process.served
        self._ready.append(process)
        if self.closing and not process.lost.done():  # in this very turn: `close` has not seen it
            process.lost.set_result(_CLOSING)
        if not first.done():
            first.set_result(process.served)
        self._dispatch()
        reason = await process.lost
        self._ready.remove(process)
        self._recover(process)
        await process.end()
        return reason

    def _recover(self, process: Process) -> None:
        """What a lost process was inferring is lost; what it was only given goes to the head of the line."""
        left = [flight.job for flight in process.flights.values()]
        process.flights.clear()
        loss = uuid.uuid4().hex
        for job in reversed(left):
            if self.closing:  # nobody would take it from the line again
                self._over(job, 503, _CLOSING)
                continue
            job.attempts += 1
            if job.stage == "executing" or (job.stage == "waiting" and job.attempts >= _ATTEMPTS):
                self._over(job, 503, "the inference process of this image was lost", lost=loss)
            elif job.stage == "waiting":
                self._waiting.appendleft(job)
        self._dispatch()

    async def _watch(self) -> None:
        """Replace a process that makes no progress with an image."""
        limit = self._settings.stuck_seconds
        while not self._closing.is_set():
            try:
                await asyncio.wait_for(self._closing.wait(), _GLANCE_SECONDS)
            except TimeoutError:
                for process in [*self._ready]:
                    if process.is_stuck(seconds=limit):
                        process.kill(f"stuck for {limit:g} seconds")

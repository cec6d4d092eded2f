"""One inference process as the front sees it, also where it does not do what it should."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from holotype.serve import ServeSettings
from holotype.serve.admission import Job, Wish
from holotype.serve.process import Process, start_process
from holotype.serve.worker import Assignment
from servers import LIVENESS
from tiny import picture

WISH = Wish(top=1)


@asynccontextmanager
async def started(bundle: Path, *, max_batch: int = 64) -> AsyncIterator[Process]:
    settings = ServeSettings()
    assignment = Assignment(
        target=str(bundle),
        runtime=settings.runtime,
        precision=settings.precision,
        threads=1,
        max_pixels=settings.max_pixels,
        max_batch=max_batch,
        max_wait_ms=None,
        deadline_seconds=60,
    )
    process = await start_process(assignment, memory_bytes=2**20)
    try:
        yield process
    finally:
        await process.end()


def jobs(count: int) -> list[Job]:
    return [Job(image=picture(), wish=WISH, deadline=time.monotonic() + 60) for _ in range(count)]


def test_orders_for_a_process_that_hangs_hold_up_nobody(tiny_bundle: Path) -> None:
    async def run() -> None:
        async with started(tiny_bundle) as process:
            landed: list[int] = []

            def land(_: Process, news: object) -> None:
                landed.extend(done.order for done in news.done if process.land(done.order))  # type: ignore[attr-defined]

            process.on_news = land
            assert process.pid is not None
            os.kill(process.pid, signal.SIGSTOP)
            # Where the orders are waited for after all, so that the test ends.
            rescue = threading.Timer(LIVENESS, os.kill, (process.pid, signal.SIGCONT))
            rescue.start()
            began = time.monotonic()
            waiting = jobs(process.room)
            assert len(waiting) == 128
            for job in waiting:
                assert process.give(job, executing=False)
            for _ in range(1000):
                process.withdraw(waiting)
            assert time.monotonic() - began < LIVENESS / 2
            rescue.cancel()
            os.kill(process.pid, signal.SIGCONT)
            async with asyncio.timeout(LIVENESS):
                while len(landed) < 128:
                    await asyncio.sleep(0.02)
            assert process.idle

    asyncio.run(run())


def test_one_that_hangs_is_ended_by_force(tiny_bundle: Path) -> None:
    async def run() -> None:
        async with started(tiny_bundle) as process:
            assert process.pid is not None
            process.give(jobs(1)[0], executing=True)
            os.kill(process.pid, signal.SIGSTOP)
            began = time.monotonic()
        assert time.monotonic() - began < 10

    asyncio.run(run())


def test_stuck_is_who_gets_no_further(tiny_bundle: Path) -> None:
    async def run() -> None:
        async with started(tiny_bundle, max_batch=1) as process:
            assert process.pid is not None
            assert not process.is_stuck(seconds=0)
            os.kill(process.pid, signal.SIGSTOP)
            first, second = jobs(2)
            process.give(first, executing=True)
            process.give(second, executing=False)
            await asyncio.sleep(0.3)
            assert process.is_stuck(seconds=0.2)
            assert not process.is_stuck(seconds=60)
            # An image that one after it has overtaken, and nothing since: its decoder hangs.
            assert process.land(2) is second
            process._moved = time.monotonic() + 60
            assert process.is_stuck(seconds=0) is True
            assert not process.is_stuck(seconds=30)
            os.kill(process.pid, signal.SIGCONT)

    asyncio.run(run())

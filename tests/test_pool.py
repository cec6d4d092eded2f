"""The processes of a bundle that is being closed: whoever waits is told, and the end comes."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from holotype.errors import ServerError
from holotype.serve import ServeSettings
from holotype.serve.admission import Job, Line, Wish
from holotype.serve.answers import Answer, Failed
from holotype.serve.pool import Pool
from servers import LIVENESS
from tiny import picture


def one_process(bundle: Path) -> Pool:
    return Pool(bundle, settings=ServeSettings(workers=1, threads=1), line=Line(places=128))


def some(count: int) -> list[Job]:
    return [Job(picture(), Wish(top=1), time.monotonic() + LIVENESS) for _ in range(count)]


async def stalled_with(bundle: Path, *, images: int) -> tuple[Pool, list[Job], int]:
    """A pool whose process stands still since before it was handed these, and that process."""
    pool = one_process(bundle)
    await pool.load()
    (process,) = pool.processes
    assert process is not None
    os.kill(process, signal.SIGSTOP)
    jobs = some(images)
    assert pool.line.admit(jobs, idle=pool.idle)
    pool.submit(jobs)
    return pool, jobs, process


def test_images_of_a_stalled_process_are_told_that_it_ends(tiny_bundle: Path) -> None:
    """Also those that it was only handed ahead, and those that it has no room for."""

    async def ended() -> tuple[list[Job], Line]:
        pool, jobs, _ = await stalled_with(tiny_bundle, images=100)
        await asyncio.wait_for(pool.close(), LIVENESS)
        await asyncio.wait([job.reply for job in jobs], timeout=1)
        return jobs, pool.line

    jobs, line = asyncio.run(ended())
    assert all(job.reply.done() for job in jobs), "somebody waits for ever"
    for reply in (job.reply.result().reply for job in jobs):
        assert isinstance(reply, Failed)
        assert (reply.error.status, reply.error.detail) == (503, "the server is shutting down")
    assert (line.waiting, line.executing) == (0, 0)


def test_a_process_that_is_ready_as_its_pool_closes_is_ended(tiny_bundle: Path) -> None:
    async def ended() -> list[int | None]:
        pool = one_process(tiny_bundle)
        loading = asyncio.create_task(pool.load())
        starting: list[asyncio.Task[object]] = []
        while not starting:
            await asyncio.sleep(0)
            tasks = asyncio.all_tasks()
            starting = [task for task in tasks if task.get_coro().__name__ == "start_process"]
        while not starting[0].done():
            await asyncio.sleep(0)
        # Whoever waits for the process has not heard of it yet.
        assert not pool.ready
        await asyncio.wait_for(pool.close(), LIVENESS)
        with suppress(ServerError):
            await loading
        return pool.processes

    assert asyncio.run(ended()) == []


def test_a_lost_process_is_named_to_all_that_it_took(tiny_bundle: Path) -> None:
    """What it was only handed ahead is answered by the next one."""

    async def lost() -> list[Job]:
        pool, jobs, process = await stalled_with(tiny_bundle, images=4)
        os.kill(process, signal.SIGKILL)
        await asyncio.wait([job.reply for job in jobs], timeout=LIVENESS)
        await pool.close()
        return jobs

    first, *others = (job.reply.result() for job in asyncio.run(lost()))
    assert isinstance(first.reply, Failed)
    assert first.reply.error.status == 503
    assert first.lost is not None
    assert all(isinstance(other.reply, Answer) and other.lost is None for other in others)

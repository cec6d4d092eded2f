"""Who may come in: the bounded line of images, and the bytes of requests that may be held at once.

Used from the event loop only, so that every count is exact.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from holotype.serve.answers import Outcome, failed

__all__ = ["Budget", "Job", "Line", "Wish"]

Stage = Literal["new", "waiting", "executing", "over"]


@dataclass(frozen=True)
class Wish:
    """What is asked about an image: how many classes, a heat map, the pixels that the model saw."""

    top: int
    explain: bool = False
    show_input: bool = False


@dataclass(eq=False)
class Job:
    """One image. `deadline` and `admitted` are in seconds of `time.monotonic`.

    It waits until the batch it is in is inferred; what is decoded ahead still waits, and may be withdrawn.
    """

    image: bytes | bytearray
    wish: Wish
    deadline: float
    admitted: float = field(default_factory=time.monotonic)
    stage: Stage = "new"
    attempts: int = 0
    reply: asyncio.Future[Outcome] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def settle(self, outcome: Outcome) -> None:
        """Deliver the outcome, unless nobody waits for it any more."""
        if not self.reply.done():
            self.reply.set_result(outcome)

    def fail(self, status: int, detail: str, *, lost: str | None = None) -> None:
        self.settle(Outcome(reply=failed(status, detail), lost=lost))


class Line:
    """Images between admission and execution, of all bundles together.

    At most `places` images wait, beside one for each inference process that has nothing to do, whether or not
    it has come for it yet: the number admitted is exact, not a matter of who was faster.
    """

    def __init__(self, *, places: int) -> None:
        self.places = places
        self.waiting = 0
        self.executing = 0

    def admit(self, jobs: Sequence[Job], *, idle: int) -> bool:
        """Let all of `jobs` in, or, where there is no place for all beside `idle` processes, none."""
        if self.free(idle=idle) < len(jobs):
            return False
        for job in jobs:
            self.move(job, "waiting")
        return True

    def free(self, *, idle: int) -> int:
        """How many more images would be let in."""
        return self.places + idle - self.waiting

    def move(self, job: Job, stage: Stage) -> None:
        """Count a job where it is now."""
        if job.stage == "over":
            return
        self.waiting += (stage == "waiting") - (job.stage == "waiting")
        self.executing += (stage == "executing") - (job.stage == "executing")
        job.stage = stage


class Budget:
    """Bytes of request bodies in memory, of all clients together."""

    def __init__(self, *, total: int) -> None:
        self._left = total

    def take(self, size: int) -> bool:
        """Account for `size` bytes; False, and nothing taken, where they are too many."""
        if size > self._left:
            return False
        self._left -= size
        return True

    def give_back(self, size: int) -> None:
        self._left += size

"""Who may come in: the bounded line of images, and the bytes of requests that may be held at once."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from holotype.serve.answers import Reply, failed

__all__ = ["Budget", "Job", "Line"]


@dataclass(frozen=True, eq=False)
class Job:
    """One admitted image. `deadline` is in seconds of `time.monotonic`.

    `reply` gets a result, unless it was cancelled because nobody waits for it any more.
    """

    image: bytes | bytearray
    top: int
    deadline: float
    reply: Future[Reply] = field(default_factory=Future)


class Line:
    """Images between admission and execution; safe to use from any thread.

    At most `places` images wait beside one for each process that is free to execute it, whether or not that
    process has come for it yet: the number admitted is exact, not a matter of who was faster.
    """

    def __init__(self, *, places: int) -> None:
        self.places = places
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._workers = 0
        self._executing = 0
        self._closed = False

    @property
    def workers(self) -> int:
        """Inference processes that are ready or executing."""
        return self._workers

    @property
    def waiting(self) -> int:
        """Images that no process has taken yet."""
        return len(self._waiting)

    @property
    def executing(self) -> int:
        """Images that a process has taken and not answered."""
        return self._executing

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def full(self) -> bool:
        """True where not even one more image would be admitted."""
        with self._changed:
            return self._free() < 1

    def admit(self, jobs: Sequence[Job]) -> bool:
        """Put all of `jobs` in the line, or, where there is no place for all, none."""
        with self._changed:
            if self._closed or self._free() < len(jobs):
                return False
            self._waiting.extend(jobs)
            self._changed.notify_all()
            return True

    def withdraw(self, jobs: Sequence[Job]) -> None:
        """Take out those of `jobs` that still wait; they will not be executed."""
        with self._changed:
            for job in jobs:
                if job in self._waiting:
                    self._waiting.remove(job)
                    job.reply.cancel()

    def take(self, *, seconds: float) -> Job | None:
        """The next image to execute; None where none came within `seconds`, or when closed.

        One of `done` and `restore` is due for every job taken. A job past its deadline is answered here and
        never handed out.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed, timeout=seconds)
            while self._waiting:
                job = self._waiting.popleft()
                if job.deadline > time.monotonic():
                    self._executing += 1
                    return job
                _settle(job, failed(504, "the deadline passed while the image was waiting"))
            return None

    def done(self, job: Job, reply: Reply) -> None:
        """Deliver the reply to a job that was taken."""
        with self._changed:
            self._executing -= 1
        _settle(job, reply)

    def restore(self, job: Job) -> None:
        """Put a job that was taken but not begun back to the head of the line."""
        with self._changed:
            self._executing -= 1
            self._waiting.appendleft(job)
            self._changed.notify_all()

    def join(self) -> None:
        """One more inference process is ready."""
        with self._changed:
            self._workers += 1

    def leave(self) -> None:
        """One inference process is no more."""
        with self._changed:
            self._workers -= 1

    def close(self) -> None:
        """Give no more work, and wake everyone who waits in `take` or `rest`."""
        with self._changed:
            self._closed = True
            abandoned = [*self._waiting]
            self._waiting.clear()
            self._changed.notify_all()
        for job in abandoned:
            _settle(job, failed(503, "the server is shutting down"))

    def rest(self, *, seconds: float) -> None:
        """Sleep, but not beyond `close`."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed, timeout=seconds)

    def _free(self) -> int:
        return self.places + max(self._workers - self._executing, 0) - len(self._waiting)


class Budget:
    """Bytes of request bodies in memory, of all clients together; used from the event loop only."""

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


def _settle(job: Job, reply: Reply) -> None:
    if job.reply.set_running_or_notify_cancel():
        job.reply.set_result(reply)

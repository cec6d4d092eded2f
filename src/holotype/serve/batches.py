"""Inside an inference process: images are decoded as they come, and inferred together as they are ready.

Nobody waits where nothing is to be gained: a single image is inferred at once. While other images are being
decoded, those that are ready wait for them, but no longer than it takes to infer one alone. Batches have few
sizes, powers of two, since each costs a runtime memory of its own; so only what is to be inferred is counted.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from holotype.preprocess import Pixels

__all__ = ["Batch", "Batcher", "Order", "Pace", "Ready"]

_WORTH = 0.95  # of the time per image that a larger batch must save at least
_SHARE_OF_DEADLINE = 0.25
_MEMORY = 0.9  # of what was measured before, in what is known after another batch
_RECALL = 0.01  # of the way back to the first measurement, for sizes that are not run, with each batch


@dataclass(frozen=True)
class Order:
    """An image to answer; `admitted` and `deadline` are in seconds of `time.monotonic`, as in the front.

    `executing` says that the front counts it so already.
    """

    number: int
    executing: bool
    top: int
    explain: bool
    show_input: bool
    admitted: float
    deadline: float


@dataclass(frozen=True, eq=False)
class Ready:
    """A decoded image, its mean level in 0 ... 1, and when its decoding began and ended.

    `error` says why it has no pixels; None too where nobody waits for it any more.
    """

    order: Order
    pixels: Pixels | None
    brightness: float | None
    error: Exception | None
    begun: float
    ended: float


@dataclass(frozen=True)
class Batch:
    """What is next: `images` to infer together, or such as need no inferring, alone.

    Of these, `broken` ones have an error to tell, and nobody waits for the `unwanted` ones any more.
    """

    images: tuple[Ready, ...] = ()
    broken: tuple[Ready, ...] = ()
    unwanted: tuple[Ready, ...] = ()


class Pace:
    """How many images are inferred together and how long one waits for others, as batches are measured.

    `seconds` are those of a batch, by its size: powers of two, and the largest one allowed. What the user has
    set stays. Sizes that are not run go back, little by little, to what these `seconds` make of the sizes
    that are: a size that was slow for a while is tried again, and one that stays slow is rare.
    """

    def __init__(
        self,
        seconds: Mapping[int, float],
        *,
        max_batch: int | None,
        wait: float | None,
        deadline: float,
    ) -> None:
        self._first, self._seconds = dict(seconds), dict(seconds)
        self._set_batch, self._set_wait, self._deadline = max_batch, wait, deadline
        self._settle()

    def learn(self, size: int, seconds: float) -> None:
        """A batch of `size` took so long."""
        known = self._seconds
        if size not in known:
            return
        known[size] += (1 - _MEMORY) * (seconds - known[size])
        slower = known[size] / max(self._first[size], 1e-9)
        for other in known.keys() - {size}:
            known[other] += _RECALL * (slower * self._first[other] - known[other])
        self._settle()

    def _settle(self) -> None:
        known = self._seconds
        self.wait = known[1] if self._set_wait is None else self._set_wait
        if self._set_batch is not None:
            self.max_batch = self._set_batch
            return
        limit = _SHARE_OF_DEADLINE * self._deadline
        worth = [
            size
            for size in known
            if known[size] <= limit
            and (size == 1 or known[size] / size <= _WORTH * known[size // 2] / (size // 2))
        ]
        self.max_batch = max(worth, default=1)


class Batcher:
    """Decodes in threads, and hands out batches to the one thread that infers."""

    def __init__(self, decode: Callable[[bytes], Pixels], *, threads: int, pace: Pace) -> None:
        self._decode = decode
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._pace = pace
        self._changed = threading.Condition()
        self._ready: deque[Ready] = deque()
        self._decoding = 0
        self._here: set[int] = set()  # numbers of orders that are not handed out yet
        self._withdrawn: set[int] = set()  # those of them that nobody waits for
        self._closed = False

    def add(self, order: Order, content: bytes, *, wanted: bool = True) -> None:
        """Begin to decode an image; one that is not wanted any more is only handed out again."""
        with self._changed:
            self._decoding += 1
            self._here.add(order.number)
            if not wanted:
                self._withdrawn.add(order.number)
        self._pool.submit(self._work, order, content)

    def withdraw(self, numbers: Sequence[int]) -> None:
        """Nobody waits for these any more: they will not be inferred, if it is not too late."""
        with self._changed:
            self._withdrawn.update(self._here.intersection(numbers))
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def take(self) -> Batch | None:
        """Wait for what is next; None: closed.

        What needs no inferring is handed out at once, whatever else is ready. Of the rest as many as are
        ready, the largest batch allowed or a power of two.
        """
        with self._changed:
            while not self._closed:
                needless = self._needless()
                if needless is not None:
                    return needless
                patience = self._patience()
                if patience is None or patience > 0:
                    self._changed.wait(patience)
                    continue
                count = min(len(self._ready), self._pace.max_batch)
                if count < self._pace.max_batch:
                    count = 1 << (count.bit_length() - 1)
                return Batch(images=self._handed_out([self._ready[place] for place in range(count)]))
            return None

    def _needless(self) -> Batch | None:
        """All that is ready and needs no inferring; None where there is nothing of that kind."""
        now = time.monotonic()
        unwanted = [one for one in self._ready if not self._is_wanted(one.order, now=now)]
        gone = {one.order.number for one in unwanted}
        broken = [one for one in self._ready if one.pixels is None and one.order.number not in gone]
        if not unwanted and not broken:
            return None
        return Batch(broken=self._handed_out(broken), unwanted=self._handed_out(unwanted))

    def _patience(self) -> float | None:
        """Seconds to wait for more than what is ready; None: until anything is."""
        if not self._ready:
            return None
        if not self._decoding or len(self._ready) >= self._pace.max_batch:
            return 0.0
        return self._ready[0].ended + self._pace.wait - time.monotonic()

    def _handed_out(self, some: Sequence[Ready]) -> tuple[Ready, ...]:
        for one in some:
            self._ready.remove(one)
            self._here.discard(one.order.number)
            self._withdrawn.discard(one.order.number)
        return tuple(some)

    def _is_wanted(self, order: Order, *, now: float) -> bool:
        """Whether somebody still waits for the answer."""
        return order.number not in self._withdrawn and order.deadline > now

    def _work(self, order: Order, content: bytes) -> None:
        begun = time.monotonic()
        pixels, brightness, problem = None, None, None
        with self._changed:
            wanted = self._is_wanted(order, now=begun)
        if wanted:
            try:
                pixels = self._decode(content)
                # In 32 bits, in half the time of 64, as far as they reach: for a row.
                rows = pixels.reshape(len(pixels), -1).sum(axis=1, dtype=np.uint32)
                brightness = int(rows.sum(dtype=np.uint64)) / pixels.size / 255
            except Exception as error:
                problem = error  # told by the thread that answers
        with self._changed:
            self._ready.append(Ready(order, pixels, brightness, problem, begun, time.monotonic()))
            self._decoding -= 1
            self._changed.notify_all()

"""Inside an inference process: what is inferred together, and what never is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from holotype.errors import BrokenImageError
from holotype.preprocess import Pixels
from holotype.serve.batches import Batch, Batcher, Order, Pace
from servers import wait_for

SECONDS = {1: 0.010, 2: 0.016, 4: 0.028, 8: 0.050}


def pace(*, max_batch: int | None = None, wait: float | None = None) -> Pace:
    return Pace(SECONDS, max_batch=max_batch, wait=wait, deadline=10)


class TestPace:
    def test_as_measured(self) -> None:
        assert (pace().max_batch, pace().wait) == (8, SECONDS[1])

    def test_what_is_set_stays(self) -> None:
        mine = pace(max_batch=4, wait=0.5)
        for _ in range(20):
            mine.learn(4, 5.0)
        assert (mine.max_batch, mine.wait) == (4, 0.5)

    def test_a_size_that_was_slow_for_a_while_is_tried_again(self) -> None:
        mine = pace()
        for _ in range(4):
            mine.learn(8, 0.5)
        assert mine.max_batch < 8
        batches = 0
        while mine.max_batch < 8:
            mine.learn(mine.max_batch, SECONDS[mine.max_batch])
            batches += 1
            assert batches < 1000, "never tried again"

    def test_a_size_that_stays_slow_is_rare(self) -> None:
        mine = pace()
        sizes = []
        for _ in range(2000):
            sizes.append(mine.max_batch)
            mine.learn(mine.max_batch, SECONDS[mine.max_batch] * (3 if mine.max_batch == 8 else 1))
        assert sizes[-1000:].count(8) < 100
        assert sizes.count(4) > 1000

    def test_a_machine_that_became_slower_is_no_reason(self) -> None:
        mine = pace()
        for size in (1, 2, 4, 8) * 100:
            mine.learn(size, 5 * SECONDS[size])
        assert mine.max_batch == 8
        assert mine.wait == pytest.approx(5 * SECONDS[1], rel=0.1)

    def test_no_batch_takes_a_large_part_of_the_deadline(self) -> None:
        assert Pace(SECONDS, max_batch=None, wait=None, deadline=0.12).max_batch == 4


def order(number: int, *, seconds: float = 60) -> Order:
    now = time.monotonic()
    return Order(
        number, executing=False, top=1, explain=False, show_input=False, admitted=now, deadline=now + seconds
    )


def decode(content: bytes) -> Pixels:
    if content == b"broken":
        raise BrokenImageError("broken")
    return np.full((2, 2, 3), content[0], dtype=np.uint8)


def held_up(go: threading.Event) -> Callable[[bytes], Pixels]:
    """As `decode`, but the image b"2" waits for `go`."""

    def decoded(content: bytes) -> Pixels:
        if content == b"2":
            go.wait(30)
        return decode(content)

    return decoded


@contextmanager
def batcher(
    *, decode: Callable[[bytes], Pixels] = decode, max_batch: int = 8, threads: int = 2, wait: float = 0.0
) -> Iterator[Batcher]:
    opened = Batcher(decode, threads=threads, pace=pace(max_batch=max_batch, wait=wait))
    try:
        yield opened
    finally:
        opened.close()


def all_ready(opened: Batcher, count: int) -> None:
    wait_for(lambda: len(opened._ready) == count, f"{count} decoded images")


def numbers(batch: Batch | None) -> tuple[list[int], list[int], list[int]]:
    assert batch is not None
    parts = (batch.images, batch.broken, batch.unwanted)
    infer, broken, unwanted = (sorted(one.order.number for one in part) for part in parts)
    return infer, broken, unwanted


class TestBatcher:
    def test_powers_of_two_of_what_is_to_be_inferred(self) -> None:
        with batcher() as opened:
            for number in range(8):
                opened.add(order(number), b"broken" if number == 3 else bytes([number]))
            all_ready(opened, 8)
            assert numbers(opened.take()) == ([], [3], [])
            sizes = [len(numbers(opened.take())[0]) for _ in range(3)]
            assert sizes == [4, 2, 1]

    def test_the_largest_batch_allowed_need_be_no_power(self) -> None:
        with batcher(max_batch=6) as opened:
            for number in range(11):
                opened.add(order(number), b"1")
            all_ready(opened, 11)
            assert [len(numbers(opened.take())[0]) for _ in range(3)] == [6, 4, 1]

    def test_what_was_withdrawn_is_not_inferred(self) -> None:
        with batcher() as opened:
            for number in range(4):
                opened.add(order(number), b"1")
            all_ready(opened, 4)
            opened.withdraw([1, 2, 77])
            assert numbers(opened.take()) == ([], [], [1, 2])
            assert len(numbers(opened.take())[0]) == 2

    def test_nor_even_decoded_where_it_is_told_in_time(self) -> None:
        decoded: list[bytes] = []
        go = threading.Event()

        def slowly(content: bytes) -> Pixels:
            decoded.append(content)
            go.wait(30)
            return decode(content)

        with batcher(decode=slowly, threads=1) as opened:
            for number in range(3):
                opened.add(order(number), bytes([number]))
            wait_for(lambda: bool(decoded), "decoding")
            opened.withdraw([1, 2])
            go.set()
            told = [numbers(opened.take()) for _ in range(2)]
            while len([number for part in told for kind in part for number in kind]) < 3:
                told.append(numbers(opened.take()))
            assert sorted(number for part in told for number in part[0]) == [0]
            assert sorted(number for part in told for number in part[2]) == [1, 2]
            assert decoded == [b"\0"]

    def test_a_number_that_was_withdrawn_too_late_is_forgotten(self) -> None:
        with batcher() as opened:
            opened.add(order(5), b"1")
            assert numbers(opened.take()) == ([5], [], [])
            opened.withdraw([5])
            assert not opened._withdrawn

    def test_what_is_late_is_not_inferred(self) -> None:
        with batcher() as opened:
            opened.add(order(0, seconds=-1), b"1")
            opened.add(order(1), b"1")
            opened.add(order(2, seconds=0.2), b"1")
            all_ready(opened, 3)
            time.sleep(0.25)
            assert numbers(opened.take()) == ([], [], [0, 2])
            assert numbers(opened.take()) == ([1], [], [])

    def test_a_single_image_waits_for_nobody(self) -> None:
        with batcher(wait=60) as opened:
            opened.add(order(0), b"1")
            assert numbers(opened.take()) == ([0], [], [])

    def test_who_is_ready_waits_a_moment_for_those_being_decoded(self) -> None:
        go = threading.Event()
        with batcher(decode=held_up(go), wait=60) as opened:
            opened.add(order(0), b"1")
            opened.add(order(1), b"2")
            all_ready(opened, 1)
            threading.Timer(0.1, go.set).start()
            assert numbers(opened.take()) == ([0, 1], [], [])

    def test_but_not_for_ever(self) -> None:
        go = threading.Event()
        with batcher(decode=held_up(go), wait=0.05) as opened:
            opened.add(order(0), b"1")
            opened.add(order(1), b"2")
            assert numbers(opened.take()) == ([0], [], [])
            go.set()

    def test_brightness_of_a_large_input(self) -> None:
        """Beyond 5.6 megapixels a sum in 32 bits begins again at nothing."""
        white = np.full((2500, 2500, 3), 255, dtype=np.uint8)
        with batcher(decode=lambda _: white) as opened:
            opened.add(order(0), b"1")
            batch = opened.take()
            assert batch is not None
            assert batch.images[0].brightness == pytest.approx(1.0)

    def test_closed(self) -> None:
        with batcher() as opened:
            threading.Timer(0.1, opened.close).start()
            assert opened.take() is None

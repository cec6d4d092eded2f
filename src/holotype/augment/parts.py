"""A batch worked on in parts: on a CPU a few images at a time in each core's cache, on a GPU all at once."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from threadpoolctl import threadpool_limits

__all__ = ["for_parts"]

# Pixels that a thread works on at once. Fewer would stay in its cache, but threads that come back from each
# operation sooner wait for each other's Python more often: 2^17 does 1010 images/s on 2 cores, 2^18 1310.
_AT_ONCE = 1 << 18


def for_parts(work: Callable[[slice], None], *, count: int, pixels: int, device: torch.device) -> None:
    """Call `work` with slices that make up `count` images of so many pixels, on torch's number of threads.

    Each thread computes its parts alone. In torch's own way, all threads at each operation, they wait for one
    another dozens of times in a part: fifty times as long on a machine that others use as well.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu":
        work(slice(0, count))
        return
    size = min(max(_AT_ONCE // pixels, 1), max(math.ceil(count / threads), 1))
    parts = [slice(start, start + size) for start in range(0, count, size)]
    if threads == 1 or len(parts) == 1:
        for part in parts:
            work(part)
        return
    inference = torch.is_inference_mode_enabled()

    def alone(part: slice) -> None:
        with torch.inference_mode(inference):  # each thread has a mode of its own
            work(part)

    for _ in _pool(threads).map(alone, parts):
        pass


@functools.lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="augment", initializer=_work_alone)


def _work_alone() -> None:
    """Give this thread no helpers: OpenMP keeps their number for each thread, torch sets it at first use."""
    torch.get_num_threads()
    threadpool_limits(1, user_api="openmp")

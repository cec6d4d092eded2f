"""Latency of several runtimes, measured in one interleaved run so that they share the machine's moods."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np

from holotype.preprocess import Pixels
from holotype.runtime import Runtime

__all__ = ["measure_latency"]


def measure_latency(
    runtimes: Mapping[str, Runtime], images: Pixels, *, repeats: int = 15
) -> dict[str, float]:
    """Median milliseconds per call of each runtime on `uint8[N, H, W, 3]`, after two warm-up calls."""
    for runtime in runtimes.values():
        for _ in range(2):
            runtime.run(images)
    seconds: dict[str, list[float]] = {name: [] for name in runtimes}
    for _ in range(repeats):
        for name, runtime in runtimes.items():
            start = time.perf_counter()
            runtime.run(images)
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) * 1e3 for name, values in seconds.items()}

"""One setup of `timing.race`: loads a bundle, and measures when it is told to. Orders and answers are lines.

Run as `python -m holotype.timing_process`: a process that shares nothing with others, as a server's does.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from holotype.bundle import read_golden
from holotype.errors import HolotypeError

__all__: list[str] = []


def _main() -> None:
    order = json.loads(sys.stdin.readline())
    begun = time.perf_counter()
    try:
        run = _open(order)
    except HolotypeError as error:
        _tell({"error": str(error)})
        return
    _tell({"load_seconds": time.perf_counter() - begun})
    for line in sys.stdin:
        asked = json.loads(line)
        _tell({"milliseconds": _measure(run, asked["task"], asked["seconds"]), "peak_mb": _peak_mb()})


def _open(order: dict[str, Any]) -> Callable[[str], Callable[[], object]]:
    """From the name of a task (a batch size, or "bytes") to what is called over and over."""
    from holotype.predictor import load

    predictor = load(
        order["bundle"],
        runtime=order["runtime"],
        precision=order["precision"],
        threads=order["threads"],
        device=order["device"],
    )
    images = read_golden(predictor.bundle).images
    photos = [Path(file).read_bytes() for file in order["files"]]
    prepared: dict[str, Callable[[], object]] = {}

    def task(name: str) -> Callable[[], object]:
        if name not in prepared:
            if name == "bytes":
                turns = itertools.cycle(photos)
                prepared[name] = lambda: predictor.predict(next(turns))
            else:
                batch = np.resize(images, (int(name), *images.shape[1:]))
                prepared[name] = lambda: predictor.runtime.run(batch)
        return prepared[name]

    return task


def _measure(task: Callable[[str], Callable[[], object]], name: str, seconds: float) -> list[float]:
    """Milliseconds of calls for about so many seconds, after one that wakes threads and caches."""
    call = task(name)
    call()
    found: list[float] = []
    end = time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        call()
        now = time.perf_counter()
        found.append(1e3 * (now - start))
        if now >= end:
            return found


def _peak_mb() -> float:
    # What the system counts for a process includes the one that started it, here: memory before `exec`.
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        (found,) = (line for line in lines if line.startswith("VmHWM:"))
        return int(found.split()[1]) * 1024 / 1e6
    except (OSError, ValueError):
        return _peak_mb_counted()


def _peak_mb_counted() -> float:
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (1e6 if sys.platform == "darwin" else 1e3)


def _tell(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _main()

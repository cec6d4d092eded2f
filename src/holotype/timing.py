"""Speed of bundles on this machine: each setup in a process of its own, all of them in turn.

Neighbours decide what a millisecond is. So rounds are interleaved, every setup has its turn in each, the
order changes from round to round, and a setup's process sleeps while another's is measured. Latencies are of
the call that a server makes: pixels in, logits and embedding out; `from_bytes` counts decoding too.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from holotype.bundle import Bundle
from holotype.errors import BundleError
from holotype.predictor import load
from holotype.preprocess import Pixels
from holotype.progress import note, track
from holotype.runtime import Choice, Precision, Runtime, RuntimeName, has_tensorrt, remember

__all__ = [
    "Latency",
    "Setup",
    "Timing",
    "find_fastest",
    "measure_latency",
    "race",
    "refusal",
    "setups_of",
    "usable",
]

_ROUNDS = 12
_SECONDS = 0.25  # of one setup and batch size in one round
_LIMIT_SECONDS = 600.0  # to load or to answer: TensorRT builds its engine meanwhile


@dataclass(frozen=True)
class Setup:
    """A way to run a bundle; `threads` None: every core this process may use."""

    bundle: Path
    runtime: RuntimeName
    precision: Precision = "auto"
    threads: int | None = None
    device: str = "auto"


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call on a batch: quantiles over all rounds, and images per second at the median."""

    p50: float
    p95: float
    p99: float
    calls: int
    images_per_second: float


@dataclass(frozen=True)
class Timing:
    """What a setup costs: by batch size; from the bytes of one image to its label; to load; and in memory."""

    setup: Setup
    batches: Mapping[int, Latency]
    from_bytes: Latency | None
    load_seconds: float
    peak_mb: float


@dataclass
class _Contestant:
    setup: Setup
    process: subprocess.Popen[str]
    load_seconds: float
    samples: dict[str, list[float]] = field(default_factory=dict)
    peak_mb: float = 0.0

    def ask(self, order: Mapping[str, Any]) -> dict[str, Any]:
        if self.process.stdin is None or self.process.stdout is None:
            raise AssertionError("opened with pipes")
        # A runtime that hangs ends with its process.
        limit = threading.Timer(_LIMIT_SECONDS + float(order.get("seconds", 0.0)), self.process.kill)
        limit.daemon = True  # it must not hold up a process that is interrupted
        limit.start()
        try:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            limit.cancel()
        return _read(answer, self.setup)


def race(
    setups: Sequence[Setup],
    *,
    batches: Sequence[int] = (1, 8),
    files: Sequence[Path] = (),
    rounds: int = _ROUNDS,
    seconds: float = _SECONDS,
) -> list[Timing]:
    """Measure `setups` in turn, in their order. With `files`, also from their bytes to a label.

    `BundleError` where one of them cannot be opened.
    """
    tasks = [str(count) for count in batches] + (["bytes"] if files else [])
    with ExitStack() as stack:
        contestants = [stack.enter_context(_open(setup, files)) for setup in setups]
        for contestant in contestants:
            for task in tasks:
                contestant.ask({"task": task, "seconds": 0.0})  # builds what is built at the first call
        order = np.random.default_rng(0)
        with track("measuring", total=rounds) as progress:
            for _ in range(rounds):
                for place in order.permutation(len(contestants)).tolist():
                    contestant = contestants[place]
                    for task in tasks:
                        told = contestant.ask({"task": task, "seconds": seconds})
                        contestant.samples.setdefault(task, []).extend(told["milliseconds"])
                        contestant.peak_mb = told["peak_mb"]
                progress.advance()
    return [_timing(contestant, batches) for contestant in contestants]


def setups_of(bundle: Bundle) -> list[Setup]:
    """The ways to run a bundle on this machine that keep its answers as they were accepted."""
    payloads, accepted = bundle.manifest.payloads, bundle.manifest.precision
    ways: list[tuple[RuntimeName, Precision]] = []
    if "onnx" in payloads:
        ways.append(("onnxruntime", "fp32"))
    if importlib.util.find_spec("openvino") is not None and {"onnx", "openvino"} & set(payloads):
        ways += [("openvino", "fp32")] if accepted != "bf16" else []
        ways += [("openvino", "bf16")] if accepted != "fp32" else []
    if "tensorrt" in payloads and has_tensorrt():
        ways.append(("tensorrt", "fp32"))
    return [Setup(bundle.path, runtime, precision) for runtime, precision in ways]


def usable(setups: Sequence[Setup]) -> list[Setup]:
    """Those in which the bundle still gives its golden outputs; the others are named and left out."""
    found = []
    for setup in setups:
        reason = refusal(setup)
        if reason is None:
            found.append(setup)
        else:
            note(f"left out: {reason}")
    return found


def refusal(setup: Setup) -> str | None:
    """Why a bundle does not open, or does not give its golden outputs, in this way; None: it does."""
    try:
        load(setup.bundle, runtime=setup.runtime, precision=setup.precision)
    except BundleError as error:
        return str(error)
    return None


def find_fastest(bundle: Bundle) -> Choice | None:
    """Measure the ways to run a bundle and remember the fastest; None where there is one at most."""
    setups = usable(setups_of(bundle))
    if len(setups) < 2:
        return None
    best = min(race(setups, batches=(1,), rounds=6, seconds=0.15), key=lambda timing: timing.batches[1].p50)
    choice = Choice(best.setup.runtime, best.setup.precision)
    remember(bundle, choice)
    return choice


@contextmanager
def _open(setup: Setup, files: Sequence[Path]) -> Iterator[_Contestant]:
    order = {**asdict(setup), "bundle": str(setup.bundle.resolve()), "files": [str(file) for file in files]}
    process = subprocess.Popen(
        [sys.executable, "-m", "holotype.timing_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        contestant = _Contestant(setup, process, 0.0)
        contestant.load_seconds = contestant.ask(order)["load_seconds"]
        yield contestant
    finally:
        process.kill()
        process.communicate()


def _read(answer: str, setup: Setup) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(answer) if answer.strip() else {"error": "its process ended"}
    if "error" in told:
        raise BundleError(f"cannot be measured in {setup.runtime} ({told['error']})", where=setup.bundle)
    return told


def _timing(contestant: _Contestant, batches: Sequence[int]) -> Timing:
    samples = contestant.samples
    return Timing(
        setup=contestant.setup,
        batches={count: _latency(samples[str(count)], images=count) for count in batches},
        from_bytes=_latency(samples["bytes"], images=1) if "bytes" in samples else None,
        load_seconds=contestant.load_seconds,
        peak_mb=contestant.peak_mb,
    )


def _latency(milliseconds: Sequence[float], *, images: int) -> Latency:
    p50, p95, p99 = (float(value) for value in np.percentile(milliseconds, (50, 95, 99)))
    return Latency(p50, p95, p99, len(milliseconds), 1e3 * images / p50)


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

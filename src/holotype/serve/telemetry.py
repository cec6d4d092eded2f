"""What is measured of a server: for Prometheus, for the charts of its page, and a line for each request."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TextIO

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from holotype.serve.notes import speak_json

__all__ = ["LogWriter", "Second", "Telemetry", "open_log"]

_SECONDS = 120  # that the charts of the page show
_LOOK_SECONDS = 0.25
_IMAGES = ("/predict", "/v2/models/{name}/infer")  # routes that the charts are of
_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


@dataclass
class Second:
    """One second of a server's life."""

    at: int
    images: int = 0
    refused: int = 0
    milliseconds: list[float] = field(default_factory=list)
    waiting: int = 0


@dataclass
class _Total:
    """A counter of what is counted elsewhere."""

    counter: Counter
    told: int = 0

    def reach(self, total: int) -> None:
        self.counter.inc(total - self.told)
        self.told = total


class Telemetry:
    """Counters and histograms in a registry of their own; used from the event loop only."""

    def __init__(self, *, version: str, log: LogWriter | None = None) -> None:
        self.version = version
        self.registry = CollectorRegistry(auto_describe=True)
        self.seconds: deque[Second] = deque(maxlen=_SECONDS)
        self._log = log
        own = self.registry
        self.requests = Counter(
            "holotype_requests", "Requests by route and status.", ["route", "status"], registry=own
        )
        self.request_seconds = Histogram(
            "holotype_request_seconds",
            "From the headers of a request to its response.",
            ["route"],
            buckets=_BUCKETS,
            registry=own,
        )
        self.answers = Counter(
            "holotype_answers", "Images answered.", ["model", "arm", "label", "sure"], registry=own
        )
        self.failures = Counter(
            "holotype_failures", "Images without an answer.", ["model", "status"], registry=own
        )
        self.challenger_failures = Counter(
            "holotype_challenger_failures",
            "Images that the challenger failed on or was late with, and somebody else answered.",
            ["model", "status"],
            registry=own,
        )
        self.stages = Histogram(
            "holotype_stage_seconds",
            "Of an image: queued, decoding, inferring.",
            ["stage"],
            buckets=_BUCKETS,
            registry=own,
        )
        self.batches = Histogram(
            "holotype_batch_images",
            "Images inferred together.",
            ["model"],
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=own,
        )
        self.gauges = {
            name: Gauge(f"holotype_{name}", told, registry=own)
            for name, told in {
                "waiting": "Images admitted and not yet executing.",
                "executing": "Images being inferred.",
                "processes_ready": "Inference processes that answer.",
                "records_pending_bytes": "Rows that are in the journal only.",
                "records_in_memory": "Rows that wait for the journal.",
                "records_database_up": "1 where the database takes rows.",
                "records_journal_up": "1 where the journal takes rows.",
                "shadow_skipped": "Images that the challenger did not answer, as others were waiting.",
            }.items()
        }
        self._records_dropped = _Total(
            Counter("holotype_records_dropped", "Rows that are lost.", registry=own)
        )
        self.drift = Gauge(
            "holotype_drift_effect",
            "Distance of recent images from validation, 0 ... 1.",
            ["model", "what"],
            registry=own,
        )
        self.drifted = Gauge(
            "holotype_drifted", "1 where the distance counts.", ["model", "what"], registry=own
        )
        self._lines_dropped = _Total(
            Counter("holotype_log_lines_dropped", "Log lines that nobody read in time.", registry=own)
        )

    def request(self, route: str, status: int, seconds: float, line: Mapping[str, Any]) -> None:
        """A response was sent; `line` is what the log says beside that."""
        self.requests.labels(route, str(status)).inc()
        self.request_seconds.labels(route).observe(seconds)
        if route in _IMAGES:
            second = self._now()
            if status in (429, 503, 504):
                second.refused += 1
            elif status == 200:
                second.milliseconds.append(1e3 * seconds)
        if self._log is not None:
            entry = {"at": round(time.time(), 3), "route": route, "status": status, **line}
            entry["ms"] = round(1e3 * seconds, 2)
            self._log.write(json.dumps(entry))

    def images(self, count: int, *, waiting: int) -> None:
        """For the charts."""
        second = self._now()
        second.images += count
        second.waiting = max(second.waiting, waiting)

    async def watch(self, waiting: Callable[[], int]) -> None:
        """Look at the line again and again: while everything is stalled, no answer tells how long it is."""
        while True:
            second = self._now()
            second.waiting = max(second.waiting, waiting())
            await asyncio.sleep(_LOOK_SECONDS)

    def dropped(self, total: int) -> None:
        """Rows lost since the start."""
        self._records_dropped.reach(total)

    def close(self) -> None:
        """Write the last lines of the log."""
        if self._log is not None:
            self._log.close()

    def exposition(self) -> bytes:
        """The text that Prometheus reads."""
        if self._log is not None:
            self._lines_dropped.reach(self._log.dropped)
        return generate_latest(self.registry)

    def recent(self) -> list[dict[str, float]]:
        """A row for each of the last seconds."""
        return [
            {
                "at": second.at,
                "images": second.images,
                "refused": second.refused,
                "p50": _quantile(second.milliseconds, 0.5),
                "p95": _quantile(second.milliseconds, 0.95),
                "waiting": second.waiting,
            }
            for second in self.seconds
        ]

    def _now(self) -> Second:
        at = int(time.time())
        if not self.seconds or self.seconds[-1].at != at:
            self.seconds.append(Second(at))
        return self.seconds[-1]


class LogWriter:
    """Lines on a stream, written by a thread of its own: who reads them may be slow, and nobody waits for it.

    Beyond `most` lines that wait, the oldest are dropped and counted.
    """

    def __init__(self, stream: TextIO, *, most: int = 10_000) -> None:
        self.dropped = 0
        self._stream, self._most = stream, most
        self._lines: deque[str] = deque()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._closed = False
        self._thread.start()

    def write(self, line: str) -> None:
        """Accept a line; once it is closed, write it."""
        if self._closed:
            self._put(line + "\n", lines=1)
            return
        if len(self._lines) >= self._most:
            self._lines.popleft()
            self.dropped += 1
        self._lines.append(line)
        self._wake.set()

    def close(self, *, seconds: float = 1.0) -> None:
        """Write what is left, if somebody reads it."""
        self._closed = True
        self._wake.set()
        self._thread.join(seconds)

    def _work(self) -> None:
        while not (self._closed and not self._lines):
            self._wake.wait()
            self._wake.clear()
            lines = []
            with suppress(IndexError):  # the last one may have been dropped meanwhile
                while self._lines:
                    lines.append(self._lines.popleft())
            if not lines:
                continue
            self._put("\n".join(lines) + "\n", lines=len(lines))

    def _put(self, text: str, *, lines: int) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            self.dropped += lines


def open_log(kind: str) -> LogWriter | None:
    """Where request lines go, and between them, as JSON too, what is noted on stderr; None: nowhere."""
    if kind != "json":
        return None
    writer = LogWriter(sys.stderr)
    speak_json(writer.write)
    return writer


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)] if values else 0.0

"""Four times what a server can do: it does what it can, refuses the rest at once, and stays what it was."""

from __future__ import annotations

import asyncio
import io
import re
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from servers import Server, serving, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.alone]

PEAK_SECONDS, OVERLOAD_SECONDS, FACTOR = 5.0, 20.0, 4


def costly_image() -> bytes:
    """A PNG of 2000 x 1500 pixels: small to send, tens of milliseconds to decode."""
    ramp = np.add.outer(np.arange(1500), np.arange(2000)) // 14
    stream = io.BytesIO()
    Image.fromarray(ramp.astype(np.uint8)).convert("RGB").save(stream, "PNG", compress_level=1)
    return stream.getvalue()


async def post(port: int, image: bytes) -> tuple[int, bool]:
    """The status of one request on a connection of its own (0: no answer), and whether it may be retried."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = (
            f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(image)}\r\nConnection: close\r\n\r\n"
        )
        writer.write(head.encode() + image)
        answer = await asyncio.wait_for(reader.read(), 30)
    except OSError:
        return 0, False
    finally:
        writer.close()
    status = re.match(rb"HTTP/1\.1 (\d+)", answer)
    return int(status[1]) if status else 0, b"\r\nretry-after:" in answer.lower()


async def peak(port: int, image: bytes) -> float:
    """Requests per second that eight clients get answered, each waiting for its answer."""
    answered, end = 0, time.monotonic() + PEAK_SECONDS

    async def client() -> None:
        nonlocal answered
        while time.monotonic() < end:
            status, _ = await post(port, image)
            answered += status == 200

    await asyncio.gather(*(client() for _ in range(8)))
    return answered / PEAK_SECONDS


async def overload(url: str, port: int, image: bytes, *, rate: float) -> tuple[Counter[int], int, list[int]]:
    """Requests at times of their own: statuses, refusals without Retry-After, and what /livez said."""
    statuses: Counter[int] = Counter()
    lives: list[int] = []
    hasty = 0

    async def one(at: float) -> None:
        nonlocal hasty
        await asyncio.sleep(at)
        status, retry = await post(port, image)
        statuses[status] += 1
        hasty += status == 429 and not retry

    async def watch() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=5) as client:
            while True:
                lives.append((await client.get("/livez")).status_code)
                await asyncio.sleep(0.5)

    watching = asyncio.ensure_future(watch())
    await asyncio.gather(*(one(number / rate) for number in range(round(rate * OVERLOAD_SECONDS))))
    watching.cancel()
    return statuses, hasty, lives


def resident(server: Server) -> float:
    """MB of the front and its inference processes."""
    found = [Path(f"/proc/{pid}/status").read_text() for pid in (server.process.pid, *server.workers)]
    return sum(int(re.search(r"VmRSS:\s+(\d+)", status)[1]) for status in found) / 1e3


def test_overload_is_refused_and_the_rest_answered(tiny_bundle: Path, tmp_path: Path) -> None:
    image = costly_image()
    with serving(tiny_bundle, folder=tmp_path, queue=16) as server:
        port = httpx.URL(server.url).port
        assert port is not None
        before_load = asyncio.run(peak(port, image))
        assert before_load > 0
        before = resident(server)
        statuses, hasty, lives = asyncio.run(overload(server.url, port, image, rate=FACTOR * before_load))
        assert set(statuses) <= {200, 429, 503, 504}, statuses
        assert statuses[429] > statuses[200] / 2, statuses
        assert not hasty, "a refusal says when to come again"
        assert set(lives) == {200}
        # The load has the same two cores: the true figure is in benchmarks/faults.py.
        assert statuses[200] / OVERLOAD_SECONDS > before_load / 2
        assert resident(server) - before < 64
        wait_for(lambda: server.predict(image).status_code == 200, "calm after the storm")
        assert server.info()["waiting"] == 0

"""Bodies without images, answers that are no numbers, and a log that nobody reads."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from holotype.serve.telemetry import LogWriter
from servers import Server, refused, serving, wait_for
from tiny import picture, poisoned_model, write_tiny_bundle


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("bodies")
    bundle = write_tiny_bundle(folder / "colours", model=poisoned_model()).path
    env = {"HOLOTYPE_ADMIN_KEY": "boss"}
    with serving(bundle, folder=folder, env=env, upload_seconds=2) as started:
        yield started


@pytest.mark.parametrize("path", ["/feedback", "/admin/models"])
def test_a_body_without_images_is_small(server: Server, path: str) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(10_000):
            yield b" " * 10_000

    headers = {"X-API-Key": "boss", "Content-Type": "application/json"}
    refused(httpx.post(f"{server.url}{path}", content=endless(), headers=headers), 413)


def test_and_arrives_in_time(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", httpx.URL(server.url).port or 0)) as slow:
        slow.sendall(b"POST /feedback HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
        slow.sendall(b"Content-Length: 100\r\n\r\n{")
        slow.settimeout(20)
        assert b" 408 " in slow.recv(4096)


@pytest.mark.parametrize(
    "tensor",
    [
        {"shape": [1] * 400_000, "data": ["eA=="]},
        {"shape": [1], "data": [1] * 2_000_000},
        {"shape": [10**9] * 8, "data": ["eA=="]},
    ],
)
def test_numbers_without_end_cost_nothing(server: Server, tensor: dict[str, object]) -> None:
    body = json.dumps({"inputs": [{"name": "images", "datatype": "BYTES", **tensor}]})
    before = resident(server)
    refused(server.client.post("/v2/models/colours/infer", content=body), 400, 413)
    assert resident(server) - before < 64
    assert server.predict(picture()).status_code == 200


def resident(server: Server) -> float:
    """MB of the front."""
    pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def test_an_answer_that_is_no_number_fails_alone(server: Server) -> None:
    (worker,) = server.workers
    for _ in range(3):
        detail = refused(server.predict(picture("white")), 500)
        assert detail == "the model failed on this image"
        assert server.predict(picture("red")).json()["results"][0]["label"] == "red"
    assert server.workers == [worker], "and costs no process"


def test_a_log_that_nobody_reads_holds_up_nobody() -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stream:
        log = LogWriter(stream, most=100)
        began = time.monotonic()
        for number in range(5000):
            log.write(f"{number} " + "x" * 200)
        assert time.monotonic() - began < 5
        wait_for(lambda: log.dropped > 0, "dropped lines")
        with os.fdopen(reading, "rb") as reader:
            os.set_blocking(reader.fileno(), False)
            wait_for(lambda: b"4999" in (reader.read() or b""), "the last line", seconds=10)
            log.close()

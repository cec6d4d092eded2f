"""A real server in its own processes, real HTTP on loopback, real signals."""

from __future__ import annotations

import asyncio
import gzip
import io
import itertools
import json
import os
import signal
import socket
import struct
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
from onnx.external_data_helper import set_external_data
from PIL import Image
from pydantic import ValidationError

from holotype.predictor import load
from holotype.serve import ServeSettings
from servers import LIVENESS, Server, files, launch, peak_bytes, refused, serving, stalled, wait_for
from tiny import CLASSES, picture, tiny_model, write_tiny_bundle

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc to find processes")


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    packed = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def frames(kind: str, *, count: int) -> bytes:
    """An animation whose first frame is red and whose others are blue and green."""
    stream = io.BytesIO()
    rest = [Image.new("RGB", (40, 30), ("blue", "lime")[number % 2]) for number in range(count - 1)]
    Image.new("RGB", (40, 30), "red").save(stream, kind, save_all=True, append_images=rest)
    return stream.getvalue()


@pytest.fixture(scope="module")
def server(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the default limits and one inference process, for tests that leave it as it is.

    It runs where importing torch and its company fails, and where a program that is started leaves a trace.
    """
    folder = tmp_path_factory.mktemp("server")
    blocked = folder / "blocked"
    blocked.mkdir()
    for name in ("torch", "torchvision", "timm", "accelerate"):
        (blocked / f"{name}.py").write_text(f"raise ImportError('{name} is not here')\n")
    bait, canary = folder / "bin", folder / "canary"
    bait.mkdir()
    for name in ("gs", "gswin64c", "sh"):  # what Pillow would start for an EPS
        (bait / name).write_text(f"#!/bin/bash\ntouch {canary}\n")
        (bait / name).chmod(0o755)
    env = {
        "PATH": f"{bait}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(blocked), os.environ.get("PYTHONPATH", "")]),
    }
    with serving(tiny_bundle, folder=folder, env=env) as started:
        yield started
        assert not canary.exists(), "an image started a program"


@pytest.fixture(scope="module")
def small(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with low limits: bodies of 100 kB, two seconds to send them, a line of four."""
    settings = {"max_body_bytes": 100_000, "max_held_bytes": 400_000, "upload_seconds": 2, "queue": 4}
    with serving(tiny_bundle, folder=tmp_path_factory.mktemp("small"), **settings) as started:
        yield started


# Answers


@pytest.mark.parametrize("colour", CLASSES)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"])
def test_answers_as_the_predictor_does(server: Server, tiny_bundle: Path, colour: str, kind: str) -> None:
    image = picture(colour, kind=kind)
    response = server.predict(image)
    assert response.status_code == 200
    body = response.json()
    expected = load(tiny_bundle).predict(image)
    assert body["bundle"] == load(tiny_bundle).bundle.hash
    assert body["milliseconds"] > 0
    (result,) = body["results"]
    assert result["label"] == expected.label == colour
    assert [choice["label"] for choice in result["top"]] == [choice.label for choice in expected.top]
    assert [choice["probability"] for choice in result["top"]] == pytest.approx(
        [choice.probability for choice in expected.top], abs=1e-6
    )


def test_form_with_one_file_is_a_single_image(server: Server) -> None:
    response = server.client.post("/predict", files=files(picture("blue")))
    assert [result["label"] for result in response.json()["results"]] == ["blue"]
    refused(server.client.post("/predict", files=files(b"no image")), 415)
    refused(server.client.post("/predict", files=files(b"")), 400)


def test_several_files_are_answered_in_order(server: Server) -> None:
    colours = ["green", "red", "blue", "red"]
    response = server.client.post("/predict", files=files(*(picture(colour) for colour in colours)))
    assert [result["label"] for result in response.json()["results"]] == colours


def test_top(server: Server) -> None:
    assert len(server.predict(picture()).json()["results"][0]["top"]) == 3
    assert len(server.predict(picture(), top_k=1).json()["results"][0]["top"]) == 1
    assert "3 classes" in refused(server.predict(picture(), top_k=4), 422)
    refused(server.predict(picture(), top_k=0), 422)
    refused(server.predict(picture(), top_k="many"), 422)


def test_health_info_and_openapi(server: Server, tiny_bundle: Path) -> None:
    assert server.client.get("/livez").status_code == 200
    assert server.client.get("/readyz").status_code == 200
    info = server.info()
    assert info["classes"] == list(CLASSES)
    assert info["bundle"] == load(tiny_bundle).bundle.hash
    assert info["runtime"] == "onnxruntime"
    assert info["preprocess"]["height"] == 32
    assert info["limits"]["queue"] == 128
    assert info["limits"]["max_body_bytes"] == 10 * 2**20
    assert {"python", "holotype", "onnxruntime"} <= set(info["versions"])
    predict = server.client.get("/openapi.json").json()["paths"]["/predict"]["post"]
    assert {"multipart/form-data", "application/octet-stream"} <= set(predict["requestBody"]["content"])
    documented = {"200", "400", "408", "413", "415", "422", "429", "503", "504"}
    assert documented <= set(predict["responses"])
    (top,) = [one for one in predict["parameters"] if one["name"] == "top_k"]
    assert top["schema"] == {"type": "integer", "minimum": 1, "maximum": 3}
    schema = predict["responses"]["422"]["content"]["application/problem+json"]["schema"]
    assert schema["$ref"].endswith("/Problem")


def test_unknown_routes_and_methods_have_the_same_error_body(server: Server) -> None:
    refused(server.client.get("/nothing"), 404)
    refused(server.client.post("/nothing", content=b"x" * 100_000), 404)
    refused(server.client.get("/predict"), 405)


# Images that cannot be answered


def test_empty_body(server: Server) -> None:
    assert "empty" in refused(server.predict(b""), 400)


def _zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.jpg", picture())
    return stream.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"hello, this is text",
        b"<svg xmlns='http://www.w3.org/2000/svg'><rect width='9' height='9'/></svg>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n0 0 moveto\nshowpage\n",
        b"%PDF-1.4\n",
        _zip(),
    ],
    ids=["text", "svg", "eps", "pdf", "zip"],
)
def test_not_an_image(server: Server, content: bytes) -> None:
    headers = {"Content-Type": "image/jpeg"}
    refused(server.client.post("/predict", content=content, headers=headers), 415)
    refused(server.client.post("/predict", files=files(content)), 415)


def test_truncated_jpeg(server: Server) -> None:
    noise = Image.effect_noise((300, 200), 90).convert("RGB")
    stream = io.BytesIO()
    noise.save(stream, "JPEG")
    image = stream.getvalue()
    assert server.predict(image).status_code == 200
    assert "truncated" in refused(server.predict(image[: len(image) // 2]), 422)


def test_header_of_a_bomb_costs_no_memory(server: Server) -> None:
    server.predict(picture())
    (worker,) = server.workers
    before = peak_bytes(worker)
    assert "pixels" in refused(server.predict(png_header(60_000, 60_000)), 413)
    assert peak_bytes(worker) - before < 50_000_000
    assert server.workers == [worker]


def test_real_image_over_the_pixel_limit(server: Server) -> None:
    stream = io.BytesIO()
    Image.new("1", (9500, 9500)).save(stream, "PNG")
    assert "pixels" in refused(server.predict(stream.getvalue()), 413)


@pytest.mark.parametrize(("kind", "count"), [("MPO", 2), ("GIF", 500), ("WEBP", 500)])
def test_first_frame_counts(server: Server, kind: str, count: int) -> None:
    assert server.predict(frames(kind, count=count)).json()["results"][0]["label"] == "red"


def test_one_poison_image_in_32(server: Server) -> None:
    colours = list(itertools.islice(itertools.cycle(CLASSES), 32))
    images = [picture(colour, kind="JPEG") for colour in colours]
    images[17] = images[17][: len(images[17]) // 2]
    response = server.client.post("/predict", files=files(*images))
    assert response.status_code == 200
    results = response.json()["results"]
    assert results[17]["error"]["status"] == 422
    assert [result.get("label") for result in results] == [*colours[:17], None, *colours[18:]]


# Bodies


def test_declared_length_over_the_limit(server: Server) -> None:
    refused(server.predict(bytes(10 * 2**20 + 1)), 413)
    refused(server.predict(bytes(10 * 2**20)), 415)


def test_chunked_body_over_the_limit(small: Server) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(5_000):
            sent += 65_536
            yield bytes(65_536)

    before = peak_bytes(small.process.pid)
    refused(small.client.post("/predict", content=endless()), 413)
    assert sent < 5_000 * 65_536, "the body was read to its end"
    assert peak_bytes(small.process.pid) - before < 30_000_000


def test_compressed_body(small: Server) -> None:
    def post(content: bytes, encoding: str) -> httpx.Response:
        return small.client.post("/predict", content=content, headers={"Content-Encoding": encoding})

    image = picture("green", kind="BMP")
    for encoding, content in (("gzip", gzip.compress(image)), ("deflate", zlib.compress(image))):
        assert post(content, encoding).json()["results"][0]["label"] == "green"
    bomb = gzip.compress(bytes(50_000_000))
    assert len(bomb) < 100_000
    before = peak_bytes(small.process.pid)
    refused(post(bomb, "gzip"), 413)
    assert peak_bytes(small.process.pid) - before < 30_000_000
    # A body at the very limit leaves output inside the decompressor after its last byte.
    refused(post(gzip.compress(bytes(100_000)), "gzip"), 415)
    refused(post(gzip.compress(bytes(100_001)), "gzip"), 413)
    refused(post(gzip.compress(image)[:-9], "gzip"), 400)
    refused(post(gzip.compress(image) + b"more", "gzip"), 400)
    refused(post(image, "gzip"), 400)
    unknown = post(image, "br")
    refused(unknown, 415)
    assert "gzip" in unknown.headers["accept-encoding"]


def test_compressed_form(small: Server) -> None:
    request = small.client.build_request("POST", "/predict", files=files(picture("red"), picture("blue")))
    headers = {"Content-Type": request.headers["content-type"], "Content-Encoding": "gzip"}
    response = small.client.post("/predict", content=gzip.compress(request.read()), headers=headers)
    assert [result["label"] for result in response.json()["results"]] == ["red", "blue"]


def test_form_limits(server: Server) -> None:
    refused(server.client.post("/predict", files=files(*[b"x"] * 5000)), 413)
    refused(server.client.post("/predict", files=files(*[b"x"] * 33)), 413)
    refused(server.client.post("/predict", data={"a": "b"}, files=files(picture())), 400)
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    refused(server.client.post("/predict", content=b"--x--\r\n", headers=headers), 400)
    refused(server.client.post("/predict", content=b"no form at all", headers=headers), 400)
    headers = {"Content-Type": "multipart/form-data"}
    refused(server.client.post("/predict", content=b"--x--\r\n", headers=headers), 400)


def _connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=LIVENESS)


def _until_closed(connection: socket.socket) -> bytes:
    received = b""
    with suppress(ConnectionResetError):
        while chunk := connection.recv(65_536):
            received += chunk
    return received


@pytest.mark.parametrize(
    "beginning",
    [
        b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nX-Slow: ",
    ],
    ids=["body", "head"],
)
def test_slow_clients_are_closed_and_others_served(small: Server, beginning: bytes) -> None:
    slow = [_connect(small) for _ in range(50)]
    stop = threading.Event()

    def trickle() -> None:
        while not stop.wait(0.2):
            for connection in slow:
                with suppress(OSError):  # closed by the server, as it should be
                    connection.send(b"x")

    for connection in slow:
        connection.sendall(beginning)
    thread = threading.Thread(target=trickle)
    thread.start()
    try:
        for _ in range(10):
            assert small.predict(picture()).status_code == 200
        answers = [_until_closed(connection) for connection in slow]
    finally:
        stop.set()
        thread.join()
        for connection in slow:
            connection.close()
    if b"Content-Length" in beginning:
        assert sum(b" 408 " in answer for answer in answers) == len(slow)
        assert all(b"connection: close" in answer for answer in answers)


# The line


def test_line_of_four_refuses_exactly_one_of_six(small: Server) -> None:
    with stalled(*small.workers), ThreadPoolExecutor(6) as clients:
        asked = [
            clients.submit(httpx.post, f"{small.url}/predict", content=picture(), timeout=LIVENESS)
            for _ in range(6)
        ]
        wait_for(lambda: any(one.done() for one in asked), "refusal")
        small.wait_waiting(4)
        (full,) = [one.result() for one in asked if one.done()]
        refused(full, 429)
        assert int(full.headers["retry-after"]) >= 1
        for worker in small.workers:
            os.kill(worker, signal.SIGCONT)
        assert sorted(one.result().status_code for one in asked) == [200] * 5 + [429]


@pytest.mark.parametrize("workers", [1, 2])
def test_queue_and_one_at_a_stalled_model(tiny_bundle: Path, tmp_path: Path, workers: int) -> None:
    """Stalled: it is executing already, an image in each process, and gets no further."""
    settings = {"workers": workers, "threads": 1, "deadline_seconds": 60}
    with serving(tiny_bundle, folder=tmp_path, **settings) as server:
        assert server.info()["limits"]["queue"] == 128

        async def burst() -> list[int]:
            executing = [asyncio.create_task(_post(server)) for _ in range(workers)]
            await _until(server, waiting=0, executing=workers)
            asked = [asyncio.create_task(_post(server)) for _ in range(129)]
            await _until(server, waiting=128, executing=workers)
            done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            assert [one.result() for one in done] == [429]
            for worker in server.workers:
                os.kill(worker, signal.SIGCONT)
            return sorted(await asyncio.gather(*executing, *asked))

        with stalled(*server.workers):
            assert asyncio.run(burst()) == [200] * (128 + workers) + [429]


async def _post(server: Server, image: bytes | None = None) -> int:
    """The status of an image on a connection of its own."""
    content = picture() if image is None else image
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))
    try:
        head = "POST /predict HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        answer = await asyncio.wait_for(reader.read(), LIVENESS)
    finally:
        writer.close()
        await writer.wait_closed()
    return int(answer.split()[1])


async def _until(server: Server, *, waiting: int, executing: int) -> None:
    """Wait until so many images are in the line, and in processes."""
    async with httpx.AsyncClient(timeout=LIVENESS) as client, asyncio.timeout(LIVENESS):
        info: dict[str, Any] = {}
        while (info.get("waiting"), info.get("executing")) != (waiting, executing):
            await asyncio.sleep(0.02)
            info = (await client.get(f"{server.url}/info")).json()


def test_full_line_is_told_before_the_body(small: Server) -> None:
    with stalled(*small.workers):
        asked = [small.send(picture()) for _ in range(5)]
        small.wait_waiting(4)
        with _connect(small) as connection:
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n\r\n")
            assert b" 429 " in _until_closed(connection)
        assert small.client.get("/livez").status_code == 200
        assert small.client.get("/readyz").status_code == 200
    assert [one.result().status_code for one in asked] == [200] * 5


@contextmanager
def _refused_early(server: Server, head: bytes) -> Iterator[socket.socket]:
    """A connection whose request was refused by its head, at a stalled model with a full line."""
    with stalled(*server.workers):
        asked = [server.send(picture()) for _ in range(5)]
        server.wait_waiting(4)
        with _connect(server) as connection:
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n")
            received = connection.recv(65_536)
            assert received.startswith(b"HTTP/1.1 429 Too Many Requests\r\n")
            assert b"\r\nx-request-id: mine\r\n" in received.lower()
            assert json.loads(received.partition(b"\r\n\r\n")[2])["status"] == 429
            yield connection
    assert [one.result().status_code for one in asked] == [200] * 5


def test_a_refused_client_may_ask_again(small: Server) -> None:
    before = small.client.get("/metrics").text
    with _refused_early(small, b"X-Request-ID: mine\r\nContent-Length: 9999\r\n") as connection:
        connection.sendall(b"x" * 9999 + b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert b'{"status":"alive"}' in _until_closed(connection)
    line = 'holotype_requests_total{route="/predict",status="429"}'
    assert _metric(small.client.get("/metrics").text, line) == _metric(before, line) + 1


def test_what_a_refused_client_still_sends_is_bounded(small: Server) -> None:
    endless = (b"4000\r\n" + b"x" * 0x4000 + b"\r\n") * 6000  # far more than two sockets hold
    with _refused_early(small, b"X-Request-ID: mine\r\nTransfer-Encoding: chunked\r\n") as connection:
        connection.settimeout(LIVENESS)
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            connection.sendall(endless)


def _metric(text: str, line: str) -> float:
    return next((float(one.split()[-1]) for one in text.splitlines() if one.startswith(line)), 0.0)


def test_several_images_are_admitted_whole_or_not_at_all(small: Server) -> None:
    with stalled(*small.workers):
        asked = [small.send(picture()) for _ in range(3)]  # one executes, two wait, two places are left
        small.wait_waiting(2)
        refused(small.client.post("/predict", files=files(*[picture()] * 3)), 429)
        assert small.info()["waiting"] == 2
        with ThreadPoolExecutor(1) as clients:
            pair = clients.submit(small.client.post, "/predict", files=files(picture("red"), picture("blue")))
            small.wait_waiting(4)
            for worker in small.workers:
                os.kill(worker, signal.SIGCONT)
            assert [result["label"] for result in pair.result().json()["results"]] == ["red", "blue"]
    assert [one.result().status_code for one in asked] == [200] * 3
    refused(small.client.post("/predict", files=files(*[b"x"] * 5)), 413)


def test_bytes_of_all_requests_are_bounded(small: Server) -> None:
    large = picture(size=(180, 180), kind="BMP")
    assert 97_000 < len(large) < 100_000
    with stalled(*small.workers):
        asked = [small.send(large) for _ in range(4)]
        small.wait_waiting(3)
        assert "bytes" in refused(small.predict(large), 429)
    assert [one.result().status_code for one in asked] == [200] * 4
    assert small.predict(large).status_code == 200


def test_client_that_leaves_frees_its_place(small: Server) -> None:
    async def leave() -> None:
        async with httpx.AsyncClient(timeout=LIVENESS) as client:
            asked = [
                asyncio.create_task(client.post(f"{small.url}/predict", content=picture())) for _ in range(3)
            ]
            info: dict[str, Any] = {}
            while (info.get("waiting"), info.get("executing")) != (2, 1):
                await asyncio.sleep(0.02)
                info = (await client.get(f"{small.url}/info")).json()
            for one in asked:
                one.cancel()

    with stalled(*small.workers):
        asyncio.run(leave())
        # The process is stopped all the while: what leaves the line now was never executed.
        small.wait_waiting(0)
        asked = [small.send(picture("blue")) for _ in range(4)]
        small.wait_waiting(4)
    assert [one.result().json()["results"][0]["label"] for one in asked] == ["blue"] * 4


def _inferred(server: Server) -> int:
    """Images that were inferred so far, as the processes say."""
    lines = server.client.get("/metrics").text.splitlines()
    return round(
        sum(float(line.split()[-1]) for line in lines if line.startswith("holotype_batch_images_sum"))
    )


def test_whoever_has_left_is_not_inferred(tiny_bundle: Path, tmp_path: Path) -> None:
    """What a stalled process was given by then, it skips once it goes on."""

    async def leave(server: Server) -> None:
        asked = [asyncio.create_task(_post(server)) for _ in range(5)]
        await _until(server, waiting=4, executing=1)
        for one in asked:
            one.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        await _until(server, waiting=0, executing=1)

    with serving(tiny_bundle, folder=tmp_path) as server:
        with stalled(*server.workers):
            asyncio.run(leave(server))
        assert server.predict(picture("blue")).json()["results"][0]["label"] == "blue"
        assert server.info()["executing"] == 0
        assert _inferred(server) == 2, "the one that was executing, and the last"


def test_what_is_late_is_not_inferred(tiny_bundle: Path, tmp_path: Path) -> None:
    with serving(tiny_bundle, folder=tmp_path, deadline_seconds=1) as server:
        with stalled(*server.workers):
            asked = [server.send(picture()) for _ in range(5)]
            assert {one.result().status_code for one in asked} == {504}
        assert server.predict(picture("blue")).json()["results"][0]["label"] == "blue"
        assert server.info()["executing"] == 0
        assert _inferred(server) == 1


def test_errors_name_who_was_asked(tiny_bundle: Path, tmp_path: Path) -> None:
    with serving(tiny_bundle, folder=tmp_path, deadline_seconds=1) as server:
        bundle = server.info()["bundle"]
        told = server.predict(b"no image")
        refused(told, 415)
        assert told.headers["holotype-bundle"] == bundle
        assert told.headers["holotype-arm"] == "champion"
        assert "decoding;dur=" in told.headers["server-timing"]
        with stalled(*server.workers):
            told = server.predict(picture())
            refused(told, 504)
            assert told.headers["holotype-bundle"] == bundle
            assert told.headers["holotype-arm"] == "champion"


def test_deadline(tiny_bundle: Path, tmp_path: Path) -> None:
    with serving(tiny_bundle, folder=tmp_path, deadline_seconds=1) as server:
        with stalled(*server.workers):
            asked = [server.send(picture()) for _ in range(3)]
            for one in asked:
                assert "deadline" in refused(one.result(), 504)
            refused(server.client.post("/predict", files=files(picture(), picture())), 504)
            assert server.info()["waiting"] == 0
        assert server.predict(picture()).status_code == 200


# Processes


def test_killed_process_costs_its_image_only(tiny_bundle: Path, tmp_path: Path) -> None:
    with serving(tiny_bundle, folder=tmp_path) as server:
        (worker,) = server.workers
        with stalled(worker):
            asked = [server.send(picture()) for _ in range(2)]
            server.wait_waiting(1)  # so the other one is in the process
            os.kill(worker, signal.SIGKILL)
            wait_for(lambda: any(one.done() for one in asked), "answer")
            assert server.client.get("/livez").status_code == 200
            waited, lost = sorted((one.result() for one in asked), key=lambda one: one.status_code)
            refused(lost, 503)
            assert waited.json()["results"][0]["label"] == "red"
        server.wait_ready()
        assert server.workers != [worker]
        # One that dies idle is replaced without costing anyone anything.
        (worker,) = server.workers
        os.kill(worker, signal.SIGKILL)
        wait_for(lambda: server.workers not in ([], [worker]), "new process", seconds=10)
        wait_for(lambda: server.client.get("/readyz").status_code == 200, "readiness", seconds=10)
        assert server.predict(picture()).status_code == 200
        assert server.process.poll() is None
        # Of several images, only the one at work is lost.
        (worker,) = server.workers
        with stalled(worker), ThreadPoolExecutor(1) as clients:
            several = clients.submit(
                server.client.post, "/predict", files=files(*(picture(colour) for colour in CLASSES))
            )
            server.wait_waiting(2)
            os.kill(worker, signal.SIGKILL)
            results = several.result().json()["results"]
        assert results[0]["error"]["status"] == 503
        assert [result["label"] for result in results[1:]] == ["green", "blue"]


def test_stuck_process_is_replaced(tiny_bundle: Path, tmp_path: Path) -> None:
    with serving(tiny_bundle, folder=tmp_path, stuck_seconds=0.5, workers=2, threads=1) as server:
        workers = server.workers
        assert len(workers) == 2
        with stalled(*workers):
            asked = [server.send(picture()) for _ in range(2)]
            for one in asked:
                refused(one.result(), 503)
            server.wait_ready()
        assert server.predict(picture()).status_code == 200
        assert not set(workers) <= set(server.workers)


def test_a_process_that_is_busy_is_not_stuck(tiny_bundle: Path, tmp_path: Path) -> None:
    """However long an image waits in it, while others are answered."""
    stream = io.BytesIO()
    Image.effect_noise((3000, 2000), 90).convert("RGB").save(stream, "JPEG", quality=98)
    image = stream.getvalue()
    settings = {"stuck_seconds": 1, "threads": 1, "max_body_bytes": 2**28, "deadline_seconds": 60}
    settings |= {"queue": 1000, "max_parts": 128, "max_batch": 64}
    with serving(tiny_bundle, folder=tmp_path, **settings) as server:
        workers = server.workers
        began = time.monotonic()
        server.predict(image)
        count = min(128, int(2.5 / (time.monotonic() - began)) + 1)
        results = server.client.post("/predict", files=files(*[image] * count)).json()["results"]
        assert all("label" in result for result in results)
        assert time.monotonic() - began > 1, "or nothing was tested"
        assert server.workers == workers


def test_pixels_shown_of_a_large_model(tmp_path: Path) -> None:
    """Eight at once are more than one message of a process may hold, and noise is more than is ever shown."""
    bundle = write_tiny_bundle(tmp_path / "bundle", size=1200).path
    noise = np.random.default_rng(0).integers(0, 256, (1200, 1200, 3), dtype=np.uint8)
    half = noise.copy()
    half[700:] = (250, 0, 0)
    settings = {"max_body_bytes": 2**26, "max_batch": 8, "stuck_seconds": 600, "deadline_seconds": 60}
    with serving(bundle, folder=tmp_path, **settings) as server:
        workers = server.workers
        told = server.predict(_png(noise), show_input=True)
        assert "ask without show_input" in refused(told, 422)
        assert server.predict(_png(noise)).status_code == 200
        with stalled(*server.workers), ThreadPoolExecutor(1) as clients:
            several = clients.submit(
                server.client.post,
                "/predict",
                files=files(*[_png(half)] * 8),
                params={"show_input": True},
                timeout=LIVENESS,
            )
            server.wait_waiting(7)
            for worker in workers:
                os.kill(worker, signal.SIGCONT)
            results = several.result().json()["results"]
        assert all(result["label"] == "red" for result in results)
        assert sum(len(result["input"]) for result in results) > 16 * 2**20
        assert server.workers == workers


def _png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def test_replaced_bundle_is_not_served_by_a_new_process(tiny_bundle: Path, tmp_path: Path) -> None:
    target = write_tiny_bundle(tmp_path / "bundle").path
    with serving(target, folder=tmp_path) as server:
        manifest = target / "holotype.json"
        manifest.write_text(manifest.read_text().replace("red", "tomato"))
        os.kill(server.workers[0], signal.SIGKILL)
        wait_for(lambda: "changed after it was written" in server.log.read_text(), "refusal")
        refused(server.client.get("/readyz"), 503)
        refused(server.predict(picture()), 503)
        assert server.client.get("/livez").status_code == 200


def test_memory_between_processes_has_no_name_left(server: Server) -> None:
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    shared = [line for line in maps.splitlines() if "psm_" in line]
    assert shared
    assert all(line.endswith("(deleted)") for line in shared)


def test_processes_end_with_a_killed_front(tiny_bundle: Path, tmp_path: Path) -> None:
    with serving(tiny_bundle, folder=tmp_path) as server:
        workers = server.workers
        server.process.kill()
        wait_for(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers), "end")


# The end


def test_sigterm_loses_nobody(tiny_bundle: Path, tmp_path: Path) -> None:
    with serving(tiny_bundle, folder=tmp_path, drain_seconds=1) as server:
        with stalled(*server.workers):
            asked = [server.send(picture(CLASSES[number % 3])) for number in range(8)]
            server.wait_waiting(7)
            server.process.terminate()
            wait_for(lambda: httpx.get(f"{server.url}/readyz").status_code == 503, "unreadiness", seconds=5)
            refused(httpx.get(f"{server.url}/readyz"), 503)
            refused(httpx.post(f"{server.url}/predict", content=picture()), 503)
            assert httpx.get(f"{server.url}/livez").status_code == 200
        labels = [one.result().json()["results"][0]["label"] for one in asked]
        assert labels == [CLASSES[number % 3] for number in range(8)]
        assert server.process.wait(LIVENESS) == 0


@pytest.mark.slow
def test_sigterm_ends_what_hangs(tiny_bundle: Path, tmp_path: Path) -> None:
    """Whatever an image or a process takes: service managers wait for thirty seconds."""
    settings = {"deadline_seconds": 600, "stuck_seconds": 600, "workers": 3, "threads": 1}
    with serving(tiny_bundle, folder=tmp_path, **settings) as server:
        with stalled(*server.workers):
            asked = [server.send(picture()) for _ in range(8)]
            wait_for(lambda: server.info()["executing"] == 3, "images in the processes")
            began = time.monotonic()
            server.process.terminate()
            assert server.process.wait(60) == 0
            assert time.monotonic() - began < 30
        for one in asked:
            refused(one.result(LIVENESS), 503)


def test_sigterm_under_load(tiny_bundle: Path, tmp_path: Path) -> None:
    begun = threading.Barrier(9)

    def ask_until_refused(url: str) -> list[int]:
        with httpx.Client(base_url=url, timeout=LIVENESS) as client:
            statuses = [client.post("/predict", content=picture()).status_code]
            begun.wait(LIVENESS)
            while statuses[-1] == 200:
                statuses.append(client.post("/predict", content=picture()).status_code)
        return statuses

    with serving(tiny_bundle, folder=tmp_path, drain_seconds=2) as server, ThreadPoolExecutor(8) as clients:
        asked = [clients.submit(ask_until_refused, server.url) for _ in range(8)]
        begun.wait(LIVENESS)
        server.process.terminate()
        for one in asked:
            *before, last = one.result()
            assert last == 503
            assert set(before) == {200}
        assert server.process.wait(LIVENESS) == 0


def test_ctrl_c(tiny_bundle: Path, tmp_path: Path) -> None:
    with serving(tiny_bundle, folder=tmp_path) as server:
        with stalled(*server.workers):
            asked = [server.send(picture()) for _ in range(2)]
            server.wait_waiting(1)
            os.killpg(server.process.pid, signal.SIGINT)  # as a terminal does
            wait_for(lambda: httpx.get(f"{server.url}/readyz").status_code == 503, "unreadiness", seconds=5)
        assert [one.result().status_code for one in asked] == [200, 200]
        assert server.process.wait(LIVENESS) == 0


# The beginning


def test_serves_without_torch(server: Server) -> None:
    """Every test of `server` runs where torch cannot be imported."""
    assert server.predict(picture("blue")).json()["results"][0]["label"] == "blue"
    for process in (server.process.pid, *server.workers):
        assert b"PYTHONPATH=" in Path(f"/proc/{process}/environ").read_bytes()
        assert "libtorch" not in Path(f"/proc/{process}/maps").read_text()


def _refusal(target: Path, folder: Path, **settings: Any) -> str:
    """The one line with which a server refuses to start."""
    process = launch(target, log_file=folder / "refusal.log", **settings)
    try:
        assert process.wait(LIVENESS) == 1
    finally:
        process.kill()
        process.wait()
    (line,) = (folder / "refusal.log").read_text().splitlines()
    return line


def test_refuses_what_is_no_bundle(tmp_path: Path) -> None:
    assert "no such bundle" in _refusal(tmp_path / "missing", tmp_path)


def test_refuses_a_changed_byte(tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "bundle").path
    model = bundle / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1] + b"\0")
    assert "does not match its hash" in _refusal(bundle, tmp_path)


def test_refuses_a_model_of_nan(tmp_path: Path) -> None:
    model = tiny_model()
    (bias,) = [one for one in model.graph.initializer if one.name == "bias"]
    bias.raw_data = struct.pack("<3f", float("nan"), 0, 0)
    assert "golden" in _refusal(write_tiny_bundle(tmp_path / "bundle", model=model).path, tmp_path)


def test_refuses_external_data(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(12))
    model = tiny_model()
    (bias,) = [one for one in model.graph.initializer if one.name == "bias"]
    set_external_data(bias, location="../secret")
    bias.ClearField("raw_data")
    assert bias.data_location == onnx.TensorProto.EXTERNAL
    bundle = write_tiny_bundle(tmp_path / "bundle", model=model).path
    assert "outside the model file" in _refusal(bundle, tmp_path)


def test_refuses_a_port_in_use(server: Server, tiny_bundle: Path, tmp_path: Path) -> None:
    port = int(server.url.rpartition(":")[2])
    assert f"port {port}" in _refusal(tiny_bundle, tmp_path, port=port)


def test_settings_are_checked() -> None:
    with pytest.raises(ValidationError):
        ServeSettings(queue=0)
    with pytest.raises(ValidationError, match="max_held_bytes"):
        ServeSettings(max_body_bytes=2, max_held_bytes=1)
    with pytest.raises(ValidationError):
        ServeSettings.model_validate({"unlimited": True})

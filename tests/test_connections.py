"""Clients that send heads without end, that come in crowds, and that never read what they asked for."""

from __future__ import annotations

import io
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest
from PIL import Image, PngImagePlugin

from servers import LIVENESS, Server, peak_bytes, refused, serving, wait_for
from tiny import picture

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")

GET = b"GET /livez HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n"
MOST = 8


@pytest.fixture(scope="module")
def server(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for eight clients, with a second for an answer to be taken."""
    settings = {"max_connections": MOST, "download_seconds": 1, "upload_seconds": 8}
    with serving(tiny_bundle, folder=tmp_path_factory.mktemp("bounded"), **settings) as started:
        started.client.close()  # whoever is connected takes a place
        yield started


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", httpx.URL(server.url).port or 0), timeout=LIVENESS)


def answer(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    received = b""
    with suppress(ConnectionResetError):
        while chunk := connection.recv(65_536):
            received += chunk
    return received


def ask(server: Server, path: str = "/livez") -> httpx.Response:
    """On a connection of its own."""
    with httpx.Client(timeout=LIVENESS, verify=False) as client:
        return client.get(f"{server.url}{path}")


def predict(server: Server) -> httpx.Response:
    with httpx.Client(timeout=LIVENESS, verify=False) as client:
        return client.post(f"{server.url}/predict", content=picture())


# Heads


@pytest.mark.parametrize(
    "head",
    [
        GET + b"X-Long: " + b"a" * 100_000,
        GET + b"".join(b"X-%d: a\r\n" % number for number in range(10_000)),
        b"GET /" + b"a" * 100_000,
        b"\r\n" * 50_000,
    ],
    ids=["one header", "many headers", "address", "nothing"],
)
def test_a_head_over_the_limit_is_refused(server: Server, head: bytes) -> None:
    with connect(server) as connection:
        connection.sendall(head)
        told = answer(connection)
    assert told.startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\n")
    assert b"connection: close" in told
    assert b"content-type: application/problem+json" in told
    assert b"over the limit of 32,768 bytes" in told


def test_a_long_head_within_it_is_read(server: Server) -> None:
    with connect(server) as connection:
        connection.sendall(GET + b"X-Long: " + b"a" * 30_000 + b"\r\n\r\n")
        first = b""
        while b"alive" not in first:
            first += connection.recv(1000)
        assert first.startswith(b"HTTP/1.1 200")
        # And the next one on the same connection begins anew.
        connection.sendall(GET + b"X-Long: " + b"a" * 30_000 + b"\r\nConnection: close\r\n\r\n")
        assert answer(connection).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "beginning",
    [
        GET + b"X-Long: ",
        b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nX-Trailer: ",
    ],
    ids=["head", "trailers"],
)
def test_heads_without_end_cost_nothing(server: Server, beginning: bytes) -> None:
    before = peak_bytes(server.process.pid)
    with connect(server) as connection, suppress(OSError):
        connection.sendall(beginning)
        for _ in range(256):
            connection.sendall(b"a" * 65_536)
    assert peak_bytes(server.process.pid) - before < 8_000_000
    assert ask(server).status_code == 200


def test_trailers_are_no_headers(server: Server) -> None:
    image = picture()
    with connect(server) as connection:
        head = b"POST /predict HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head + b"%x\r\n" % len(image) + image + b"\r\n0\r\nX-Request-ID: mine\r\n\r\n")
        told = answer(connection)
    assert told.startswith(b"HTTP/1.1 200")
    assert b"x-request-id: mine" not in told


def test_what_is_no_http_is_told_in_the_shape_of_all_errors(server: Server) -> None:
    with connect(server) as connection:
        connection.sendall(b"hello\r\n\r\n")
        told = answer(connection)
    assert told.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert b"application/problem+json" in told


def test_a_body_that_is_no_chunk_is_told_too(server: Server) -> None:
    with connect(server) as connection:
        head = b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head + b"3\r\nabc\r\nno size\r\n")
        assert answer(connection).startswith(b"HTTP/1.1 400 Bad Request\r\n")


def test_requests_on_the_heels_of_another(server: Server) -> None:
    with connect(server) as connection:
        connection.sendall((GET + b"\r\n") * 20 + GET + b"Connection: close\r\n\r\n")
        assert answer(connection).count(b"HTTP/1.1 200") == 21
    before = peak_bytes(server.process.pid)
    with connect(server) as connection, suppress(OSError):
        for _ in range(20):
            connection.sendall((GET + b"\r\n") * 5000)
        assert answer(connection).count(b"HTTP/1.1 200") < 5000
    assert peak_bytes(server.process.pid) - before < 30_000_000


# Other protocols

H2C = b"Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n%s: h2c\r\n"
SECOND = GET + b"Connection: close\r\n\r\n"


def upgrading(body: bytes, *, name: bytes = b"Upgrade", chunked: bool = False) -> bytes:
    """An image from a client that would rather speak HTTP/2."""
    length = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % len(body)
    sent = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if chunked else body
    return b"POST /predict HTTP/1.1\r\nHost: x\r\n" + H2C % name + length + b"\r\n\r\n" + sent


def like_a_head() -> bytes:
    """An image with a comment, of which a changed byte would break the checksum."""
    comment = PngImagePlugin.PngInfo()
    comment.add_text("Comment", "\r\nUpgrade: h2c\r\n\r\nGET /stolen HTTP/1.1\r\nHost: x\r\n\r\n")
    stream = io.BytesIO()
    Image.new("RGB", (48, 40), "red").save(stream, "PNG", pnginfo=comment)
    return stream.getvalue()


@pytest.mark.parametrize("piece", [10_000, 1, 7], ids=["whole", "bytes", "pieces"])
@pytest.mark.parametrize("name", [b"Upgrade", b"upgrade", b"UPGRADE"])
@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_who_asks_for_another_protocol_is_answered_in_this_one(
    server: Server, piece: int, name: bytes, chunked: bool
) -> None:
    """As curl --http2 and Java do: the body is the body, and no request of its own."""
    sent = upgrading(like_a_head(), name=name, chunked=chunked)
    with connect(server) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(sent), piece):
            connection.sendall(sent[start : start + piece])
        first = b""
        while b'"label":"red"' not in first and (chunk := connection.recv(10_000)):
            first += chunk
        connection.sendall(SECOND)
        told = first + answer(connection)
    assert told.count(b"HTTP/1.1 ") == told.count(b"HTTP/1.1 200") == 2, told


def test_whoever_asks_for_another_protocol_without_a_body_too(server: Server) -> None:
    with connect(server) as connection:
        connection.sendall(GET + H2C % b"Upgrade" + b"\r\n" + SECOND)
        assert answer(connection).count(b"HTTP/1.1 200") == 2


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_on_the_heels_of_a_body_its_body_is_no_request_either(server: Server, chunked: bool) -> None:
    image = picture()
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(image)
    with connect(server) as connection:
        connection.sendall(head + image + upgrading(SECOND, chunked=chunked))
        told = answer(connection)
    assert b"alive" not in told
    assert b"HTTP/1.1 400" in told or told.count(b"HTTP/1.1 200") == 1


@pytest.mark.parametrize("target", [b"example.com:443", b"/predict"])
def test_no_tunnel_is_opened(server: Server, target: bytes) -> None:
    with connect(server) as connection:
        connection.sendall(b"CONNECT %s HTTP/1.1\r\nHost: x\r\n\r\n" % target + SECOND)
        told = answer(connection)
    assert told.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert told.count(b"HTTP/1.1 ") == 1


# Crowds


def test_beyond_the_limit_only_health_is_told(server: Server) -> None:
    with ExitStack() as stack:
        for _ in range(MOST):
            stack.enter_context(connect(server)).sendall(POST)
        wait_for(lambda: predict(server).status_code == 503, "refusal")
        told = predict(server)
        assert refused(told, 503) == "too many connections"
        assert told.headers["retry-after"]
        assert told.headers["connection"] == "close"
        for path in ("/livez", "/readyz", "/metrics"):
            assert ask(server, path).status_code == 200
        assert 'status="503"' in ask(server, "/metrics").text
    wait_for(lambda: predict(server).status_code == 200, "place")


def test_who_only_stands_there_makes_place(server: Server) -> None:
    with ExitStack() as stack:
        idlers = [stack.enter_context(connect(server)) for _ in range(MOST)]
        time.sleep(1.2)
        assert predict(server).status_code == 200
        assert answer(idlers[0]) == b""


def test_a_flood_leaves_the_server_alive(server: Server) -> None:
    with ExitStack() as stack:
        refusals = 0
        for _ in range(200):
            one = stack.enter_context(connect(server))
            with suppress(OSError):
                one.sendall(POST)
                one.setblocking(False)
            with suppress(OSError):
                refusals += b" 503 " in one.recv(4096)
    wait_for(lambda: predict(server).status_code == 200, "calm")
    assert ask(server).status_code == 200


def test_open_files_are_enough_for_all(tiny_bundle: Path, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        with serving(tiny_bundle, folder=tmp_path) as server:
            limits = Path(f"/proc/{server.process.pid}/limits").read_text()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    (line,) = [line for line in limits.splitlines() if "open files" in line]
    assert int(line.split()[3]) >= 1024 + 256


# Readers


def test_who_never_reads_is_closed(server: Server) -> None:
    port = httpx.URL(server.url).port or 0

    def served() -> bool:
        """Whether the server's end of the connection is open."""
        ends = f":{port:04X} 0100007F:{deaf.getsockname()[1]:04X} 01 "
        return ends in Path("/proc/net/tcp").read_text()

    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", port))
        stop = threading.Event()

        def insist() -> None:
            deaf.settimeout(1)
            with suppress(OSError):
                while not stop.wait(0.05):
                    deaf.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 4)

        thread = threading.Thread(target=insist)
        thread.start()
        wait_for(served, "connection")
        began = time.monotonic()
        wait_for(lambda: not served(), "its end")
        assert time.monotonic() - began > 1, "it had its time"
        stop.set()
        thread.join()
    assert ask(server).status_code == 200


def test_who_reads_slowly_but_reads_is_served(server: Server) -> None:
    whole = ask(server, "/openapi.json").content
    with connect(server) as connection:
        connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        time.sleep(0.5)
        assert answer(connection).endswith(whole)

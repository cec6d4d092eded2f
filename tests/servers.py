"""A real server in its own processes, for tests that speak HTTP with it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

_PROGRAM = """
import json, sys
from pathlib import Path
from holotype.errors import HolotypeError
from holotype.serve import ServeSettings, run
if __name__ == "__main__":
    try:
        targets, settings, challenger = json.loads(sys.argv[1])
        run(targets, settings=ServeSettings(**settings), challenger=challenger and Path(challenger))
    except HolotypeError as error:
        sys.exit(f"error: {error}")
"""
LIVENESS = 30.0
LEAKS = ("Traceback", "site-packages", ".py", " object at ", "/tmp", "/home", "/work", "/dev", "/usr")


@dataclass(frozen=True)
class Server:
    """A running `holotype.serve.run` and a client of it."""

    process: subprocess.Popen[bytes]
    log: Path
    url: str
    client: httpx.Client

    @property
    def workers(self) -> list[int]:
        """Process ids of the inference processes that live now."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, parent = stat.read_text().rpartition(")")[2].split()[:2]
                command = (stat.parent / "cmdline").read_bytes()
            except OSError:
                continue
            if int(parent) == self.process.pid and state != "Z" and b"spawn_main" in command:
                found.append(int(stat.parent.name))
        return found

    def predict(self, image: bytes, **params: Any) -> httpx.Response:
        return self.client.post("/predict", content=image, params=params)

    def send(self, image: bytes) -> Future[httpx.Response]:
        """Post in a thread and connection of its own."""
        future: Future[httpx.Response] = Future()

        def post() -> None:
            try:
                future.set_result(httpx.post(f"{self.url}/predict", content=image, timeout=LIVENESS))
            except httpx.HTTPError as error:
                future.set_exception(error)

        threading.Thread(target=post, daemon=True).start()
        return future

    def info(self) -> dict[str, Any]:
        answer: dict[str, Any] = self.client.get("/info").json()
        return answer

    def wait_waiting(self, count: int) -> None:
        """Wait until `count` images are in the line of a stalled process, and one in the process itself."""

        def reached() -> bool:
            with httpx.Client(base_url=self.url, timeout=LIVENESS) as client:
                info = client.get("/info").json()
            return (info["waiting"], info["executing"]) == (count, 1)

        wait_for(reached, f"{count} images in the line")
        time.sleep(0.1)  # the one taken is on its way into the process

    def wait_ready(self) -> None:
        wait_for(lambda: self.client.get("/readyz").status_code == 200, "ready")


def wait_for(condition: Callable[[], bool], what: str, *, seconds: float = LIVENESS) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, f"no {what} within {seconds} s"
        time.sleep(0.02)


def launch(
    *targets: Path | str,
    log_file: Path,
    env: dict[str, str] | None = None,
    challenger: Path | None = None,
    **settings: Any,
) -> subprocess.Popen:
    settings = {"port": 0, "drain_seconds": 0, **settings}
    order = [[str(target) for target in targets], settings, challenger and str(challenger)]
    with log_file.open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, "-W", "error", "-c", _PROGRAM, json.dumps(order)],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )


@contextmanager
def serving(*targets: Path | str, folder: Path, **options: Any) -> Iterator[Server]:
    """Start a server, wait until it says its address, and check that it ends well."""
    log = folder / f"serve-{time.monotonic_ns()}.log"
    process = launch(*targets, log_file=log, **options)
    try:
        wait_for(lambda: process.poll() is not None or b"serving" in log.read_bytes(), "address")
        found = re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text())
        assert found, log.read_text()
        with httpx.Client(base_url=found[0], timeout=LIVENESS) as client:
            yield Server(process=process, log=log, url=found[0], client=client)
        if process.poll() is None:
            process.terminate()
        assert process.wait(LIVENESS) in (0, -signal.SIGKILL)
        words = log.read_text()
        assert "Traceback" not in words, words
        assert "leaked" not in words, words
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def stalled(*workers: int) -> Iterator[None]:
    """Inference processes that hang in the middle of whatever they do."""
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    try:
        yield
    finally:
        for worker in workers:
            if Path(f"/proc/{worker}").exists():
                os.kill(worker, signal.SIGCONT)


def peak_bytes(process: int) -> int:
    status = Path(f"/proc/{process}/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


def refused(response: httpx.Response, *statuses: int) -> str:
    """Check that an error has the one body all errors have (RFC 9457), and tells nothing of this machine."""
    assert response.status_code in statuses, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    protocol = response.request.url.path.startswith("/v2")  # whose clients look for the detail in `error`
    assert set(body) == {"type", "title", "status", "detail", *(["error"] if protocol else [])}
    assert body.get("error", body["detail"]) == body["detail"]
    assert body["status"] == response.status_code
    assert not [leak for leak in LEAKS if leak in response.text], response.text
    detail: str = body["detail"]
    return detail


def files(*images: bytes) -> list[tuple[str, tuple[str, bytes, str]]]:
    return [("files", (f"{number}.jpg", image, "image/jpeg")) for number, image in enumerate(images)]

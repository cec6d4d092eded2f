"""Requests per second and latency: `holotype serve`, the tutorial's server, LitServe, in one interleaved run.

    python benchmarks/serving.py RUN INT8_RUN PHOTOS --lit-python lit/bin/python --rounds 3 --seconds 10

RUN is the float run, INT8_RUN what `compress` made of it, PHOTOS a folder of JPEG files. The load comes from
wrk (apt install wrk), another process with keep-alive connections that posts the photos in turn. Each server
is started, warmed up and stopped again in every round; rounds are interleaved. The limit is what decoding and
inference alone would allow: cores, less those that the load itself took, over the core-seconds of one image,
measured in a process for each core at once: a core with a busy neighbour is slower than one alone.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import itertools
import json
import multiprocessing
import os
import re
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np

from holotype.bundle import open_bundle
from holotype.machine import available_cores, machine_name
from holotype.predictor import load
from holotype.runtime import RuntimeName

HERE = Path(__file__).parent

SCRIPT = """
local bodies, at = {}, 0
local kind = os.getenv("LOAD_KIND")
for name in io.lines(os.getenv("LOAD_LIST")) do
  local file = io.open(name, "rb")
  local body = file:read("*a")
  file:close()
  bodies[#bodies + 1] = body
end
local headers = {["Content-Type"] = kind}
request = function()
  at = at % #bodies + 1
  return wrk.format("POST", "/predict", headers, bodies[at])
end
done = function(summary, latency)
  local errors = summary.errors
  local wrong = errors.status + errors.connect + errors.read + errors.timeout
  local seconds = summary.duration / 1e6
  io.write(string.format("JSON [%d, %.6f, %d, %.3f, %.3f]\\n", summary.requests, seconds, wrong,
    latency:percentile(50) / 1e3, latency:percentile(95) / 1e3))
end
"""


@dataclass(frozen=True)
class Measured:
    """One load: requests per second, latency in ms, requests that failed, the cores that the load took."""

    rate: float
    p50: float
    p95: float
    errors: int
    load_cores: float
    memory_mb: float


def main() -> None:
    arguments = read_arguments()
    photos = sorted(arguments.photos.rglob("*.jpg"))[: arguments.count]
    found: dict[tuple[str, int], list[Measured]] = {}
    runtime: RuntimeName = "auto"
    commands = servers(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        script, lists = Path(scratch) / "load.lua", write_lists(Path(scratch), photos)
        script.write_text(SCRIPT)
        for number in range(arguments.rounds):
            order = list(commands)
            if number % 2:
                order.reverse()
            for who in order:
                with running(commands[who]) as (url, process):
                    put(url, script, lists, who, connections=4, seconds=2)
                    if who == "holotype":
                        runtime = httpx.get(f"{url}/info").json()["runtime"]
                    for connections in arguments.connections:
                        one = put(url, script, lists, who, connections=connections, seconds=arguments.seconds)
                        memory = resident_mb(process.pid)
                        found.setdefault((who, connections), []).append(Measured(**one, memory_mb=memory))
                        print(
                            f"round {number + 1} {who:9} {connections:3} connections: {one['rate']:6.1f}/s,"
                            f" p50 {one['p50']:.1f} ms, {one['errors']} errors, {memory:.0f} MB",
                            flush=True,
                        )
    work = work_of(arguments.int8, photos, runtime=runtime)
    print(f"\nholotype answered in {runtime}")
    report(found, work, arguments)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("int8", type=Path)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--lit-python", type=Path, help="python of an environment with litserve")
    parser.add_argument("--lit-workers", type=int, default=2)
    parser.add_argument("--lit-batch", type=int, default=8)
    parser.add_argument("--lit-wait", type=float, default=0.005)
    parser.add_argument("--only", nargs="+", default=["holotype", "tutorial", "litserve"])
    parser.add_argument("--set", nargs="*", default=[], help="settings of holotype serve")
    parser.add_argument("--count", type=int, default=200, help="photos that are posted in turn")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=10)
    return parser.parse_args()


def servers(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """How each is started, with PORT for the port."""
    more = [part for setting in arguments.set for part in ("--set", setting)]
    ours = [sys.executable, "-m", "holotype", "serve", str(arguments.int8), "--port", "PORT", *more]
    commands = {"holotype": ours}
    commands["tutorial"] = [
        sys.executable, str(HERE / "servers" / "tutorial.py"), str(arguments.run), "PORT",
    ]  # fmt: skip
    if arguments.lit_python:
        bundle = open_bundle(arguments.int8)
        commands["litserve"] = [
            str(arguments.lit_python), str(HERE / "servers" / "lit.py"), str(bundle.path / "model.onnx"),
            json.dumps(bundle.manifest.classes), str(bundle.manifest.preprocess.height), "PORT",
            str(arguments.lit_workers), str(arguments.lit_batch), str(arguments.lit_wait),
        ]  # fmt: skip
    return {who: command for who, command in commands.items() if who in arguments.only}


@contextlib.contextmanager
def running(command: Sequence[str]) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server in a process group of its own, ready to answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [part.replace("PORT", str(port)) if part == "PORT" else part for part in command],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        limit = time.monotonic() + 60
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.post(f"{url}/predict", content=b"", timeout=5).status_code not in (503, 404):
                    break
            if time.monotonic() > limit or process.poll() is not None:
                raise SystemExit(f"does not start: {' '.join(command)}")
            time.sleep(0.1)
        yield url, process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def write_lists(scratch: Path, photos: Sequence[Path]) -> dict[str, Path]:
    """For each content type a file with the names of the bodies: photos as they are, or base64 in JSON."""
    encoded = []
    for photo in photos:
        encoded.append(scratch / f"{photo.stem}.json")
        encoded[-1].write_text(json.dumps({"image": base64.b64encode(photo.read_bytes()).decode()}))
    lists = {"image/jpeg": scratch / "jpeg", "application/json": scratch / "json"}
    for kind, files in (("image/jpeg", photos), ("application/json", encoded)):
        lists[kind].write_text("\n".join(str(file.resolve()) for file in files))
    return lists


def put(
    url: str, script: Path, lists: dict[str, Path], who: str, *, connections: int, seconds: int
) -> dict[str, float]:
    """Load a server with so many connections, each of which waits for its answer."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    kind = "application/json" if who == "litserve" else "image/jpeg"
    environment = {**os.environ, "LOAD_LIST": str(lists[kind]), "LOAD_KIND": kind}
    done = subprocess.run(
        ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "20s", "-s", str(script), url],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = re.search(r"JSON (.*)", done.stdout)
    if found is None:
        raise SystemExit(done.stdout + done.stderr)
    requests, elapsed, errors, p50, p95 = json.loads(found[1])
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "rate": requests / elapsed,
        "p50": p50,
        "p95": p95,
        "errors": errors,
        "load_cores": spent / elapsed,
    }


def resident_mb(leader: int) -> float:
    """Proportional set size of all processes of a server, in MB: what is shared is counted once."""
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader:  # the session
                rollup = (stat.parent / "smaps_rollup").read_text()
                total += int(re.search(r"Pss:\s+(\d+)", rollup)[1])  # type: ignore[index]
    return total / 1e3


def work_of(target: Path, photos: Sequence[Path], *, runtime: RuntimeName) -> tuple[float, float]:
    """Core-seconds of decoding a photo, and of inferring one of a batch of eight in the server's runtime."""
    cores = available_cores()
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(cores, mp_context=context) as pool:
        barrier = manager.Barrier(cores)
        work = [pool.submit(_work_of_one, target, list(photos), runtime, barrier) for _ in range(cores)]
        decoding, inferring = zip(*(one.result() for one in work), strict=True)
    return statistics.mean(decoding), statistics.mean(inferring)


def _work_of_one(
    target: Path, photos: list[Path], runtime: RuntimeName, barrier: threading.Barrier
) -> tuple[float, float]:
    """In one of several processes, with one thread: several of them wait for each other, and that counts."""
    predictor = load(target, runtime=runtime, threads=1)
    contents = itertools.cycle([photo.read_bytes() for photo in photos])
    batch = np.stack([predictor.read(next(contents)) for _ in range(8)])
    for _ in range(5):
        predictor.runtime.run(batch)
    barrier.wait()
    decoding = _core_seconds(lambda: predictor.read(next(contents)))
    barrier.wait()
    return decoding, _core_seconds(lambda: predictor.runtime.run(batch)) / len(batch)


def _core_seconds(call: Callable[[], object], *, seconds: float = 4.0) -> float:
    count, end, began = 0, time.perf_counter() + seconds, time.process_time()
    while time.perf_counter() < end:
        call()
        count += 1
    return (time.process_time() - began) / count


def report(
    found: dict[tuple[str, int], list[Measured]], work: tuple[float, float], arguments: argparse.Namespace
) -> None:
    print(f"\non {machine_name()}; medians of {arguments.rounds} interleaved rounds of {arguments.seconds} s")
    print(f"decoding {1e3 * work[0]:.2f} core-ms, inference {1e3 * work[1]:.2f} core-ms per image")
    most = max(arguments.connections)
    for (who, connections), rounds in found.items():
        rate, p50, p95, cores, memory = (
            statistics.median(getattr(one, name) for one in rounds)
            for name in ("rate", "p50", "p95", "load_cores", "memory_mb")
        )
        limit = (available_cores() - cores) / sum(work)
        share = f", {rate / limit:.0%} of the limit of {limit:.0f}" if connections == most else ""
        errors = sum(one.errors for one in rounds)
        print(
            f"{who:9} {connections:3} connections: {rate:6.1f} requests/s, p50 {p50:6.2f} ms,"
            f" p95 {p95:6.2f} ms, {memory:.0f} MB, {errors} errors{share}"
        )
    for other in ("tutorial", "litserve"):
        if (other, most) in found and ("holotype", most) in found:
            ours, theirs = (
                statistics.median(one.rate for one in found[who, most]) for who in ("holotype", other)
            )
            mine, his = (statistics.median(one.p50 for one in found[who, 1]) for who in ("holotype", other))
            times = f"{ours / theirs:.1f} times the requests"
            print(f"against {other}: {times}, {mine / his:.2f} of the p50 at one client")


if __name__ == "__main__":
    main()

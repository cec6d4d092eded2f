"""What a server loses under load and faults: overload, slow clients, kill -9, reload, SIGTERM, no database.

    python benchmarks/faults.py RUN PHOTOS overload slow kill reload terminate database --seconds 60
    python benchmarks/faults.py RUN PHOTOS soak --seconds 600

Requests go out at times of their own (an open loop), whatever became of the ones before; each is a connection
of its own, and counts as lost when it gets no answer, as late beyond its deadline, as wrong when the label is
another one than `predict` gives. RUN is a run folder or bundle, PHOTOS a folder of JPEG files.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from holotype.predictor import load

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

DEADLINE = 10.0
_PARTS = 3  # of an overload
ADMIN = {"X-API-Key": "boss"}


@dataclass
class Tally:
    """What became of the requests of one load."""

    statuses: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    lost: int = 0
    late: int = 0
    wrong: int = 0
    elapsed: float = 0.0

    @property
    def goodput(self) -> float:
        return self.statuses[200] / self.elapsed

    def told(self) -> str:
        statuses = ", ".join(f"{count} x {status}" for status, count in sorted(self.statuses.items()))
        middle = f"p50 {1e3 * statistics.median(self.seconds):.1f} ms, " if self.seconds else ""
        return f"{statuses}; {middle}lost {self.lost}, late {self.late}, wrong {self.wrong}"


@dataclass(frozen=True)
class Photo:
    content: bytes
    label: str


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen[bytes]
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def workers(self) -> list[int]:
        models = httpx.get(f"{self.url}/admin/models", headers=ADMIN, timeout=10).json()["models"]
        return [pid for model in models for pid in model["live"]["processes"]]

    def usage(self) -> tuple[float, int, int]:
        """MB of all processes (what is shared counted once), open files, threads."""
        memory, files, threads = 0.0, 0, 0
        for process in (self.process.pid, *self.workers()):
            rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
            found = re.search(r"Pss:\s+(\d+)", rollup)
            memory += int(found[1]) / 1e3 if found else 0.0
            files += len([*Path(f"/proc/{process}/fd").iterdir()])
            threads += len([*Path(f"/proc/{process}/task").iterdir()])
        return memory, files, threads


def main() -> None:
    arguments = read_arguments()
    photos = labelled(arguments.run, arguments.photos)
    for name in arguments.scenes:
        with serving(arguments.run, "--workers", str(arguments.workers)) as server:
            SCENES[name](server, photos, arguments)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("photos", type=Path)
    parser.add_argument("scenes", nargs="+", choices=list(SCENES))
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--workers", type=int, default=1)
    return parser.parse_args()


def labelled(run: Path, folder: Path) -> list[Photo]:
    """Photos with the labels that the command line gives them."""
    predictor = load(run)
    files = sorted(folder.rglob("*.jpg"))[:100]
    return [Photo(file.read_bytes(), str(predictor.predict(file).label)) for file in files]


@contextmanager
def serving(run: Path, *more: str) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log"
        command = [sys.executable, "-m", "holotype", "serve", str(run), "--port", "0", "--set", "log=none"]
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [*command, *more], stderr=stream, env={**os.environ, "HOLOTYPE_ADMIN_KEY": "boss"}
            )
        try:
            while (found := re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text())) is None:
                if process.poll() is not None:
                    raise SystemExit(log.read_text())
                time.sleep(0.05)
            yield Server(process, int(found[1]))
        finally:
            process.terminate()
            process.wait(40)


async def send(server: Server, photo: Photo, tally: Tally) -> None:
    began = time.monotonic()
    try:
        async with asyncio.timeout(DEADLINE + 5):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            try:
                head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(photo.content)}\r\n"
                writer.write((head + "Connection: close\r\n\r\n").encode())
                writer.write(photo.content)
                answer = await reader.read()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        tally.lost += 1
        return
    seconds = time.monotonic() - began
    if not answer.startswith(b"HTTP/1.1 "):
        tally.lost += 1
        return
    status = int(answer[9:12])
    tally.statuses[status] += 1
    if status == 200:
        tally.seconds.append(seconds)
        tally.late += seconds > DEADLINE
        body = json.loads(answer.partition(b"\r\n\r\n")[2])
        tally.wrong += body["results"][0]["label"] != photo.label


async def open_loop(server: Server, photos: list[Photo], *, rate: float, seconds: float) -> Tally:
    """So many requests per second, evenly, whatever becomes of them."""
    tally, tasks, began = Tally(), set(), time.monotonic()
    count = round(rate * seconds)
    for number in range(count):
        delay = began + number / rate - time.monotonic()
        if delay > 0:
            await asyncio.sleep(delay)
        task = asyncio.create_task(send(server, photos[number % len(photos)], tally))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    tally.elapsed = time.monotonic() - began
    if tasks:
        await asyncio.wait(tasks)
    return tally


async def closed_loop(server: Server, photos: list[Photo], *, clients: int, seconds: float) -> Tally:
    tally, end = Tally(), time.monotonic() + seconds

    async def client(first: int) -> None:
        number = first
        while time.monotonic() < end:
            await send(server, photos[number % len(photos)], tally)
            number += clients

    began = time.monotonic()
    await asyncio.gather(*(client(first) for first in range(clients)))
    tally.elapsed = time.monotonic() - began
    return tally


def overload(server: Server, photos: list[Photo], arguments: argparse.Namespace) -> None:
    """Four times what it can do; /livez is asked all the while.

    In three parts, with a look at the peak before and after each: a shared machine is not as fast at the end
    of a minute as at its beginning.
    """
    asyncio.run(closed_loop(server, photos, clients=16, seconds=5))
    at_peak = time.process_time()
    peaks = [asyncio.run(closed_loop(server, photos, clients=16, seconds=5)).goodput]
    at_peak = (time.process_time() - at_peak) / 5
    before = server.usage()[0]
    late: list[float] = []
    stop = threading.Event()

    def watch() -> None:
        with httpx.Client(base_url=server.url, timeout=10) as client:
            while not stop.wait(0.2):
                began = time.monotonic()
                client.get("/livez")
                late.append(1e3 * (time.monotonic() - began))

    tallies, shares, own = [], [], 0.0
    for _ in range(_PARTS):
        stop.clear()
        thread = threading.Thread(target=watch)
        thread.start()
        began = time.process_time()
        seconds = arguments.seconds / _PARTS
        tallies.append(asyncio.run(open_loop(server, photos, rate=4 * peaks[-1], seconds=seconds)))
        own += time.process_time() - began
        stop.set()
        thread.join()
        peaks.append(asyncio.run(closed_loop(server, photos, clients=16, seconds=5)).goodput)
        shares.append(tallies[-1].goodput / statistics.mean(peaks[-2:]))
    statuses = sum((one.statuses for one in tallies), Counter[int]())
    failures = ", ".join(
        f"{name} {sum(getattr(one, name) for one in tallies)}" for name in ("lost", "late", "wrong")
    )
    print(
        f"overload: peaks {', '.join(f'{one:.0f}' for one in peaks)}/s; at four times the last one for"
        f" {arguments.seconds:.0f} s {', '.join(f'{one:.0%}' for one in shares)} of the peak answered;"
        f" {', '.join(f'{count} x {status}' for status, count in sorted(statuses.items()))};"
        f" {failures};"
        f" memory {server.usage()[0] - before:+.0f} MB; /livez p50 {statistics.median(late):.0f}, longest"
        f" {max(late):.0f} ms; the load itself took {own / sum(one.elapsed for one in tallies):.2f} cores,"
        f" {at_peak:.2f} at the peak"
    )


def slow(server: Server, photos: list[Photo], _: argparse.Namespace) -> None:
    """200 clients that send a byte a second, beside ordinary ones."""

    async def both() -> tuple[Tally, Tally, list[float]]:
        alone = await closed_loop(server, photos, clients=2, seconds=5)
        closed: list[float] = []

        async def crawl() -> None:
            began = time.monotonic()
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
            end = asyncio.ensure_future(reader.read())
            while not end.done() and time.monotonic() - began < 40:
                writer.write(b"x")
                await asyncio.wait({end}, timeout=1)
            closed.append(time.monotonic() - began)
            writer.close()

        crawling = asyncio.gather(*(crawl() for _ in range(200)), return_exceptions=True)
        await asyncio.sleep(1)
        beside = await closed_loop(server, photos, clients=2, seconds=10)
        await crawling
        return alone, beside, closed

    alone, beside, closed = asyncio.run(both())
    print(
        f"slow clients: closed after {max(closed):.1f} s at the latest; others p50, p99"
        f" {quantiles(alone)} ms without, {quantiles(beside)} ms with them; {beside.told()}"
    )


def quantiles(tally: Tally) -> str:
    cuts = statistics.quantiles(tally.seconds, n=100)
    return f"{1e3 * cuts[49]:.1f}, {1e3 * cuts[98]:.1f}"


def kill(server: Server, photos: list[Photo], arguments: argparse.Namespace) -> None:
    """kill -9 of the inference process every three seconds, at half capacity."""
    peak = asyncio.run(closed_loop(server, photos, clients=16, seconds=5)).goodput

    async def run() -> tuple[Tally, int, float]:
        loading = asyncio.create_task(open_loop(server, photos, rate=peak / 2, seconds=arguments.seconds / 3))
        kills, longest = 0, 0.0
        while not loading.done():
            await asyncio.sleep(3)
            for worker in await asyncio.to_thread(server.workers):
                os.kill(worker, signal.SIGKILL)
                kills += 1
            began = time.monotonic()
            while (await asyncio.to_thread(httpx.get, f"{server.url}/readyz")).status_code != 200:
                await asyncio.sleep(0.05)
            longest = max(longest, time.monotonic() - began)
        return await loading, kills, longest

    tally, kills, longest = asyncio.run(run())
    print(f"kill -9: {kills} times, back after {longest:.1f} s at the latest; {tally.told()}")


def reload(server: Server, photos: list[Photo], arguments: argparse.Namespace) -> None:
    """Load the same bundle beside the live one and promote it, again and again, at half capacity."""
    peak = asyncio.run(closed_loop(server, photos, clients=16, seconds=5)).goodput
    name = httpx.get(f"{server.url}/info").json()["models"][0]

    async def run() -> tuple[Tally, int, float]:
        loading = asyncio.create_task(open_loop(server, photos, rate=peak / 2, seconds=arguments.seconds / 3))
        swaps, longest = 0, 0.0
        async with httpx.AsyncClient(base_url=server.url, headers=ADMIN, timeout=60) as boss:
            while not loading.done():
                (await boss.post("/admin/models", json={"path": str(arguments.run)})).raise_for_status()
                (await boss.post(f"/admin/models/{name}/promote")).raise_for_status()
                began = time.monotonic()
                (await boss.post(f"/admin/models/{name}/rollback")).raise_for_status()
                longest = max(longest, time.monotonic() - began)
                swaps += 2
        return await loading, swaps, longest

    tally, swaps, longest = asyncio.run(run())
    print(f"reload: {swaps} swaps, rollback in {1e3 * longest:.0f} ms at the longest; {tally.told()}")


def terminate(server: Server, photos: list[Photo], _: argparse.Namespace) -> None:
    """SIGTERM under load: what was accepted is answered; what comes later is refused."""

    tally = Tally()

    async def watched() -> float:
        async def client(first: int) -> None:
            number = first
            while True:
                refused = tally.statuses[503] + tally.lost
                if refused and server.process.poll() is not None:
                    return
                before = tally.statuses[503]
                await send(server, photos[number % len(photos)], tally)
                number += 16
                if tally.statuses[503] > before:
                    return

        clients = [asyncio.create_task(client(first)) for first in range(16)]
        await asyncio.sleep(3)
        server.process.terminate()
        began = time.monotonic()
        await asyncio.gather(*clients)
        await asyncio.to_thread(server.process.wait, 40)
        return time.monotonic() - began

    ended = asyncio.run(watched())
    print(f"SIGTERM under load: gone after {ended:.1f} s; {tally.told()}")


def database(server: Server, photos: list[Photo], arguments: argparse.Namespace) -> None:
    """PostgreSQL stopped and started under load; rows are counted at the end."""
    import sqlalchemy

    from holotype.records import PREDICTIONS, connect
    from postgres import postgres

    del server  # this scene has a server of its own
    with postgres() as cluster, tempfile.TemporaryDirectory() as scratch:
        more = ("--set", f"records.database={cluster.url}", "--set", f"records.journal={scratch}")
        with serving(arguments.run, *more) as own:
            peak = asyncio.run(closed_loop(own, photos, clients=16, seconds=5))

            async def run() -> Tally:
                loading = asyncio.create_task(open_loop(own, photos, rate=peak.goodput / 2, seconds=20))
                await asyncio.sleep(5)
                await asyncio.to_thread(cluster.stop)
                await asyncio.sleep(7)
                await asyncio.to_thread(cluster.start)
                return await loading

            tally = asyncio.run(run())
            while httpx.get(f"{own.url}/stats").json()["records"]["pending_bytes"]:
                time.sleep(0.1)
            dropped = httpx.get(f"{own.url}/stats").json()["records"]["dropped"]
        engine = connect(cluster.url)
        with engine.connect() as connection:
            rows = connection.execute(sqlalchemy.select(sqlalchemy.func.count()).select_from(PREDICTIONS))
            found = int(rows.scalar())
        engine.dispose()
    given = peak.statuses[200] + tally.statuses[200]
    print(
        f"database gone for 7 s: {tally.told()}; {found} rows of {given} answers, {dropped} dropped:"
        f" {given - found} lost"
    )


def soak(server: Server, photos: list[Photo], arguments: argparse.Namespace) -> None:
    """Half capacity for minutes: memory, handles, threads."""
    peak = asyncio.run(closed_loop(server, photos, clients=16, seconds=10)).goodput
    samples: list[tuple[float, float, int, int]] = []
    stop = threading.Event()

    def watch() -> None:
        began = time.monotonic()
        while not stop.wait(5):
            samples.append((time.monotonic() - began, *server.usage()))

    thread = threading.Thread(target=watch)
    thread.start()
    tally = asyncio.run(open_loop(server, photos, rate=peak / 2, seconds=arguments.seconds))
    stop.set()
    thread.join()
    kept = samples[len(samples) // 10 :]  # what is built at first
    slope = statistics.linear_regression([one[0] / 60 for one in kept], [one[1] for one in kept]).slope
    print(
        f"soak: {arguments.seconds / 60:.0f} min at {peak / 2:.0f}/s; memory {kept[0][1]:.0f} →"
        f" {kept[-1][1]:.0f} MB ({slope:+.2f} MB/min), handles {kept[0][2]} → {kept[-1][2]},"
        f" threads {kept[0][3]} → {kept[-1][3]}; {tally.told()}"
    )


SCENES = {
    "overload": overload,
    "slow": slow,
    "kill": kill,
    "reload": reload,
    "terminate": terminate,
    "database": database,
    "soak": soak,
}


if __name__ == "__main__":
    main()

"""The front process: opens the door, tells when it is ready, and closes it without losing anyone.

It reads requests and passes bytes on; it never decodes an image and never loads a model.
"""

from __future__ import annotations

import asyncio
import gc
import importlib.metadata
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from holotype.bundle import resolve
from holotype.errors import ServerError
from holotype.experiment import Rule
from holotype.machine import cache_root
from holotype.progress import note
from holotype.runtime import remembered
from holotype.serve.admission import Budget, Line
from holotype.serve.fleet import Fleet, name_targets
from holotype.serve.settings import ServeSettings

if TYPE_CHECKING:
    import uvicorn

    from holotype.serve.desk import Desk

__all__ = ["run"]

# These, a second for the processes, one for the log and four for the records, stay within the thirty seconds
# that a service manager waits.
_DRAIN_LIMIT_SECONDS = 20.0
_CLOSE_LIMIT_SECONDS = 2
_BACKLOG = 2048
_OTHER_FILES = 512  # that are open beside connections, at most: pipes, memory, the database


def run(
    targets: Sequence[str],
    *,
    settings: ServeSettings,
    challenger: Path | None = None,
) -> None:
    """Serve bundles or run folders (`PATH`, or `NAME=PATH`) over HTTP until SIGTERM or Ctrl-C; blocks.

    With `challenger`, an A/B test of the first one. Raises `BundleError` or `ServerError` where a bundle
    cannot be loaded or the address not be used.
    """
    named = name_targets(list(targets))
    for path in named.values():
        resolve(path)
    _allow_files(settings.max_connections + _OTHER_FILES)
    with _listen(settings) as listener, asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(named, settings, listener, challenger=challenger))


def _allow_files(count: int) -> None:
    """Raise what a shell or a service manager allows by default; `ServerError` where it may not be raised.

    Where a connection finds no file descriptor, nobody is let in any more, not even to ask about health.
    """
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        raise ServerError(
            f"max_connections needs {count:,} open files, and {hard:,} are allowed",
            fix="lower max_connections, or raise the limit (ulimit -Hn, or LimitNOFILE of the service)",
        )
    if soft != resource.RLIM_INFINITY and soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """libuv's event loop, or Python's own on Windows, where there is no other."""
    if sys.platform == "win32":
        return None
    from uvloop import new_event_loop

    return new_event_loop


def _listen(settings: ServeSettings) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            if os.name == "posix":  # elsewhere the option lets two servers share one port
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(_BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ServerError(
            f"cannot listen on {settings.host} port {settings.port} ({error.strerror})",
            fix="choose another --host or --port; port 0 takes a free one",
        ) from error
    return listener


async def _serve(
    targets: dict[str, Path],
    settings: ServeSettings,
    listener: socket.socket,
    *,
    challenger: Path | None,
) -> None:
    line = Line(places=settings.queue)
    fleet = Fleet(targets, settings=settings, line=line, challenger=challenger)
    # While the processes load: the web framework takes about as long to import as they to start.
    loading = asyncio.ensure_future(fleet.load())
    await asyncio.sleep(0.05)
    from holotype.serve.connections import close_the_slow

    desk = _open_desk(settings, line)
    server = _uvicorn(desk)
    looking = asyncio.ensure_future(desk.telemetry.watch(lambda: line.waiting))
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    watching = asyncio.ensure_future(close_the_slow(server, settings=settings))
    try:
        while not (server.started or serving.done()):
            await asyncio.sleep(0.01)
        _drain_on_signal(desk, server)
        either: set[asyncio.Future[Any]] = {serving, loading}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if loading.done() and loading.exception() is None:
            fleet.listener = desk.hear
            desk.fleet = fleet
            await _begin_trial(desk)
            gc.freeze()  # what is loaded stays: the collector need not look at it again and again
            _announce(desk, listener)
        elif loading.done():
            server.should_exit = True
        await serving
        if loading.done():
            loading.result()  # raises what kept a bundle from loading
    finally:
        server.should_exit = True
        watching.cancel()
        looking.cancel()
        loading.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        if desk.watching is not None:
            desk.watching.cancel()
        await fleet.close()
        await asyncio.to_thread(desk.telemetry.close)
        if desk.records is not None:
            await asyncio.to_thread(desk.records.close)


def _open_desk(settings: ServeSettings, line: Line) -> Desk:
    from holotype.serve.desk import Desk
    from holotype.serve.telemetry import Telemetry, open_log

    telemetry = Telemetry(version=importlib.metadata.version("holotype"), log=open_log(settings.log))
    budget = Budget(total=settings.max_held_bytes)
    return Desk(settings=settings, line=line, budget=budget, telemetry=telemetry)


def _uvicorn(desk: Desk) -> uvicorn.Server:
    import uvicorn

    from holotype.serve.app import create_app
    from holotype.serve.connections import bounded_protocol
    from holotype.serve.doors import Keys

    app, shed = create_app(desk, keys=Keys.from_environment())
    config = uvicorn.Config(
        app,
        http=bounded_protocol(desk.settings, shed=shed),
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nothing here asks who the client is
        timeout_graceful_shutdown=_CLOSE_LIMIT_SECONDS,
        backlog=_BACKLOG,
    )
    return uvicorn.Server(config)


async def _begin_trial(desk: Desk) -> None:
    """Open the records, and the experiment where there is a challenger; `ConfigError` where that fails."""
    settings, fleet = desk.settings, desk.fleet
    if fleet is None:
        raise AssertionError("begun without a model")
    model = fleet.default
    if model.challenger is None and settings.records.database is None:
        return
    from holotype.experiment import experiment_id
    from holotype.journal import open_journal
    from holotype.records import Records, connect

    live = model.live.served
    if live is None:
        raise AssertionError("begun before it was loaded")
    folder = cache_root() / "experiments"
    own = f"sqlite:///{folder / live.bundle[:16]}.db"
    folder.mkdir(parents=True, exist_ok=True)
    url = settings.records.database or own
    journal = Path(settings.records.journal) if settings.records.journal else folder
    desk.records = Records(
        connect(url),
        open_journal(journal, url=url, capacity=settings.records.journal_bytes),
        keep_days=settings.records.keep_days,
    )
    if model.challenger is not None and model.challenger.served is not None:
        from holotype.serve.trial import Trial

        experiment = experiment_id(live.bundle, model.challenger.served.bundle)
        desk.trial = Trial(
            experiment,
            settings.experiment,
            model,
            champion=model.live,
            challenger=model.challenger,
            fleet=fleet,
            line=desk.line,
            records=desk.records,
            telemetry=desk.telemetry,
        )
        await desk.trial.begin()
        desk.watching = asyncio.ensure_future(desk.trial.watch())
        note(f"experiment {experiment}: {_described(settings.experiment)}")
    desk.records.start()


def _described(rule: Rule) -> str:
    if rule.shadow:
        return "the challenger answers in the shadow"
    return f"the challenger answers {rule.share:.0%} of the keys in {rule.key}"


def _announce(desk: Desk, listener: socket.socket) -> None:
    if desk.fleet is None:
        raise AssertionError("announced before it was loaded")
    host, port = listener.getsockname()[:2]
    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    count = desk.settings.workers
    workers = f"{count} worker{'s' if count > 1 else ''}"
    for name, model in desk.fleet.models.items():
        served = model.live.served
        if served is None:
            raise AssertionError("announced before it was loaded")
        bundle = model.live.bundle
        if desk.settings.runtime == "auto" and bundle is not None and remembered(bundle) is None:
            note(
                f"{name}: nobody measured which runtime is the fastest here, so it is {served.runtime}"
                " (holotype benchmark measures it)"
            )
        note(
            f"serving {name} {served.bundle[:12]} on http://{place} ({served.runtime}, {workers},"
            f" batches of {served.max_batch} at most)"
        )


def _drain_on_signal(desk: Desk, server: uvicorn.Server) -> None:
    """Take SIGTERM and Ctrl-C over from uvicorn, which would close its listeners first."""
    loop = asyncio.get_running_loop()
    tasks: list[asyncio.Task[None]] = []

    def begin() -> None:
        if tasks:
            server.should_exit = server.force_exit = True  # asked twice: now
        tasks.append(loop.create_task(_drain(desk, server)))

    def handle(_: int, __: FrameType | None) -> None:
        loop.call_soon_threadsafe(begin)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)


async def _drain(desk: Desk, server: uvicorn.Server) -> None:
    """Stop letting in, wait for those who are in, and only then close the door."""
    desk.draining = True
    began = time.monotonic()
    while time.monotonic() - began < _DRAIN_LIMIT_SECONDS:
        if not desk.active and time.monotonic() - began >= desk.settings.drain_seconds:
            break
        await asyncio.sleep(0.05)
    if desk.active and desk.fleet is not None:
        # Who waits for something that hangs is told so, before uvicorn ends them without a word.
        await desk.fleet.close()
        await asyncio.sleep(0.05)
    server.should_exit = True

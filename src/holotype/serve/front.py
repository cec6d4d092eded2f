"""The front process: opens the door, tells when it is ready, and closes it without losing anyone.

It reads requests and passes bytes on; it never decodes an image and never loads a model.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import signal
import socket
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from holotype.bundle import resolve
from holotype.errors import ServerError
from holotype.progress import note
from holotype.serve.admission import Budget, Line
from holotype.serve.pool import Pool
from holotype.serve.settings import ServeSettings

if TYPE_CHECKING:
    import uvicorn

    from holotype.serve.app import Desk

__all__ = ["run"]

# Together with the end of the processes, this stays within the thirty seconds a service manager waits.
_DRAIN_LIMIT_SECONDS = 25.0
_CLOSE_LIMIT_SECONDS = 2
_BACKLOG = 2048


def run(target: Path | str, *, settings: ServeSettings) -> None:
    """Serve a bundle or run folder over HTTP until SIGTERM or Ctrl-C; blocks.

    Raises `BundleError` or `ServerError` where the bundle cannot be loaded or the address not be used.
    """
    folder = resolve(target)
    with _listen(settings) as listener:
        line = Line(places=settings.queue)
        pool = Pool(folder, settings=settings, line=line)
        pool.start()
        try:
            # While the processes load: the web framework takes about as long to import as they to start.
            from holotype.serve.app import Desk

            budget = Budget(total=settings.max_held_bytes)
            desk = Desk(pool=pool, line=line, settings=settings, budget=budget)
            asyncio.run(_serve(desk, listener))
        finally:
            pool.close()


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


async def _serve(desk: Desk, listener: socket.socket) -> None:
    import uvicorn

    from holotype.serve.app import create_app

    config = uvicorn.Config(
        create_app(desk, version=importlib.metadata.version("holotype")),
        http="h11",
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_CLOSE_LIMIT_SECONDS,
        backlog=_BACKLOG,
    )
    server = uvicorn.Server(config)
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    loading = asyncio.gather(*(asyncio.wrap_future(one) for one in desk.pool.started))
    watching = asyncio.ensure_future(_close_idlers(server, seconds=desk.settings.upload_seconds))
    while not (server.started or serving.done()):
        await asyncio.sleep(0.01)
    _drain_on_signal(desk, server)
    either: set[asyncio.Future[Any]] = {serving, loading}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if loading.done() and loading.exception() is None:
            _announce(desk, listener)
        elif loading.done():
            server.should_exit = True
        await serving
        if loading.done():
            loading.result()  # raises what kept the bundle from loading
    finally:
        loading.cancel()
        watching.cancel()


def _announce(desk: Desk, listener: socket.socket) -> None:
    served = desk.pool.served
    assert served is not None
    host, port = listener.getsockname()[:2]
    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    count = desk.settings.workers
    workers = f"{count} worker{'s' if count > 1 else ''}"
    note(f"serving {served.bundle[:12]} on http://{place} ({served.runtime}, {workers})")


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
    server.should_exit = True


async def _close_idlers(server: uvicorn.Server, *, seconds: float) -> None:
    """Close connections that take longer than `seconds` to send the head of a request.

    A body has its own deadline, and an idle connection its keep-alive time; but uvicorn has none for a head.
    """
    connections: set[Any] = server.server_state.connections
    since: dict[Any, tuple[Any, float]] = {}
    while True:
        await asyncio.sleep(min(seconds / 4, 1))
        now = time.monotonic()
        idle = [one for one in connections if one.cycle is None or one.cycle.response_complete]
        # A cycle is one request of a connection: another one means that it was not idle in between.
        earlier = {one: since.get(one, (one.cycle, now)) for one in idle}
        since = {one: (one.cycle, at if cycle is one.cycle else now) for one, (cycle, at) in earlier.items()}
        for one, (_, at) in since.items():
            if now - at > seconds:
                one.transport.close()

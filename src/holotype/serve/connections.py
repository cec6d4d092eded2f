"""Connections with limits: how long a request's head may be, how many clients there are, and who never reads.

uvicorn bounds none of these, and its parser keeps a head of any length.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, cast

import uvicorn
from starlette.responses import Response
from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from holotype.serve.doors import HEALTH
from holotype.serve.problems import problem
from holotype.serve.settings import ServeSettings

__all__ = ["Shed", "bounded_protocol", "close_the_slow", "crowded", "is_crowded_out"]

_RESERVE = 64  # connections beyond the limit that may ask whether the server lives
_IDLE_SECONDS = 1.0  # before a connection without a request may have to make place for another
_LINGER_SECONDS = 1.0  # to read what a client still sends after a refusal, so that it lives to read it
_MOST_PIPELINED = 32  # requests of one connection that wait for the one before
_UPGRADE, _IGNORED = b"upgrade:", b"ignored:"  # of one length, so that limits count the same
_CROWDED = "holotype.crowded"  # in the state of a request that is one too many

Shed = Callable[[Scope], Response | None]
"""The refusal of a request by its head, None where the application is to answer it."""


def bounded_protocol(settings: ServeSettings, *, shed: Shed) -> type[asyncio.Protocol]:
    """The protocol of one server, for uvicorn to make one of for each connection.

    What `shed` says of a request's head is answered at once; where it says None, the application answers.
    """
    crowd = _Crowd(most=settings.max_connections)

    class Bounded(_Connection):
        most_head = settings.max_head_bytes
        most_body = settings.max_body_bytes

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(crowd, shed, *args, **kwargs)

    return Bounded


def is_crowded_out(scope: Scope) -> bool:
    """Whether a request is one too many; those that ask whether the server lives never are."""
    return _CROWDED in scope.get("state", ()) and scope["path"] not in HEALTH


def crowded(path: str = "") -> Response:
    """What such a request is told."""
    headers = {"Retry-After": "1", "Connection": "close"}
    return problem(503, "too many connections", path=path, headers=headers)


async def close_the_slow(server: uvicorn.Server, *, settings: ServeSettings) -> None:
    """Close connections that take too long to send the head of a request, or to take an answer.

    A body has its own deadline, and an idle connection its keep-alive time; but uvicorn has none for these.
    """
    connections: set[Any] = server.server_state.connections
    idle, unread = _Since(), _Since()
    while True:
        await asyncio.sleep(min(settings.upload_seconds / 4, settings.download_seconds / 4, 1))
        for one in idle.beyond(filter(_is_idle, connections), seconds=settings.upload_seconds):
            one.transport.close()
        for one in unread.beyond(filter(_is_unread, connections), seconds=settings.download_seconds):
            one.transport.abort()  # closing would wait until it has read all


class _Since:
    """How long connections have been in some state, each within one request.

    A cycle is one request of a connection: another one means that it was not in that state in between.
    """

    def __init__(self) -> None:
        self._since: dict[Any, tuple[Any, float]] = {}

    def beyond(self, connections: Any, *, seconds: float) -> list[Any]:
        """Those that are in it now, and have been for more than `seconds`."""
        now = time.monotonic()
        earlier = {one: self._since.get(one, (one.cycle, now)) for one in connections}
        self._since = {
            one: (one.cycle, at if cycle is one.cycle else now) for one, (cycle, at) in earlier.items()
        }
        return [one for one, (_, at) in self._since.items() if now - at > seconds]


def _is_idle(connection: Any) -> bool:
    return connection.cycle is None or connection.cycle.response_complete


def _is_unread(connection: Any) -> bool:
    return bool(connection.transport.get_write_buffer_size())


class _Crowd:
    """Who is connected; those without a request, the longest first, make place where there are `most`."""

    def __init__(self, *, most: int) -> None:
        self._most = most
        self._all: set[_Connection] = set()
        self._idle: dict[_Connection, float] = {}

    def join(self, one: _Connection) -> bool:
        """Let one in; False where there are too many even for a question about health."""
        if len(self._all) >= self._most:
            self._make_place()
        if len(self._all) >= self._most + _RESERVE:
            return False
        self._all.add(one)
        self.rest(one)
        return True

    def leave(self, one: _Connection) -> None:
        self._all.discard(one)
        self._idle.pop(one, None)

    def rest(self, one: _Connection) -> None:
        """It has no request now."""
        if one in self._all:
            self._idle[one] = time.monotonic()

    def ask(self, one: _Connection) -> bool:
        """It has one; False where too many others have one, too."""
        self._idle.pop(one, None)
        return len(self._all) - len(self._idle) <= self._most

    def _make_place(self) -> None:
        longest = next(iter(self._idle), None)
        if longest is not None and time.monotonic() - self._idle[longest] > _IDLE_SECONDS:
            self.leave(longest)
            longest.transport.close()


class _Connection(HttpToolsProtocol):
    """uvicorn's protocol, which refuses heads beyond `most_head` bytes and clients beyond the crowd's limit.

    Trailers count as a head of their own, and are passed on to nobody. What `shed` refuses costs no task and
    passes no middleware: under overload that is most requests, and what they cost is taken from the answers.

    Who asks for another protocol is answered in this one (RFC 9110, 7.8). The parser takes what follows such
    a head for the other protocol, and then reads the body as requests: so it does not see the header, and
    where it does, as on the heels of a body, the request is refused.
    """

    most_head: int
    most_body: int

    def __init__(self, crowd: _Crowd, shed: Shed, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._crowd = crowd
        self._shed = shed
        self._unwanted = 0  # bytes of bodies whose requests were refused by their heads
        self._answered: RequestResponseCycle | None = None
        self._reading_head = True
        self._at_line = True  # the parser was given whole lines so far
        self._held = b""  # the beginning of a line that may turn out to ask for another protocol
        self._progress = 0  # heads and pieces of bodies so far
        self._without = 0  # bytes since the last of these
        self._refused = False
        self._lingering: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's
        super().connection_made(transport)
        if not self._crowd.join(self):
            self._refuse(crowded(), linger=0)

    def connection_lost(self, exc: Exception | None) -> None:
        self._crowd.leave(self)
        if self._lingering is not None:
            self._lingering.cancel()
        # uvicorn tells the last request only, and those before it would write to nobody.
        for cycle in (self._answered, *(cycle for cycle, _ in self.pipeline)):
            if cycle is not None:
                cycle.disconnected = True
                cycle.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        data, self._held = self._held + data, b""
        while data and not (self._refused or self.transport.is_closing()):
            piece, data = self._cut(data) if self._reading_head else (data, b"")
            if not piece:
                self._held = data
                return
            self._at_line = piece.endswith(b"\n")
            before = self._progress
            super().data_received(piece)
            self._without = 0 if self._progress != before else self._without + len(piece)
            if self._without >= self.most_head and not self._refused:
                told = f"the head of a request is over the limit of {self.most_head:,} bytes"
                self._refuse(problem(431, told, headers={"Connection": "close"}))

    def _cut(self, data: bytes) -> tuple[bytes, bytes]:
        """What of `data` the parser is given next, and the rest; nothing yet where a line has just begun.

        It is given no more than a head may have, and ends before each line that seems to ask for another
        protocol: only the parser knows whether that is still the head, where it is renamed, or the body.
        """
        if self._at_line:
            begins = data[: len(_UPGRADE)].lower()
            if begins == _UPGRADE:
                data = _IGNORED + data[len(_UPGRADE) :]
            elif _UPGRADE.startswith(begins):
                return b"", data
        piece = data[: self.most_head - self._without].lower()
        end = piece.find(b"\n" + _UPGRADE) + 1
        if not end:
            last = piece.rfind(b"\n") + 1
            begun = 0 < last < len(piece) and _UPGRADE.startswith(piece[last:])
            end = last if begun else len(piece)
        return data[:end], data[end:]

    def send_400_response(self, msg: str) -> None:
        """What the parser does not understand, in the shape of all errors."""
        self._refuse(problem(400, msg, headers={"Connection": "close"}))

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= _MOST_PIPELINED:
            raise ValueError("too many requests at once")  # the parser stops, and says 400
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._reading_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._reading_head = False
        self._progress += 1
        if self.parser.should_upgrade():  # CONNECT too
            raise ValueError("another protocol")  # the parser stops, and says 400
        if not self._crowd.ask(self):
            self.scope["state"][_CROWDED] = True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._progress += 1
        super().on_body(body)
        if self.cycle.response_complete:
            self._unwanted += len(body)
            if self._unwanted > self.most_body:
                self.transport.close()

    def on_message_complete(self) -> None:
        self._reading_head = True
        super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answered = cycle
        scope = cast("Scope", cycle.scope)
        refusal = None if is_crowded_out(scope) else self._shed(scope)
        if refusal is None:
            super()._start_asgi_task(cycle, app)
            return
        cycle.response_started = cycle.response_complete = True
        if cycle.keep_alive:
            self._unwanted = 0
            self.transport.write(_on_the_wire(refusal))
            self.on_response_complete()
        else:
            self._refuse(refusal)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if _is_idle(self):
            self._crowd.rest(self)

    def _refuse(self, response: Response, *, linger: float = _LINGER_SECONDS) -> None:
        """Answer past the application, unless it is answering already, and close."""
        self._refused = True
        if self.transport.is_closing():
            return
        answering = not _is_idle(self) and (self.cycle.response_started or bool(self.pipeline))
        if not _is_idle(self):
            self.cycle.disconnected = True  # the application need not go on
            self.cycle.message_event.set()
        if not answering:
            self.transport.write(_on_the_wire(response))
        if answering or not linger:
            self.transport.close()
        else:
            self.transport.write_eof()
            self._lingering = self.loop.call_later(linger, self.transport.close)


def _on_the_wire(response: Response) -> bytes:
    status = response.status_code
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}".encode()]
    lines += [name + b": " + value for name, value in response.raw_headers]
    return b"\r\n".join([*lines, b"", bytes(response.body)])

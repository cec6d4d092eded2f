"""The relabel page: a web server on loopback that shows one image after the other and keeps every answer.

No path goes to the browser and none is taken from it: images are asked for by their place in the queue. The
address holds a token that is new in each run, so that no other site and no other user can read or answer.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import statistics
import sys
import threading
import time
import webbrowser
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from holotype.agree.pictures import render
from holotype.dataset.hashes import file_hash
from holotype.errors import ImageError, ServerError
from holotype.fields import printable
from holotype.preprocess import Limits
from holotype.progress import note
from holotype.review import Action, Decision, Item, append_decisions, append_undo, read_log

__all__ = ["Answer", "Desk", "Progress", "Undo", "create_app", "serve_page"]

_HOST = "127.0.0.1"
_LOOPBACK = frozenset({_HOST, "localhost"})
_DROP, _SKIP = -1, -2
_PACE_OF, _IDLE_SECONDS = 20, 120.0
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
    " img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_ASSETS = {"relabel.css": "text/css", "relabel.js": "text/javascript"}


class Answer(BaseModel):
    """What the page sends: the item's place in the queue, the class's in the classes, seconds of looking."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    index: int
    action: Action
    label: int | None = None
    seconds: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)] = 0.0


class Undo(BaseModel):
    """The item whose answer, the last one given, is taken back."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    index: int


class Progress(BaseModel):
    """What happened since the page's `version`: pairs of item and answer, None where it was taken back.

    An answer is the place of a class, or -1: dropped, -2: skipped. `last` is the item answered last; `pace`
    the seconds that one takes.
    """

    version: int
    changes: list[tuple[int, int | None]]
    last: int | None
    pace: float | None


@dataclass(eq=False)
class Desk:
    """The queue and its answers in memory; the log in `folder` is written before an answer counts.

    The server stops when `finished`, or `linger` seconds after it was last `seen` with all answered.
    """

    folder: Path
    root: Path
    items: tuple[Item, ...]
    classes: tuple[str, ...]
    command: str
    limits: Limits = field(default_factory=Limits)
    token: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    linger: float = 60.0
    finished: bool = False
    seen: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._places = {item.path: place for place, item in enumerate(self.items)}
        self._labels = {label: place for place, label in enumerate(self.classes)}
        log = read_log(self.folder, root=self.root)
        known = (decision for decision in log.standing if decision.path in self._places)
        self._standing: list[Decision] = list(known)
        self._events = [(self._places[one.path], self._code(one)) for one in self._standing]
        self._answers: dict[int, int | None] = dict(self._events)

    @property
    def complete(self) -> bool:
        """Every item has an answer."""
        with self._lock:
            return sum(code is not None for code in self._answers.values()) == len(self.items)

    def progress(self, since: int) -> Progress:
        with self._lock:
            return self._since(since)

    def decide(self, answer: Answer, *, since: int) -> Progress:
        """Keep an answer, on the disk, before it is confirmed."""
        item = self._item(answer.index)
        label = None
        if answer.action == "label":
            if answer.label is None or not 0 <= answer.label < len(self.classes):
                raise HTTPException(422, f"label: there are {len(self.classes)} classes")
            label = self.classes[answer.label]
        decision = Decision(
            path=item.path,
            action=answer.action,
            label=label,
            before=item.label,
            reason=", ".join(item.reasons),
            seconds=round(answer.seconds, 2),
            at=datetime.now(UTC).isoformat(timespec="seconds"),
            sha256=file_hash(item.path, root=self.root),
        )
        with self._lock:
            append_decisions(self.folder, [decision])
            self._standing.append(decision)
            self._happened(answer.index)
            return self._since(since)

    def undo(self, index: int, *, since: int) -> Progress:
        """Take back the last answer of all, which must be that of item `index`."""
        path = self._item(index).path
        with self._lock:
            if not self._standing or self._standing[-1].path != path:
                raise HTTPException(409, "another answer came in between")
            append_undo(self.folder, path)
            self._standing.pop()
            self._happened(index)
            return self._since(since)

    def image(self, index: int) -> tuple[bytes, str]:
        """The picture of an item and its media type."""
        return render(self.root, self._item(index).path, limits=self.limits)

    def description(self) -> dict[str, Any]:
        """What the page needs once. Of a blind item nothing is told that could lead the eye.

        Candidates are in the order of the classes: their place on the page does not say who is for which.
        """
        return {
            "classes": [printable(label) for label in self.classes],
            "items": [
                {
                    "reasons": ["review"] if item.blind else item.reasons,
                    "candidates": sorted(
                        self._labels[label] for label in item.candidates if label in self._labels
                    ),
                }
                for item in self.items
            ],
            "command": printable(self.command),
        }

    def _item(self, index: int) -> Item:
        if not 0 <= index < len(self.items):
            raise HTTPException(404, f"there are {len(self.items)} images")
        return self.items[index]

    def _happened(self, index: int) -> None:
        path = self.items[index].path
        last = next((one for one in reversed(self._standing) if one.path == path), None)
        code = None if last is None else self._code(last)
        self._events.append((index, code))
        self._answers[index] = code

    def _since(self, version: int) -> Progress:
        recent = [min(one.seconds, _IDLE_SECONDS) for one in self._standing[-_PACE_OF:] if one.seconds > 0]
        return Progress(
            version=len(self._events),
            changes=self._events[max(version, 0) :],
            last=self._places[self._standing[-1].path] if self._standing else None,
            pace=statistics.fmean(recent) if recent else None,
        )

    def _code(self, decision: Decision) -> int | None:
        """The answer as the page has it; None where the class is none any more: to be asked again."""
        if decision.label is None:
            return _DROP if decision.action == "drop" else _SKIP
        return self._labels.get(decision.label)


class _Guard:
    """Refuse requests under a foreign name (DNS rebinding) or from a foreign page; add security headers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        host = headers.get("host", "")

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                for name, value in _HEADERS.items():
                    MutableHeaders(scope=message).setdefault(name, value)
            await send(message)

        app = self._app
        if host.rpartition(":")[0] not in _LOOPBACK and host not in _LOOPBACK:
            app = PlainTextResponse("this page is for 127.0.0.1 only", 403)
        elif headers.get("origin", f"http://{host}") != f"http://{host}":
            app = PlainTextResponse("this page answers no other site", 403)
        await app(scope, receive, send_guarded)


def create_app(desk: Desk) -> FastAPI:
    """The ASGI application of one run; every address begins with the run's token."""

    def admitted(token: str) -> None:
        if not secrets.compare_digest(token.encode(), desk.token.encode()):
            raise HTTPException(403, "an old address: open the one that the terminal shows")
        desk.seen = time.monotonic()

    app = FastAPI(title="holotype relabel", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_Guard)
    app.add_exception_handler(OSError, _say_not_saved)
    router = APIRouter(prefix="/{token}", dependencies=[Depends(admitted)])
    _add_page(router)
    _add_queue(router, desk)
    app.include_router(router)
    return app


def _add_page(router: APIRouter) -> None:
    @router.get("/")
    def page() -> Response:
        return Response(_asset("relabel.html"), media_type="text/html")

    @router.get("/asset/{name}")
    def asset(name: str) -> Response:
        if name not in _ASSETS:
            raise HTTPException(404)
        return Response(_asset(name), media_type=_ASSETS[name])


def _add_queue(router: APIRouter, desk: Desk) -> None:
    @router.get("/queue")
    def queue() -> dict[str, Any]:
        return {**desk.description(), "progress": desk.progress(0)}

    @router.get("/progress")
    def progress(since: int) -> Progress:
        return desk.progress(since)

    @router.get("/image/{index}")
    def image(index: int) -> Response:
        try:
            content, kind = desk.image(index)
        except ImageError as error:
            return PlainTextResponse(error.what, 422)
        except OSError as error:
            return PlainTextResponse(error.strerror or "the file cannot be opened", 404)
        return Response(content, media_type=kind, headers={"Cache-Control": "private, max-age=3600"})

    @router.post("/decide")
    def decide(answer: Answer, since: int) -> Progress:
        return desk.decide(answer, since=since)

    @router.post("/undo")
    def undo(answer: Undo, since: int) -> Progress:
        return desk.undo(answer.index, since=since)

    @router.post("/finish", status_code=204)
    def finish() -> None:
        desk.finished = True


def serve_page(desk: Desk, *, port: int, open_browser: bool) -> None:
    """Serve on 127.0.0.1 until all is decided and the page is left alone, it says that it is done, or Ctrl-C.

    Port 0 takes a free one. Raises `ServerError` where the port cannot be used.
    """
    with _listen(port) as listener:
        url = f"http://{_HOST}:{listener.getsockname()[1]}/{desk.token}/"
        many = "image" if len(desk.items) == 1 else "images"
        note(f"{len(desk.items)} {many} to decide about: {url} (Ctrl-C stops; every answer is kept)")
        if open_browser:
            _open(url)
        try:
            asyncio.run(_serve(desk, listener))
        except KeyboardInterrupt:
            note("stopped; the same command goes on where you are")


async def _serve(desk: Desk, listener: socket.socket) -> None:
    import uvicorn

    config = uvicorn.Config(
        create_app(desk),
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,  # logging belongs to the program, which may have closed what uvicorn would write to
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    while not serving.done():
        await asyncio.wait([serving], timeout=0.1)
        left_alone = time.monotonic() - desk.seen > desk.linger
        if desk.finished or (left_alone and desk.complete):
            server.should_exit = True
    await serving


def _listen(port: int) -> socket.socket:
    listener = socket.socket()
    try:
        if os.name == "posix":  # elsewhere the option lets two servers share one port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((_HOST, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise ServerError(
            f"cannot listen on {_HOST} port {port} ({error.strerror})",
            fix="choose another --port; 0 takes a free one",
        ) from error
    return listener


def _open(url: str) -> None:
    """Show the page, unless the only browser would be one in the terminal."""
    windows = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if sys.platform.startswith("linux") and not windows:
        return
    threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()


def _asset(name: str) -> bytes:
    return files("holotype.agree").joinpath(name).read_bytes()


async def _say_not_saved(_: Request, error: Exception) -> Response:
    assert isinstance(error, OSError)
    return PlainTextResponse(f"the answer was not saved ({error.strerror or error})", 507)

"""The ASGI application: every route, behind the doors, observed, with errors in one shape."""

from __future__ import annotations

import copy
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from pydantic import BaseModel, Field
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from holotype.serve.admin import admin_router
from holotype.serve.answers import Problem, ProtocolProblem, Served
from holotype.serve.classify import Asked, classify, predict_router
from holotype.serve.connections import Shed, crowded, is_crowded_out
from holotype.serve.desk import RETRY, Desk, line_is_full
from holotype.serve.doors import Doors, Keys, is_loopback
from holotype.serve.feedback import feedback_router
from holotype.serve.kserve import kserve_router
from holotype.serve.linger import LingeringClose
from holotype.serve.page import page_router
from holotype.serve.problems import add_handlers, documented, in_one_shape, problem
from holotype.serve.telemetry import Telemetry
from holotype.serve.upload import SmallBodies

__all__ = ["create_app"]

_REQUEST_ID = re.compile(r"^[\x21-\x7e]{1,64}$")


def create_app(desk: Desk, *, keys: Keys) -> tuple[ASGIApp, Shed]:
    """The ASGI application, and what refuses requests by their heads alone while the line is full.

    Every error body is a `Problem` (RFC 9457).
    """
    app = FastAPI(
        title="holotype",
        version=desk.telemetry.version,
        description="Image classification. Send the bytes of an image, get its class.",
        docs_url=None,  # it would fetch its scripts from elsewhere: the page has one of its own
        redoc_url=None,
    )
    add_handlers(app)
    _add_health(app, desk)
    for router in (predict_router, kserve_router, feedback_router, admin_router, page_router):
        app.include_router(router(desk))
    app.openapi = _described(app.openapi, desk)  # type: ignore[method-assign] # as FastAPI documents
    app.add_middleware(SmallBodies, seconds=desk.settings.upload_seconds)
    # Around the application, not in it: who is refused passes nothing but these.
    doors = Doors(_Express(app, desk), keys=keys, loopback=is_loopback(desk.settings.host))
    bounded = LingeringClose(_Uncrowded(doors), max_bytes=desk.settings.max_body_bytes)
    return _Observed(bounded, desk.telemetry), _shedding(desk, doors)


class Info(Served):
    """What is served, and within which limits."""

    models: tuple[str, ...]
    experiment: str | None
    workers: int
    workers_ready: int
    threads: int
    waiting: int = Field(description="images admitted and not yet executing")
    executing: int
    limits: dict[str, int | float]


class Status(BaseModel):
    """A word about the server."""

    status: str


def _add_health(app: FastAPI, desk: Desk) -> None:
    @app.get("/livez", tags=["health"])
    async def livez() -> Status:
        """The server answers."""
        return Status(status="alive")

    @app.get("/readyz", tags=["health"], responses=documented(503))
    async def readyz() -> Status:
        """Images are being classified; 503 while loading, restarting or shutting down."""
        desk.model()
        return Status(status="ready")

    @app.get("/info", tags=["health"], responses=documented(401, 503))
    async def info() -> Info:
        """What is served, and within which limits."""
        fleet, settings = desk.fleet, desk.settings
        served = None if fleet is None else fleet.default.live.served
        if fleet is None or served is None:
            raise HTTPException(503, "the model is being loaded", RETRY)
        limits = settings.model_dump(
            include={"queue", "deadline_seconds", "upload_seconds", "max_parts", "max_pixels"}
            | {"max_body_bytes", "max_held_bytes", "max_head_bytes", "max_connections", "download_seconds"}
        )
        return Info(
            **served.model_dump(),
            models=tuple(fleet.models),
            experiment=None if desk.trial is None else desk.trial.experiment,
            workers=settings.workers,
            workers_ready=fleet.default.live.pool.ready,
            waiting=desk.line.waiting,
            executing=desk.line.executing,
            threads=settings.threads_each,
            limits=limits,
        )


def _described(describe: Callable[[], dict[str, Any]], desk: Desk) -> Callable[[], dict[str, Any]]:
    """The OpenAPI document with the shape of errors, and with what only the loaded bundles know."""

    def described() -> dict[str, Any]:
        document = describe()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for shape in (Problem, ProtocolProblem):
            schemas[shape.__name__] = shape.model_json_schema()
        served = None if desk.fleet is None else desk.fleet.default.live.served
        if desk.fleet is None or served is None:
            return document
        schemas["Feedback"]["properties"]["label"]["enum"] = list(served.classes)
        known = {
            "top_k": {"type": "integer", "minimum": 1, "maximum": len(served.classes)},
            "model": {"type": "string", "enum": list(desk.fleet.models)},
            "name": {"type": "string", "enum": list(desk.fleet.models)},
        }
        for path in document["paths"].values():
            for parameter in (one for operation in path.values() for one in operation.get("parameters", ())):
                parameter["schema"] = known.get(parameter["name"], parameter["schema"])
        return document

    return described


@dataclass(frozen=True)
class _Uncrowded:
    """ASGI middleware: 503 for requests beyond the limit of connections."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (crowded(scope["path"]) if is_crowded_out(scope) else self.app)(scope, receive, send)


@dataclass(frozen=True)
class _Express:
    """ASGI middleware: images without a query go to the desk past the framework, as its route would do it.

    Routing them, and checking a query that is not there, costs a quarter of what the front does for an image.
    """

    app: ASGIApp
    desk: Desk

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not _is_plain(scope):
            await self.app(scope, receive, send)
            return
        scope["route"] = _PREDICT
        request = Request(scope, receive)
        response = await in_one_shape(request, classify(request, self.desk, Asked()))
        await response(scope, receive, send)


def _is_plain(scope: Scope) -> bool:
    image = scope["type"] == "http" and scope["path"] == "/predict" and scope["method"] == "POST"
    return image and not scope["query_string"]


def _shedding(desk: Desk, doors: Doors) -> Shed:
    """Images for which the line has no place are refused by the head of their request, as the route would.

    Who waits for a word before sending its body is left to the route, which may let the connection go.
    """
    full = problem(429, line_is_full().detail, headers=RETRY)

    def shed(scope: Scope) -> Response | None:
        if not (desk.full and _is_plain(scope)) or doors.refusal(scope) is not None:
            return None
        headers = Headers(scope=scope)
        if "expect" in headers:
            return None
        began, identity = time.perf_counter(), _identity(headers)
        refusal = copy.copy(full)
        refusal.raw_headers = [*full.raw_headers, (b"x-request-id", identity.encode())]
        line = {"id": identity, "method": scope["method"]}
        desk.telemetry.request(_PREDICT.path, full.status_code, time.perf_counter() - began, line)
        return refusal

    return shed


@dataclass(frozen=True)
class _Route:
    path: str


_PREDICT = _Route("/predict")


@dataclass(frozen=True)
class _Observed:
    """ASGI middleware: an id for each request, its time, its log line."""

    app: ASGIApp
    telemetry: Telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        identity = _identity(Headers(scope=scope))
        status, arm = 500, None

        async def watched(message: Message) -> None:
            nonlocal status, arm
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(raw=message["headers"])
                headers["X-Request-ID"] = identity
                arm = headers.get("holotype-arm")
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            # Never the path itself where it is not one of ours: labels must stay few.
            route = str(getattr(scope.get("route"), "path", "other"))
            line = {"id": identity, "method": scope["method"], **({"arm": arm} if arm else {})}
            self.telemetry.request(route, status, time.perf_counter() - began, line)


def _identity(headers: Headers) -> str:
    """The id of a request: the client's where it gave a short one, else a new one."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.match(given) else uuid.uuid4().hex

"""The routes: what a client may ask, and in which words it is answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from holotype.serve.admission import Budget, Job, Line
from holotype.serve.answers import Answer, Failed, Info, Predictions, Reply, Served, failed
from holotype.serve.linger import LingeringClose
from holotype.serve.pool import Pool
from holotype.serve.settings import ServeSettings
from holotype.serve.upload import Upload, read_upload

__all__ = ["Desk", "create_app"]

_RETRY = {"Retry-After": "1"}
_GONE = 499  # nobody reads it

_BODY = {
    "required": True,
    "content": {
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        "image/*": {"schema": {"type": "string", "format": "binary"}},
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {
                    "files": {"type": "array", "items": {"type": "string", "format": "binary"}, "minItems": 1}
                },
                "required": ["files"],
            }
        },
    },
}


@dataclass(eq=False)
class Desk:
    """What the routes share: the line, the pool behind it, and whether the door is still open."""

    pool: Pool
    line: Line
    settings: ServeSettings
    budget: Budget
    draining: bool = False
    active: int = 0
    """Requests that were let in and have no response yet."""

    def ready(self) -> Served:
        """What is served; raises 503 while there is nothing to serve with."""
        served = self.pool.served
        if self.draining:
            raise HTTPException(503, "the server is shutting down", {**_RETRY, "Connection": "close"})
        if served is None:
            raise HTTPException(503, "the model is being loaded", _RETRY)
        if not self.line.workers:
            raise HTTPException(503, "the inference processes are being restarted", _RETRY)
        return served


def create_app(desk: Desk, *, version: str) -> FastAPI:
    """The ASGI application. Every error body is `{"error": {"status", "message"}}`."""
    app = FastAPI(
        title="holotype",
        version=version,
        description="Image classification. Send the bytes of an image, get its class.",
        redoc_url=None,
    )
    app.add_middleware(LingeringClose, max_bytes=desk.settings.max_body_bytes)
    app.add_exception_handler(StarletteHTTPException, _say_http_error)
    app.add_exception_handler(RequestValidationError, _say_invalid)
    app.add_exception_handler(Exception, _say_internal)
    _add_health(app, desk)
    _add_predict(app, desk)
    app.openapi = _with_class_count(app.openapi, desk)  # type: ignore[method-assign] # as FastAPI documents
    return app


def _add_health(app: FastAPI, desk: Desk) -> None:
    @app.get("/livez", tags=["health"])
    async def livez() -> dict[str, str]:
        """The server answers."""
        return {"status": "alive"}

    @app.get("/readyz", tags=["health"], responses=_documented(503))
    async def readyz() -> dict[str, str]:
        """Images are being classified; 503 while loading, restarting or shutting down."""
        desk.ready()
        return {"status": "ready"}

    @app.get("/info", tags=["health"], responses=_documented(503))
    async def info() -> Info:
        """What is served, and within which limits."""
        served, settings = desk.pool.served, desk.settings
        if served is None:
            raise HTTPException(503, "the model is being loaded", _RETRY)
        limits = settings.model_dump(
            include={"queue", "deadline_seconds", "upload_seconds", "max_parts", "max_pixels"}
            | {"max_body_bytes", "max_held_bytes"}
        )
        return Info(
            **served.model_dump(),
            workers=settings.workers,
            workers_ready=desk.line.workers,
            waiting=desk.line.waiting,
            executing=desk.line.executing,
            threads=settings.threads_each,
            limits=limits,
        )


def _add_predict(app: FastAPI, desk: Desk) -> None:
    @app.post(
        "/predict",
        tags=["predict"],
        response_model=Predictions,
        responses=_documented(400, 408, 413, 415, 422, 429, 500, 503, 504),
        openapi_extra={"requestBody": _BODY},
    )
    async def predict(
        request: Request,
        top: Annotated[
            int | None,
            Query(ge=1, description="classes to list, at most all; by default five, or all if fewer"),
        ] = None,
    ) -> Predictions | Response:
        """Classify one image (the raw bytes as the body) or several (files of a multipart form).

        One image: an error is the HTTP status. Several: the status is 200, and each result is an answer or
        an error, in the order of the files.
        """
        began = time.perf_counter()
        served = desk.ready()
        if desk.line.full:
            raise _line_is_full()
        count = _checked_top(top, classes=len(served.classes))
        desk.active += 1
        try:
            async with read_upload(request, settings=desk.settings, budget=desk.budget) as upload:
                replies = await _classify(upload, desk=desk, top=count, receive=request.receive)
        except ClientDisconnect:
            return Response(status_code=_GONE)
        finally:
            desk.active -= 1
        elapsed = 1000 * (time.perf_counter() - began)
        return Predictions(results=replies, bundle=served.bundle, milliseconds=round(elapsed, 3))


def _with_class_count(describe: Callable[[], dict[str, Any]], desk: Desk) -> Callable[[], dict[str, Any]]:
    """Add to the OpenAPI document what only the loaded bundle knows: the largest `top`."""

    def described() -> dict[str, Any]:
        document = describe()
        if served := desk.pool.served:
            (top,) = document["paths"]["/predict"]["post"]["parameters"]
            top["schema"] = {"type": "integer", "minimum": 1, "maximum": len(served.classes)}
        return document

    return described


def _checked_top(top: int | None, *, classes: int) -> int:
    if top is not None and top > classes:
        raise HTTPException(422, f"query.top: there are only {classes} classes")
    return min(5, classes) if top is None else top


async def _classify(upload: Upload, *, desk: Desk, top: int, receive: Receive) -> list[Reply]:
    """A reply for each image; where there is only one, its error is raised as the HTTP status."""
    limit = desk.settings.queue
    if len(upload.images) > limit:
        raise HTTPException(413, f"{len(upload.images)} images; no more than {limit} can wait here")
    deadline = time.monotonic() + desk.settings.deadline_seconds
    jobs = [Job(image=image, top=top, deadline=deadline) for image in upload.images]
    if not desk.line.admit(jobs):
        raise _line_is_full()
    replies = await _await_replies(jobs, line=desk.line, receive=receive, deadline=deadline)
    errors = [reply.error for reply in replies if isinstance(reply, Failed)]
    # A deadline is the request's, not an image's; and a request of one image fails with its image.
    for error in errors:
        if error.status == 504 or not upload.several:
            raise HTTPException(error.status, error.message, _RETRY if error.status == 503 else None)
    return replies


async def _await_replies(
    jobs: Sequence[Job], *, line: Line, receive: Receive, deadline: float
) -> list[Answer | Failed]:
    """Wait for every reply; where time runs out or the client goes, what waits is withdrawn."""
    replies = asyncio.gather(*(asyncio.wrap_future(job.reply) for job in jobs))
    gone = asyncio.ensure_future(_until_disconnected(receive))
    either: set[asyncio.Future[Any]] = {replies, gone}
    try:
        await asyncio.wait(either, timeout=deadline - time.monotonic(), return_when=asyncio.FIRST_COMPLETED)
        if replies.done():
            return replies.result()
        if gone.done():
            raise ClientDisconnect
        raise HTTPException(504, "no answer within the deadline")
    finally:
        line.withdraw(jobs)
        replies.cancel()
        gone.cancel()


async def _until_disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _line_is_full() -> HTTPException:
    return HTTPException(429, "too many images are waiting", _RETRY)


def _documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Failed, "description": HTTPStatus(status).phrase} for status in statuses}


async def _say_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    return _say(error.status_code, str(error.detail), headers=error.headers)


async def _say_invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return _say(422, f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}")


async def _say_internal(_: Request, __: Exception) -> Response:
    return _say(500, "internal error")


def _say(status: int, message: str, *, headers: Any = None) -> Response:
    return JSONResponse(failed(status, message).model_dump(), status_code=status, headers=headers)

"""Errors in one shape, as RFC 9457 has it: application/problem+json."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from holotype.serve.answers import PROBLEM, Problem, ProtocolProblem

__all__ = ["add_handlers", "documented", "in_one_shape", "problem"]

_log = logging.getLogger("uvicorn.error")  # where uvicorn writes what an application raises

_PROTOCOL = "/v2"  # KServe's Open Inference Protocol
_GONE = 499  # the client has left: nobody reads it

_DETAILS = {
    400: "the body is empty",
    401: "the key is missing or wrong",
    403: "administration is off: start the server with HOLOTYPE_ADMIN_KEY set",
    404: "there is no model of this name",
    408: "the request took longer than 15 s to arrive",
    409: "refused: has other classes than the live bundle: violet",
    413: "a body of more than 10485760 bytes",
    415: "not an image in a format that is read here",
    422: "the image is truncated",
    429: "too many images are waiting",
    500: "internal error",
    501: "no heat maps here: this architecture's embedding is not a mean of features with a place",
    503: "the model is being loaded",
    504: "no answer within the deadline",
}
"""For the OpenAPI document: what an error may say."""


def problem(
    status: int, detail: str, *, path: str = "", headers: Mapping[str, str] | None = None
) -> Response:
    """An error response to a request of `path`, where that is known."""
    body = _body(status, detail, protocol=path.startswith(f"{_PROTOCOL}/") or path == _PROTOCOL)
    return Response(
        body.model_dump_json(), status_code=status, headers=dict(headers or {}), media_type=PROBLEM
    )


def _body(status: int, detail: str, *, protocol: bool) -> Problem:
    """RFC 9457 (3.2) lets a problem have further members, so that one shape serves both."""
    title = HTTPStatus(status).phrase
    if protocol:
        return ProtocolProblem(title=title, status=status, detail=detail, error=detail)
    return Problem(title=title, status=status, detail=detail)


def documented(*statuses: int, protocol: bool = False) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI document: which errors a route may give, `protocol` being that of `/v2`."""
    schema = (ProtocolProblem if protocol else Problem).__name__
    return {
        status: {
            "description": HTTPStatus(status).phrase,
            "content": {
                PROBLEM: {
                    "schema": {"$ref": f"#/components/schemas/{schema}"},
                    "example": _body(status, _DETAILS[status], protocol=protocol).model_dump(),
                }
            },
        }
        for status in statuses
    }


def add_handlers(app: FastAPI) -> None:
    """Every error, whoever raises it, has the one shape and tells nothing of this machine."""
    app.add_exception_handler(HTTPException, _say_http_error)
    app.add_exception_handler(RequestValidationError, _say_invalid)
    app.add_exception_handler(ClientDisconnect, _say_nothing)
    app.add_exception_handler(Exception, _say_internal)


async def in_one_shape(request: Request, work: Awaitable[Response]) -> Response:
    """The response of `work`, or of its error, as the application's handlers have it."""
    try:
        return await work
    except HTTPException as error:
        return await _say_http_error(request, error)
    except ClientDisconnect as error:
        return await _say_nothing(request, error)
    except Exception as error:
        _log.exception("an error of ours while answering %s", request.scope["path"])
        return await _say_internal(request, error)


async def _say_http_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise TypeError("registered for HTTPException")
    headers = error.headers
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        # The router names the methods of one route only, where several share a path.
        headers = {"Allow": ", ".join(_methods(request))}
    path = request.scope["path"]
    return problem(error.status_code, str(error.detail), path=path, headers=headers)


def _methods(request: Request) -> list[str]:
    """What may be asked of the path of a request, by the OpenAPI document."""
    here = request.scope["path"].strip("/").split("/")
    found: set[str] = set()
    for path, operations in request.app.openapi()["paths"].items():
        parts = path.strip("/").split("/")
        same = all(part == own or part.startswith("{") for part, own in zip(parts, here, strict=False))
        if same and len(parts) == len(here):
            found.update(method.upper() for method in operations)
    return sorted(found) or ["GET"]


async def _say_invalid(request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestValidationError):
        raise TypeError("registered for RequestValidationError")
    first = error.errors()[0]
    detail = f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    return problem(422, detail, path=request.scope["path"])


async def _say_nothing(_: Request, __: Exception) -> Response:
    return Response(status_code=_GONE)


async def _say_internal(request: Request, _: Exception) -> Response:
    return problem(500, "internal error", path=request.scope["path"])

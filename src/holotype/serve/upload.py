"""Reading the images of a request within every limit, without decoding one."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import NamedTuple

from fastapi import HTTPException, Request
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from holotype.serve.admission import Budget
from holotype.serve.settings import ServeSettings

__all__ = ["SmallBodies", "Upload", "read_body", "read_upload"]

_STEP_BYTES = 64 * 1024
_SMALL_BYTES = 64 * 1024  # of a body without images
_ANY_HEADER = 32 + zlib.MAX_WBITS  # zlib's code for "gzip or zlib, look at the header"


class Upload(NamedTuple):
    """The images of one request. `several` is true for a multipart request with more than one."""

    images: list[bytes | bytearray]
    several: bool


@dataclass
class _Meter:
    """Counts the bytes of one request against its own limit and against the budget of all."""

    limit: int
    budget: Budget
    held: int = 0

    def count(self, size: int) -> None:
        if self.held + size > self.limit:
            raise HTTPException(413, f"the body is over the limit of {self.limit:,} bytes")
        if not self.budget.take(size):
            raise HTTPException(429, "too many bytes of requests are waiting", {"Retry-After": "1"})
        self.held += size


@dataclass(frozen=True)
class SmallBodies:
    """ASGI middleware: what is no image is 64 KiB at most and arrives in `seconds`; else 413 and 408.

    The routes that take images read their bodies themselves, within limits of their own.
    """

    app: ASGIApp
    seconds: float

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/predict" or scope["path"].endswith("/infer"):
            await self.app(scope, receive, send)
            return
        deadline = asyncio.get_running_loop().time() + self.seconds
        held, complete = 0, False

        async def bounded() -> Message:
            nonlocal held, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError as error:
                raise _too_slow(self.seconds) from error
            held += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if held > _SMALL_BYTES:
                raise HTTPException(413, f"the body is over the limit of {_SMALL_BYTES:,} bytes")
            return message

        await self.app(scope, bounded, send)


@asynccontextmanager
async def read_upload(
    request: Request, *, settings: ServeSettings, budget: Budget
) -> AsyncGenerator[Upload, None]:
    """Read the body (raw bytes, or multipart with files); its bytes count in `budget` until the block ends.

    Raises `HTTPException`: 400 nothing in it or malformed, 408 too slow, 413 over a limit, 415 an encoding
    that is not undone here, 429 the budget is spent; and `ClientDisconnect` where the client has gone.
    """
    async with _metered(settings, budget) as meter, _in_time(settings) as timer:
        content = _content(request, meter=meter)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "multipart/form-data":
            upload = await _read_form(request, content, settings=settings)
        elif image := await _join(content):
            upload = Upload([image], several=False)
        else:
            raise HTTPException(400, "empty body, no image bytes")
        timer.reschedule(None)  # all is here
        yield upload


@asynccontextmanager
async def read_body(
    request: Request, *, settings: ServeSettings, budget: Budget
) -> AsyncGenerator[bytearray, None]:
    """The body as it is, within the same limits and with the same errors."""
    async with _metered(settings, budget) as meter, _in_time(settings) as timer:
        body = await _join(_content(request, meter=meter))
        timer.reschedule(None)
        yield body


@asynccontextmanager
async def _metered(settings: ServeSettings, budget: Budget) -> AsyncGenerator[_Meter, None]:
    meter = _Meter(limit=settings.max_body_bytes, budget=budget)
    try:
        yield meter
    finally:
        budget.give_back(meter.held)


@asynccontextmanager
async def _in_time(settings: ServeSettings) -> AsyncGenerator[asyncio.Timeout, None]:
    """408 for a client that is too slow, until the timer is taken off."""
    try:
        async with asyncio.timeout(settings.upload_seconds) as timer:
            yield timer
    except TimeoutError as error:
        raise _too_slow(settings.upload_seconds) from error


def _too_slow(seconds: float) -> HTTPException:
    return HTTPException(408, f"the request was not sent within {seconds:g} seconds")


async def _join(content: AsyncGenerator[bytes, None]) -> bytearray:
    body = bytearray()
    async for chunk in content:
        body += chunk
    return body


def _content(request: Request, *, meter: _Meter) -> AsyncGenerator[bytes, None]:
    """The body without its transfer encoding; every byte of it is counted."""
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > meter.limit:
        raise HTTPException(413, f"the body is over the limit of {meter.limit:,} bytes")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding in ("", "identity"):
        return _counted(request.stream(), meter)
    if encoding in ("gzip", "x-gzip", "deflate"):
        return _decompressed(request.stream(), meter)
    raise HTTPException(
        415,
        "this content encoding is not read; send gzip, deflate or none",
        {"Accept-Encoding": "gzip, deflate"},
    )


async def _counted(stream: AsyncGenerator[bytes, None], meter: _Meter) -> AsyncGenerator[bytes, None]:
    async for chunk in stream:
        meter.count(len(chunk))
        yield chunk


async def _decompressed(stream: AsyncGenerator[bytes, None], meter: _Meter) -> AsyncGenerator[bytes, None]:
    """Both sides are counted: a bomb stops at the limit, and padding that decompresses to nothing too."""
    inflater = zlib.decompressobj(wbits=_ANY_HEADER)
    sent = 0
    async for chunk in stream:
        sent += len(chunk)
        if sent > meter.limit:
            raise HTTPException(413, f"the body is over the limit of {meter.limit:,} bytes")
        waiting, content = chunk, bytes(_STEP_BYTES)
        # A full step may leave output inside zlib after the last input byte went in.
        while waiting or len(content) == _STEP_BYTES:
            try:
                content = inflater.decompress(waiting, _STEP_BYTES)
            except zlib.error as error:
                raise HTTPException(400, "the compressed body is damaged") from error
            meter.count(len(content))
            yield content
            waiting = inflater.unconsumed_tail
        if inflater.unused_data:
            raise HTTPException(400, "bytes after the end of the compressed body")
    if sent and not inflater.eof:
        raise HTTPException(400, "the compressed body is truncated")


async def _read_form(
    request: Request, content: AsyncGenerator[bytes, None], *, settings: ServeSettings
) -> Upload:
    parser = MultiPartParser(
        request.headers, content, max_files=settings.max_parts, max_fields=settings.max_parts
    )
    parser.spool_max_size = settings.max_body_bytes  # counted and bounded already: nothing goes to the disk
    try:
        form = await parser.parse()
    except MultiPartException as error:
        # The parser has one exception for all; too many parts is a limit, the rest is malformed.
        raise HTTPException(413 if "Too many" in error.message else 400, error.message) from error
    try:
        images = await _files(form, limit=settings.max_parts)
    finally:
        await form.close()
    return Upload(images, several=len(images) > 1)


async def _files(form: FormData, *, limit: int) -> list[bytes | bytearray]:
    parts = form.multi_items()
    if len(parts) > limit:
        raise HTTPException(413, f"more than {limit} parts")
    images: list[bytes | bytearray] = []
    for name, value in parts:
        if not isinstance(value, UploadFile):
            raise HTTPException(400, f"form field {name[:50]!r} is not a file; give it a file name")
        images.append(await value.read())
    if not images:
        raise HTTPException(400, "no file in the form")
    return images

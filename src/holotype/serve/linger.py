"""Answering before the body has arrived, in a way that the client lives to read."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["LingeringClose"]

_SECONDS = 1.0


@dataclass(frozen=True)
class LingeringClose:
    """ASGI middleware for responses that are sent while the client is still sending.

    Such a connection cannot be used again, and closing it with bytes unread makes TCP destroy the response
    on its way. So the response says `Connection: close`, is sent whole, and what still comes is thrown away,
    for at most a second and `max_bytes`, before the connection is closed. Where the rest of the body has
    arrived by now, it is thrown away first, and the connection lives on.
    """

    app: ASGIApp
    max_bytes: int

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        if scope["type"] != "http" or not _has_body(headers):
            await self.app(scope, receive, send)
            return
        complete = False

        async def watched_receive() -> Message:
            nonlocal complete
            message = await receive()
            complete = not message.get("more_body", False)
            return message

        async def lingering_send(message: Message) -> None:
            nonlocal complete
            if not complete and message["type"] == "http.response.start":
                complete = "expect" not in headers and await _is_all_here(receive)
                if not complete:
                    MutableHeaders(raw=message["headers"])["Connection"] = "close"
            if complete or message["type"] == "http.response.start" or message.get("more_body", False):
                await send(message)
            else:
                await send({**message, "more_body": True})
                await self._discard(receive)
                await send({"type": "http.response.body", "body": b"", "more_body": False})

        await self.app(scope, watched_receive, lingering_send)

    async def _discard(self, receive: Receive) -> None:
        left = self.max_bytes
        try:
            async with asyncio.timeout(_SECONDS):
                while left > 0:
                    message = await receive()
                    left -= len(message.get("body", b""))
                    if not message.get("more_body", False):
                        return
        except TimeoutError:
            return


def _has_body(headers: Headers) -> bool:
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers


async def _is_all_here(receive: Receive) -> bool:
    """Take what has arrived of the body, without waiting; True where that is the rest of it."""
    for _ in range(4):  # or a fast client could keep it here for ever
        receiving = asyncio.ensure_future(receive())
        await asyncio.sleep(0)
        if not receiving.done():
            receiving.cancel()
            return False
        if not receiving.result().get("more_body", False):
            return True
    return False

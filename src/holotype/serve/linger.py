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
    for at most a second and `max_bytes`, before the connection is closed.
    """

    app: ASGIApp
    max_bytes: int

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        complete = headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers

        async def watched_receive() -> Message:
            nonlocal complete
            message = await receive()
            complete = complete or not message.get("more_body", False)
            return message

        async def lingering_send(message: Message) -> None:
            if complete:
                await send(message)
            elif message["type"] == "http.response.start":
                MutableHeaders(raw=message["headers"])["Connection"] = "close"
                await send(message)
            elif message.get("more_body", False):
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

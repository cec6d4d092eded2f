"""Who may ask what: an optional key for everybody, and another one for those who run the server."""

from __future__ import annotations

import hmac
import ipaddress
import os
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from holotype.serve.problems import problem

__all__ = ["HEALTH", "Doors", "Keys", "is_loopback"]

_OPEN = ("/", "/docs")  # pages that ask for the key themselves
HEALTH = ("/livez", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready")
"""What is answered however many clients there are, and on loopback without a key."""


@dataclass(frozen=True)
class Keys:
    """The secrets, None where there is none."""

    client: str | None = None
    admin: str | None = None

    @staticmethod
    def from_environment() -> Keys:
        """HOLOTYPE_API_KEY and HOLOTYPE_ADMIN_KEY: a command line is for everybody to read."""
        return Keys(os.environ.get("HOLOTYPE_API_KEY") or None, os.environ.get("HOLOTYPE_ADMIN_KEY") or None)


@dataclass(frozen=True)
class Doors:
    """ASGI middleware: 401 without the right key in `Authorization: Bearer` or `X-API-Key`.

    Health and metrics need none when the server listens on loopback only. Without an admin key nobody is let
    into /admin.
    """

    app: ASGIApp
    keys: Keys
    loopback: bool

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refusal := self.refusal(scope)):
            await refusal(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def refusal(self, scope: Scope) -> ASGIApp | None:
        """What a request without the right key is told; None for one that may pass."""
        path, headers = scope["path"], Headers(scope=scope)
        if path.startswith("/admin"):
            if self.keys.admin is None:
                return problem(403, "administration is off: start the server with HOLOTYPE_ADMIN_KEY set")
            return None if _opens(self.keys.admin, headers) else _locked(path)
        if self.keys.client is None or path in _OPEN or path.startswith("/page/"):
            return None
        if path in HEALTH and self.loopback:
            return None
        return None if _opens(self.keys.client, headers) else _locked(path)


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _opens(key: str, headers: Headers) -> bool:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
    # A header is decoded as Latin-1, whatever bytes the client meant.
    return hmac.compare_digest(given.encode("latin-1"), key.encode())


def _locked(path: str) -> ASGIApp:
    headers = {"WWW-Authenticate": "Bearer"}
    return problem(401, "the key is missing or wrong", path=path, headers=headers)

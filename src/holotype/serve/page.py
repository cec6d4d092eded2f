"""The page at /, what its charts show, and the text that Prometheus reads."""

from __future__ import annotations

import importlib.resources
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, HTTPException, Response

from holotype.serve.desk import RETRY, Desk
from holotype.serve.problems import documented

__all__ = ["page_router"]

_KINDS = {
    "app.js": "text/javascript; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "index.html": "text/html; charset=utf-8",
    "docs.html": "text/html; charset=utf-8",
    "docs.js": "text/javascript; charset=utf-8",
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
    " img-src 'self' blob: data:; media-src 'self' blob:; frame-ancestors 'none'; base-uri 'none'",
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def page_router(desk: Desk) -> APIRouter:
    """Routes for people who look at a server."""
    router = APIRouter(tags=["health"])
    content = {
        name: importlib.resources.files("holotype.serve").joinpath(f"static/{name}") for name in _KINDS
    }

    def static(name: str) -> Response:
        return Response(content[name].read_bytes(), media_type=_KINDS[name], headers=_HEADERS)

    @router.get("/", include_in_schema=False)
    async def index() -> Response:
        return static("index.html")

    @router.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return static("docs.html")

    @router.get("/page/{name}", include_in_schema=False)
    async def asset(name: str) -> Response:
        if name not in _KINDS:
            raise HTTPException(404, "Not Found")
        return static(name)

    @router.get("/stats", responses=documented(401, 503))
    async def stats() -> dict[str, Any]:
        """The last two minutes, and what has moved since validation."""
        if desk.fleet is None:
            raise HTTPException(503, "the model is being loaded", RETRY)
        return {
            "seconds": desk.telemetry.recent(),
            "waiting": desk.line.waiting,
            "executing": desk.line.executing,
            "drift": {name: _drift(desk, name) for name in desk.fleet.models},
            "records": _records(desk),
            "shadow_skipped": None if desk.trial is None else desk.trial.skipped,
        }

    @router.get("/metrics", responses={200: {"content": {"text/plain": {}}}, **documented(401)})
    async def metrics() -> Response:
        """For Prometheus."""
        _gauge(desk)
        return Response(desk.telemetry.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


def _drift(desk: Desk, name: str) -> dict[str, Any] | None:
    if desk.fleet is None:
        return None
    drift = desk.drift(desk.fleet.models[name].live)
    if drift is None:
        return None
    return {"images": drift.images, "movements": [asdict(one) for one in drift.movements()]}


def _records(desk: Desk) -> dict[str, Any] | None:
    records = desk.records
    if records is None:
        return None
    return {
        "database": records.up,
        "journal": records.journal_up,
        "pending_bytes": records.pending,
        "in_memory": records.held,
        "dropped": records.dropped,
    }


def _gauge(desk: Desk) -> None:
    """Bring up to date what is only looked at when somebody asks."""
    telemetry, gauges = desk.telemetry, desk.telemetry.gauges
    gauges["waiting"].set(desk.line.waiting)
    gauges["executing"].set(desk.line.executing)
    if desk.records is not None:
        gauges["records_pending_bytes"].set(desk.records.pending)
        gauges["records_in_memory"].set(desk.records.held)
        gauges["records_database_up"].set(bool(desk.records.up))
        gauges["records_journal_up"].set(desk.records.journal_up)
        telemetry.dropped(desk.records.dropped)
    if desk.trial is not None:
        gauges["shadow_skipped"].set(desk.trial.skipped)
    if desk.fleet is None:
        return
    gauges["processes_ready"].set(sum(model.live.pool.ready for model in desk.fleet.models.values()))
    for name, model in desk.fleet.models.items():
        drift = desk.drift(model.live)
        for one in drift.movements() if drift is not None else ():
            telemetry.drift.labels(name, one.what).set(one.effect)
            telemetry.drifted.labels(name, one.what).set(one.moved)

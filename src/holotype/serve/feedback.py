"""POST /feedback: what an image really was; and how the experiment stands."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, HTTPException
from pydantic import BaseModel, ConfigDict, Field

from holotype.serve.desk import RETRY, Desk
from holotype.serve.problems import documented

__all__ = ["feedback_router"]

_SAFE_SECONDS = 5.0


class Feedback(BaseModel):
    """The right label of an image that was answered."""

    model_config = ConfigDict(extra="forbid")

    id: str = Field(pattern=r"^[0-9a-f]{32}$", description="`id` of the answer", examples=["0" * 32])
    label: str = Field(min_length=1, max_length=500, description="the right class")


def feedback_router(desk: Desk) -> APIRouter:
    """Routes of servers that keep records."""
    router = APIRouter(tags=["feedback"])

    @router.post("/feedback", status_code=202, responses=documented(400, 401, 409, 422, 503))
    async def feedback(told: Feedback) -> dict[str, str]:
        """Tell the right label of an image; on the disk when this is answered. The last one told counts."""
        if desk.records is None:
            raise HTTPException(409, "nothing is kept here: start the server with a database or a challenger")
        if told.label not in desk.classes():
            raise HTTPException(422, "body.label: not a class of any model here")
        row = {"id": told.id, "at": time.time(), "label": told.label}
        safe = desk.records.add("feedback", row)
        try:
            async with asyncio.timeout(_SAFE_SECONDS):
                # Shielded: the row is on its way, whether or not anybody still waits to hear so.
                kept = await asyncio.shield(asyncio.wrap_future(safe))
        except TimeoutError:
            kept = False
        if not kept:
            raise HTTPException(503, "the label could not be kept now", RETRY)
        return {"status": "kept"}

    @router.get("/experiment", responses=documented(401, 409, 503))
    async def experiment() -> dict[str, Any]:
        """Both arms, the difference with its anytime-valid interval, and what may be said."""
        if desk.trial is None:
            raise HTTPException(409, "there is no experiment: start the server with a challenger")
        try:
            status = await desk.trial.look()
        except Exception as error:
            raise HTTPException(503, "the database does not answer", RETRY) from error
        found = asdict(status)
        found["rule"] = status.rule.model_dump(mode="json")
        return {**found, "over": desk.trial.over, "skipped": desk.trial.skipped}

    return router

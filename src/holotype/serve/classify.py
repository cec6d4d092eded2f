"""POST /predict: images in, labels out."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, HTTPException, Query, Request, Response

from holotype.serve.admission import Wish
from holotype.serve.answers import Failed, Moments, Predictions, Served
from holotype.serve.desk import RETRY, Answered, Desk, who_answered
from holotype.serve.problems import documented
from holotype.serve.upload import Upload, read_upload

__all__ = ["Asked", "classify", "moment_headers", "predict_router"]

_EXAMPLE = {
    "results": [
        {
            "label": "shirt",
            "probability": 0.94,
            "sure": True,
            "doubts": [],
            "top": [{"label": "shirt", "probability": 0.94}, {"label": "t-shirt", "probability": 0.04}],
        }
    ],
    "bundle": "0f3c…",
    "milliseconds": 6.1,
}

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


def predict_router(desk: Desk) -> APIRouter:
    """The route that a client of a classifier needs."""
    router = APIRouter(tags=["predict"])

    @router.post(
        "/predict",
        response_model=Predictions,
        responses={
            200: {"content": {"application/json": {"example": _EXAMPLE}}},
            **documented(400, 401, 404, 408, 413, 415, 422, 429, 500, 501, 503, 504),
        },
        openapi_extra={"requestBody": _BODY},
    )
    async def predict(
        request: Request,
        top_k: Annotated[
            int | None,
            Query(ge=1, description="classes to list, at most all; by default five, or all if fewer"),
        ] = None,
        explain: Annotated[bool, Query(description="also where in the image the evidence is")] = False,
        show_input: Annotated[bool, Query(description="also the pixels that the model saw")] = False,
        model: Annotated[str | None, Query(description="which one; by default the first")] = None,
    ) -> Response:
        """Classify one image (the raw bytes as the body) or several (files of a multipart form).

        One image: an error is the HTTP status. Several: the status is 200, and each result is an answer or
        an error, in the order of the files.
        """
        asked = Asked(top_k, explain=explain, show_input=show_input, model=model)
        return await classify(request, desk, asked)

    return router


@dataclass(frozen=True)
class Asked:
    """The query of a request, as the route documents it."""

    top_k: int | None = None
    explain: bool = False
    show_input: bool = False
    model: str | None = None


async def classify(request: Request, desk: Desk, asked: Asked) -> Response:
    """Answer the images of a request; `HTTPException` and `ClientDisconnect` where that cannot be."""
    began = time.perf_counter()
    found, served = desk.model(asked.model)
    top = _checked_top(asked.top_k, classes=len(served.classes))
    wish = Wish(top, explain=asked.explain, show_input=asked.show_input)
    key = request.headers.get(desk.settings.experiment.key)
    with desk.letting_in(found):
        async with read_upload(request, settings=desk.settings, budget=desk.budget) as upload:
            answered = await desk.answer(
                upload.images, model=found, wish=wish, key=key, receive=request.receive
            )
    _raise_error(upload, answered)
    return _response(answered, began=began)


def moment_headers(answered: Answered) -> dict[str, str]:
    """Who answered, and the milliseconds of the request's slowest image."""
    headers = who_answered(answered.version, answered.arm)
    known = [outcome.moments for outcome in answered.outcomes if outcome.moments is not None]
    if known:
        slowest = max(known, key=_total)
        headers["Server-Timing"] = ", ".join(f"{name};dur={value:.2f}" for name, value in slowest)
    return headers


def _total(moments: Moments) -> float:
    return moments.queued + moments.decoding + moments.inferring


def _response(answered: Answered, *, began: float) -> Response:
    served: Served | None = answered.version.served
    body = Predictions(
        results=[outcome.reply for outcome in answered.outcomes],
        bundle=served.bundle if served else "",
        milliseconds=round(1e3 * (time.perf_counter() - began), 3),
    )
    return Response(
        body.model_dump_json(exclude_none=True),
        media_type="application/json",
        headers=moment_headers(answered),
    )


def _raise_error(upload: Upload, answered: Answered) -> None:
    """A deadline is the request's, not an image's; and a request of one image fails with its image."""
    for outcome in answered.outcomes:
        if not isinstance(outcome.reply, Failed):
            continue
        error = outcome.reply.error
        if error.status == 504 or not upload.several:
            again = RETRY if error.status == 503 else {}
            raise HTTPException(error.status, error.detail, {**again, **moment_headers(answered)})


def _checked_top(top: int | None, *, classes: int) -> int:
    if top is not None and top > classes:
        raise HTTPException(422, f"query.top_k: there are only {classes} classes")
    return min(5, classes) if top is None else top

"""KServe's Open Inference Protocol, version 2, over HTTP: images as base64 in a BYTES tensor."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, HTTPException, Path, Request, Response
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError

from holotype.serve.admission import Wish
from holotype.serve.answers import Answer, Failed, Outcome
from holotype.serve.classify import moment_headers
from holotype.serve.desk import RETRY, Answered, Desk
from holotype.serve.problems import documented
from holotype.serve.settings import MOST_PARTS
from holotype.serve.upload import read_body

__all__ = ["kserve_router"]

_MOST_VALUES = 20_000  # of JSON: a body of numbers would grow to twenty times its size as it is parsed


class _Tensor(BaseModel):
    """One input: `data` holds base64 of image files."""

    model_config = ConfigDict(extra="ignore", strict=True)

    name: str
    shape: Annotated[list[int], FailFast(), Field(max_length=8)]
    datatype: Literal["BYTES"]
    data: Annotated[list[str], FailFast(), Field(min_length=1, max_length=MOST_PARTS)]


class _Wanted(BaseModel):
    """An output that is asked for."""

    model_config = ConfigDict(extra="ignore", strict=True)

    name: str


class _Inference(BaseModel):
    """The body of an inference request."""

    model_config = ConfigDict(extra="ignore", strict=True)

    id: str | None = None
    inputs: Annotated[list[_Tensor], FailFast(), Field(min_length=1, max_length=1)]
    outputs: Annotated[list[_Wanted] | None, Field(max_length=8)] = None


_SCHEMA = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": {"type": ["string", "null"]},
        "inputs": {
            "type": "array",
            "minItems": 1,
            "maxItems": 1,
            "items": {
                "type": "object",
                "required": ["name", "shape", "datatype", "data"],
                "properties": {
                    "name": {"type": "string"},
                    "shape": {"type": "array", "items": {"type": "integer"}},
                    "datatype": {"const": "BYTES"},
                    "data": {
                        "type": "array",
                        "minItems": 1,
                        "items": {"type": "string", "contentEncoding": "base64"},
                    },
                },
            },
        },
        "outputs": {
            "type": ["array", "null"],
            "maxItems": 8,
            "description": "which outputs to return; all where none is named",
            "items": {
                "type": "object",
                "required": ["name"],
                "properties": {"name": {"enum": ["label", "sure", "probabilities", "id"]}},
            },
        },
    },
}

_RED_PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR42mP4z8AAAAMBAQD3A0FDAAAAAElFTkSuQmCC"
_ASKED = {
    "id": "7",
    "inputs": [{"name": "images", "shape": [1], "datatype": "BYTES", "data": [_RED_PIXEL]}],
}
_TOLD = {
    "id": "7",
    "model_name": "shirts",
    "model_version": "0f3c…",
    "outputs": [
        {"name": "label", "datatype": "BYTES", "shape": [1], "data": ["shirt"]},
        {"name": "sure", "datatype": "BOOL", "shape": [1], "data": [True]},
        {"name": "probabilities", "datatype": "FP64", "shape": [1, 2], "data": [0.94, 0.06]},
        {"name": "id", "datatype": "BYTES", "shape": [1], "data": ["0" * 32]},
    ],
}

Name = Annotated[str, Path(description="of a model")]


def kserve_router(desk: Desk) -> APIRouter:
    """The routes of the protocol."""
    router = APIRouter(prefix="/v2", tags=["open inference protocol"])

    @router.get("", responses=documented(401, protocol=True))
    async def server() -> dict[str, Any]:
        """Which server this is."""
        return {"name": "holotype", "version": desk.telemetry.version, "extensions": []}

    @router.get("/health/live")
    async def live() -> dict[str, bool]:
        """The server answers."""
        return {"live": True}

    @router.get("/health/ready", responses=documented(401, 503, protocol=True))
    async def ready() -> dict[str, bool]:
        """Images are being classified."""
        desk.model()
        return {"ready": True}

    @router.get("/models/{name}", responses=documented(401, 404, 503, protocol=True))
    async def metadata(name: Name) -> dict[str, Any]:
        """What a model takes and gives. One version of a model answers, so there are none to choose from."""
        _, served = desk.model(name)
        return {
            "name": name,
            "platform": f"holotype_{served.runtime}",
            "inputs": [{"name": "images", "datatype": "BYTES", "shape": [-1]}],
            "outputs": _outputs(desk, classes=len(served.classes)),
            "parameters": {
                "classes": list(served.classes),
                "heat_maps": served.heat_maps,
                "bundle": served.bundle,
            },
        }

    @router.get("/models/{name}/ready", responses=documented(401, 404, 503, protocol=True))
    async def model_ready(name: Name) -> dict[str, Any]:
        """A model answers."""
        desk.model(name)
        return {"name": name, "ready": True}

    @router.post(
        "/models/{name}/infer",
        responses={
            200: {"content": {"application/json": {"example": _TOLD}}},
            **documented(400, 401, 404, 408, 413, 415, 422, 429, 500, 503, 504, protocol=True),
        },
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": _SCHEMA, "example": _ASKED}},
            }
        },
    )
    async def infer(name: Name, request: Request) -> Response:
        """Classify images; an image that cannot be answered fails the request.

        Where answers are kept, the output `id` has what /feedback asks for, image by image. `outputs` may
        name those that are wanted.
        """
        model, served = desk.model(name)
        key = request.headers.get(desk.settings.experiment.key)
        with desk.letting_in(model):
            async with read_body(request, settings=desk.settings, budget=desk.budget) as body:
                asked = _parse(body)
                _check_outputs(asked, known=_outputs(desk, classes=len(served.classes)))
                answered = await desk.answer(
                    _images(asked.inputs[0], limit=desk.settings.max_parts),
                    model=model,
                    wish=Wish(top=len(served.classes)),
                    key=key,
                    receive=request.receive,
                )
        return _response(answered, asked, name=name, classes=served.classes)

    return router


def _outputs(desk: Desk, *, classes: int) -> list[dict[str, Any]]:
    """What a model gives; an id only where answers are kept."""
    identity = [] if desk.records is None else [{"name": "id", "datatype": "BYTES", "shape": [-1]}]
    return [
        {"name": "label", "datatype": "BYTES", "shape": [-1]},
        {"name": "sure", "datatype": "BOOL", "shape": [-1]},
        {"name": "probabilities", "datatype": "FP64", "shape": [-1, classes]},
        *identity,
    ]


def _check_outputs(asked: _Inference, *, known: list[dict[str, Any]]) -> None:
    names = [output["name"] for output in known]
    if any(one.name not in names for one in asked.outputs or ()):
        raise HTTPException(400, f"outputs: there are {', '.join(names)}")


def _parse(body: bytearray) -> _Inference:
    if sum(body.count(mark) for mark in b",[{") > _MOST_VALUES:
        raise HTTPException(413, f"more than {_MOST_VALUES:,} values")
    try:
        return _Inference.model_validate_json(bytes(body))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        if first["type"] == "json_invalid":
            raise HTTPException(400, "the body is no valid JSON") from error
        place = ".".join(str(part) for part in first["loc"])
        raise HTTPException(400, f"{place}: {first['msg']}" if place else first["msg"]) from error


def _images(tensor: _Tensor, *, limit: int) -> list[bytes]:
    count = math.prod(tensor.shape)
    if count != len(tensor.data):
        raise HTTPException(400, f"the shape says {count} images, the data hold {len(tensor.data)}")
    if count > limit:
        raise HTTPException(413, f"more than {limit} images")
    try:
        return [base64.b64decode(text, validate=True) for text in tensor.data]
    except (binascii.Error, ValueError) as error:
        raise HTTPException(400, "an image is not base64") from error


def _response(answered: Answered, asked: _Inference, *, name: str, classes: tuple[str, ...]) -> Response:
    headers = moment_headers(answered)
    answers = [_answer(outcome, headers=headers) for outcome in answered.outcomes]
    rows = []
    for answer in answers:
        by_name = {choice.label: choice.probability for choice in answer.top}
        rows.append([by_name[label] for label in classes])
    count = len(answers)
    outputs = [
        _tensor("label", "BYTES", [count], [answer.label for answer in answers]),
        _tensor("sure", "BOOL", [count], [answer.sure for answer in answers]),
        _tensor("probabilities", "FP64", [count, len(classes)], [value for row in rows for value in row]),
    ]
    identities = [answer.id for answer in answers if answer.id is not None]
    if identities:
        outputs.append(_tensor("id", "BYTES", [count], identities))
    wanted = {one.name for one in asked.outputs or ()}
    if wanted:
        outputs = [output for output in outputs if output["name"] in wanted]
    served = answered.version.served
    body = _Result(
        id=asked.id, model_name=name, model_version=served.bundle if served else "", outputs=outputs
    )
    return Response(
        body.model_dump_json(exclude_none=True),
        media_type="application/json",
        headers=headers,
    )


class _Result(BaseModel):
    """The body of an inference response."""

    id: str | None
    model_name: str
    model_version: str
    outputs: list[dict[str, Any]]


def _tensor(name: str, datatype: str, shape: list[int], data: list[Any]) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape, "data": data}


def _answer(outcome: Outcome, *, headers: Mapping[str, str]) -> Answer:
    if isinstance(outcome.reply, Failed):
        error = outcome.reply.error
        retry = RETRY if error.status == 503 else {}
        raise HTTPException(error.status, error.detail, {**headers, **retry})
    return outcome.reply

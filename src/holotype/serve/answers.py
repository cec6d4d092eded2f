"""What the server says: the JSON of answers and errors, over HTTP and between the processes."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from holotype.policy import Doubt

__all__ = [
    "PROBLEM",
    "Answer",
    "Choice",
    "Failed",
    "HeatMap",
    "Moments",
    "News",
    "Outcome",
    "Predictions",
    "Problem",
    "ProtocolProblem",
    "Reply",
    "Served",
    "failed",
]

_FROZEN = ConfigDict(frozen=True)

PROBLEM = "application/problem+json"


class Choice(BaseModel):
    """A class and its probability."""

    model_config = _FROZEN

    label: str
    probability: float = Field(ge=0, le=1)


class HeatMap(BaseModel):
    """Where in the image the evidence for the label is: rows of values in [0, 1], over what the model saw."""

    model_config = _FROZEN

    method: str = Field(description="cam | grad-cam")
    grid: tuple[tuple[float, ...], ...]


class Answer(BaseModel):
    """The most probable class of one image, whether the policy stands by it, and the `top` ones."""

    model_config = _FROZEN

    id: str | None = Field(None, description="to name in /feedback")
    label: str
    probability: float = Field(ge=0, le=1)
    sure: bool
    doubts: tuple[Doubt, ...] = Field((), description="why it is not sure")
    left_open: tuple[str, ...] | None = Field(
        None, description="classes that conformal prediction leaves open"
    )
    distance: float | None = Field(None, description="from what was learned; about 1 for an image like that")
    top: tuple[Choice, ...]
    heat_map: HeatMap | None = None
    input: str | None = Field(None, description="the pixels that the model saw, a PNG as base64")


class Problem(BaseModel):
    """An error as RFC 9457 has it."""

    model_config = _FROZEN

    type: str = "about:blank"
    title: str
    status: int
    detail: str


class ProtocolProblem(Problem):
    """An error of the Open Inference Protocol, which has a member of its own for what went wrong."""

    error: str = Field(description="the detail once more, where clients of the protocol look for it")


class Failed(BaseModel):
    """The result of an image that has no answer, among others that have."""

    model_config = _FROZEN

    error: Problem


Reply = Answer | Failed
"""What an inference process answers about one image."""


class Predictions(BaseModel):
    """One result for each image, in the order they were sent."""

    model_config = _FROZEN

    results: list[Answer | Failed]
    bundle: str = Field(description="hash of the bundle that answered")
    milliseconds: float = Field(description="from the request's headers to this answer")


class Moments(BaseModel):
    """Milliseconds that an image was waiting, being decoded and being inferred."""

    model_config = _FROZEN

    queued: float
    decoding: float
    inferring: float


class Outcome(BaseModel):
    """A reply and what an inference process knows beside it; `brightness` is its pixels' mean, 0 ... 1.

    `lost` names the end of a process that took this image with it, and others of the same name.
    """

    model_config = _FROZEN

    reply: Answer | Failed
    moments: Moments | None = None
    brightness: float | None = None
    lost: str | None = None


class Done(BaseModel):
    """An outcome and the number of its order; None where the image was withdrawn or late, so never run."""

    model_config = _FROZEN

    order: int
    outcome: Outcome | None


class News(BaseModel):
    """One message of an inference process: orders that it begins to infer, and those that are done.

    `batch` images were inferred together for these; 0 where that was told before.
    `embeddings` are the sum and the sum of squares of those of `count` images, as base64 of float64[2, D].
    """

    model_config = _FROZEN

    begun: tuple[int, ...] = ()
    batch: int = 0
    done: tuple[Done, ...] = ()
    embeddings: str | None = None
    count: int = 0


class Served(BaseModel):
    """What an inference process says once it is ready."""

    model_config = _FROZEN

    bundle: str
    classes: tuple[str, ...]
    preprocess: dict[str, Any]
    runtime: str
    precision: str
    max_batch: int
    heat_maps: str = Field(description="cam | grad-cam | why there are none")
    versions: dict[str, str]


def failed(status: int, detail: str) -> Failed:
    return Failed(error=Problem(title=HTTPStatus(status).phrase, status=status, detail=detail))

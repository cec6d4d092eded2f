"""What the server says: the JSON of answers and errors, over HTTP and between the processes."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

__all__ = [
    "REPLY",
    "Answer",
    "Choice",
    "Failed",
    "Info",
    "Predictions",
    "Problem",
    "Reply",
    "Served",
    "failed",
]

_FROZEN = ConfigDict(frozen=True)


class Choice(BaseModel):
    """A class and its probability."""

    model_config = _FROZEN

    label: str
    probability: float = Field(ge=0, le=1)


class Answer(BaseModel):
    """The most probable class of one image, and the `top` ones, most probable first."""

    model_config = _FROZEN

    label: str
    probability: float = Field(ge=0, le=1)
    top: tuple[Choice, ...]


class Problem(BaseModel):
    """An HTTP status and a sentence for people."""

    model_config = _FROZEN

    status: int
    message: str


class Failed(BaseModel):
    """The body of every error, and the result of an image that has no answer."""

    model_config = _FROZEN

    error: Problem


class Predictions(BaseModel):
    """One result for each image, in the order they were sent."""

    model_config = _FROZEN

    results: list[Answer | Failed]
    bundle: str = Field(description="hash of the bundle that answered")
    milliseconds: float = Field(description="from the request's headers to this answer")


class Served(BaseModel):
    """What an inference process says once it is ready."""

    model_config = _FROZEN

    bundle: str
    classes: tuple[str, ...]
    preprocess: dict[str, Any]
    runtime: str
    versions: dict[str, str]


class Info(Served):
    """What is served, and within which limits."""

    workers: int
    workers_ready: int
    threads: int
    waiting: int = Field(description="images admitted and not yet executing")
    executing: int
    limits: dict[str, int | float]


Reply = Answer | Failed
"""What an inference process answers about one image."""

REPLY: TypeAdapter[Reply] = TypeAdapter(Reply)


def failed(status: int, message: str) -> Failed:
    return Failed(error=Problem(status=status, message=message))

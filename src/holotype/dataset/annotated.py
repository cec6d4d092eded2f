"""What an annotation format says about an image: its boxes, or its label."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from holotype.dataset.listing import Problem, Split
from holotype.errors import DatasetError
from holotype.preprocess import Box

__all__ = ["Annotated", "Annotations", "LabelledBox", "problem_of"]


@dataclass(frozen=True)
class LabelledBox:
    """A box with its class, as the format says it; whether it fits the image is checked later.

    In pixels of the upright image, or, where `relative`, in shares of its width and height. `rotation` is in
    degrees, clockwise about the corner (left, top). `str(where)` is its place for messages.
    """

    box: Box
    label: str
    where: object
    relative: bool = False
    rotation: float = 0.0


@dataclass(frozen=True)
class Annotated:
    """An image that somebody looked at. No boxes and no label: known to hold no object.

    `path` is POSIX and relative to the root of the `Annotations`, or absolute. `complete` is False where the
    format names an object that is not among `boxes`: the image is then neither empty nor surely of one class.
    """

    path: str
    where: object
    boxes: tuple[LabelledBox, ...] = ()
    label: str | None = None
    split: Split | None = None
    annotator: str | None = None
    complete: bool = True


@dataclass(frozen=True)
class Annotations:
    """All that an annotation format says, the files that were passed over, and the bad records."""

    root: Path
    images: tuple[Annotated, ...]
    ignored: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()


def problem_of(error: DatasetError, where: object) -> Problem:
    """The bad record behind an error; `where` is its place, unless the error knows better."""
    return Problem(str(error.where or where), error.what, error.fix or "correct or remove it")

"""What `holotype compress --json` prints and `compress.json` holds: keys stay, new ones may come."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from holotype.report import Estimate
from holotype.runtime import Precision, RuntimeName

__all__ = ["Budget", "Candidate", "ClassDelta", "Compressed", "Decision", "FlippedImage", "Layer"]

_FROZEN = ConfigDict(frozen=True, extra="forbid")

Decision = Literal["chosen", "keep-parent", "nothing-fits"]


class Budget(BaseModel):
    """The limits: points of accuracy and of a class's recall, bytes, milliseconds; null: none."""

    model_config = _FROZEN

    drop: float | None
    class_drop: float | None
    size: int | None
    latency: float | None


class ClassDelta(BaseModel):
    """Recall of a class on validation, before and after; `flipped` are images whose label changed."""

    model_config = _FROZEN

    name: str
    images: int
    before: float
    after: float
    flipped: tuple[str, ...]

    @property
    def drop(self) -> float:
        """Recall lost, in points."""
        return 100 * (self.before - self.after)


class FlippedImage(BaseModel):
    """An image that a candidate calls something else than the parent does."""

    model_config = _FROZEN

    path: str
    label: str
    before: str
    after: str


class Candidate(BaseModel):
    """A model that was made and measured: accuracy on validation, bytes of the payload served, speed here.

    `runtime` and `precision` are the fastest way to run it here: in these it was judged, calibrated and
    timed, and in these it is served. `drop` is the loss of accuracy in points with its paired interval,
    `class_drops` that of the recall of each class; `agreement` the share of labels that stay;
    `compressed_bytes` what zlib makes of the payload, on a disk or on the way; `latency_ms` the median for
    one image, `throughput` images per second at batch 8.
    """

    model_config = _FROZEN

    method: str
    settings: dict[str, Any]
    bundle: str
    bytes: int
    accuracy: float
    drop: Estimate
    class_drop: float
    worst_class: str
    class_drops: dict[str, float] = {}
    agreement: float
    latency_ms: float
    throughput: float
    runtime: RuntimeName
    precision: Precision
    seconds: float
    compressed_bytes: int
    rejected_because: tuple[str, ...] = ()


class Layer(BaseModel):
    """What rounding one layer alone costs: accuracy in points, and the mean shift of probabilities."""

    model_config = _FROZEN

    name: str
    weights: int
    drop: float
    shift: float


class TestScore(BaseModel):
    """Accuracy of the chosen model on the test split, read once, with its 95 % interval."""

    model_config = _FROZEN

    accuracy: float
    low: float
    high: float
    images: int


class Compressed(BaseModel):
    """The outcome of a search.

    `not_tried` are methods, and single candidates, that were left out, with the reasons; `sensitivity` was
    measured on `sensitivity_images` images of validation.
    """

    model_config = _FROZEN

    schema_version: int = 1
    decision: Decision
    reason: str
    budget: Budget
    parent: Candidate
    best_float: Candidate
    chosen: Candidate | None
    candidates: tuple[Candidate, ...]
    not_tried: dict[str, str]
    classes: tuple[ClassDelta, ...]
    flips: tuple[FlippedImage, ...]
    sensitivity: tuple[Layer, ...]
    sensitivity_images: int = 0
    test: TestScore | None
    machine: str
    seconds: float

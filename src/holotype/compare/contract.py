"""The contract of `compare --json`: keys stay, new ones may come."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from holotype.dataset import Split
from holotype.report import Estimate

__all__ = ["ClassDifference", "Comparison", "Flip", "Side", "Verdict"]

_FROZEN = ConfigDict(frozen=True, extra="forbid")

Verdict = Literal["better", "not worse", "worse", "can't tell"]


class Side(BaseModel):
    """One of the two bundles; speed is None where it was not measured."""

    model_config = _FROZEN

    bundle: str
    hash: str
    accuracy: float
    macro_f1: float
    bytes: int
    runtime: str
    precision: str
    latency_ms: float | None
    throughput: float | None


class ClassDifference(BaseModel):
    """Recall of a class with both, and their difference with its paired 95 % interval."""

    model_config = _FROZEN

    name: str
    images: int
    recall_a: float
    recall_b: float
    difference: Estimate


class Flip(BaseModel):
    """An image that gets different labels."""

    model_config = _FROZEN

    path: str
    label: str
    a: str
    b: str
    probability_a: float
    probability_b: float


class Comparison(BaseModel):
    """What the same images say about B against A. `needed_images` is None where the verdict needs no more.

    `difference` and `macro_f1` are B minus A as a share, with paired 95 % intervals, that of the accuracy
    never narrower than exact bounds; `only_a` and `only_b` count the images that one alone gets right;
    `mcnemar_p` is of their balance.
    """

    model_config = _FROZEN

    schema_version: int = 1
    verdict: Verdict
    reason: str
    a: Side
    b: Side
    dataset: str
    split: Split
    images: int
    margin: float
    difference: Estimate
    macro_f1: Estimate
    mcnemar_p: float
    only_a: int
    only_b: int
    needed_images: int | None
    classes: tuple[ClassDifference, ...]
    flips: tuple[Flip, ...]
    machine: str

"""What held a training run back, from what was recorded of it: each fault with its numbers and its remedy."""

from __future__ import annotations

from collections.abc import Callable

from holotype.diagnosis.epochs import input_bound, label_noise, overfitting, underfitting
from holotype.diagnosis.evidence import Evidence, suspect_paths
from holotype.diagnosis.steps import (
    dead_layer,
    exploding,
    norm_mismatch,
    rate_too_high,
    rate_too_low,
    vanishing,
)
from holotype.report import Fault, Finding

__all__ = ["Evidence", "diagnose", "suspect_paths"]

_RULES: tuple[Callable[[Evidence], Finding | None], ...] = (
    rate_too_high,
    exploding,
    dead_layer,
    norm_mismatch,
    vanishing,
    rate_too_low,
    label_noise,
    overfitting,
    underfitting,
    input_bound,
)

_CAUSES: dict[Fault, tuple[Fault, ...]] = {
    "exploding-gradients": ("learning-rate-high",),
    "vanishing-gradients": ("learning-rate-high", "dead-layer", "norm-mismatch"),
    "learning-rate-low": ("vanishing-gradients", "dead-layer"),
    "underfitting": (
        "learning-rate-high", "exploding-gradients", "dead-layer", "norm-mismatch", "vanishing-gradients",
        "learning-rate-low", "label-noise",
    ),
}  # fmt: skip
"""Faults that follow from others, and are not listed beside a warning of those."""


def diagnose(evidence: Evidence) -> tuple[Finding, ...]:
    """Every fault that the evidence shows: warnings first, and causes before what follows from them."""
    found: list[Finding] = []
    for rule in _RULES:
        finding = rule(evidence)
        warned = {other.name for other in found if other.severity == "warning"}
        if finding is not None and warned.isdisjoint(_CAUSES.get(finding.name, ())):
            found.append(finding)
    return tuple(sorted(found, key=lambda finding: finding.severity != "warning"))

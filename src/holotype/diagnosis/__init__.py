"""What held a training run back, from what was recorded of it: each fault with its numbers and its remedy."""

from __future__ import annotations

from collections.abc import Callable

from holotype.diagnosis.epochs import input_bound, label_noise, overfitting, underfitting
from holotype.diagnosis.evidence import LEAST_EPOCHS, LEAST_ROWS, Evidence, suspect_paths
from holotype.diagnosis.steps import (
    dead_layer,
    exploding,
    norm_mismatch,
    rate_too_high,
    rate_too_low,
    vanishing,
)
from holotype.report import Fault, Finding

__all__ = ["Evidence", "diagnose", "looked_for", "suspect_paths"]

_RULES: dict[Fault, Callable[[Evidence], Finding | None]] = {
    "learning-rate-high": rate_too_high,
    "exploding-gradients": exploding,
    "dead-layer": dead_layer,
    "norm-mismatch": norm_mismatch,
    "vanishing-gradients": vanishing,
    "learning-rate-low": rate_too_low,
    "label-noise": label_noise,
    "overfitting": overfitting,
    "underfitting": underfitting,
    "input-bound": input_bound,
}

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


def looked_for(evidence: Evidence) -> tuple[Fault, ...]:
    """The faults that this evidence can show, found or not: a trend, say, takes some epochs."""
    epochs, rows = len(evidence.epochs), len(evidence.finite_steps)
    able: dict[Fault, bool] = {
        "exploding-gradients": rows >= LEAST_ROWS or evidence.diverged,
        "learning-rate-low": rows >= LEAST_EPOCHS,
        "overfitting": epochs >= LEAST_EPOCHS,
        "underfitting": epochs >= 2 and not evidence.interrupted,
        "label-noise": evidence.sample_losses is not None
        and not evidence.mixed
        and (evidence.suspects is not None or epochs >= LEAST_EPOCHS),
        "input-bound": bool(epochs),
    }
    return tuple(fault for fault in _RULES if able.get(fault, rows > 0))


def diagnose(evidence: Evidence) -> tuple[Finding, ...]:
    """Every fault that the evidence shows: warnings first, and causes before what follows from them."""
    found: list[Finding] = []
    for rule in _RULES.values():
        finding = rule(evidence)
        warned = {other.name for other in found if other.severity == "warning"}
        if finding is not None and warned.isdisjoint(_CAUSES.get(finding.name, ())):
            found.append(finding)
    return tuple(sorted(found, key=lambda finding: finding.severity != "warning"))

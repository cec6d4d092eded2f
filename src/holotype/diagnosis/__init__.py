"""What held a training run back, from what was recorded of it: each fault with its numbers and its remedy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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


@dataclass(frozen=True)
class _Rule:
    """How a fault is found, and whether an evidence can show it at all: a trend, say, takes some epochs."""

    find: Callable[[Evidence], Finding | None]
    able: Callable[[Evidence], bool] = lambda evidence: bool(evidence.finite_steps)


_RULES: dict[Fault, _Rule] = {
    "learning-rate-high": _Rule(rate_too_high),
    "exploding-gradients": _Rule(
        exploding, lambda evidence: evidence.diverged or len(evidence.finite_steps) >= LEAST_ROWS
    ),
    "dead-layer": _Rule(dead_layer),
    "norm-mismatch": _Rule(norm_mismatch),
    "vanishing-gradients": _Rule(vanishing),
    "learning-rate-low": _Rule(rate_too_low, lambda evidence: len(evidence.finite_steps) >= LEAST_EPOCHS),
    "label-noise": _Rule(
        label_noise,
        lambda evidence: (
            evidence.tells_labels and (evidence.suspects is not None or len(evidence.epochs) >= LEAST_EPOCHS)
        ),
    ),
    "overfitting": _Rule(overfitting, lambda evidence: len(evidence.epochs) >= LEAST_EPOCHS),
    "underfitting": _Rule(
        underfitting, lambda evidence: len(evidence.epochs) >= 2 and not evidence.interrupted
    ),
    "input-bound": _Rule(input_bound, lambda evidence: bool(evidence.timings)),
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
    """The faults that this evidence can show, found or not."""
    return tuple(fault for fault, rule in _RULES.items() if rule.able(evidence))


def diagnose(evidence: Evidence) -> tuple[Finding, ...]:
    """Every fault that the evidence shows: warnings first, and causes before what follows from them."""
    found: list[Finding] = []
    for rule in _RULES.values():
        finding = rule.find(evidence) if rule.able(evidence) else None
        warned = {other.name for other in found if other.severity == "warning"}
        if finding is not None and warned.isdisjoint(_CAUSES.get(finding.name, ())):
            found.append(finding)
    return tuple(sorted(found, key=lambda finding: finding.severity != "warning"))

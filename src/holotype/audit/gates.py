"""The gates: what a dataset must fulfil, whether it does, and what to do where it does not."""

from __future__ import annotations

from collections.abc import Sequence

from holotype.audit.contract import (
    Balance,
    Duplicates,
    Gate,
    Issue,
    LabelAccuracy,
    Leakage,
    Shift,
    Shortcut,
    Verdict,
)
from holotype.config import AuditConfig
from holotype.dataset import Dataset

__all__ = ["EXIT_CODES", "judge_data", "judge_findings", "verdict_of"]

EXIT_CODES: dict[Verdict, int] = {"ready": 0, "fix": 3, "unusable": 4}
"""What `holotype audit` exits with; 1 and 2 mean that it could not be run."""

_LEAST_SAMPLE = 300


def judge_data(dataset: Dataset, *, config: AuditConfig) -> tuple[Gate, ...]:
    """What `train` asks of a dataset before it reads a pixel: failing one of these makes it unusable.

    A gate is called as its threshold among the settings: `gates.NAME`.
    """
    broken = len(dataset.unreadable) + len(dataset.problems)
    total = len(dataset.table) + broken
    gaps = [
        f"{label} in {split}"
        for label, row in dataset.counts().items()
        for split, count in row.items()
        if count == 0
    ]
    needed = [split for split in ("train", "validation") if split not in dataset.splits]
    return (
        Gate(
            name="unreadable",
            passed=total > 0 and broken <= config.data.max_unreadable * total,
            value=broken / total if total else 1.0,
            threshold=config.data.max_unreadable,
            advice="repair or remove the unreadable files and bad records",
            severity="unusable",
        ),
        Gate(
            name="classes",
            passed=len(dataset.classes) >= 2,
            value=len(dataset.classes),
            threshold=2,
            advice="a classifier needs two or more classes with readable images",
            severity="unusable",
        ),
        Gate(
            name="splits",
            passed=not gaps and not needed,
            value=len(gaps) + len(needed),
            threshold=0,
            advice=_lacking(gaps, needed),
            severity="unusable",
        ),
    )


def _lacking(gaps: Sequence[str], needed: Sequence[str]) -> str:
    if needed:
        return f"there is no {needed[0]} split"
    shown = f"; missing: {', '.join(gaps[:5])}{', …' if len(gaps) > 5 else ''}" if gaps else ""
    return f"add images of the class, or place some yourself in train/, validation/ and test/{shown}"


def judge_findings(
    *,
    balance: Balance,
    duplicates: Duplicates,
    leakage: Leakage,
    label_accuracy: LabelAccuracy,
    health: Sequence[Issue],
    shortcuts: Sequence[Shortcut],
    shift: Sequence[Shift],
    images: int,
    config: AuditConfig,
) -> tuple[Gate, ...]:
    """What makes the result of training untrustworthy: failing one of these asks for a fix first."""
    limits = config.gates
    smallest = min(balance.counts, key=lambda label: balance.counts[label], default="")
    conflicts = sum(cluster.conflict for cluster in duplicates.clusters)
    odd = len({issue.path for issue in health}) / images if images else 0.0
    worst = max(shortcuts, key=lambda shortcut: shortcut.correlation, default=None)
    drift = max(shift, key=lambda one: one.low, default=None)
    return (
        _gate(
            "balance",
            balance.max_min_ratio,
            limits.balance,
            _balance_advice(balance),
        ),
        Gate(
            name="class_size",
            passed=balance.counts.get(smallest, 0) >= limits.class_size,
            value=balance.counts.get(smallest, 0),
            threshold=limits.class_size,
            advice=f"collect more images of {smallest!r}, or merge it into another class" if smallest else "",
            severity="fix",
        ),
        _gate(
            "leakage",
            leakage.fraction,
            limits.leakage,
            "make a split that keeps copies together: --fix-split",
        ),
        _gate(
            "conflicts",
            conflicts,
            limits.conflicts,
            "decide which label is right: holotype agree adjudicate",
        ),
        _label_gate(label_accuracy, threshold=limits.label_accuracy, images=images),
        _gate("health", odd, limits.health, "look at the images listed under health; repair or remove them"),
        _gate(
            "shortcut",
            None if worst is None else worst.correlation,
            limits.shortcut,
            ""
            if worst is None
            else f"{worst.measure} goes with the class ({worst.low} least, {worst.high} most): collect images"
            " in which it does not, or augment it away; where it is what defines the class, raise"
            " --set gates.shortcut",
            absent=True,
        ),
        _gate(
            "shift",
            None if drift is None else drift.low,
            limits.shift,
            ""
            if drift is None
            else f"{drift.split} images can be told from training images: draw both from one source",
        ),
    )


def _gate(
    name: str, value: float | None, threshold: float, advice: str, *, absent: bool | None = None
) -> Gate:
    """A gate that values up to `threshold` pass; where there is none, it says `absent`."""
    passed = absent if value is None else value <= threshold
    return Gate(name=name, passed=passed, value=value, threshold=threshold, advice=advice, severity="fix")


def _balance_advice(balance: Balance) -> str:
    if not balance.collect:
        return ""
    label, lack = max(balance.collect.items(), key=lambda item: item[1])
    more = f" (and of {len(balance.collect) - 1} other classes)" if len(balance.collect) > 1 else ""
    remedy = f", or train with --set {balance.remedies[0]}" if balance.remedies else ""
    return f"collect {lack:,} more images of {label!r}{more}{remedy}"


def _label_gate(found: LabelAccuracy, *, threshold: float, images: int) -> Gate:
    """By the exact one-sided 95 % bound of a reviewed sample of 300 or more, or of all images."""
    seen = found.reviewed + found.skipped
    finished = 0 < seen == found.sample and found.sample >= min(_LEAST_SAMPLE, images)
    if not finished:
        state = f"{seen} of {found.sample} reviewed" if found.sample else "no sample was reviewed"
        advice = f"{state}: holotype audit --review-sample {_LEAST_SAMPLE}, then holotype agree adjudicate"
    elif found.high is not None and found.high < threshold:
        advice = "labels are wrong too often: relabel, beginning with the suspects"
    else:
        advice = "the sample is too small to show it: review more with a larger --review-sample"
    return Gate(
        name="label_accuracy",
        passed=(found.low is not None and found.low >= threshold) if finished else None,
        value=found.low if finished else None,
        threshold=threshold,
        advice=advice,
        severity="fix",
    )


def verdict_of(gates: Sequence[Gate]) -> tuple[Verdict, tuple[str, ...]]:
    """The verdict, and why: the gates that failed, or, where all hold, those that were not measured."""
    failed = [gate for gate in gates if gate.passed is False]
    for severity in ("unusable", "fix"):
        reasons = tuple(f"{gate.name}: {gate.advice}" for gate in failed if gate.severity == severity)
        if reasons:
            return ("unusable" if severity == "unusable" else "fix"), reasons
    unknown = tuple(f"{gate.name} was not measured: {gate.advice}" for gate in gates if gate.passed is None)
    return "ready", unknown

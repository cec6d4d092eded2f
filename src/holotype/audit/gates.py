"""The gates: what a dataset must fulfil, whether it does, and what to do where it does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from holotype.audit.contract import (
    Balance,
    Duplicates,
    Gate,
    Issue,
    LabelAccuracy,
    Leakage,
    Shift,
    Shortcut,
    Suspect,
    Verdict,
)
from holotype.config import AuditConfig, GatesConfig
from holotype.dataset import Dataset

__all__ = ["AT_LEAST", "EXIT_CODES", "Findings", "judge_data", "judge_findings", "verdict_of"]

EXIT_CODES: dict[Verdict, int] = {"ready": 0, "fix": 3, "unusable": 4}
"""What `holotype audit` exits with; 1 and 2 mean that it could not be run."""

AT_LEAST = frozenset({"classes", "class_size", "label_accuracy"})
"""Gates whose value must reach the threshold; that of the others must not exceed it."""

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


@dataclass(frozen=True)
class Findings:
    """What was found in the images; the parts are those of an `Audit`, `health` without unreadable files."""

    balance: Balance
    duplicates: Duplicates
    leakage: Leakage
    label_suspects: tuple[Suspect, ...]
    label_accuracy: LabelAccuracy
    health: tuple[Issue, ...]
    shortcuts: tuple[Shortcut, ...]
    shift: tuple[Shift, ...]


def judge_findings(found: Findings, *, images: int, limits: GatesConfig) -> tuple[Gate, ...]:
    """What makes the result of training untrustworthy: failing one of these asks for a fix first."""
    conflicts = sum(cluster.conflict for cluster in found.duplicates.clusters)
    odd = len({issue.path for issue in found.health}) / images if images else 0.0
    return (
        _gate("balance", found.balance.max_min_ratio, limits.balance, _balance_advice(found.balance)),
        _class_size_gate(found.balance, threshold=limits.class_size),
        _gate(
            "leakage",
            found.leakage.fraction,
            limits.leakage,
            "make a split that keeps copies together: --fix-split",
        ),
        _gate(
            "conflicts",
            conflicts,
            limits.conflicts,
            "decide which label is right: holotype agree adjudicate",
        ),
        _label_gate(found.label_accuracy, threshold=limits.label_accuracy, images=images),
        _gate("health", odd, limits.health, "look at the images listed under health; repair or remove them"),
        _shortcut_gate(found.shortcuts, threshold=limits.shortcut),
        _shift_gate(found.shift, threshold=limits.shift),
    )


def _gate(
    name: str, value: float | None, threshold: float, advice: str, *, absent: bool | None = None
) -> Gate:
    """A gate that values up to `threshold` pass; where there is none, it says `absent`."""
    passed = absent if value is None else value <= threshold
    return Gate(name=name, passed=passed, value=value, threshold=threshold, advice=advice, severity="fix")


def _class_size_gate(balance: Balance, *, threshold: int) -> Gate:
    smallest = min(balance.counts, key=lambda label: balance.counts[label], default="")
    count = balance.counts.get(smallest, 0)
    return Gate(
        name="class_size",
        passed=count >= threshold,
        value=count,
        threshold=threshold,
        advice=f"collect more images of {smallest!r}, or merge it into another class" if smallest else "",
        severity="fix",
    )


def _shortcut_gate(found: Sequence[Shortcut], *, threshold: float) -> Gate:
    worst = max(found, key=lambda shortcut: shortcut.correlation, default=None)
    if worst is None:
        return _gate("shortcut", None, threshold, "", absent=True)
    return _gate(
        "shortcut",
        worst.correlation,
        threshold,
        f"{worst.measure} goes with the class ({worst.low} least, {worst.high} most): collect images"
        " in which it does not, or augment it away; where it is what defines the class, raise"
        " --set gates.shortcut",
    )


def _shift_gate(found: Sequence[Shift], *, threshold: float) -> Gate:
    drift = max(found, key=lambda one: one.low, default=None)
    if drift is None:
        return _gate("shift", None, threshold, "")
    return _gate(
        "shift",
        drift.low,
        threshold,
        f"{drift.split} images can be told from training images: draw both from one source",
    )


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

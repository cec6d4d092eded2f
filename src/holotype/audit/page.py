"""One self-contained HTML page about an `Audit`: pictures as data URIs, no request to anywhere."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from holotype.audit.contract import Audit, Cluster, Gate, Issue
from holotype.audit.gates import AT_LEAST
from holotype.report import Thumbnail, data_uri, write_html

__all__ = ["write_page"]

Entry = TypeVar("Entry")

# How much of each kind is shown, so that the page of a large set stays a page; a picture weighs about 8 kB.
_PAIRS, _CLUSTERS, _COPIES, _SUSPECTS, _ISSUES = 24, 24, 4, 36, 6
_ROWS, _CLASSES, _NAMES = 200, 100, 12

_VERDICTS = {
    "ready": ("Ready", "Every gate that was measured is passed: train on it."),
    "fix": ("Fix first", "It would train, but what it learns, or how good it seems, could not be trusted."),
    "unusable": ("Not usable", "Training would refuse this data."),
}

_SHARES = frozenset({"unreadable", "leakage", "label_accuracy", "health"})
"""Gates whose value and threshold are shares."""

_MEANINGS = {
    "wrong extension": "what the bytes are, though the name says otherwise",
    "unusual mode": "Pillow's mode: another depth or colour space than the rest",
    "odd size": "pixels, far more or fewer than most",
    "odd aspect": "longer over shorter side; stretching to the model's input distorts it",
    "dark": "95 % of the pixels are below this level, of 0 (black) to 1 (white)",
    "light": "95 % of the pixels are above this level, of 0 (black) to 1 (white)",
    "blurry": "sharpness of its edges, from 0 (a ramp) to 1 (a step)",
    "low information": "entropy of the grey levels, of at most 8 bits",
    "grey": "mean difference of the colour channels, in a set of colour images",
}
"""What the value of an issue is."""

_UNSEEN = ("unreadable", "truncated", "empty")
"""Issues of files that have no picture; the page lists them with their errors instead."""


@dataclass(frozen=True)
class _Capped(Generic[Entry]):
    """The first entries of a list, and how many more there are."""

    shown: Sequence[Entry]
    more: int


@dataclass(frozen=True)
class _Copy:
    """One image of a cluster."""

    path: str
    label: str | None
    split: str | None


@dataclass(frozen=True)
class _Copies:
    """Images that are one picture."""

    kind: str | None
    conflict: bool
    copies: _Capped[_Copy]


@dataclass(frozen=True)
class _GateRow:
    name: str
    state: str
    value: str
    threshold: str
    advice: str


@dataclass(frozen=True)
class _IssueGroup:
    issue: str
    meaning: str
    issues: _Capped[Issue]


@dataclass(frozen=True)
class _Step:
    """A command that mends something, and what it does."""

    command: str
    meaning: str


def write_page(file: Path, audit: Audit, *, thumbnail: Thumbnail) -> None:
    """Write `audit` as HTML to `file`, atomically; `thumbnail` is asked once for each image shown.

    `MissingExtraError` where Jinja2 is missing.
    """
    content = _content(audit)
    write_html(
        file,
        "audit.html.j2",
        package="holotype.audit",
        filters={"percent": _percent, "plain": _plain},
        content={
            "audit": audit,
            "thumbnails": {path: data_uri(thumbnail(path)) for path in _pictures(content)},
            **content,
        },
    )


def _content(audit: Audit) -> dict[str, Any]:
    """What the template shows that is derived from the audit rather than in it."""
    # Those across splits are shown as leakage.
    within = [cluster for cluster in audit.duplicates.clusters if len(set(cluster.splits)) == 1]
    within.sort(key=lambda cluster: not cluster.conflict)
    title, meaning = _VERDICTS[audit.verdict]
    counts = sorted(audit.balance.counts.items(), key=lambda item: (-item[1], item[0]))
    splits = list(dict.fromkeys(split for row in audit.balance.by_split.values() for split in row))
    return {
        "verdict": title,
        "verdict_meaning": meaning,
        "gates": [_gate_row(gate) for gate in audit.gates],
        "limits": {_gate_name(gate): gate.threshold for gate in audit.gates},
        "steps": _steps(audit),
        "leaks": _cap(_leaks(audit), _PAIRS),
        "conflicts": sum(cluster.conflict for cluster in audit.duplicates.clusters),
        "within": _cap([_copies(cluster) for cluster in within], _CLUSTERS),
        "suspects": _cap(audit.label_suspects, _SUSPECTS),
        "splits": splits,
        "largest": counts[0] if counts else None,
        "smallest": counts[-1] if counts else None,
        "class_rows": _class_rows([name for name, _ in counts]),
        "totals": [sum(row.get(s, 0) for row in audit.balance.by_split.values()) for s in splits],
        "collect": _cap(sorted(audit.balance.collect.items(), key=lambda item: -item[1]), _NAMES),
        "groups": _issue_groups(audit.health),
        "unreadable": _cap(audit.unreadable, _ROWS),
        "problems": _cap(audit.problems, _ROWS),
    }


def _cap(entries: Sequence[Entry], limit: int) -> _Capped[Entry]:
    return _Capped(entries[:limit], max(len(entries) - limit, 0))


def _gate_row(gate: Gate) -> _GateRow:
    sign, share = "≥" if gate.name in AT_LEAST else "≤", gate.name in _SHARES
    threshold = f"{100 * gate.threshold:g}\N{NO-BREAK SPACE}%" if share else _plain(gate.threshold)
    show = _percent if share else _plain
    return _GateRow(
        name=_gate_name(gate),
        state={True: "passed", False: "failed", None: "not measured"}[gate.passed],
        value="" if gate.value is None else show(gate.value),
        threshold=f"{sign}\N{NO-BREAK SPACE}{threshold}",
        advice="" if gate.passed else gate.advice,
    )


def _gate_name(gate: Gate) -> str:
    return gate.name.replace("_", " ")


def _steps(audit: Audit) -> list[_Step]:
    """Commands that would mend what was found, in the order to run them.

    A random sample proves something about the labels and splits it was drawn from, so these are mended first.
    """
    data, accuracy = shlex.quote(audit.source.path), audit.label_accuracy
    failed = {gate.name for gate in audit.gates if gate.passed is False}
    unknown = {gate.name for gate in audit.gates if gate.passed is None}
    steps = []
    if audit.label_suspects or any(cluster.conflict for cluster in audit.duplicates.clusters):
        steps.append(_Step(f"holotype agree adjudicate {data}", "decide on suspected and conflicting labels"))
        steps.append(_Step(f"holotype agree apply {data}", "take over what was decided"))
    if audit.leakage.pairs:
        steps.append(_Step(f"holotype audit {data} --fix-split", "make a split that keeps copies together"))
    if "label_accuracy" in failed | unknown:
        if accuracy.reviewed + accuracy.skipped >= accuracy.sample:
            steps.append(_Step(f"holotype audit {data} --review-sample 300", "draw a random sample"))
        steps.append(
            _Step(f"holotype agree adjudicate {data}", "look at it: that measures the label accuracy")
        )
    if steps or failed:
        steps.append(_Step(f"holotype audit {data}", "measure again"))
    for place, remedy in enumerate(audit.balance.remedies):
        meaning = "train in spite of the imbalance" if place == 0 else "or so, to compare"
        steps.append(_Step(f"holotype train {data} --set {shlex.quote(remedy)}", meaning))
    return steps or [_Step(f"holotype train {data}", "train")]


def _leaks(audit: Audit) -> list[_Copies]:
    """The pairs across splits: first those under different labels, then exact copies, then near ones."""
    kinds: dict[str, str] = {}
    known: dict[str, _Copy] = {}
    for cluster in audit.duplicates.clusters:
        kinds |= dict.fromkeys(cluster.paths, cluster.kind)
        known |= {copy.path: copy for copy in _members(cluster)}
    pairs = []
    for paths in audit.leakage.pairs:
        copies = [known.get(path, _Copy(path, None, None)) for path in paths]
        labels = {copy.label for copy in copies}
        conflict = len(labels) > 1
        pairs.append(_Copies(kind=kinds.get(paths[0]), conflict=conflict, copies=_cap(copies, 2)))
    return sorted(pairs, key=lambda pair: (not pair.conflict, pair.kind != "exact"))


def _copies(cluster: Cluster) -> _Copies:
    copies = _members(cluster)
    if cluster.conflict:  # one of each label first, so that what differs is seen
        firsts = list({copy.label: copy for copy in reversed(copies)}.values())[::-1]
        copies = firsts + [copy for copy in copies if copy not in firsts]
    return _Copies(kind=cluster.kind, conflict=cluster.conflict, copies=_cap(copies, _COPIES))


def _members(cluster: Cluster) -> list[_Copy]:
    members = zip(cluster.paths, cluster.labels, cluster.splits, strict=True)
    return [_Copy(path, label, split) for path, label, split in members]


def _class_rows(names: Sequence[str]) -> list[str | int]:
    """Classes from the largest to the smallest; of very many those at both ends, and the number between."""
    if len(names) <= 2 * _CLASSES:
        return list(names)
    return [*names[:_CLASSES], len(names) - 2 * _CLASSES, *names[-_CLASSES:]]


def _issue_groups(issues: Iterable[Issue]) -> list[_IssueGroup]:
    groups: dict[str, list[Issue]] = {}
    for issue in issues:
        if issue.issue not in _UNSEEN:
            groups.setdefault(issue.issue, []).append(issue)
    return [
        _IssueGroup(name, _MEANINGS.get(name, ""), _cap(_worst_first(group), _ISSUES))
        for name, group in groups.items()
    ]


def _worst_first(issues: list[Issue]) -> list[Issue]:
    """By how far out the value is, where it is a number: all but these two issues mean too little of it."""
    sign = -1 if issues[0].issue in ("light", "odd aspect") else 1
    return sorted(issues, key=lambda issue: 0 if isinstance(issue.value, str) else sign * issue.value)


def _pictures(content: dict[str, Any]) -> list[str]:
    """Paths of every picture on the page, each once."""
    clusters = [*content["leaks"].shown, *content["within"].shown]
    paths = [copy.path for cluster in clusters for copy in cluster.copies.shown]
    paths += [suspect.path for suspect in content["suspects"].shown]
    paths += [issue.path for group in content["groups"] for issue in group.issues.shown]
    return list(dict.fromkeys(paths))


def _percent(value: float) -> str:
    digits = 2 if 0 < value < 0.01 else 1
    return f"{100 * value:.{digits}f}\N{NO-BREAK SPACE}%"


def _plain(value: float | str) -> str:
    """A number with as many digits as say something: 7.1, 0.043, 1,200."""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if value == round(value) or abs(value) >= 1000 else f"{value:.3g}"

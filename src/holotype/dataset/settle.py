"""Records that repeat each other become one; those that contradict each other become a problem."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from holotype.dataset.listing import Problem, Record

__all__ = ["Placed", "settle"]

Placed = tuple[Record, object]
"""A record and the place in the source that says it, as text by `str`."""


def settle(
    placed: Iterable[Placed], *, keep_annotators: bool
) -> tuple[tuple[Record, ...], tuple[Problem, ...]]:
    """One record for each example, sorted by path, and a problem for each on which the source disagrees.

    With `keep_annotators` there is one for each example and annotator, so that their agreement can be
    measured; without, annotators who agree count once, and nobody's label is taken where they do not.
    """
    groups: dict[tuple[str, str | None], list[Placed]] = {}
    for record, where in placed:
        key = record.path, record.annotator if keep_annotators else None
        groups.setdefault(key, []).append((record, where))
    records: list[Record] = []
    problems: list[Problem] = []
    for same in groups.values():
        if len(same) == 1:
            records.append(same[0][0])
            continue
        problem = _contradiction(same)
        if problem is not None:
            problems.append(problem)
            continue
        annotators = {record.annotator for record, _ in same}
        annotator = annotators.pop() if len(annotators) == 1 else None
        records.append(dataclasses.replace(same[0][0], annotator=annotator))
    return tuple(sorted(records, key=lambda r: (r.path, r.annotator or ""))), tuple(problems)


def _contradiction(same: Sequence[Placed]) -> Problem | None:
    first, place = same[0]
    for field in ("label", "split", "group"):
        value = getattr(first, field)
        other = next(((r, where) for r, where in same if getattr(r, field) != value), None)
        if other is None:
            continue
        record, elsewhere = other
        fix = f"keep the right {field}"
        if field == "label" and record.annotator != first.annotator:
            fix = "annotators disagree: holotype agree score finds the consensus"
        return Problem(
            str(place),
            f"{first.path} has {field} {value!r} here and {getattr(record, field)!r} at {elsewhere}",
            fix,
        )
    return None

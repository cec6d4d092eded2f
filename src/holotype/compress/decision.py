"""Which candidate is taken, and why: among those inside the budget the fastest here, then the smallest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from holotype.compress.contract import Budget, Candidate, Decision
from holotype.compress.search import Found, feasible, floats_of, over_limits, rejections
from holotype.compress.workshop import Measured
from holotype.config import BudgetConfig

__all__ = ["Decided", "decide"]


@dataclass(frozen=True)
class Decided:
    """The decision with its reason, and all candidates with why they were not taken."""

    kind: Decision
    reason: str
    budget: Budget
    chosen: Measured | None
    best_float: Candidate
    candidates: tuple[Candidate, ...]


def decide(found: Found, budget: BudgetConfig) -> Decided:
    """Choose among what was timed in one race, which is what `settle` did not reject."""
    inside = feasible(found, budget)
    chosen = inside[0] if inside else None
    kind: Decision = "nothing-fits"
    if chosen is not None:
        kind = "keep-parent" if chosen is found.measured[0] else "chosen"
    best_float = min(floats_of(found), key=lambda one: one.candidate.latency_ms)
    return Decided(
        kind=kind,
        reason=_reason(chosen, inside, found, budget),
        budget=Budget(**budget.model_dump()),
        chosen=chosen,
        best_float=best_float.candidate,
        candidates=tuple(_judged(one, chosen, found, budget) for one in found.measured[1:]),
    )


def _judged(one: Measured, chosen: Measured | None, found: Found, budget: BudgetConfig) -> Candidate:
    candidate = one.candidate
    reasons = candidate.rejected_because or rejections(candidate, found.parent, budget)
    if not reasons and chosen is not None and one is not chosen:
        reasons = (f"fits; {chosen.candidate.method} is faster",)
    return candidate.model_copy(update={"rejected_because": reasons})


def _reason(chosen: Measured | None, inside: Sequence[Measured], found: Found, budget: BudgetConfig) -> str:
    if chosen is None:
        return _what_binds(found, budget)
    best, parent = chosen.candidate, found.parent
    if chosen is found.measured[0]:
        if len(found.measured) == 1:
            return "no candidate could be made, and the bundle as it is fits the budget"
        return "nothing that fits the budget is faster here than the bundle as it is"
    which = f"the fastest of {len(inside)} that fit" if len(inside) > 1 else "the only one that fits"
    faster = parent.latency_ms / best.latency_ms
    return (
        f"{which} is {best.method}: {best.latency_ms:.2f} ms, {faster:.1f} times as fast as the parent, at"
        f" {best.bytes / parent.bytes:.0%} of its size and {-best.drop.value:+.2f} points"
    )


_Limit = tuple[str, float, Callable[[Candidate], float], str]
"""Name, value, what of a candidate it limits, and the unit."""


def _limits(budget: BudgetConfig) -> list[_Limit]:
    size = None if budget.size is None else budget.size / 1e6
    limits: list[tuple[str, float | None, Callable[[Candidate], float], str]] = [
        ("drop", budget.drop, lambda one: one.drop.value, "points"),
        ("class_drop", budget.class_drop, lambda one: one.class_drop, "points of a class"),
        ("size", size, lambda one: one.bytes / 1e6, "MB"),
        ("latency", budget.latency, lambda one: one.latency_ms, "ms"),
    ]
    return [(name, limit, value, unit) for name, limit, value, unit in limits if limit is not None]


def _what_binds(found: Found, budget: BudgetConfig) -> str:
    """What fits but is no faster here; for each limit, how near anything came that keeps to the others.

    Else how near anything came at all.
    """
    parent, *candidates = (one.candidate for one in found.measured)
    told = _no_faster(candidates, parent, budget)
    fits_nowhere = not told
    for name, limit, value, unit in _limits(budget):
        relaxed = budget.model_copy(update={name: None})
        rest = [
            one for one in candidates if over_limits(one, budget) and not rejections(one, parent, relaxed)
        ]
        # The bundle as it is, is near only where nothing made of it is.
        if not rest and fits_nowhere and not over_limits(parent, relaxed):
            rest = [parent]
        if rest:
            best = min(rest, key=value)
            told.append(
                f"{name} binds: {best.method} keeps to everything else with {value(best):.2f} {unit},"
                f" {value(best) - limit:.2f} too many"
            )
    if told:
        return "; ".join(told)
    nearest = []
    for name, limit, value, unit in _limits(budget):
        least = min(value(one) for one in (parent, *candidates)) + 0.0  # not -0.00
        nearest.append((least > limit, f"{name} {limit:g} {unit}: the best is {least:.2f}"))
    # A limit that nothing keeps, whatever else it loses, says more than one that something does.
    unkept = [told for broken, told in nearest if broken]
    return "no candidate keeps to all limits but one; " + ", ".join(unkept or [told for _, told in nearest])


def _no_faster(candidates: Sequence[Candidate], parent: Candidate, budget: BudgetConfig) -> list[str]:
    """Of what keeps to every limit, and so is here no faster than the parent, the fastest."""
    inside = [one for one in candidates if not over_limits(one, budget)]
    if not inside:
        return []
    best = min(inside, key=lambda one: one.latency_ms)
    reasons = best.rejected_because or rejections(best, parent, budget)
    return [f"{best.method} keeps to every limit with {best.bytes / 1e6:.2f} MB, but {'; '.join(reasons)}"]

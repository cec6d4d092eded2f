"""The walk from cheap to dear: make, measure, and stop where something fits; then decide, all in one race."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from holotype.bundle import Bundle
from holotype.compress.contract import Candidate
from holotype.compress.measure import measure, measure_parent
from holotype.compress.methods import steps
from holotype.compress.workshop import Measured, Method, Workshop
from holotype.config import BudgetConfig, CompressConfig
from holotype.errors import BundleError, ConfigError, HolotypeError, require
from holotype.progress import note
from holotype.timing import Setup, race

__all__ = [
    "Found",
    "check_methods",
    "feasible",
    "floats_of",
    "over_limits",
    "rejections",
    "search",
    "settle",
    "walk",
]

_FLOATS = ("parent", "openvino", "bf16")
_ROUNDING = 1e-9  # of points: 100 * (1 - 0.95) is 5.000000000000004
_FINAL_SECONDS = 0.2  # of a turn in the race that decides
_NEARLY = 1.5  # times a latency: a machine that is shared changes its speed by as much within minutes
_TRAINED = ("structured", "qat", "student", "magnitude")


@dataclass
class Found:
    """All that was measured, the parent first, which methods are done, and why others were left out.

    A candidate has `rejected_because` once it was left out of a race that decided: its timing is of another
    minute than that of what was timed again, so it stays rejected.
    """

    measured: list[Measured] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    not_tried: dict[str, str] = field(default_factory=dict)

    @property
    def parent(self) -> Candidate:
        """What everything is compared with: the bundle itself, in float onnxruntime."""
        return self.measured[0].candidate


def check_methods(source: Bundle, config: CompressConfig) -> None:
    """`ConfigError` where a method that was asked for by name cannot work here or with this bundle.

    Of the default ones, those are left out when their turn comes.
    """
    if "methods" not in config.model_fields_set:
        return
    for name in config.methods:
        try:
            if name in _TRAINED:
                source.network_files(purpose=" to train", fix="compress what train wrote")
            if name == "bf16":
                require("openvino", extra="openvino", purpose="OpenVINO")
            if name == "structured":
                require("torch_pruning", extra="train", purpose="structured pruning")
        except HolotypeError as error:
            raise ConfigError(
                f"{name} cannot be tried: {error.what}",
                where="methods",
                fix=f"{error.fix}; or leave {name} out",
            ) from error


def walk(shop: Workshop, found: Found, *, keep: Callable[[Found], None]) -> None:
    """Search and settle; and search on as long as the race that decides leaves nothing that fits.

    Before anything is trained, which takes minutes, what is nearly fast enough is timed again.
    """
    budget = shop.config.budget
    if shop.config.search == "enough":
        search(shop, found, keep=keep, train=False)
        near = [one for one in found.measured if _nearly_fits(one.candidate, found.parent, budget)]
        if near and _smaller_that_fits(found, budget) is None:
            names = ", ".join(one.made.method for one in near)
            note(f"timed again before anything is trained, as nearly fast enough: {names}")
            settle(found, budget, rounds=shop.config.rounds)
            keep(found)
    while True:
        search(shop, found, keep=keep)
        settle(found, budget, rounds=shop.config.rounds)
        keep(found)
        left = [name for name, _ in steps(shop.config) if name not in found.done]
        enough = _smaller_that_fits(found, budget)
        if enough is not None:
            reason = f"{enough.made.method} fits the budget (--set search=all tries it)"
            found.not_tried |= dict.fromkeys(left, reason)
        if enough is not None or not left:
            return
        note(f"timed again, nothing smaller fits: going on with {left[0]}")


def search(shop: Workshop, found: Found, *, keep: Callable[[Found], None], train: bool = True) -> None:
    """Measure candidates method by method, as far as the settings say, going on from what was `found` before.

    It stops where a candidate fits the budget, unless every method is asked for; and without `train`, before
    the first method that trains. `keep` is called whenever a method is done.
    """
    if not found.measured:
        found.measured.append(measure_parent(shop))
        keep(found)
    for name, method in steps(shop.config):
        if name in found.done:
            continue
        if shop.config.search == "enough" and _smaller_that_fits(found, shop.config.budget) is not None:
            break
        if not train and name.split()[0] in _TRAINED:
            return
        found.not_tried.pop(name, None)
        try:
            _try(method, shop, found)
        except (HolotypeError, RuntimeError) as error:
            # What this model or machine does not allow is no reason to lose what the other methods made.
            _leave_out(name, error, found)
        found.done.append(name)
        keep(found)
    if shop.config.int8.sensitivity == "always":
        shop.sensitivity("min-max")


def _try(method: Method, shop: Workshop, found: Found) -> None:
    started, lost = time.perf_counter(), None
    for made in method(shop, found.measured):
        if made.parent is not None and lost is not None:
            found.not_tried[made.method] = f"it is made of {lost}, which was left out"
            continue
        try:
            measured = measure(made, shop, parent=found.parent, started=started)
        except BundleError as error:
            lost = made.method
            _leave_out(made.method, error, found)
        else:
            found.measured.append(measured)
            _tell(measured.candidate)
        started = time.perf_counter()


def _leave_out(name: str, error: Exception, found: Found) -> None:
    reason = str(error) if isinstance(error, HolotypeError) else f"{type(error).__name__}: {error}"
    found.not_tried[name] = " ".join(reason.split())
    note(f"{name} is left out: {found.not_tried[name]}")


def _smaller_that_fits(found: Found, budget: BudgetConfig) -> Measured | None:
    """Something better than the same network in another arithmetic, which hardly anybody calls compressed."""
    floats = floats_of(found)
    return next(
        (one for one in feasible(found, budget) if all(one is not other for other in floats)),
        None,
    )


def feasible(found: Found, budget: BudgetConfig) -> list[Measured]:
    """What fits and was not rejected before, the fastest first, then the smallest."""
    inside = [
        one
        for one in found.measured
        if not one.candidate.rejected_because and not rejections(one.candidate, found.parent, budget)
    ]
    return sorted(inside, key=lambda one: (one.candidate.latency_ms, one.candidate.bytes))


def floats_of(found: Found) -> list[Measured]:
    """The same network without integers: what INT8 has to beat."""
    return [one for one in found.measured if one.made.method in _FLOATS]


def rejections(candidate: Candidate, parent: Candidate, budget: BudgetConfig) -> tuple[str, ...]:
    """Why a candidate is not taken, each with by how much; empty where it fits."""
    broken = over_limits(candidate, budget)
    if candidate.method != parent.method and candidate.latency_ms >= parent.latency_ms:
        broken += (
            f"{candidate.latency_ms:.2f} ms, no faster here than the parent's {parent.latency_ms:.2f}",
        )
    return broken


def over_limits(candidate: Candidate, budget: BudgetConfig) -> tuple[str, ...]:
    """Which limits a candidate breaks, each with by how much."""
    broken = []
    if budget.drop is not None and candidate.drop.value > budget.drop + _ROUNDING:
        broken.append(
            f"loses {candidate.drop.value:.2f} points, {candidate.drop.value - budget.drop:.2f} too many"
        )
    if budget.class_drop is not None and candidate.class_drop > budget.class_drop + _ROUNDING:
        over = candidate.class_drop - budget.class_drop
        broken.append(f"{candidate.worst_class} loses {candidate.class_drop:.1f} points, {over:.1f} too many")
    if budget.size is not None and candidate.bytes > budget.size:
        broken.append(f"{candidate.bytes / 1e6:.2f} MB, {(candidate.bytes - budget.size) / 1e6:.2f} too many")
    if budget.latency is not None and candidate.latency_ms > budget.latency:
        over = candidate.latency_ms - budget.latency
        broken.append(f"{candidate.latency_ms:.2f} ms, {over:.2f} too many")
    return tuple(broken)


def _nearly_fits(candidate: Candidate, parent: Candidate, budget: BudgetConfig) -> bool:
    """Whether nothing but a latency, and that by less than what a machine's speed changes, keeps it out."""
    if candidate.rejected_because or not rejections(candidate, parent, budget):
        return False
    as_if = candidate.model_copy(update={"latency_ms": candidate.latency_ms / _NEARLY})
    return candidate.method != parent.method and not rejections(as_if, parent, budget)


def settle(found: Found, budget: BudgetConfig, *, rounds: int) -> None:
    """Time what fits or nearly does, the parent and all floats again, in turn: one race makes the decision.

    What does not run in it is rejected for good, by what was measured before.
    """
    finalists = {id(one) for one in (found.measured[0], *feasible(found, budget), *floats_of(found))}
    parent, places = found.parent, []
    for place, one in enumerate(found.measured):
        reasons = one.candidate.rejected_because or rejections(one.candidate, parent, budget)
        if id(one) in finalists or _nearly_fits(one.candidate, parent, budget):
            places.append(place)
        else:
            found.measured[place] = _changed(one, rejected_because=reasons)
    setups = [
        Setup(Path(c.bundle), c.runtime, c.precision) for c in (found.measured[i].candidate for i in places)
    ]
    timings = race(setups, batches=(1, 8), rounds=rounds, seconds=_FINAL_SECONDS)
    for place, timing in zip(places, timings, strict=True):
        found.measured[place] = _changed(
            found.measured[place],
            latency_ms=timing.batches[1].p50,
            throughput=timing.batches[8].images_per_second,
        )


def _changed(one: Measured, **update: object) -> Measured:
    return replace(one, candidate=one.candidate.model_copy(update=update))


def _tell(candidate: Candidate) -> None:
    note(
        f"{candidate.method}: {candidate.accuracy:.1%} on validation ({-candidate.drop.value:+.2f} points),"
        f" {candidate.bytes / 1e6:.2f} MB, {candidate.latency_ms:.2f} ms in {candidate.runtime}"
    )

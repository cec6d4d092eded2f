"""What the verbs about data and its annotation print: audit, convert, agree."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from holotype.terminal.tables import open_console, open_table

if TYPE_CHECKING:
    from holotype.agree.adjudicate import Adjudicated
    from holotype.agree.apply import Applied
    from holotype.agree.contract import Agreement, Plan
    from holotype.audit import AuditResult
    from holotype.audit.contract import Gate
    from holotype.convert import Converted

__all__ = [
    "show_adjudicated",
    "show_agreement",
    "show_applied",
    "show_audit",
    "show_converted",
    "show_plan",
]

_COEFFICIENTS = {
    "agreement": "raw agreement",
    "cohen_kappa": "Cohen's kappa",
    "fleiss_kappa": "Fleiss' kappa",
    "alpha": "Krippendorff's alpha",
    "ac1": "Gwet's AC1",
}


def show_audit(result: AuditResult) -> None:
    """The gates, what was found in a few words, the verdict with its reasons, and where the report is."""
    console, audit = open_console(), result.audit
    table = open_table("gate", "", "value", "wanted", left=("gate", ""))
    for gate in audit.gates:
        mark = {True: "passed", False: "FAILED", None: "not measured"}[gate.passed]
        table.add_row(gate.name, mark, "" if gate.value is None else f"{gate.value:.4g}", _wanted(gate))
    console.print(table)
    near = sum(cluster.kind == "near" for cluster in audit.duplicates.clusters)
    exact = len(audit.duplicates.clusters) - near
    console.print(
        f"{audit.source.images:,} images in {len(audit.source.classes)} classes:"
        f" {exact} exact and {near} near groups of copies, {len(audit.leakage.pairs)} leaked images,"
        f" {len(audit.label_suspects)} suspected labels, {len(audit.health)} odd images,"
        f" {len(audit.unreadable)} unreadable; {audit.seconds:.0f} s",
        soft_wrap=True,
    )
    for effect in audit.leakage.effects:
        console.print(
            f"{effect.split} accuracy of a linear head {effect.accuracy:.1%}, without its {effect.leaked}"
            f" leaked images {effect.without:.1%}"
        )
    console.print(f"verdict  {audit.verdict}")
    for reason in audit.reasons:
        console.print(f"         {reason}", markup=False, soft_wrap=True)
    console.print(f"report   {result.folder / 'audit.html'}", markup=False)


def _wanted(gate: Gate) -> str:
    from holotype.audit.gates import AT_LEAST

    return f"{'at least' if gate.name in AT_LEAST else 'at most'} {gate.threshold:.4g}"


def show_converted(result: Converted) -> None:
    """What was written, and every record that could not be."""
    console = open_console()
    for problem in result.problems:
        console.print(str(problem), markup=False, soft_wrap=True)
    counts = ", ".join(f"{label} {count:,}" for label, count in sorted(result.classes.items()))
    console.print(f"{result.out}: {result.records:,} examples ({counts})", markup=False)
    for line in result.notes:
        console.print(line, markup=False)
    if result.problems:
        console.print(f"{len(result.problems)} records could not be used; they are listed above")
    if result.preview is not None:
        console.print(f"preview  {result.preview}", markup=False)


def show_plan(plan: Plan, folder: Path) -> None:
    """How many images each annotator has."""
    console = open_console()
    table = open_table("annotator", "images", "in common")
    for name, tasks in plan.tasks.items():
        table.add_row(name, f"{len(tasks):,}", f"{plan.common:,}")
    console.print(table)
    console.print(
        f"tasks    {folder}\nkeep {folder / 'plan.json'} to yourself: it names the files", markup=False
    )


def show_agreement(result: Agreement) -> None:
    """The coefficients with their intervals, the verdict, and where the report is."""
    console = open_console()
    table = open_table("coefficient", "value", "95 % interval")
    for name, title in _COEFFICIENTS.items():
        estimate = getattr(result, name)
        if estimate.value is None:
            table.add_row(title, "undefined", estimate.reason or "")
        else:
            table.add_row(title, f"{estimate.value:.3f}", f"{estimate.low:.3f} – {estimate.high:.3f}")
    console.print(table)
    console.print(f"verdict  {result.verdict}")
    for reason in result.reasons:
        console.print(f"         {reason}", markup=False, soft_wrap=True)
    console.print(f"report   {Path(result.folder) / 'agreement.html'}", markup=False)


def show_adjudicated(result: Adjudicated, data: Path) -> None:
    """How far the queue is, and what comes next."""
    console = open_console()
    console.print(f"{result.decided:,} of {result.items:,} decided, {result.skipped:,} left open")
    if result.out is not None:
        console.print(f"queue    {result.out}", markup=False)
    console.print(f"next     holotype agree apply {data}", markup=False)


def show_applied(result: Applied) -> None:
    """Every label that changed, and why."""
    console = open_console()
    table = open_table("image", "before", "after", "why", left=("image", "before", "after", "why"))
    for change in (*result.changed, *result.dropped):
        table.add_row(change.path, change.before, change.after or "(left out)", change.reason)
    if table.row_count:
        console.print(table)
    console.print(
        f"revision {result.revision}: {len(result.changed)} relabelled, {len(result.dropped)} left out,"
        f" {result.unchanged} decided to be as they are, {result.skipped} left open"
    )

"""What the verbs that bring a model into production print: compress, benchmark, export, compare, ab."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from holotype.terminal.tables import named_way, open_console, open_table

if TYPE_CHECKING:
    from holotype.benchmark import Benchmark
    from holotype.compare import Comparison
    from holotype.compress import Compressed
    from holotype.experiment import Status
    from holotype.export import Exported

__all__ = [
    "show_benchmark",
    "show_comparison",
    "show_compressed",
    "show_experiment",
    "show_exported",
]


def show_compressed(outcome: Compressed) -> None:
    """The candidates as a table, the decision with its reason, and where everything is."""
    console = open_console()
    rows = [outcome.parent, *outcome.candidates]
    # Zeros are worth nothing but what a packer makes of them.
    zeros = [row for row in outcome.candidates if row.method.startswith("magnitude")]
    packed = ("packed MB",) if zeros else ()
    titles = "candidate", "accuracy", "points", "MB", *packed, "ms", "images/s", "runs in", ""
    table = open_table(*titles, left=("candidate", "runs in", ""))
    for row in rows:
        best = outcome.chosen is not None and row.method == outcome.chosen.method
        table.add_row(
            row.method,
            f"{row.accuracy:.1%}",
            f"{-row.drop.value:+.2f}",
            f"{row.bytes / 1e6:.2f}",
            *([f"{row.compressed_bytes / 1e6:.2f}"] if zeros else []),
            f"{row.latency_ms:.2f}",
            f"{row.throughput:.0f}",
            named_way(row.runtime, row.precision),
            "chosen" if best else "; ".join(row.rejected_because),
        )
    console.print(table)
    console.print(outcome.reason, markup=False, soft_wrap=True)
    for reason in dict.fromkeys(outcome.not_tried.values()):
        names = ", ".join(name for name, said in outcome.not_tried.items() if said == reason)
        console.print(f"not tried: {names}: {reason}", markup=False, soft_wrap=True)
    if zeros:
        console.print("zeros shrink no file that is stored as it is, only what is packed", markup=False)
    if outcome.test is not None:
        test = outcome.test
        console.print(f"test accuracy {test.accuracy:.1%} ({test.low:.1%} – {test.high:.1%}), read once")
    if outcome.chosen is not None:
        folder = Path(outcome.chosen.bundle).parent
        console.print(
            f"bundle  {outcome.chosen.bundle}\nreport  {folder / 'compress.html'}",
            markup=False,
            soft_wrap=True,
        )
        console.print(f"next    holotype serve {shlex.quote(str(folder))}", markup=False, soft_wrap=True)


def show_benchmark(result: Benchmark) -> None:
    """One row for each setup, and which to deploy."""
    console = open_console()
    batches = list(result.rows[0].timing.batches)
    data = result.rows[0].accuracy is not None
    columns = ["bundle", "runs in"]
    columns += [
        f"ms for {batches[0]}",
        "95 %",
        "99 %",
        *(f"for {count}" for count in batches[1:]),
        "images/s",
    ]
    columns += [*(["bytes to label", "accuracy"] if data else []), "MB", "RAM", "load"]
    table = open_table(*columns, left=("bundle", "runs in"))
    for row in result.rows:
        timing = row.timing
        threads = "" if row.threads is None else f" x{row.threads}"
        cells = ["/".join(Path(row.bundle).parts[-2:]), named_way(row.runtime, row.precision) + threads]
        first = timing.batches[batches[0]]
        cells += [f"{first.p50:.2f}", f"{first.p95:.2f}", f"{first.p99:.2f}"]
        cells += [f"{timing.batches[count].p50:.2f}" for count in batches[1:]]
        cells.append(f"{timing.batches[batches[-1]].images_per_second:.0f}")
        if row.accuracy is not None and timing.from_bytes is not None:
            cells += [f"{timing.from_bytes.p50:.2f}", f"{row.accuracy.value:.1%}"]
        cells += [f"{row.bytes / 1e6:.2f}", f"{timing.peak_mb:.0f}", f"{timing.load_seconds:.1f} s"]
        table.add_row(*cells)
    console.print(table)
    for purpose, row in (("latency", result.for_latency), ("throughput", result.for_throughput)):
        console.print(
            f"for {purpose}: {row.bundle} in {named_way(row.runtime, row.precision)}",
            markup=False,
            soft_wrap=True,
        )
    console.print(f"measured on {result.machine}", markup=False, soft_wrap=True)


def show_exported(result: Exported) -> None:
    """What the parity gate found and its limits, every label that changed, and what runs the bundle here."""
    console, parity = open_console(), result.parity
    limits = parity.limits
    lines = [
        str(result.bundle.path),
        f"{parity.candidate} agrees with {parity.reference} on {parity.images} images, probabilities within"
        f" {parity.largest_difference:.1g}",
        f"limits   {limits.flips:.0%} of the labels changed: {len(parity.flips)} are; probabilities shifted"
        f" by {limits.shift:g} on average: {parity.shift:.1g}"
        + (f"; any by {limits.gap:g}" if limits.gap < 1 else ""),
    ]
    for title, flips in (("flip", parity.flips), ("tie", parity.ties)):
        lines += [f"{title:<8} {one.path}: {one.reference}, now {one.candidate}" for one in flips]
    if result.fastest is not None:
        way = named_way(result.fastest.runtime, result.fastest.precision)
        lines.append(f"fastest  {way}: measured here, and remembered")
    console.print("\n".join(lines), markup=False, soft_wrap=True)


def show_comparison(found: Comparison) -> None:
    """The verdict, both bundles, and where their page is."""
    console = open_console()
    table = open_table("", "accuracy", "macro F1", "right alone", "MB", "ms", "runs in", left=("", "runs in"))
    for name, side, alone in (("A", found.a, found.only_a), ("B", found.b, found.only_b)):
        table.add_row(
            name,
            f"{side.accuracy:.1%}",
            f"{side.macro_f1:.1%}",
            str(alone),
            f"{side.bytes / 1e6:.2f}",
            "" if side.latency_ms is None else f"{side.latency_ms:.2f}",
            named_way(side.runtime, side.precision),
        )
    console.print(table)
    console.print(f"{found.verdict}: {found.reason}; McNemar's p {found.mcnemar_p:.3f}", markup=False)


def show_experiment(found: Status) -> None:
    """Both arms and what may be said."""
    console = open_console()
    table = open_table("arm", "answers", "failed", "keys", "labelled", "accuracy", "95 % ms", left=("arm",))
    arms = (
        ("champion", found.champion, found.champion_accuracy),
        ("challenger", found.challenger, found.challenger_accuracy),
    )
    for name, arm, accuracy in arms:
        table.add_row(
            name,
            f"{arm.answers:,}",
            f"{arm.failed:,}",
            f"{arm.keys:,}",
            f"{arm.labelled:,}",
            "" if accuracy is None else f"{accuracy.value:.1%} ({accuracy.low:.1%} to {accuracy.high:.1%})",
            "" if arm.p95_ms is None else f"{arm.p95_ms:.1f}",
        )
    console.print(table)
    value, low, high = (
        100 * part for part in (found.difference.value, found.difference.low, found.difference.high)
    )
    console.print(
        f"experiment {found.experiment}: challenger {value:+.1f} points, between {low:+.1f} and {high:+.1f}"
        f" however often one looks\n{found.verdict}; {found.advice}",
        markup=False,
    )

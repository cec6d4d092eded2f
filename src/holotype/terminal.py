"""Results for people: the tables and lines that the verbs print on stdout."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from holotype.agree.adjudicate import Adjudicated
    from holotype.agree.apply import Applied
    from holotype.agree.contract import Agreement, Plan
    from holotype.audit import AuditResult
    from holotype.audit.contract import Gate
    from holotype.benchmark import Benchmark
    from holotype.catalogue import Entry
    from holotype.compare import Comparison
    from holotype.compress import Compressed
    from holotype.config import Setting
    from holotype.convert import Converted
    from holotype.demo import Demo
    from holotype.experiment import Status
    from holotype.explain import Explanation
    from holotype.export import Exported
    from holotype.hard_samples import HardSamples
    from holotype.predictor import Prediction
    from holotype.report import Report
    from holotype.tune import TuneResult

__all__ = [
    "prediction_lines",
    "show_adjudicated",
    "show_agreement",
    "show_applied",
    "show_audit",
    "show_benchmark",
    "show_comparison",
    "show_compressed",
    "show_converted",
    "show_demo",
    "show_experiment",
    "show_explanation",
    "show_exported",
    "show_hard_samples",
    "show_models",
    "show_plan",
    "show_report",
    "show_settings",
    "show_tune",
]

_NAMES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "weighted_f1": "weighted F1",
    "log_loss": "log loss",
    "ece": "calibration error",
}
_TRIALS = 20
_SHARES = frozenset(_NAMES) - {"log_loss"}
_COEFFICIENTS = {
    "agreement": "raw agreement",
    "cohen_kappa": "Cohen's kappa",
    "fleiss_kappa": "Fleiss' kappa",
    "alpha": "Krippendorff's alpha",
    "ac1": "Gwet's AC1",
}


def show_report(report: Report, folder: Path) -> None:
    """The metrics of an evaluation, the most confused pairs, and where the report is."""
    console = _console()
    table = _table("metric", "value", "95 % interval")
    for name, title in _NAMES.items():
        estimate = getattr(report.metrics, name)
        form = "{:.1%}" if name in _SHARES else "{:.3f}"
        interval = f"{form.format(estimate.low)} – {form.format(estimate.high)}"
        table.add_row(title, form.format(estimate.value), interval)
    console.print(table)
    images = sum(score.support for score in report.per_class.values())
    console.print(f"{images:,} images of {report.split}, by {report.runtime}, {report.seconds:.0f} s in all")
    if report.sureness is not None:
        sure = report.sureness
        right = "" if sure.accuracy is None else f", {sure.accuracy:.1%} of these right"
        console.print(f"{sure.share:.1%} of the answers are sure{right}")
    if report.leaked is not None and report.leaked.images:
        rest = report.leaked.accuracy_without
        without = "" if rest is None else f"; accuracy without them {rest.value:.1%}"
        console.print(f"{report.leaked.images} of them have a copy in an earlier split{without}")
    for pair in report.confused[:3]:
        console.print(f"{pair.label} taken for {pair.predicted}: {pair.count}", markup=False)
    _show_diagnosis(report, console)
    console.print(f"bundle  {report.bundle.path}\nreport  {folder / 'report.html'}", markup=False)
    if report.confused:
        target = f"{shlex.quote(report.bundle.path)} --data {shlex.quote(report.dataset.path)}"
        for line in (f"explain {target} --split {report.split}", f"hard-samples {target}"):
            console.print(f"next    holotype {line}", markup=False, soft_wrap=True)


def _show_diagnosis(report: Report, console: Console) -> None:
    """Every finding with its evidence and the settings that address it."""
    if report.diagnosis:
        console.print("diagnosis of the training")
    for finding in report.diagnosis:
        console.print(
            f"{finding.severity:<8} {finding.name}: {finding.evidence}", markup=False, soft_wrap=True
        )
        for setting in finding.settings:
            console.print(f"         --set {setting}", markup=False, soft_wrap=True)


def show_demo(demo: Demo) -> None:
    """One row for each runtime, a few predictions, and where everything is."""
    console = _console()
    table = _table("runtime", "test accuracy", "95 % interval", "1 image", "8 images", "size")
    for row in demo.rows:
        low, high = row.accuracy.low, row.accuracy.high
        table.add_row(
            f"{row.runtime} fp32",
            f"{row.accuracy.value:.1%}",
            f"{low:.1%} – {high:.1%}",
            f"{row.one_ms:.1f} ms",
            f"{row.eight_ms:.1f} ms",
            f"{row.megabytes:.1f} MB",
        )
    console.print(table)
    for line in prediction_lines(demo.examples, style="table"):
        console.print(line, markup=False)
    result = demo.result
    console.print(
        f"report   {result.folder / 'report.html'}\nbundle   {result.best}\nopenvino {demo.openvino}\n"
        f"{demo.seconds:.0f} s in all. Next: holotype serve {result.best}",
        markup=False,
    )


def show_models(entries: Sequence[Entry], source: str) -> None:
    """The architectures, one a row."""
    console = _console()
    table = _table("name", "parameters", "input", "top-1", "MB", "ms here", "use", left=("name", "use"))
    for entry in entries:
        table.add_row(
            entry.name,
            f"{entry.parameters / 1e6:.1f} M",
            f"{entry.height}",
            "" if entry.top1 is None else f"{entry.top1:.1f}",
            f"{entry.megabytes:.0f}",
            "" if entry.milliseconds is None else f"{entry.milliseconds:.1f}",
            entry.use,
        )
    console.print(table)
    console.print(
        f"top-1: ImageNet, % ({source}). ms here: onnxruntime fp32, one image; --measure fills it in."
    )


def show_settings(settings: Sequence[Setting]) -> None:
    """Every key of a verb."""
    table = _table("key", "default", "type", "meaning", left=("key", "default", "type", "meaning"))
    for setting in settings:
        table.add_row(setting.key, setting.default, setting.type, setting.meaning)
    _console().print(table)


def show_audit(result: AuditResult) -> None:
    """The gates, what was found in a few words, the verdict with its reasons, and where the report is."""
    console, audit = _console(), result.audit
    table = _table("gate", "", "value", "wanted", left=("gate", ""))
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
    console = _console()
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
    console = _console()
    table = _table("annotator", "images", "in common")
    for name, tasks in plan.tasks.items():
        table.add_row(name, f"{len(tasks):,}", f"{plan.common:,}")
    console.print(table)
    console.print(
        f"tasks    {folder}\nkeep {folder / 'plan.json'} to yourself: it names the files", markup=False
    )


def show_agreement(result: Agreement) -> None:
    """The coefficients with their intervals, the verdict, and where the report is."""
    console = _console()
    table = _table("coefficient", "value", "95 % interval")
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
    console = _console()
    console.print(f"{result.decided:,} of {result.items:,} decided, {result.skipped:,} left open")
    if result.out is not None:
        console.print(f"queue    {result.out}", markup=False)
    console.print(f"next     holotype agree apply {data}", markup=False)


def show_applied(result: Applied) -> None:
    """Every label that changed, and why."""
    console = _console()
    table = _table("image", "before", "after", "why", left=("image", "before", "after", "why"))
    for change in (*result.changed, *result.dropped):
        table.add_row(change.path, change.before, change.after or "(left out)", change.reason)
    if table.row_count:
        console.print(table)
    console.print(
        f"revision {result.revision}: {len(result.changed)} relabelled, {len(result.dropped)} left out,"
        f" {result.unchanged} decided to be as they are, {result.skipped} left open"
    )


def show_compressed(outcome: Compressed) -> None:
    """The candidates as a table, the decision with its reason, and where everything is."""
    console = _console()
    rows = [outcome.parent, *outcome.candidates]
    # Zeros are worth nothing but what a packer makes of them.
    zeros = [row for row in outcome.candidates if row.method.startswith("magnitude")]
    packed = ("packed MB",) if zeros else ()
    titles = "candidate", "accuracy", "points", "MB", *packed, "ms", "images/s", "runs in", ""
    table = _table(*titles, left=("candidate", "runs in", ""))
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
            _way(row.runtime, row.precision),
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
    console = _console()
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
    table = _table(*columns, left=("bundle", "runs in"))
    for row in result.rows:
        timing = row.timing
        threads = "" if row.threads is None else f" x{row.threads}"
        cells = ["/".join(Path(row.bundle).parts[-2:]), _way(row.runtime, row.precision) + threads]
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
            f"for {purpose}: {row.bundle} in {_way(row.runtime, row.precision)}", markup=False, soft_wrap=True
        )
    console.print(f"measured on {result.machine}", markup=False, soft_wrap=True)


def show_exported(result: Exported) -> None:
    """What the parity gate found and its limits, every label that changed, and what runs the bundle here."""
    console, parity = _console(), result.parity
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
        way = _way(result.fastest.runtime, result.fastest.precision)
        lines.append(f"fastest  {way}: measured here, and remembered")
    console.print("\n".join(lines), markup=False, soft_wrap=True)


def show_comparison(found: Comparison) -> None:
    """The verdict, both bundles, and where their page is."""
    console = _console()
    table = _table("", "accuracy", "macro F1", "right alone", "MB", "ms", "runs in", left=("", "runs in"))
    for name, side, alone in (("A", found.a, found.only_a), ("B", found.b, found.only_b)):
        table.add_row(
            name,
            f"{side.accuracy:.1%}",
            f"{side.macro_f1:.1%}",
            str(alone),
            f"{side.bytes / 1e6:.2f}",
            "" if side.latency_ms is None else f"{side.latency_ms:.2f}",
            _way(side.runtime, side.precision),
        )
    console.print(table)
    console.print(f"{found.verdict}: {found.reason}; McNemar's p {found.mcnemar_p:.3f}", markup=False)


def show_experiment(found: Status) -> None:
    """Both arms and what may be said."""
    console = _console()
    table = _table("arm", "answers", "failed", "keys", "labelled", "accuracy", "95 % ms", left=("arm",))
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


def show_explanation(result: Explanation) -> None:
    """The confused classes or the images that were explained, and where the page is."""
    console = _console()
    for pair in result.pairs:
        for i, count in enumerate(pair.counts):
            line = f"{pair.classes[i]} taken for {pair.classes[1 - i]}: {count} of {pair.images[i]}"
            console.print(line, markup=False)
    for shown in result.named:
        two = "  ".join(f"{part.label} {part.probability:.1%}" for part in shown.evidence)
        console.print(f"{two}  {shown.path}", markup=False, soft_wrap=True)
    for file in result.unreadable:
        console.print(f"{file.path}: {file.error}", markup=False, soft_wrap=True)
    console.print(f"page     {result.page}\npicture  {result.picture}", markup=False, soft_wrap=True)


def show_hard_samples(result: HardSamples) -> None:
    """The hardest images with the labels of their neighbours, and what to do with the list."""
    console = _console()
    for sample in result.samples[:10]:
        near = ", ".join(neighbour.label for neighbour in sample.neighbours)
        said = f"{sample.label} called {sample.predicted}, near {near}"
        console.print(f"{sample.loss:.2f}  {said}  {sample.path}", markup=False, soft_wrap=True)
    console.print(
        f"{len(result.samples):,} hardest of {result.images:,} images of {result.split}\n"
        f"list     {result.file}\npage     {result.page}",
        markup=False,
        soft_wrap=True,
    )
    if result.split == "test":
        console.print("what is trained on because of test images makes the accuracy on them too good")
    if result.training_images:
        command = f"holotype train {shlex.quote(result.dataset)} --focus {shlex.quote(result.file)}"
        console.print(f"next     {command}", markup=False, soft_wrap=True)


def show_tune(result: TuneResult) -> None:
    """The trials, the best first, and what to do with the best settings."""
    from holotype.tune.results import short_names, shown, shown_value

    console = _console()
    rows = result.trials[:_TRIALS]
    names = short_names(list(dict.fromkeys(key for row in rows for key in row.params)))
    cells = [{names[key]: shown(label) for key, label in row.params.items()} for row in rows]
    widths = {name: max(len(name), *(len(row.get(name, "")) for row in cells)) for name in names.values()}
    apart = sum(widths.values()) + 2 * len(widths) + 50 <= console.width
    settings = tuple(widths) if apart else ("settings",)
    titles = ("trial", result.metric.replace("_", " "), *settings, "epochs", "seconds", "state")
    table = _table(*titles, left=("settings", "state"))
    for row, own in zip(rows, cells, strict=True):
        listed = ", ".join(f"{name} {text}" for name, text in own.items())
        texts = [own.get(name, "") for name in widths] if apart else [listed]
        seconds = "" if row.seconds is None else f"{row.seconds:.0f}"
        value = shown_value(row.value, result.metric)
        table.add_row(str(row.number), value, *map(escape, texts), str(row.epochs), seconds, row.state)
    console.print(table)
    if len(result.trials) > _TRIALS:
        console.print(f"… and {len(result.trials) - _TRIALS} more")
    console.print(f"trials   {result.folder / 'trials.csv'}", markup=False, soft_wrap=True)
    if result.report is not None:
        console.print(f"report   {result.report}", markup=False, soft_wrap=True)
    if result.interrupted:
        console.print("interrupted: the same command goes on with the study")
    if result.next_command is not None:
        console.print(f"next     {result.next_command}", markup=False, soft_wrap=True)


def prediction_lines(predictions: Iterable[Prediction], *, style: str) -> Iterable[str]:
    """A line for each prediction: `table` (for people), `csv` (after its header) or `jsonl`."""
    from holotype.predict import as_csv_row, as_json, csv_header

    if style == "csv":
        yield csv_header()
    for prediction in predictions:
        if style == "csv":
            yield as_csv_row(prediction)
        elif style == "jsonl":
            yield json.dumps(as_json(prediction), allow_nan=False)
        else:
            yield _line(prediction)


def _line(prediction: Prediction) -> str:
    if prediction.error is not None:
        return f"error {prediction.error.status}  {prediction.path}: {prediction.error.message}"
    best, *others = prediction.top
    rest = "  ".join(f"{choice.label} {choice.probability:.1%}" for choice in others[:2])
    doubt = "" if prediction.sure else "  not sure"
    return (
        f"{best.label}  {best.probability:.1%}  {prediction.path}" + (f"  ({rest})" if rest else "") + doubt
    )


def _way(runtime: str, precision: str) -> str:
    """A runtime, with the arithmetic of what is not in integers where it is not the usual one."""
    return runtime if precision == "fp32" else f"{runtime} {precision}"


def _table(*titles: str, left: Sequence[str] | None = None) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        aligned_left = title == titles[0] if left is None else title in left
        table.add_column(
            title, justify="left" if aligned_left else "right", no_wrap=title in (titles[0], "runs in")
        )
    return table


def _console() -> Console:
    return Console(highlight=False, soft_wrap=False)

"""What the verbs that make and ask a model print: demo, train, tune, predict, explain and their like."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from holotype.terminal.tables import open_console, open_table

if TYPE_CHECKING:
    from holotype.catalogue import Entry
    from holotype.config import Setting
    from holotype.demo import Demo
    from holotype.explain import Explanation
    from holotype.hard_samples import HardSamples
    from holotype.predictor import Prediction
    from holotype.report import Report
    from holotype.tune import TuneResult

__all__ = [
    "prediction_lines",
    "show_demo",
    "show_explanation",
    "show_hard_samples",
    "show_models",
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


def show_demo(demo: Demo) -> None:
    """One row for each runtime, a few predictions, and where everything is."""
    console = open_console()
    table = open_table("runtime", "test accuracy", "95 % interval", "1 image", "8 images", "size")
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


def show_report(report: Report, folder: Path) -> None:
    """The metrics of an evaluation, the most confused pairs, and where the report is."""
    console = open_console()
    table = open_table("metric", "value", "95 % interval")
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


def show_tune(result: TuneResult) -> None:
    """The trials, the best first, and what to do with the best settings."""
    from holotype.tune.results import short_names, shown, shown_value

    console = open_console()
    rows = result.trials[:_TRIALS]
    names = short_names(list(dict.fromkeys(key for row in rows for key in row.params)))
    cells = [{names[key]: shown(label) for key, label in row.params.items()} for row in rows]
    widths = {name: max(len(name), *(len(row.get(name, "")) for row in cells)) for name in names.values()}
    apart = sum(widths.values()) + 2 * len(widths) + 50 <= console.width
    settings = tuple(widths) if apart else ("settings",)
    titles = ("trial", result.metric.replace("_", " "), *settings, "epochs", "seconds", "state")
    table = open_table(*titles, left=("settings", "state"))
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


def show_explanation(result: Explanation) -> None:
    """The confused classes or the images that were explained, and where the page is."""
    console = open_console()
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
    console = open_console()
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


def show_models(entries: Sequence[Entry], source: str) -> None:
    """The architectures, one a row."""
    console = open_console()
    table = open_table("name", "parameters", "input", "top-1", "MB", "ms here", "use", left=("name", "use"))
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
    table = open_table("key", "default", "type", "meaning", left=("key", "default", "type", "meaning"))
    for setting in settings:
        table.add_row(setting.key, setting.default, setting.type, setting.meaning)
    open_console().print(table)

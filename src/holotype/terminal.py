"""Results for people: the tables and lines that the verbs print on stdout."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from holotype.catalogue import Entry
    from holotype.config import Setting
    from holotype.demo import Demo
    from holotype.predictor import Prediction
    from holotype.report import Report

__all__ = ["prediction_lines", "show_demo", "show_models", "show_report", "show_settings"]

_NAMES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "weighted_f1": "weighted F1",
    "log_loss": "log loss",
    "ece": "calibration error",
}
_SHARES = frozenset(_NAMES) - {"log_loss"}


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
    for pair in report.confused[:3]:
        console.print(f"{pair.label} taken for {pair.predicted}: {pair.count}", markup=False)
    console.print(f"bundle  {report.bundle.path}\nreport  {folder / 'report.html'}", markup=False)


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
    return f"{best.label}  {best.probability:.1%}  {prediction.path}" + (f"  ({rest})" if rest else "")


def _table(*titles: str, left: Sequence[str] | None = None) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        aligned_left = title == titles[0] if left is None else title in left
        table.add_column(title, justify="left" if aligned_left else "right", no_wrap=title == titles[0])
    return table


def _console() -> Console:
    return Console(highlight=False, soft_wrap=False)

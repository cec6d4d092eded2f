"""What a model is worth, as `report.json` for programs and `report.html` for people."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from pathlib import Path

from holotype.bundle import write_text
from holotype.errors import require
from holotype.metrics import Predictions
from holotype.report.contract import (
    BundleSummary,
    ClassScore,
    ConfusedPair,
    Confusion,
    DatasetSummary,
    Estimate,
    Fault,
    Finding,
    HistoryRow,
    Leaked,
    Metrics,
    Mistake,
    Report,
    Split,
    Sureness,
    UnreadableFile,
    build_report,
)
from holotype.report.page import Thumbnail, write_page
from holotype.report.plots import confusion_png, history_png, reliability_png
from holotype.report.render import Figure, data_uri, embed_figure, percent, write_html
from holotype.report.style import DARK, LIGHT

__all__ = [
    "BundleSummary",
    "ClassScore",
    "ConfusedPair",
    "Confusion",
    "DatasetSummary",
    "Estimate",
    "Fault",
    "Figure",
    "Finding",
    "HistoryRow",
    "Leaked",
    "Metrics",
    "Mistake",
    "Report",
    "Split",
    "Sureness",
    "Thumbnail",
    "UnreadableFile",
    "build_report",
    "confusion_png",
    "data_uri",
    "embed_figure",
    "history_png",
    "percent",
    "reliability_png",
    "write_html",
    "write_page",
    "write_report",
]


def write_report(folder: Path, report: Report, *, predictions: Predictions, thumbnail: Thumbnail) -> None:
    """Write `report.json`, a self-contained `report.html` and its two main figures to `folder`.

    These are `confusion_matrix.png` and `reliability.png`.
    `predictions` are those `report` was built from. `thumbnail` gives PNG or JPEG bytes for one of their
    paths, or None. `MissingExtraError` where matplotlib or Jinja2 is missing, but after writing the JSON.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "report.json", report.model_dump_json(indent=1) + "\n")
    for library in ("matplotlib", "jinja2"):
        require(library, extra="train", purpose="drawing a report")
    with tempfile.TemporaryDirectory(prefix="holotype-report-") as scratch:
        figures = _draw(Path(scratch), report, predictions=predictions)
        write_page(folder / "report.html", report, figures=figures, thumbnail=thumbnail)
        _publish(figures["confusion"], folder / "confusion_matrix.png")
        _publish(figures["reliability"], folder / "reliability.png")


def _draw(folder: Path, report: Report, *, predictions: Predictions) -> dict[str, Path]:
    """Every figure that the report has data for, light and dark, by its name on the page."""
    figures: dict[str, Path] = {}
    for suffix, theme in (("", LIGHT), ("_dark", DARK)):
        confusion, reliability, history = (
            folder / f"{name}{suffix}.png" for name in ("confusion", "reliability", "history")
        )
        confusion_png(report.confusion, confusion, theme=theme)
        reliability_png(predictions, reliability, theme=theme)
        figures |= {f"confusion{suffix}": confusion, f"reliability{suffix}": reliability}
        if history_png(report.history, history, theme=theme):
            figures[f"history{suffix}"] = history
    return figures


def _publish(source: Path, target: Path) -> None:
    """Copy beside the target and rename, so that a reader never sees half a picture."""
    scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        shutil.copyfile(source, scratch)
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)

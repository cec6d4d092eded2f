"""One self-contained HTML page about a `Report`: pictures as data URIs, no request to anywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from holotype.report.contract import ClassScore, ConfusedPair, Estimate, Fault, Report
from holotype.report.render import Figure, data_uri, embed_figure, percent, write_html

__all__ = ["Thumbnail", "write_page"]

Thumbnail = Callable[[str], bytes | None]
"""Path of a dataset image → PNG or JPEG bytes of a small picture; None where there is none."""

_UNREADABLE = 200

_MEANINGS = {
    "accuracy": ("Accuracy", "share of images with the right answer"),
    "balanced_accuracy": ("Balanced accuracy", "mean recall: every class counts the same"),
    "macro_f1": ("Macro F1", "mean F1 over classes: every class counts the same"),
    "weighted_f1": ("Weighted F1", "mean F1 over classes, weighted by their images"),
    "log_loss": ("Log loss", "mean of −ln p(true class), in nats; lower is better"),
    "ece": ("Calibration error", "mean gap between confidence and accuracy (ECE); lower is better"),
}


_FAULTS: dict[Fault, str] = {
    "overfitting": "Overfitting",
    "underfitting": "Underfitting",
    "learning-rate-high": "Learning rate too high",
    "learning-rate-low": "Learning rate too low",
    "exploding-gradients": "Exploding gradients",
    "vanishing-gradients": "Vanishing gradients",
    "dead-layer": "Dead layer",
    "norm-mismatch": "Batch-norm statistics do not fit",
    "label-noise": "Wrong labels",
    "input-bound": "Waiting for data",
}


@dataclass(frozen=True)
class _MetricRow:
    title: str
    meaning: str
    estimate: Estimate
    share: bool  # in [0, 1], shown as a percentage


@dataclass(frozen=True)
class _ClassRow:
    number: int
    name: str
    score: ClassScore
    instead: tuple[tuple[str, int], ...]


def write_page(file: Path, report: Report, *, figures: Mapping[str, Path], thumbnail: Thumbnail) -> None:
    """Write `report` as HTML to `file`, atomically.

    `figures` maps `confusion`, `reliability` and, where something was trained, `history` to PNG files; a
    figure `NAME_dark` beside them is shown in dark mode. `thumbnail` is asked once for each image shown.
    """
    write_html(
        file,
        "report.html.j2",
        filters={"interval": _interval},
        content={
            "report": report,
            "figures": _embed_figures(figures),
            "thumbnails": {path: data_uri(thumbnail(path)) for path in _shown(report)},
            **_tables(report),
        },
    )


def _tables(report: Report) -> dict[str, Any]:
    """What the template shows that is derived from the report rather than in it."""
    wrong = report.images - sum(row[i] for i, row in enumerate(report.confusion.counts))
    counts = report.dataset.counts.values()
    names = {name: None for by_split in counts for name in by_split}
    order = ("train", "validation", "test")
    splits = [*(s for s in order if s in names), *(s for s in names if s not in order)]
    totals = [sum(by_split.get(split, 0) for by_split in counts) for split in splits]
    return {
        "wrong": wrong,
        "rule_of_three": min(3 / report.images, 1.0),
        "metrics": [
            _MetricRow(title, meaning, getattr(report.metrics, name), share=name != "log_loss")
            for name, (title, meaning) in _MEANINGS.items()
        ],
        "faults": _FAULTS,
        "pairs": _pairs(report),
        "classes": _class_rows(report),
        "splits": splits,
        "totals": [*totals, sum(totals)],
        "unreadable_limit": _UNREADABLE,
    }


def _pairs(report: Report) -> list[ConfusedPair]:
    """The pairs worth a picture: those that happened more than once, or the first six."""
    return [pair for i, pair in enumerate(report.confused) if pair.count > 1 or i < 6]


def _class_rows(report: Report) -> list[_ClassRow]:
    """Classes by F1, the weakest first; those without images last."""
    counts = np.array(report.confusion.counts)
    np.fill_diagonal(counts, 0)
    names = report.confusion.classes
    rows = [
        _ClassRow(
            number=i,
            name=name,
            score=report.per_class[name],
            instead=tuple(
                (names[j], int(counts[i, j]))
                for j in np.argsort(-counts[i], kind="stable")[:3]
                if counts[i, j] > 0
            ),
        )
        for i, name in enumerate(names)
    ]
    return sorted(rows, key=lambda row: (row.score.support == 0, row.score.f1, row.number))


def _shown(report: Report) -> list[str]:
    """Paths of every picture on the page, each once, in order of appearance."""
    paths = [path for pair in _pairs(report) for path in pair.paths]
    return list(dict.fromkeys([*paths, *(mistake.path for mistake in report.mistakes)]))


def _embed_figures(files: Mapping[str, Path]) -> dict[str, Figure | None]:
    return {
        name: embed_figure(files[name], files.get(f"{name}_dark")) if name in files else None
        for name in ("confusion", "reliability", "history")
    }


def _interval(estimate: Estimate) -> str:
    return f"{100 * estimate.low:.1f}\N{NO-BREAK SPACE}–\N{NO-BREAK SPACE}{percent(estimate.high)}"

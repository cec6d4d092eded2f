"""One self-contained HTML page about an `Agreement`: no request to anywhere, pictures as data URIs."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from holotype.agree.contract import Agreement, AnnotatorAgreement, Estimate
from holotype.report import Thumbnail, data_uri, write_html

__all__ = ["write_page"]

# A matrix of more classes is no longer read; its largest cells are.
_MATRIX = 20
_CELLS = 15
_SHOWN_PAIRS = 4


def write_page(file: Path, result: Agreement, *, thumbnail: Thumbnail) -> None:
    """Write `result` as HTML to `file`, atomically. `thumbnail` is asked once for each image shown.

    `MissingExtraError` where Jinja2 is missing.
    """
    shown = result.confused[:_SHOWN_PAIRS]
    write_html(
        file,
        "score.html.j2",
        package="holotype.agree",
        filters={"number": _number, "interval": _interval, "place": _place},
        content={
            "result": result,
            "coefficients": _coefficients(result),
            "shown": shown,
            "thumbnails": {path: data_uri(thumbnail(path)) for pair in shown for path in pair.paths},
            "matrix_limit": _MATRIX,
            "largest": {name: _largest(part, result.classes) for name, part in result.per_annotator.items()},
        },
    )


def _coefficients(result: Agreement) -> list[tuple[str, str, Estimate]]:
    return [
        (
            "Krippendorff's alpha",
            "1 less observed over expected disagreement; the verdict is by this",
            result.alpha,
        ),
        ("Fleiss' kappa", "agreement beyond that of annotators who share one habit", result.fleiss_kappa),
        (
            "Cohen's kappa",
            "agreement beyond that of two annotators' own habits, mean over pairs",
            result.cohen_kappa,
        ),
        ("Gwet's AC1", "as kappa, but steady where one class is far the most frequent", result.ac1),
        ("Raw agreement", "share of pairs of votes on one image that are equal", result.agreement),
    ]


def _largest(annotator: AnnotatorAgreement, classes: tuple[str, ...]) -> list[tuple[str, str, int]]:
    """(consensus, said, votes) of the most frequent mistakes of one annotator."""
    counts = np.array(annotator.confusion)
    np.fill_diagonal(counts, 0)
    order = np.argsort(-counts, axis=None, kind="stable")[:_CELLS]
    cells = [(int(cell) // len(counts), int(cell) % len(counts)) for cell in order]
    return [(classes[i], classes[j], int(counts[i, j])) for i, j in cells if counts[i, j]]


def _number(estimate: Estimate) -> str:
    return "–" if estimate.value is None else f"{estimate.value:.3f}"


def _interval(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return estimate.reason or ""
    return f"{estimate.low:.3f}\N{NO-BREAK SPACE}–\N{NO-BREAK SPACE}{estimate.high:.3f}"


def _place(value: float) -> str:
    """Where a coefficient stands on a line from 0 to 1, in CSS."""
    return f"{100 * min(max(value, 0.0), 1.0):.2f}%"

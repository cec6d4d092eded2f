"""One self-contained HTML page about an `Agreement`: no request to anywhere, pictures as data URIs."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from holotype.agree.contract import Agreement, AnnotatorAgreement, Estimate
from holotype.bundle import write_text
from holotype.dataset.listing import file_and_region
from holotype.errors import ImageError, require
from holotype.preprocess import Preprocess, read_pixels

__all__ = ["thumbnailer", "write_page"]

# A matrix of more classes is no longer read; its largest cells are.
_MATRIX = 20
_CELLS = 15
_SHOWN_PAIRS = 4


def thumbnailer(root: Path, *, side: int = 160) -> Callable[[str], bytes | None]:
    """A function from a path in the dataset at `root` to a small JPEG; None where there is no such image."""
    spec = Preprocess(height=side, width=side, resize="letterbox", filter="bilinear")

    def thumbnail(name: str) -> bytes | None:
        path, region = file_and_region(name)
        try:
            pixels = read_pixels((root / path).read_bytes(), spec=spec, region=region)
        except (OSError, ImageError):
            return None
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=85)
        return buffer.getvalue()

    return thumbnail


def write_page(file: Path, result: Agreement, *, thumbnail: Callable[[str], bytes | None]) -> None:
    """Write `result` as HTML to `file`, atomically. `thumbnail` is asked once for each image shown.

    `MissingExtraError` where Jinja2 is missing.
    """
    require("jinja2", extra="train", purpose="drawing a report")
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        # Style and sorting are those of the other reports.
        loader=ChoiceLoader([PackageLoader("holotype.agree", "."), PackageLoader("holotype.report")]),
        autoescape=True,  # class names, annotators and paths are whatever somebody called them
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": lambda value: f"{value:,}",
        "fixed": lambda value, digits: f"{value:.{digits}f}",
        "percent": lambda value: f"{100 * value:.1f}\N{NO-BREAK SPACE}%",
        "number": _number,
        "interval": _interval,
        "place": _place,
    }
    shown = result.confused[:_SHOWN_PAIRS]
    script = environment.get_template("report.js").render()
    page = environment.get_template("score.html.j2").render(
        result=result,
        coefficients=_coefficients(result),
        shown=shown,
        thumbnails={path: _embed(thumbnail(path)) for pair in shown for path in pair.paths},
        matrix_limit=_MATRIX,
        largest={name: _largest(part, result.classes) for name, part in result.per_annotator.items()},
        script=Markup(script),  # noqa: S704 - our own file, nothing of the user's is in it
        script_hash=f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
    )
    write_text(file, page)


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


def _embed(data: bytes | None) -> str | None:
    return None if data is None else f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"

"""`holotype predict`: files, folders, globs and lists of names, to rows of answers."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from holotype.errors import ConfigError, ImageError
from holotype.predictor import Prediction, Predictor
from holotype.preprocess import SUFFIXES

__all__ = ["as_csv_row", "as_json", "csv_header", "expand", "save_inputs"]

_CSV_COLUMNS = ("path", "label", "probability", "sure", "top", "error")


def expand(paths: Sequence[str]) -> list[str]:
    """The files that arguments mean: a folder's images (searched deeply), a glob's matches, a file itself.

    "-" reads one file name a line from stdin. A name that matches nothing is kept and answered by an error
    row; no images at all is a `ConfigError`.
    """
    files: list[str] = []
    for argument in paths:
        if argument == "-":
            files += [line.strip() for line in sys.stdin if line.strip()]
            continue
        path = Path(argument)
        if path.is_dir():
            found = (p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            files += sorted(str(p) for p in found)
        elif not path.exists() and any(sign in argument for sign in "*?["):
            anchor = Path(path.anchor) if path.is_absolute() else Path()
            files += sorted(str(p) for p in anchor.glob(str(path.relative_to(path.anchor))) if p.is_file())
        else:
            files.append(argument)
    if not files:
        raise ConfigError(
            "no images found", where=" ".join(paths), fix="give files, folders, globs or - for a list"
        )
    return files


def as_json(prediction: Prediction) -> dict[str, Any]:
    """path, label, probability, whether it is sure and why not, top; `error` where there is no answer."""
    row: dict[str, Any] = {
        "path": prediction.path,
        "label": prediction.label,
        "probability": prediction.probability,
        "sure": prediction.sure,
        "doubts": list(prediction.doubts),
        "top": [{"label": choice.label, "probability": choice.probability} for choice in prediction.top],
    }
    if prediction.left_open is not None:
        row["left_open"] = list(prediction.left_open)
    if prediction.distance is not None:
        row["distance"] = prediction.distance
    if prediction.error is not None:
        row["error"] = {"status": prediction.error.status, "message": prediction.error.message}
    return row


def csv_header() -> str:
    return ",".join(_CSV_COLUMNS)


def as_csv_row(prediction: Prediction) -> str:
    """One CSV line in the order of `csv_header`; `top` is a JSON list."""
    row = as_json(prediction)
    error = row.get("error")
    cells = [
        row["path"],
        row["label"],
        row["probability"],
        "yes" if row["sure"] else "no",
        json.dumps(row["top"]),
        error["message"] if error else "",
    ]
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="").writerow("" if cell is None else cell for cell in cells)
    return buffer.getvalue()


def save_inputs(predictor: Predictor, files: Sequence[str], folder: Path) -> Iterator[Path]:
    """Write, as PNG, the pixels that the model sees of each readable file."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, file in enumerate(files):
        try:
            pixels = predictor.read(file)
        except (OSError, ImageError):
            continue
        target = folder / f"{number:05d}-{Path(file).stem}.png"
        Image.fromarray(pixels).save(target)
        yield target

"""A predictor over a dataset's split: `Predictions` to measure."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from holotype.dataset import Dataset, Split
from holotype.errors import DatasetError, ImageError
from holotype.metrics import Predictions
from holotype.predictor import Predictor
from holotype.preprocess import Preprocess, read_pixels
from holotype.progress import track
from holotype.report import BundleSummary, DatasetSummary, Report, UnreadableFile, build_report, write_report
from holotype.runlog import Row

_THUMBNAIL = Preprocess(height=160, width=160, resize="letterbox", filter="bilinear")

__all__ = ["choose_split", "evaluate_split", "score"]


def choose_split(dataset: Dataset, *, wanted: str = "auto") -> Split:
    """The split to evaluate: "auto" is test where there is one, else validation."""
    for split in dataset.splits:
        if split == wanted:
            return split
    if wanted != "auto":
        raise DatasetError(
            f"has no {wanted} split", where=dataset.source, fix=f"it has {', '.join(dataset.splits)}"
        )
    return "test" if "test" in dataset.splits else "validation"


def score(predictor: Predictor, dataset: Dataset, *, split: Split) -> Predictions:
    """Run every image of `split`, from the pixel cache; classes are matched by name."""
    position = {label: i for i, label in enumerate(predictor.classes)}
    unknown = [label for label in dataset.classes if label not in position]
    if unknown:
        raise DatasetError(
            f"has a class the bundle does not know: {unknown[0]!r}",
            where=dataset.source,
            fix=f"the bundle knows {', '.join(predictor.classes)}",
        )
    rows = dataset.rows(split)
    batches = [rows[i : i + predictor.batch_size] for i in range(0, len(rows), predictor.batch_size)]
    parts = []
    with track(f"evaluating {split}", total=len(rows)) as progress:
        for images in dataset.pixels(batches):
            parts.append(predictor.probabilities(images))
            progress.advance(len(images))
    own = np.array([position[label] for label in dataset.classes], dtype=np.int64)
    return Predictions(
        classes=predictor.classes,
        paths=dataset.paths(rows),
        labels=own[dataset.labels(rows)],
        probabilities=np.concatenate(parts),
    )


def evaluate_split(
    predictor: Predictor,
    dataset: Dataset,
    *,
    split: Split,
    folder: Path,
    started: float,
    history: Sequence[Row] = (),
) -> Report:
    """Score a split and write report.json, report.html and confusion_matrix.png into `folder`.

    `started` is the `time.perf_counter()` at which the user's command began: `seconds` counts from it.
    """
    predictions = score(predictor, dataset, split=split)
    bundle = predictor.bundle
    report = build_report(
        predictions,
        dataset=DatasetSummary(
            path=str(dataset.source),
            root_hash=dataset.root_hash,
            images=len(dataset.table),
            counts=dataset.counts(),
            unreadable=tuple(UnreadableFile(path=u.path, error=u.error) for u in dataset.unreadable),
            deviation=dataset.deviation,
        ),
        bundle=BundleSummary(hash=bundle.hash, path=str(bundle.path)),
        runtime=predictor.runtime.name,
        split=split,
        seconds=time.perf_counter() - started,
        history=history,
    )

    def thumbnail(path: str) -> bytes | None:
        try:
            pixels = read_pixels(dataset.file(path).read_bytes(), spec=_THUMBNAIL, limits=dataset.limits)
        except (OSError, ImageError):
            return None
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=85)
        return buffer.getvalue()

    write_report(folder, report, predictions=predictions, thumbnail=thumbnail)
    return report

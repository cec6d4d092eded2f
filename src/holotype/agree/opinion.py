"""A model's opinion of the images that people voted on, for the consensus."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from holotype.dataset.examples import read_example
from holotype.errors import DatasetError, ImageError
from holotype.metrics import Predictions
from holotype.predictor import load
from holotype.progress import note, track

__all__ = ["predict_items"]


def predict_items(target: Path | str, items: Sequence[str], *, root: Path) -> Predictions:
    """Probabilities of a bundle or run folder for dataset paths below `root`; unreadable ones are left out.

    The model must not have been trained on these images, or it repeats the labels it was given. `labels` of
    the result are its own answers. `DatasetError` where none of the images can be read.
    """
    predictor = load(target)
    spec = predictor.bundle.manifest.preprocess
    read, rows, batch = [], [], []
    with track("asking the model", total=len(items)) as progress:
        for item in items:
            try:
                batch.append(read_example(root, item, spec=spec))
                read.append(item)
            except (OSError, ImageError):
                pass
            if len(batch) == predictor.batch_size:
                rows.append(predictor.probabilities(np.stack(batch)))
                batch = []
            progress.advance()
    if batch:
        rows.append(predictor.probabilities(np.stack(batch)))
    if not rows:
        raise DatasetError(
            "none of the images can be read", where=root, fix="give the plan.json: --plan FILE"
        )
    if len(read) < len(items):
        note(f"the model was asked about {len(read)} of {len(items)} images; the others cannot be read")
    chances = np.concatenate(rows)
    return Predictions(
        classes=predictor.classes,
        paths=tuple(read),
        labels=chances.argmax(axis=1).astype(np.int64),
        probabilities=chances,
    )

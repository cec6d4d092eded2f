"""A predictor over a dataset's split: `Predictions` to measure."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from holotype.dataset import Dataset, Split, cache_folder, thumbnailer
from holotype.dataset.leaks import read_leaks
from holotype.errors import DatasetError
from holotype.metrics import Predictions
from holotype.policy import Policy, judge_probabilities
from holotype.predictor import Predictor
from holotype.progress import track
from holotype.report import (
    BundleSummary,
    DatasetSummary,
    Fault,
    Finding,
    Report,
    Sureness,
    UnreadableFile,
    build_report,
    write_report,
)
from holotype.runlog import Row

__all__ = ["choose_split", "evaluate_split", "score"]


def choose_split(dataset: Dataset, *, wanted: str = "auto") -> Split:
    """The split to evaluate: "auto" is test where there is one, else validation; `DatasetError` without."""
    judged: tuple[Split, ...] = ("test", "validation")
    for split in judged if wanted == "auto" else dataset.splits:
        if split in dataset.splits and wanted in ("auto", split):
            return split
    there = ", ".join(dataset.splits)
    if wanted != "auto":
        raise DatasetError(f"has no {wanted} split", where=dataset.source, fix=f"it has {there}")
    raise DatasetError(
        "has neither a test nor a validation split", where=dataset.source, fix=f"name what it has: {there}"
    )


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
    diagnosis: Sequence[Finding] = (),
    looked_for: Sequence[Fault] = (),
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
        leaked=read_leaks(cache_folder(dataset.source), dataset.root_hash, split),
        history=history,
        diagnosis=diagnosis,
        looked_for=looked_for,
    ).model_copy(update={"sureness": _sureness(predictions, bundle.manifest.policy)})
    write_report(folder, report, predictions=predictions, thumbnail=thumbnailer(dataset))
    return report


def _sureness(predictions: Predictions, policy: Policy) -> Sureness | None:
    """None where the policy never abstains."""
    if policy.abstain == "none":
        return None
    judged = judge_probabilities(predictions.probabilities, policy=policy, classes=predictions.classes)
    sure = np.array([one.sure for one in judged])
    right = predictions.predicted == predictions.labels
    held = [
        label in one.left_open
        for one, label in zip(judged, predictions.labels.tolist(), strict=True)
        if one.left_open is not None
    ]
    return Sureness(
        rule=policy.abstain,
        share=float(sure.mean()),
        accuracy=float(right[sure].mean()) if sure.any() else None,
        held=sum(held) / len(held) if held else None,
    )

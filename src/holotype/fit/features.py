"""Features of the frozen backbone, which heads are fitted on: computed by a runtime, or remembered."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from holotype.dataset import Dataset
from holotype.embeddings import EMBEDDED_AT_ONCE, Backbone, embed
from holotype.fit.quarantine import Quarantine
from holotype.head import Features, batches_of, extract_features
from holotype.progress import note
from holotype.runlog import RunLog
from holotype.runtime import Runtime

__all__ = ["Splits", "computed_features", "remembered_features"]


@dataclass(frozen=True)
class Splits:
    """Features of the splits that a head needs."""

    train: Features
    validation: Features


def computed_features(
    runtime: Runtime, dataset: Dataset, *, mirror: bool, quarantine: Quarantine, log: RunLog
) -> Splits:
    """Of `runtime`, and with `mirror` also of every training image mirrored."""
    rows, judged = dataset.rows("train"), dataset.rows("validation")
    begun = time.perf_counter()
    train = extract_features(
        runtime,
        dataset.pixels(list(batches_of(rows, size=EMBEDDED_AT_ONCE)), instead=quarantine),
        dataset.labels(rows),
        mirror=mirror,
        label="features of train",
    )
    validation = extract_features(
        runtime,
        dataset.pixels(list(batches_of(judged, size=EMBEDDED_AT_ONCE)), instead=quarantine),
        dataset.labels(judged),
        mirror=False,
        label="features of validation",
    )
    _tell(Splits(train, validation), by=runtime.name, seconds=time.perf_counter() - begun, log=log)
    return Splits(train, validation)


def remembered_features(
    backbone: Backbone, dataset: Dataset, *, quarantine: Quarantine, log: RunLog
) -> Splits:
    """Of `backbone`, from the dataset's cache folder where an audit or an earlier run has computed them."""
    rows, judged = dataset.rows("train"), dataset.rows("validation")
    begun = time.perf_counter()
    both = embed(dataset, backbone=backbone, rows=np.concatenate([rows, judged]), instead=quarantine)
    splits = Splits(
        Features(both[: len(rows)], dataset.labels(rows)), Features(both[len(rows) :], dataset.labels(judged))
    )
    _tell(splits, by=backbone.model.name, seconds=time.perf_counter() - begun, log=log)
    return splits


def _tell(splits: Splits, *, by: str, seconds: float, log: RunLog) -> None:
    count = len(splits.train.labels) + len(splits.validation.labels)
    log.add_timing({"stage": "features", "seconds": seconds, "images_per_second": count / seconds})
    note(f"{count:,} features by {by} in {seconds:.1f} s")

"""Fitting what a bundle knows about its own answers: its policy and its baseline, on real images."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from holotype.baseline import Baseline, distances, make_baseline
from holotype.bundle import Bundle
from holotype.config import PolicyConfig
from holotype.dataset import Dataset, check_splits
from holotype.policy import (
    Policy,
    conformal_threshold,
    fit_temperature,
    probabilities,
    score_thresholds,
)
from holotype.progress import track
from holotype.runtime import Runtime

__all__ = ["Fitted", "fit_policy", "rule_of"]

_TRAINING_IMAGES = 1024  # that class means are taken of: ±3 % of a standard deviation for ten classes
_BATCH = 16


@dataclass(frozen=True)
class Fitted:
    """A policy with the baseline it belongs to, and the logits `float32[N, C]` on validation behind both."""

    policy: Policy
    baseline: Baseline
    logits: npt.NDArray[np.float32]


def rule_of(bundle: Bundle, config: PolicyConfig) -> PolicyConfig:
    """`config`, where it is silent as the policy of `bundle` was fitted: when it says "not sure"."""
    told = bundle.manifest.settings.get("policy", {})
    known = {name: value for name, value in told.items() if name in PolicyConfig.model_fields}
    return PolicyConfig.model_validate(known | config.model_dump(exclude_unset=True))


def fit_policy(
    runtime: Runtime,
    dataset: Dataset,
    *,
    classes: tuple[str, ...],
    config: PolicyConfig,
    without: Collection[int] = (),
) -> Fitted:
    """Run validation and some training images of `dataset` through `runtime`, and fit both.

    `classes` are the bundle's, in the order of its logits; the dataset's are among them. `without` are rows
    whose files have broken since the dataset was read. `DatasetError` where there is nothing to fit on.
    """
    check_splits(dataset, "train", "validation")
    places = np.array([classes.index(name) for name in dataset.classes], dtype=np.int64)
    train = _some(np.setdiff1d(dataset.rows("train"), list(without)))
    rows = np.setdiff1d(dataset.rows("validation"), list(without))
    learned, _, _ = _run(runtime, dataset, train)
    embedding, logits, brightness = _run(runtime, dataset, rows)
    labels = places[dataset.labels(rows)]
    policy = Policy(temperature=fit_temperature(logits, labels))
    chances = probabilities(logits, policy=policy)
    baseline = make_baseline(
        train=(learned, places[dataset.labels(train)]),
        embedding=embedding,
        chances=chances,
        brightness=brightness,
    )
    far = distances(embedding, baseline)
    complete = policy.model_copy(
        update={
            "abstain": config.abstain,
            "thresholds": dict(
                score_thresholds(chances, labels, classes=classes, precision=config.precision)
            ),
            "open_above": conformal_threshold(chances, labels, coverage=config.coverage),
            "coverage": config.coverage,
            "familiar": None if config.unfamiliar is None else float(np.quantile(far, 1 - config.unfamiliar)),
        }
    )
    return Fitted(complete, baseline, logits)


def _some(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return rows[np.linspace(0, len(rows) - 1, min(len(rows), _TRAINING_IMAGES)).round().astype(np.int64)]


def _run(
    runtime: Runtime, dataset: Dataset, rows: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Embeddings, logits and brightness, in the order of `rows`."""
    parts = []
    with track("fitting the policy", total=len(rows)) as progress:
        for images in dataset.pixels([rows[at : at + _BATCH] for at in range(0, len(rows), _BATCH)]):
            logits, embedding = runtime.run(images)
            parts.append((embedding, logits, images.mean(axis=(1, 2, 3), dtype=np.float32) / 255))
            progress.advance(len(images))
    embedding, logits, brightness = (np.concatenate(part) for part in zip(*parts, strict=True))
    return embedding, logits, brightness

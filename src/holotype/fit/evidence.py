"""What a run leaves for its diagnosis."""

from __future__ import annotations

import numpy as np

from holotype.dataset import cache_folder
from holotype.diagnosis import Evidence, suspect_paths
from holotype.fit.run import Learned
from holotype.fit.session import Session
from holotype.runlog import RunLog

__all__ = ["evidence_of"]


def evidence_of(session: Session, learned: Learned, *, log: RunLog) -> Evidence | None:
    """Of what held the training back; None where only a head was fitted."""
    if learned.steps is None:
        return None
    dataset = session.dataset
    doubted = suspect_paths(cache_folder(dataset.source), dataset.root_hash)
    paths = dataset.paths(dataset.rows("train"))
    return Evidence(
        session.config,
        metrics=log.metrics,
        steps=learned.steps,
        timings=log.timings,
        counts=dataset.counts(),
        sample_losses=learned.losses,
        suspects=None if doubted is None else np.array([path in doubted for path in paths]),
        recall=learned.recall,
        uncached=dataset.uncached(session.view),
        interrupted=learned.interrupted,
    )

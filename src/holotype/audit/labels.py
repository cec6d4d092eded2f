"""Label errors: images whose label an out-of-sample classifier finds improbable (confident learning)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from holotype.audit.contract import Choice, Suspect
from holotype.head import Features, logistic_path
from holotype.policy import Policy, probabilities
from holotype.progress import track

__all__ = ["OutOfSample", "label_suspects", "out_of_sample"]

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

_PENALTIES = (3e-1, 1e-1, 3e-2)


@dataclass(frozen=True)
class OutOfSample:
    """Probabilities `float32[N, C]` by models that never saw the image or a copy of it.

    `judged: bool[N]` is False where the label's class was not among those the model had seen. `penalty` is
    the strength of the regression's L2 term whose probabilities were best.
    """

    probabilities: Floats
    judged: Flags
    penalty: float


def out_of_sample(
    embeddings: Floats, labels: Rows, clusters: Rows, *, classes: int, folds: int, seed: int
) -> OutOfSample | None:
    """Cross-validated logistic regression on `float32[N, D]`; copies (one cluster number) share a fold.

    Of three L2 penalties that with the lowest log loss is kept, as wrong labels punish confidence. None where
    fewer than two classes can be judged, or no more images than folds are there.
    """
    if len(np.unique(labels)) < 2 or len(labels) <= folds:
        return None
    fold = _folds(labels, clusters, folds=folds, seed=seed)
    logits = np.zeros((len(_PENALTIES), len(labels), classes), dtype=np.float32)
    judged = np.zeros(len(labels), dtype=np.bool_)
    with track("checking labels", total=folds) as progress:
        for number in range(folds):
            test = fold == number
            known = np.bincount(labels[~test], minlength=classes) > 0
            if test.any() and known.sum() > 1:
                judged[test] = known[labels[test]]
                train = Features(embeddings[~test], labels[~test])
                path = logistic_path(train, embeddings[test], classes=classes, penalties=_PENALTIES)
                for place, values in enumerate(path):
                    logits[place, test] = np.where(known, values, -np.inf)
            progress.advance()
    if len(np.unique(labels[judged])) < 2:
        return None
    chances = np.stack([probabilities(one, policy=Policy()) for one in logits])
    own = chances[:, np.flatnonzero(judged), labels[judged]]
    losses = -np.log(np.maximum(own, 1e-12)).mean(axis=1)
    best = int(losses.argmin())
    return OutOfSample(chances[best], judged, _PENALTIES[best])


def label_suspects(
    found: OutOfSample, labels: Rows, *, paths: Sequence[str], classes: Sequence[str], most: float
) -> tuple[tuple[Suspect, ...], float]:
    """The images whose label is most improbable, and cleanlab's estimate of the share of right labels.

    Ranked by self-confidence, the probability of the given label, which is `1 - score` (Northcutt et al.
    2021, Confident learning); listed are those for which another class is more probable, up to the share
    `most` of all. The estimate counts the off-diagonal of the calibrated confident joint.
    """
    from cleanlab.count import num_label_issues
    from cleanlab.rank import get_label_quality_scores

    rows = np.flatnonzero(found.judged)
    given, chances = labels[rows], found.probabilities[rows].astype(np.float64)
    present, compact = np.unique(given, return_inverse=True)
    chances = chances[:, present] / chances[:, present].sum(axis=1, keepdims=True)
    quality = get_label_quality_scores(compact, chances, method="self_confidence")
    errors = num_label_issues(compact, chances, estimation_method="off_diagonal_calibrated")
    order = np.argsort(quality, kind="stable")[: int(most * len(labels))]
    suspects = []
    for place in order:
        top = np.argsort(-chances[place], kind="stable")[:2]
        if top[0] == compact[place]:
            continue
        choices = tuple(
            Choice(label=classes[present[choice]], probability=min(float(chances[place, choice]), 1.0))
            for choice in top
        )
        suspects.append(
            Suspect(
                path=paths[rows[place]],
                label=classes[given[place]],
                suggested=choices[0].label,
                score=1 - float(quality[place]),
                top=choices,
            )
        )
    return tuple(suspects), 1 - errors / len(rows)


def _folds(labels: Rows, clusters: Rows, *, folds: int, seed: int) -> Rows:
    """The fold of each image: clusters dealt out class by class, in random order within a class."""
    numbers, first, owner = np.unique(clusters, return_index=True, return_inverse=True)
    shuffled = np.random.default_rng(seed).permutation(len(numbers))
    by_class = shuffled[np.argsort(labels[first[shuffled]], kind="stable")]
    fold = np.empty(len(numbers), dtype=np.int64)
    fold[by_class] = np.arange(len(numbers)) % folds
    return fold[owner]

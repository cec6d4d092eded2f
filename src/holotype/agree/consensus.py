"""One label from several votes: majority, Dawid & Skene's model, and CROWDLAB, which also asks a classifier.

Votes are `int64[N, R]` as in `holotype.agreement`: the class each annotator gave, -1 where there is no vote.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from holotype.agree.votes import Votes
from holotype.agreement import count_votes
from holotype.errors import DatasetError, require
from holotype.metrics import Predictions

__all__ = [
    "Consensus",
    "Crowdlab",
    "DawidSkene",
    "Majority",
    "crowdlab",
    "dawid_skene",
    "find_consensus",
    "majority_vote",
]

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Majority:
    """`labels` is `int64[N]`: the class with most votes, -1 where there is no vote or several share the lead.

    `tied` is `bool[N]`, those that share it; `share` is `float64[N]`, the leader's share of the votes.
    """

    labels: Counts
    tied: npt.NDArray[np.bool_]
    share: Floats


@dataclass(frozen=True)
class DawidSkene:
    """What the model of Dawid & Skene says about images and annotators.

    `probabilities` is `float64[N, K]`, of the true class given the votes (the prior, where there are none);
    `prior` is `float64[K]`; `confusion` is `float64[R, K, K]`, the probability that an annotator says the
    column's class where the row's is true. `objective` is what was maximised, after each step.
    """

    probabilities: Floats
    prior: Floats
    confusion: Floats
    objective: tuple[float, ...]
    converged: bool

    @property
    def quality(self) -> Floats:
        """`float64[R]`: the probability that an annotator is right on a random image."""
        return np.asarray(np.diagonal(self.confusion, axis1=1, axis2=2) @ self.prior, dtype=np.float64)


@dataclass(frozen=True)
class Crowdlab:
    """`labels` and `confidence` of the consensus, `int64[N]` and `float64[N]`.

    `vote_quality` is `float64[N, R]`, how probably each vote is right (NaN where none); `quality` is
    `float64[R]`, that of each annotator (NaN for one without votes).
    """

    labels: Counts
    confidence: Floats
    vote_quality: Floats
    quality: Floats


@dataclass(frozen=True)
class Consensus:
    """One label for each image, and what each annotator's votes are worth.

    `labels` is `int64[N]` (-1: no vote) and `confidence` is `float64[N]`, how probably they are right (NaN:
    no vote). `method` says of each image how: `dawid-skene`, `crowdlab`, `single` for an only vote,
    "" for none. `quality` and `crowdlab_quality` are `float64[R]`, the latter NaN without a classifier.
    """

    labels: Counts
    confidence: Floats
    method: tuple[str, ...]
    majority: Majority
    quality: Floats
    crowdlab_quality: Floats


def find_consensus(votes: Votes, *, predictions: Predictions | None = None) -> Consensus:
    """Dawid and Skene's consensus, or CROWDLAB's on the images that `predictions` cover; an only vote stands.

    An only vote is never overruled, since nobody has contradicted it, but its confidence may be low.
    `predictions` are out of sample and must know every class of `votes`; `DatasetError` where they cover no
    image with two votes.
    """
    table = votes.table
    number = (table >= 0).sum(axis=1)
    model = dawid_skene(table, classes=len(votes.classes))
    labels, confidence = model.probabilities.argmax(axis=1), model.probabilities.max(axis=1)
    only = table.max(axis=1)  # the vote of an image with one
    vote_confidence = np.take_along_axis(model.probabilities, np.maximum(only, 0)[:, None], axis=1)[:, 0]
    method = np.full(len(table), "dawid-skene", dtype=object)
    crowdlab_quality = np.full(table.shape[1], np.nan)
    if predictions is not None:
        rows, probabilities = _covered(votes, predictions)
        if not (number[rows] >= 2).any():
            raise DatasetError(
                "the model's predictions cover no image with two votes", fix="predict the voted images"
            )
        found = crowdlab(table[rows], probabilities)
        labels[rows], confidence[rows], method[rows] = found.labels, found.confidence, "crowdlab"
        vote_confidence[rows] = np.nanmax(found.vote_quality, axis=1)
        crowdlab_quality = found.quality
    single, none = number == 1, number == 0
    labels[single], confidence[single], method[single] = only[single], vote_confidence[single], "single"
    labels[none], confidence[none], method[none] = -1, np.nan, ""
    return Consensus(
        labels=labels,
        confidence=confidence,
        method=tuple(method),
        majority=majority_vote(table, classes=len(votes.classes)),
        quality=model.quality,
        crowdlab_quality=crowdlab_quality,
    )


def majority_vote(votes: Counts, *, classes: int) -> Majority:
    """The class with most votes. A tie is reported, not broken."""
    counts = count_votes(votes, classes=classes)
    most = counts.max(axis=1)
    voted = most > 0
    tied = voted & ((counts == most[:, None]).sum(axis=1) > 1)
    labels = np.where(voted & ~tied, counts.argmax(axis=1), -1)
    return Majority(labels=labels, tied=tied, share=most / np.maximum(counts.sum(axis=1), 1))


def dawid_skene(
    votes: Counts,
    *,
    classes: int,
    smoothing: float = 1.0,
    steps: int = 500,
    tolerance: float = 1e-7,
) -> DawidSkene:
    """Annotators' error rates and true classes by EM (Dawid & Skene 1979, Appl. Statist. 28:20).

    The M step adds pseudo-votes to the expected counts: for each annotator and true class, `smoothing` right
    votes and as many spread evenly over all classes; for the prior, as many spread over all classes. That is
    a Dirichlet prior: each step raises log-likelihood + Σ pseudo-votes · log parameter, the `objective`.
    `smoothing` must be above 0; towards 0 it is Dawid and Skene's maximum likelihood, which overfits few
    votes.

    Starts from the shares of the votes, ends when a step gains less than `tolerance` per vote. Error rates
    are learned from images with two or more votes, since one vote says nothing about its own reliability; the
    others' probabilities follow from them.
    """
    several = (votes >= 0).sum(axis=1) >= 2
    learned = votes[several]
    pseudo = smoothing * (np.eye(classes) + 1 / classes)
    counts = count_votes(learned, classes=classes)
    posterior: Floats = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    objective: list[float] = []
    converged = False
    for _ in range(steps):
        prior = _normalise(posterior.sum(axis=0) + smoothing / classes)
        confusion = _normalise(_expected(learned, posterior, classes=classes) + pseudo)
        posterior, likelihood = _posterior(learned, prior, confusion)
        penalty = (pseudo * np.log(confusion)).sum() + smoothing * np.log(prior).mean()
        objective.append(float(likelihood + penalty))
        if len(objective) > 1 and objective[-1] - objective[-2] < tolerance * max(counts.sum(), 1):
            converged = True
            break
    probabilities, _ = _posterior(votes, prior, confusion)
    return DawidSkene(
        probabilities=probabilities,
        prior=prior,
        confusion=confusion,
        objective=tuple(objective),
        converged=converged,
    )


def crowdlab(votes: Counts, probabilities: Floats) -> Crowdlab:
    """cleanlab's estimate from votes and a classifier's probabilities (Goh et al. 2022, arXiv:2210.06812).

    `probabilities` is `float64[N, K]`, out of sample: of a model that was not trained on these images. Every
    image needs a vote, and at least one image two. `MissingExtraError` where cleanlab is missing.
    """
    library = require("cleanlab.multiannotator", extra="train", purpose="the consensus by CROWDLAB")
    present = np.flatnonzero((votes >= 0).any(axis=0))
    labels = np.where(votes >= 0, votes, np.nan)[:, present]
    with warnings.catch_warnings(), _fixed_seed():
        # The coefficients say already that no two annotators agree, and the summary how many votes are tied.
        warnings.filterwarnings("ignore", message="Annotators do not agree", category=UserWarning)
        warnings.filterwarnings("ignore", message="breaking ties of examples", category=UserWarning)
        result = library.get_label_quality_multiannotator(
            labels, np.asarray(probabilities, dtype=np.float64), verbose=False
        )
    images, annotators = result["label_quality"], result["annotator_stats"].sort_index()
    vote_quality = np.full(votes.shape, np.nan)
    vote_quality[:, present] = result["detailed_label_quality"].to_numpy()
    quality = np.full(votes.shape[1], np.nan)
    quality[present] = annotators["annotator_quality"].to_numpy()
    return Crowdlab(
        labels=images["consensus_label"].to_numpy().astype(np.int64),
        confidence=images["consensus_quality_score"].to_numpy().astype(np.float64),
        vote_quality=vote_quality,
        quality=quality,
    )


@contextmanager
def _fixed_seed() -> Iterator[None]:
    """numpy's global generator seeded for a while: cleanlab breaks its last ties by it."""
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002


def _covered(votes: Votes, predictions: Predictions) -> tuple[Counts, Floats]:
    """Rows with a vote and a prediction, and `float64[M, K]` of these in the order of the votes' classes."""
    place = {path: i for i, path in enumerate(predictions.paths)}
    voted = np.asarray((votes.table >= 0).any(axis=1))
    rows = [i for i, item in enumerate(votes.items) if voted[i] and item in place]
    columns = [predictions.classes.index(name) for name in votes.classes]
    chosen = predictions.probabilities[[place[votes.items[i]] for i in rows]][:, columns]
    return np.array(rows, dtype=np.int64), chosen


def _expected(votes: Counts, posterior: Floats, *, classes: int) -> Floats:
    """`float64[R, K, K]`: expected number of votes of each annotator by true class (rows) and class said."""
    eye = np.eye(classes + 1)[:, :classes]  # no vote, -1, is its last row: nothing
    return np.stack([posterior.T @ eye[column] for column in votes.T])


def _posterior(votes: Counts, prior: Floats, confusion: Floats) -> tuple[Floats, float]:
    """`float64[N, K]` of the true class, and the log-likelihood of all votes."""
    said = np.pad(np.log(confusion), ((0, 0), (0, 0), (0, 1)))  # no vote, -1, is the last column: factor 1
    joint = np.tile(np.log(prior), (len(votes), 1))
    for log, column in zip(said, votes.T, strict=True):
        joint += log[:, column].T
    peak = joint.max(axis=1, keepdims=True)
    odds: Floats = np.exp(joint - peak)
    total = odds.sum(axis=1, keepdims=True)
    return odds / total, float((peak + np.log(total)).sum())


def _normalise(counts: Floats) -> Floats:
    return np.asarray(counts / counts.sum(axis=-1, keepdims=True), dtype=np.float64)

"""Copies: which images show the same picture, exactly or nearly, and in which splits they lie."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from holotype.audit.alignment import aligned_distance, coarse_distance
from holotype.audit.calibration import Embed, Thresholds, calibrate, pictures_of
from holotype.audit.contract import Calibration, Cluster, Duplicates
from holotype.audit.neighbours import EXACT_UP_TO, hash_pairs, nearest
from holotype.audit.signatures import Signatures
from holotype.config import DuplicatesConfig
from holotype.dataset import Dataset
from holotype.progress import track

__all__ = ["Copies", "find_copies", "summarise"]

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

_CHUNK = 512


@dataclass(frozen=True)
class Copies:
    """`cluster: int64[N]`, images with one number are copies; `pairs: int64[P, 2]`, which were seen to be.

    `distances: float32[P]` of the pairs: 0 where bytes or pixels are equal, else `aligned_distance`.
    `exact: int64[N]`, as `cluster`, of copies with equal bytes or pixels alone.
    """

    cluster: Rows
    exact: Rows
    pairs: Rows
    distances: Floats
    calibration: Calibration | None

    def groups(self) -> list[list[int]]:
        """The rows of each cluster of two and more, in order of the first."""
        members = defaultdict(list)
        for row, number in enumerate(self.cluster.tolist()):
            members[number].append(row)
        return [rows for rows in members.values() if len(rows) > 1]


def find_copies(
    dataset: Dataset,
    signatures: Signatures,
    embeddings: Floats,
    *,
    embed: Embed,
    config: DuplicatesConfig,
    seed: int,
) -> Copies:
    """Exact copies by hash of file and of pixels; near ones by perceptual hash and embedding, confirmed.

    `embeddings` is `float32[N, D]` of length 1. Exact copies stand for each other, so that a picture that is
    there a thousand times is compared once.
    """
    equal = _exact_pairs(dataset)
    exact = _components(equal, count=len(dataset.table))
    first_of = np.unique(exact, return_index=True)[1].astype(np.int64)
    found = None
    if config.near and len(first_of) > 1:
        found = calibrate(dataset, signatures, embeddings, first_of, embed=embed, config=config, seed=seed)
    if found is None:
        return Copies(exact, exact, equal, np.zeros(len(equal), dtype=np.float32), None)
    thresholds, calibration = found
    candidates = _candidates(signatures, embeddings, first_of, thresholds, config)
    near, distances = _confirm(dataset, signatures, candidates, thresholds)
    pairs = np.concatenate([equal, near])
    return Copies(
        _components(pairs, count=len(dataset.table)),
        exact,
        pairs,
        np.concatenate([np.zeros(len(equal), dtype=np.float32), distances]),
        calibration,
    )


def summarise(dataset: Dataset, copies: Copies) -> Duplicates:
    """The clusters of two and more, the largest first."""
    groups = copies.groups()
    clusters = [_cluster(dataset, rows, exact=len(set(copies.exact[rows].tolist())) == 1) for rows in groups]
    clusters.sort(key=lambda cluster: (not cluster.conflict, -len(cluster.paths), cluster.paths))
    return Duplicates(
        clusters=tuple(clusters),
        extra=sum(len(rows) - 1 for rows in groups),
        calibration=copies.calibration,
    )


def _cluster(dataset: Dataset, rows: Sequence[int], *, exact: bool) -> Cluster:
    part = dataset.table.select("path", "label", "split").gather(list(rows))
    labels = part["label"].to_list()
    return Cluster(
        paths=tuple(part["path"].to_list()),
        labels=tuple(labels),
        splits=tuple(part["split"].to_list()),
        kind="exact" if exact else "near",
        conflict=len(set(labels)) > 1,
    )


def _exact_pairs(dataset: Dataset) -> Rows:
    """Each image with the first of its own bytes, or of its own pixels."""
    pairs = []
    for keys in (dataset.contents, dataset.table["pixels_sha256"].to_list()):
        first: dict[str, int] = {}
        pairs += [(first.setdefault(key, row), row) for row, key in enumerate(keys)]
    apart = sorted({pair for pair in pairs if pair[0] != pair[1]})
    return np.array(apart, dtype=np.int64).reshape(-1, 2)


def _candidates(
    signatures: Signatures,
    embeddings: Floats,
    rows: Rows,
    thresholds: Thresholds,
    config: DuplicatesConfig,
) -> Rows:
    """Pairs of `rows` that are near by hash or embedding: `int64[P, 2]`."""
    approximate = len(rows) > EXACT_UP_TO if config.approximate == "auto" else bool(config.approximate)
    by_hash = np.zeros((0, 2), dtype=np.int64)
    if thresholds.hash_distance >= 0:
        by_hash = hash_pairs(
            signatures.hashes[rows], within=thresholds.hash_distance, approximate=approximate
        )
    others, distances = nearest(embeddings[rows], count=config.neighbours, approximate=approximate)
    owner, place = np.nonzero(distances <= thresholds.embedding_distance)
    by_embedding = np.sort(np.stack([owner, others[owner, place]], axis=1), axis=1)
    return np.asarray(rows[np.unique(np.concatenate([by_hash, by_embedding]), axis=0)], dtype=np.int64)


def _confirm(
    dataset: Dataset, signatures: Signatures, candidates: Rows, thresholds: Thresholds
) -> tuple[Rows, Floats]:
    """The candidates whose pictures lie over each other, and how far apart they still are."""
    pairs, distances = [np.zeros((0, 2), dtype=np.int64)], [np.zeros(0, dtype=np.float32)]
    with track("comparing pictures", total=len(candidates)) as progress:
        for start in range(0, len(candidates), _CHUNK):
            some = candidates[start : start + _CHUNK]
            small = signatures.small[some]
            some = some[coarse_distance(small[:, 0], small[:, 1]) <= thresholds.coarse]
            rows, place = np.unique(some, return_inverse=True)
            pictures = pictures_of(dataset, rows)
            place = place.reshape(-1, 2)
            distance = aligned_distance(pictures[place[:, 0]], pictures[place[:, 1]])
            same = distance <= thresholds.pixel
            pairs.append(some[same])
            distances.append(distance[same])
            progress.advance(min(_CHUNK, len(candidates) - start))
    return np.concatenate(pairs), np.concatenate(distances)


def _components(pairs: Iterable[npt.NDArray[np.int64]], *, count: int) -> Rows:
    """The number of its connected component for each of `count` nodes (Tarjan's union-find)."""
    parent = list(range(count))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for first, second in pairs:
        parent[root(int(second))] = root(int(first))
    return np.array([root(node) for node in range(count)], dtype=np.int64)

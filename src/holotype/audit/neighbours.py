"""Pairs that may be copies: near by perceptual hash, or by embedding; exact up to 100,000 images."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from holotype.errors import require
from holotype.progress import track

__all__ = ["EXACT_UP_TO", "hash_pairs", "nearest"]

EXACT_UP_TO = 100_000
"""Images up to which every pair is compared where approximate search is left to `auto`."""

_CELLS = 4_000_000
"""Entries of a block of the distance matrix: 16 MB in single precision, which stays in the cache's reach."""

_ROWS_PER_CELL = 39
"""What faiss asks for, at least, to place the cells of an inverted file."""

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Hashes = npt.NDArray[np.uint64]


def nearest(embeddings: Floats, *, count: int, approximate: bool = False) -> tuple[Rows, Floats]:
    """The `count` nearest other rows by cosine: rows `int64[N, count]` and distances `float32[N, count]`.

    `embeddings: float32[N, D]` of length 1. Exact by blocked matrix products, or an inverted file of faiss
    (but for a handful of rows).
    Rows that have fewer neighbours are filled with -1 at distance 2.
    """
    count = min(count, max(len(embeddings) - 1, 0))
    if count == 0:
        return np.zeros((len(embeddings), 0), dtype=np.int64), np.zeros((len(embeddings), 0), np.float32)
    if approximate and len(embeddings) >= _ROWS_PER_CELL:
        return _nearest_approximate(embeddings, count=count)
    block = max(_CELLS // len(embeddings), 1)
    rows = np.empty((len(embeddings), count), dtype=np.int64)
    distances = np.empty((len(embeddings), count), dtype=np.float32)
    with track("comparing embeddings", total=len(embeddings)) as progress:
        for start in range(0, len(embeddings), block):
            likeness = embeddings[start : start + block] @ embeddings.T
            some = np.arange(len(likeness))
            likeness[some, start + some] = -2.0
            best = np.argpartition(likeness, -count, axis=1)[:, -count:]
            value = np.take_along_axis(likeness, best, axis=1)
            order = np.argsort(-value, axis=1, kind="stable")
            rows[start + some] = np.take_along_axis(best, order, axis=1)
            distances[start + some] = 1 - np.take_along_axis(value, order, axis=1)
            progress.advance(len(likeness))
    return rows, distances


def hash_pairs(hashes: Hashes, *, within: int, approximate: bool = False) -> Rows:
    """All pairs `int64[P, 2]` (first < second) whose hashes `uint64[N, 8]` differ by at most `within` bits.

    Any orientation of one is compared with the upright other. Exact by comparing all, or a multi-index of
    faiss, which is exact for `within` < 16 but keeps less in memory for millions.
    """
    if approximate:
        return _hash_pairs_indexed(hashes, within=within)
    upright = np.ascontiguousarray(hashes[:, 0])
    block = max(_CELLS // max(len(hashes), 1), 1)
    found = []
    with track("comparing hashes", total=len(hashes)) as progress:
        for start in range(0, len(hashes), block):
            rest = upright[start:]
            for orientation in range(hashes.shape[1]):
                some = hashes[start : start + block, orientation]
                first, second = np.nonzero(np.bitwise_count(some[:, None] ^ rest) <= within)
                later = second > first
                found.append(np.stack([first[later], second[later]], axis=1) + start)
            progress.advance(min(block, len(hashes) - start))
    return np.unique(np.concatenate(found), axis=0) if found else np.zeros((0, 2), dtype=np.int64)


def _faiss() -> Any:
    return require("faiss", extra="faiss", purpose=f"comparing more than {EXACT_UP_TO:,} images")


def _nearest_approximate(embeddings: Floats, *, count: int) -> tuple[Rows, Floats]:
    """An inverted file with 4 sqrt(N) cells, of which the nearest 16 are searched (Jégou et al. 2011)."""
    faiss = _faiss()
    size, width = embeddings.shape
    cells = min(int(4 * np.sqrt(size)), size // _ROWS_PER_CELL)
    quantizer = faiss.IndexFlatIP(width)
    index = faiss.IndexIVFFlat(quantizer, width, cells, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = 0
    index.train(embeddings[:: max(size // (40 * cells), 1)])
    index.add(embeddings)
    index.nprobe = min(16, cells)
    likeness, rows = index.search(embeddings, count + 1)
    return _without_self(rows, (1 - likeness).astype(np.float32), count=count)


def _without_self(rows: Rows, distances: Floats, *, count: int) -> tuple[Rows, Floats]:
    """Drop each row's match with itself, or else its last; -1 (none) at distance 2."""
    own = rows == np.arange(len(rows))[:, None]
    own[~own.any(axis=1), -1] = True
    kept = ~own
    rows, distances = rows[kept].reshape(-1, count), distances[kept].reshape(-1, count)
    return rows.astype(np.int64), np.where(rows < 0, np.float32(2), distances)


def _hash_pairs_indexed(hashes: Hashes, *, within: int) -> Rows:
    """Four tables of 16 bits: a pair within `within` bits is within `within // 4` in one of them."""
    faiss = _faiss()
    index = faiss.IndexBinaryMultiHash(64, 4, 16)
    index.nflip = within // 4
    index.add(_bytes(hashes[:, 0]))
    found = []
    with track("comparing hashes", total=hashes.shape[1]) as progress:
        for orientation in range(hashes.shape[1]):
            limits, _, rows = index.range_search(_bytes(hashes[:, orientation]), within + 1)
            first = np.repeat(np.arange(len(hashes)), np.diff(limits).astype(np.int64))
            apart = first != rows
            found.append(np.sort(np.stack([first[apart], rows[apart]], axis=1).astype(np.int64), axis=1))
            progress.advance()
    return np.unique(np.concatenate(found), axis=0)


def _bytes(hashes: Hashes) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(hashes).view(np.uint8).reshape(len(hashes), 8)

"""Leakage: copies on both sides of a split, what they do to the accuracy, and a split without them."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import numpy.typing as npt

from holotype.audit.contract import Leakage, LeakageEffect
from holotype.audit.duplicates import Copies
from holotype.dataset import SPLITS, Dataset, Split
from holotype.dataset.revisions import Change
from holotype.head import Features, logistic_path

__all__ = ["find_leakage", "mended_split"]

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]


def find_leakage(dataset: Dataset, copies: Copies, embeddings: Floats, *, penalty: float | None) -> Leakage:
    """Each image of validation and test that has a copy in an earlier split, with the nearest such copy.

    `penalty` of the regression, trained on train, whose accuracy on each split is told with and without the
    leaked images; None: no accuracy is told.
    """
    splits = dataset.table["split"].to_list()
    names = dataset.table["path"].to_list()
    partner = _partners(copies, splits)
    pairs = sorted((names[source], names[row]) for row, source in partner.items())
    held_out = sum(split != "train" for split in splits)
    leaked: dict[Split, tuple[str, ...]] = {
        split: tuple(sorted(names[row] for row in partner if splits[row] == split))
        for split in SPLITS
        if split != "train"
    }
    effects = () if penalty is None or not partner else _effects(dataset, embeddings, partner, penalty)
    return Leakage(
        pairs=tuple(pairs),
        fraction=len(partner) / held_out if held_out else 0.0,
        leaked={split: paths for split, paths in leaked.items() if paths},
        effects=effects,
    )


def _partners(copies: Copies, splits: list[Split]) -> dict[int, int]:
    """By leaked row: its copy in the earliest other split, the nearest where pairs were compared."""
    rank = {split: place for place, split in enumerate(SPLITS)}
    compared = _compared(copies)
    partner = {}
    for rows in _torn(copies, splits):
        first = min((splits[row] for row in rows), key=rank.__getitem__)
        earliest = [row for row in rows if splits[row] == first]
        for row in rows:
            if splits[row] == first:
                continue
            # A pair that was not compared comes after all that were, so only one of them is in question.
            near = compared.get(row, {})
            other = next((other for other in earliest if other not in near), None)
            nearest = [(near[other], other) for other in near if splits[other] == first]
            partner[row] = min(nearest + ([] if other is None else [(2.0, other)]))[1]
    return partner


def _compared(copies: Copies) -> dict[int, dict[int, float]]:
    """By row, the rows that it was compared with, all of one cluster, and how far they are apart."""
    compared: dict[int, dict[int, float]] = defaultdict(dict)
    for (one, other), distance in zip(copies.pairs.tolist(), copies.distances.tolist(), strict=True):
        compared[one][other] = compared[other][one] = distance
    return compared


def _torn(copies: Copies, splits: list[Split]) -> list[list[int]]:
    """The clusters that lie in several splits."""
    return [rows for rows in copies.groups() if len({splits[row] for row in rows}) > 1]


def _effects(
    dataset: Dataset, embeddings: Floats, partner: dict[int, int], penalty: float
) -> tuple[LeakageEffect, ...]:
    train = dataset.rows("train")
    if not len(train):
        return ()
    features = Features(embeddings[train], dataset.labels(train))
    (logits,) = logistic_path(features, embeddings, classes=len(dataset.classes), penalties=(penalty,))
    effects = []
    for split in dataset.splits:
        rows = dataset.rows(split)
        leaked = np.array([row in partner for row in rows.tolist()], dtype=np.bool_)
        if split == "train" or not leaked.any() or leaked.all():
            continue
        right = logits[rows].argmax(axis=1) == dataset.labels(rows)
        effects.append(
            LeakageEffect(
                split=split,
                accuracy=float(right.mean()),
                without=float(right[~leaked].mean()),
                leaked=int(leaked.sum()),
                images=len(rows),
            )
        )
    return tuple(effects)


def mended_split(dataset: Dataset, copies: Copies) -> tuple[Change, ...]:
    """A split for every image that keeps each cluster of copies together and moves nothing else.

    A cluster that lies in several splits goes, whole, to that of them which is furthest below the share of
    the cluster's classes that it has now, so that the classes stay stratified.
    """
    table = dataset.table
    splits, labels, names = (table[name].to_list() for name in ("split", "label", "path"))
    wanted = Counter(zip(labels, splits, strict=True))
    torn = _torn(copies, splits)
    torn.sort(key=lambda rows: (-len(rows), rows))
    have = Counter(wanted)
    for rows in torn:
        have.subtract((labels[row], splits[row]) for row in rows)
    placed = list(splits)
    for rows in torn:
        choices = [split for split in SPLITS if split in {splits[row] for row in rows}]

        def shortfall(split: Split, rows: list[int] = rows) -> float:
            cells = {(labels[row], split) for row in rows}
            return sum((wanted[cell] - have[cell]) / max(wanted[cell], 1) for cell in cells)

        chosen = max(choices, key=shortfall)
        for row in rows:
            placed[row] = chosen
            have[labels[row], chosen] += 1
    # Every image is named, so that a later change of the shares moves none of them.
    return tuple(
        Change(path=name, split=split, reason="copies stay together" if split != old else "", sha256=digest)
        for name, split, old, digest in zip(names, placed, splits, table["sha256"], strict=True)
    )

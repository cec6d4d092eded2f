"""What a candidate says about the validation split, beside what its parent says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from holotype.compress.contract import ClassDelta, FlippedImage
from holotype.dataset import Dataset
from holotype.errors import DatasetError
from holotype.metrics import paired_accuracy
from holotype.report import Estimate
from holotype.runtime import Runtime

__all__ = ["Panel", "Verdict", "answers", "compare", "logits_of", "open_panel"]

Logits = npt.NDArray[np.float32]

_BATCH = 16


@dataclass(frozen=True)
class Panel:
    """The images that candidates are judged on, with their labels as places in the bundle's classes."""

    dataset: Dataset
    rows: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Verdict:
    """A candidate against its parent on the same images."""

    accuracy: float
    drop: Estimate
    agreement: float
    classes: tuple[ClassDelta, ...]
    flips: tuple[FlippedImage, ...]

    @property
    def worst(self) -> ClassDelta:
        """The class that loses most recall."""
        return max(self.classes, key=lambda one: one.drop)


def open_panel(dataset: Dataset, classes: tuple[str, ...]) -> Panel:
    """The validation split; `DatasetError` where it has a class that the bundle does not know."""
    unknown = [name for name in dataset.classes if name not in classes]
    if unknown:
        raise DatasetError(
            f"has a class the bundle does not know: {unknown[0]!r}",
            where=dataset.source,
            fix=f"the bundle knows {', '.join(classes)}",
        )
    rows = dataset.rows("validation")
    places = np.array([classes.index(name) for name in dataset.classes], dtype=np.int64)
    return Panel(dataset, rows, places[dataset.labels(rows)], classes)


def answers(runtime: Runtime, panel: Panel) -> Logits:
    """Logits `float32[N, C]` of all images of the panel."""
    return logits_of(runtime, panel.dataset, panel.rows)


def logits_of(runtime: Runtime, dataset: Dataset, rows: npt.NDArray[np.int64]) -> Logits:
    """Logits `float32[N, C]` of `rows`, from the pixel cache."""
    batches = [rows[start : start + _BATCH] for start in range(0, len(rows), _BATCH)]
    return np.concatenate([runtime.run(images).logits for images in dataset.pixels(batches)])


def compare(before: Logits, after: Logits, panel: Panel) -> Verdict:
    """The candidate's answers beside the parent's; where they are one, nothing can be lost."""
    old, new, labels = before.argmax(axis=1), after.argmax(axis=1), panel.labels
    difference = paired_accuracy(old == labels, new == labels, same=before is after)
    paths = panel.dataset.paths(panel.rows)
    flips = tuple(
        FlippedImage(
            path=paths[place],
            label=panel.classes[labels[place]],
            before=panel.classes[old[place]],
            after=panel.classes[new[place]],
        )
        for place in np.flatnonzero(old != new).tolist()
    )
    return Verdict(
        accuracy=float((new == labels).mean()),
        drop=Estimate(value=-100 * difference.value, low=-100 * difference.high, high=-100 * difference.low),
        agreement=float((old == new).mean()),
        classes=tuple(_classes(old, new, panel, flips)),
        flips=flips,
    )


def _classes(
    old: npt.NDArray[np.int64], new: npt.NDArray[np.int64], panel: Panel, flips: tuple[FlippedImage, ...]
) -> Iterator[ClassDelta]:
    for place, name in enumerate(panel.classes):
        own = panel.labels == place
        if own.any():
            yield ClassDelta(
                name=name,
                images=int(own.sum()),
                before=float((old[own] == place).mean()),
                after=float((new[own] == place).mean()),
                flipped=tuple(flip.path for flip in flips if flip.label == name),
            )

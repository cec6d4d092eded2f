"""The contract of `hard-samples --json`, and the columns of the CSV it writes."""

from __future__ import annotations

import csv
import io
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from holotype.dataset import Split
from holotype.fields import Count, Share, Text
from holotype.report import BundleSummary

__all__ = ["COLUMNS", "HardSample", "HardSamples", "Neighbour", "to_csv"]

COLUMNS = (
    "image_path",
    "label",
    "similarity",
    "hard_path",
    "hard_predicted",
    "hard_loss",
    "hard_margin",
    "hard_label_probability",
    "hard_probability",
    "other_path",
    "other_label",
    "other_similarity",
)
"""Of the CSV: a training image, the hard one of its label that it is near to, and one of another label."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Neighbour(_Part):
    """A training image, its label, and the cosine of its embedding with the hard image's, in [-1, 1]."""

    path: Text
    label: Text
    similarity: Annotated[float, Field(ge=-1, le=1)]


class HardSample(_Part):
    """An image that the model does badly on, and what is nearest to it in training, the nearest first.

    `neighbours` have any label, which tells why it is hard; `same_label` have its own, `other_label` another.
    `loss` is -ln p(label), in nats; `margin` is p(label) less the largest probability of another class, in
    [-1, 1], and below 0 for a wrong answer; `probability` is that of `predicted`.
    """

    path: Text
    label: Text
    predicted: Text
    loss: Annotated[float, Field(ge=0)]
    margin: Annotated[float, Field(ge=-1, le=1)]
    label_probability: Share
    probability: Share
    neighbours: tuple[Neighbour, ...]
    same_label: tuple[Neighbour, ...]
    other_label: tuple[Neighbour, ...]


class HardSamples(_Part):
    """The hardest of the `images` of a split, the hardest first, and the files that list them."""

    bundle: BundleSummary
    dataset: Text
    split: Split
    images: Count
    file: Text
    page: Text
    samples: tuple[HardSample, ...]

    @property
    def training_images(self) -> frozenset[str]:
        """The images in `file`, which `train --focus` draws more often."""
        return frozenset(near.path for sample in self.samples for near in self.listed(sample))

    def listed(self, sample: HardSample) -> tuple[Neighbour, ...]:
        """What `sample` is learned from: itself, if it is trained on, and training images of its label."""
        itself = Neighbour(path=sample.path, label=sample.label, similarity=1.0)
        return (itself, *sample.same_label) if self.split == "train" else sample.same_label


def to_csv(result: HardSamples) -> str:
    """A row for each hard image and training image of the same label near to it, the hardest first.

    `image_path` is always a training image, so `train --focus` takes the file as it is; it counts an image
    once, however many rows it has. The n-th row of a hard image also names, as `other_path`, the n-th nearest
    training image of another label, for people: nearer than those of its own, it says that the label may be
    wrong. `train` does not look there: drawn more often, it would move the boundary the wrong way.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for sample in result.samples:
        facts = (sample.loss, sample.margin, sample.label_probability, sample.probability)
        hard = (sample.path, sample.predicted, *(f"{fact:.4f}" for fact in facts))
        others = [(near.path, near.label, f"{near.similarity:.4f}") for near in sample.other_label]
        for number, near in enumerate(result.listed(sample)):
            other = others[number] if number < len(others) else ("", "", "")
            writer.writerow((near.path, near.label, f"{near.similarity:.4f}", *hard, *other))
    return buffer.getvalue()

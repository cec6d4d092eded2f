"""The contract of `explain --json`: which images are shown, and what the network said about them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from holotype.dataset import Split
from holotype.fields import Count, Share, Text
from holotype.report import BundleSummary, UnreadableFile

__all__ = ["ConfusedClasses", "Evidence", "Explanation", "Shown"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Evidence(_Part):
    """A class whose evidence is drawn, and the probability that the image was given for it."""

    label: Text
    probability: Share


class Shown(_Part):
    """An image with the two classes whose evidence is drawn: its label and the class it is confused with.

    `label` is None for an image that was named without one: there they are the two most probable classes.
    """

    path: Text
    label: Text | None
    predicted: Text
    evidence: tuple[Evidence, Evidence]


class ConfusedClasses(_Part):
    """Two classes that are taken for each other.

    Of the `images[0]` images of `classes[0]`, `counts[0]` were called `classes[1]`; `wrong[0]` shows the most
    certain of them, and `right[0]` the images of `classes[0]` that were recognised most certainly. At 1 the
    same of `classes[1]`.
    """

    classes: tuple[Text, Text]
    counts: tuple[Count, Count]
    images: tuple[Count, Count]
    wrong: tuple[tuple[Shown, ...], tuple[Shown, ...]]
    right: tuple[tuple[Shown, ...], tuple[Shown, ...]]


class Explanation(_Part):
    """Contents of `explain.json`: confused `pairs` of a split, the most frequent first, or `named` images.

    `page` and `picture` are the files that show them. `dataset` and `split` are None where images were
    named; `images` counts those that were judged, `mistakes` the wrong answers among them.
    """

    bundle: BundleSummary
    page: Text
    picture: Text
    dataset: Text | None = None
    split: Split | None = None
    images: Count
    mistakes: Count = 0
    pairs: tuple[ConfusedClasses, ...] = ()
    named: tuple[Shown, ...] = ()
    unreadable: tuple[UnreadableFile, ...] = ()

"""The contracts of `agree`: `plan.json`, and what `agree score --json` prints."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from holotype.fields import Count, Share, Text

__all__ = [
    "EXIT_CODES",
    "Agreement",
    "AnnotatorAgreement",
    "ClassAgreement",
    "ClassPair",
    "ConsensusSummary",
    "Estimate",
    "Images",
    "Item",
    "PairKappa",
    "Plan",
    "Thresholds",
    "TruthScore",
    "Verdict",
]

Verdict = Literal["accept", "tentative", "rewrite", "undefined"]
EXIT_CODES: dict[Verdict, int] = {"accept": 0, "tentative": 3, "rewrite": 4, "undefined": 4}
"""What a program is told by `agree score`: only labels that were accepted are a success."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Item(_Part):
    """An image as the dataset names it, the SHA-256 of its file, and whether every annotator gets it."""

    path: str
    sha256: str
    common: bool


class Plan(_Part):
    """Who labels what under which name. It holds the dataset's paths, so annotators must not see it.

    `tasks` maps an annotator to the images in the folder of that name, by file name, and each of these to the
    path of the image in the dataset at `root`.
    """

    version: Literal[1] = 1
    root: str
    classes: tuple[str, ...]
    seed: Count
    items: tuple[Item, ...]
    tasks: dict[str, dict[str, str]]
    problems: tuple[Text, ...] = ()

    @property
    def annotators(self) -> tuple[str, ...]:
        return tuple(self.tasks)

    @property
    def common(self) -> int:
        """How many images every annotator gets."""
        return sum(item.common for item in self.items)


class Estimate(_Part):
    """A coefficient with its bootstrap 95 % interval; all None where undefined, as `reason` says."""

    value: float | None
    low: float | None
    high: float | None
    reason: Text | None = None


class Thresholds(_Part):
    """Krippendorff's alpha from which labels are accepted, and from which they are tentative."""

    accept: Share
    tentative: Share


class Images(_Part):
    """Images by votes: `compared` have several, `single` one, `none` none; in `disputed` ones they differ."""

    compared: Count
    single: Count
    none: Count
    disputed: Count


class PairKappa(_Part):
    """Two annotators on the images that both voted on."""

    annotators: tuple[Text, Text]
    images: Count
    agreement: Share | None
    kappa: Estimate


class ClassAgreement(_Part):
    """`votes` for a class on compared images.

    `agreement`: where one annotator chose it, the chance that another did (specific agreement); `alpha`:
    Krippendorff's alpha of this class against the rest.
    """

    votes: Count
    agreement: Estimate
    alpha: Estimate


class AnnotatorAgreement(_Part):
    """One annotator.

    `empty` images were given without a label. `agreement` is the share of pairs with another's vote that are
    equal; `alpha_without` is alpha of the others alone. `with_consensus` is the share of this annotator's
    votes on compared images that equal the consensus and `confusion` counts them, rows by consensus, columns
    by vote, in the order of the classes. `quality` is how probably a vote is right, by Dawid & Skene's model,
    and `crowdlab_quality` by CROWDLAB.
    """

    votes: Count
    compared: Count
    empty: Count
    agreement: Estimate
    alpha_without: Estimate
    with_consensus: Share | None
    quality: Share | None
    crowdlab_quality: Share | None
    confusion: tuple[tuple[Count, ...], ...]


class ClassPair(_Part):
    """Two classes given to one image by two annotators, `count` times, a `share` of all disagreement."""

    classes: tuple[Text, Text]
    count: Count
    share: Share
    paths: tuple[Text, ...]


class ConsensusSummary(_Part):
    """How the votes became labels.

    `labels` counts images by consensus, `methods` by how it was found. In `tied` images several classes share
    the lead of the votes; in `overruled` the consensus is another class than the majority's.
    """

    labels: dict[Text, Count]
    methods: dict[str, Count]
    tied: Count
    overruled: Count


class TruthScore(_Part):
    """Share of right labels among the `images` whose true class is known, by whose label it is.

    A tie of the majority counts as wrong.
    """

    images: Count
    consensus: Share
    majority: Share
    annotators: dict[Text, Share | None]


class Agreement(_Part):
    """All that `agree score` found; printed by `--json` and written to `agreement.json`.

    `certain`: the whole interval of alpha lies where alpha does, so the verdict would not change with other
    images. `cohen_kappa` is the mean over pairs of annotators.
    """

    verdict: Verdict
    certain: bool
    reasons: tuple[Text, ...]
    thresholds: Thresholds
    classes: tuple[Text, ...]
    annotators: tuple[Text, ...]
    images: Images
    votes: Count
    agreement: Estimate
    cohen_kappa: Estimate
    fleiss_kappa: Estimate
    alpha: Estimate
    ac1: Estimate
    worst_pair: ClassPair | None
    confused: tuple[ClassPair, ...]
    per_class: dict[Text, ClassAgreement]
    per_annotator: dict[Text, AnnotatorAgreement]
    pairs: tuple[PairKappa, ...]
    consensus: ConsensusSummary
    truth: TruthScore | None
    problems: tuple[Text, ...]
    folder: Text
    seconds: Annotated[float, Field(ge=0)]

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.verdict]

"""The contract of `audit --json`: what was found in a dataset, the gates, and the verdict."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from holotype.dataset import Split
from holotype.fields import Count, Share, Text

__all__ = [
    "Audit",
    "Balance",
    "Calibration",
    "Choice",
    "Cluster",
    "Duplicates",
    "Gate",
    "Issue",
    "LabelAccuracy",
    "Leakage",
    "LeakageEffect",
    "Shift",
    "Shortcut",
    "Source",
    "Suspect",
    "Trait",
    "UnreadableImage",
    "Verdict",
]

Verdict = Literal["ready", "fix", "unusable"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Gate(_Part):
    """One condition. `passed` is None where it was not measured, which `advice` then says how to do.

    `severity` says what a failure means: `unusable`: training would refuse the data; `fix`: it would train,
    and the result could not be trusted.
    """

    name: str
    passed: bool | None
    value: float | None
    threshold: float
    advice: Text
    severity: Literal["fix", "unusable"]


class Source(_Part):
    """What was looked at."""

    path: Text
    root_hash: str
    images: Count
    classes: tuple[Text, ...]
    revision: Count


class Balance(_Part):
    """`counts` of images by class, and `by_split` by class and split.

    `entropy` is the normalised Shannon entropy of the classes, 1 where all are equal. `effective` is, by
    class, the effective number of images (1 - b^n) / (1 - b), b = 1 - 1/N (Cui et al. 2019). `remedies` are
    settings of `train`, the first choice first; `collect` is what each small class lacks for the rule.
    """

    counts: dict[Text, Count]
    by_split: dict[Text, dict[str, Count]]
    max_min_ratio: float | None
    entropy: Share
    effective: dict[Text, float]
    remedies: tuple[Text, ...]
    collect: dict[Text, Count]


class Cluster(_Part):
    """Copies of one image: `exact` (equal bytes or pixels) or `near`; `conflict`: under several labels.

    `labels` and `splits` are those of `paths`, in their order.
    """

    paths: tuple[Text, ...]
    labels: tuple[Text, ...]
    splits: tuple[Split, ...]
    kind: Literal["exact", "near"]
    conflict: bool


class Calibration(_Part):
    """How near copies were told from different images on this set.

    Thresholds on the Hamming distance of perceptual hashes, on the cosine distance of embeddings, and on the
    pixel distance that confirms a pair; `found` is the share of altered copies that pass, by alteration, and
    `false_copies` an estimate of the share of images that pass by chance.
    """

    hash_distance: int
    embedding_distance: float
    pixel_distance: float
    found: dict[str, Share]
    false_copies: Share
    copies: Count
    random_pairs: Count


class Duplicates(_Part):
    """Clusters of copies, the largest first; `extra` images could go without losing a picture."""

    clusters: tuple[Cluster, ...]
    extra: Count
    calibration: Calibration | None


class LeakageEffect(_Part):
    """Accuracy of a linear head on the frozen backbone with and without the leaked images of a split."""

    split: Split
    accuracy: Share
    without: Share
    leaked: Count
    images: Count


class Leakage(_Part):
    """`pairs` of copies in different splits (the training image first); `fraction` of validation and test."""

    pairs: tuple[tuple[Text, Text], ...]
    fraction: Share
    leaked: dict[Split, tuple[Text, ...]]
    effects: tuple[LeakageEffect, ...]


class Choice(_Part):
    """A class and its out-of-sample probability."""

    label: Text
    probability: Share


class Suspect(_Part):
    """An image whose label is probably wrong: the higher `score` is, the surer; `top` the best two."""

    path: Text
    label: Text
    suggested: Text
    score: Share
    top: tuple[Choice, ...]


class LabelAccuracy(_Part):
    """`estimate` by cleanlab is advisory. The gate uses `low`, the exact one-sided 95 % bound of the sample.

    `reviewed` images of a random sample of `sample` were decided, `wrong` of them otherwise than they are
    labelled; `skipped` were looked at and left open.
    """

    estimate: Share | None
    sample: Count
    reviewed: Count
    wrong: Count
    skipped: Count
    low: Share | None
    high: Share | None


class Issue(_Part):
    """An odd image. `value` is the measure behind `issue`."""

    path: Text
    issue: str
    value: float | str


class Trait(_Part):
    """An issue so common that it is how the set is: listed once, not per image."""

    issue: str
    images: Count
    prevalence: Share


class Shortcut(_Part):
    """Correlation ratio (0 to 1) of a health measure with the class; above the gate a model could learn it.

    `low` and `high` are the classes with the smallest and largest mean of the measure.
    """

    measure: str
    correlation: Share
    low: Text
    high: Text


class Shift(_Part):
    """Cross-validated AUC of a classifier that tells train from `split`, by embeddings; 0.5: it cannot."""

    split: Split
    auc: Share
    low: Share
    high: Share


class UnreadableImage(_Part):
    path: Text
    error: Text


class Audit(_Part):
    """All that `audit` found; printed by `--json` and written to `audit.json`."""

    verdict: Verdict
    reasons: tuple[Text, ...]
    gates: tuple[Gate, ...]
    source: Source
    balance: Balance
    duplicates: Duplicates
    leakage: Leakage
    label_suspects: tuple[Suspect, ...]
    label_accuracy: LabelAccuracy
    health: tuple[Issue, ...]
    traits: tuple[Trait, ...]
    shortcuts: tuple[Shortcut, ...]
    shift: tuple[Shift, ...]
    unreadable: tuple[UnreadableImage, ...]
    problems: tuple[Text, ...]
    seconds: Annotated[float, Field(ge=0)]

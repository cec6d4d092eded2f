"""An A/B test: who meets which arm, the rule that was settled before, and what may be said by now."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from holotype.sequential import (
    Arm,
    Sequence,
    SequentialVerdict,
    difference,
    happens_more,
    paired_difference,
    rate,
    ratio_is_off,
    sequential_verdict,
)

__all__ = [
    "ArmName",
    "ArmStatus",
    "Rule",
    "Status",
    "assign",
    "experiment_id",
    "hashed",
    "judge",
]

ArmName = Literal["champion", "challenger"]

_FEW_FAILURES = 5  # keys, or lost processes with all they took: so many may be chance


class Rule(BaseModel):
    """An A/B test: settled before it starts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    share: float = Field(0.1, gt=0, lt=1, description="of the keys that the challenger answers")
    shadow: bool = Field(
        False, description="the challenger answers beside the champion, while nobody waits; nobody sees it"
    )
    key: str = Field(
        "x-holotype-subject",
        description="request header whose value always meets the same arm; else the image",
    )
    alpha: float = Field(0.05, gt=0, lt=0.5, description="chance of a wrong verdict, however often one looks")
    margin: float = Field(
        0.0, ge=0, le=0.5, description="loss of accuracy, as a share, that is still not worse"
    )
    auto: Literal["none", "promote", "rollback", "both"] = Field(
        "none", description="what is done when the verdict is there, without asking"
    )
    least: int = Field(100, ge=1, description="labelled answers of each arm before any verdict")
    slower: float = Field(
        1.5,
        gt=1,
        description="ratio of the 95 % latencies beyond which nothing is promoted; not looked at in a shadow",
    )


@dataclass(frozen=True)
class ArmStatus:
    """Answers of an arm, images that it failed on or was late with, and of how many keys these are; its 95 %
    latency; keys with a labelled image, and how many of these were answered rightly.

    What was assigned to an arm is a key: of its labelled images only the first counts, since answers to one
    key are not independent. An image that the challenger failed on is a wrong answer, whoever answered it
    then, and all that one lost process took with it are one key. A client of a champion that fails has no
    answer to label: these count as failures only. Keys that found no process of their arm are in neither.
    """

    answers: int
    failed: int
    keys: int
    labelled: int
    right: int
    p95_ms: float | None

    @property
    def accuracy(self) -> float | None:
        return self.right / self.labelled if self.labelled else None


@dataclass(frozen=True)
class Status:
    """What an experiment says now. `difference` is of accuracy, as a share, anytime-valid at `rule.alpha`.

    So are the accuracies of both arms, each by itself; None where nobody told a label. `too_slow` is never
    said of a shadow, which answers at the lowest priority and when there is time. `fails_more`: the
    challenger fails for more keys than its share explains, which no accuracy makes up for.
    """

    experiment: str
    rule: Rule
    champion: ArmStatus
    challenger: ArmStatus
    champion_accuracy: Sequence | None
    challenger_accuracy: Sequence | None
    difference: Sequence
    ratio_is_off: bool
    too_slow: bool
    fails_more: bool
    verdict: SequentialVerdict
    advice: str


def experiment_id(champion: str, challenger: str) -> str:
    """Of two bundles, by their hashes: a restarted server goes on with its experiment."""
    return hashlib.sha256(f"{champion}/{challenger}".encode()).hexdigest()[:16]


def assign(key: bytes, *, experiment: str, share: float) -> ArmName:
    """The arm that a key meets, always and everywhere: by SHA-256 of experiment and key."""
    digest = hashlib.sha256(experiment.encode() + b"\0" + key).digest()
    return "challenger" if int.from_bytes(digest[:8], "big") < share * 2**64 else "champion"


def hashed(unit: bytes) -> str:
    """What is kept of a key or an image: enough to tell it from others, not what it was."""
    return hashlib.sha256(unit).hexdigest()[:32]


def judge(
    experiment: str,
    rule: Rule,
    *,
    champion: ArmStatus,
    challenger: ArmStatus,
    pairs: tuple[int, int, int, int] | None,
    failures: tuple[int, int],
) -> Status:
    """What may be said of these counts; `pairs` are those of a shadow: both right, only one, only the other,
    neither. `failures` are keys that the champion failed, and that the challenger did; of a shadow, those
    that only the one did, and only the other."""
    if pairs is not None:
        found = paired_difference(*pairs, alpha=rule.alpha)
    else:
        found = difference(
            Arm(champion.right, champion.labelled - champion.right),
            Arm(challenger.right, challenger.labelled - challenger.right),
            alpha=rule.alpha,
        )
    total = champion.keys + challenger.keys
    off = not rule.shadow and total > 0 and ratio_is_off(challenger.keys, total, share=rule.share)
    slow = (
        not rule.shadow  # which has the lowest priority: its latency says nothing of the bundle
        and champion.p95_ms is not None
        and challenger.p95_ms is not None
        and challenger.p95_ms > rule.slower * champion.p95_ms
    )
    share = 0.5 if rule.shadow else rule.share
    failing = failures[1] > _FEW_FAILURES and happens_more(
        failures[1], failures[0], share=share, alpha=rule.alpha
    )
    enough = min(champion.labelled, challenger.labelled) >= rule.least
    verdict: SequentialVerdict = (
        sequential_verdict(found, margin=rule.margin) if enough and not off else "undecided"
    )
    return Status(
        experiment=experiment,
        rule=rule,
        champion=champion,
        challenger=challenger,
        champion_accuracy=_accuracy(champion, alpha=rule.alpha),
        challenger_accuracy=_accuracy(challenger, alpha=rule.alpha),
        difference=found,
        ratio_is_off=off,
        too_slow=slow,
        fails_more=failing,
        verdict=verdict,
        advice=_FAILING if failing else _advice(verdict, off=off, slow=slow, enough=enough, least=rule.least),
    )


_FAILING = "roll back: the challenger fails more often than the champion"


def _accuracy(arm: ArmStatus, *, alpha: float) -> Sequence | None:
    return rate(Arm(arm.right, arm.labelled - arm.right), alpha=alpha) if arm.labelled else None


def _advice(verdict: SequentialVerdict, *, off: bool, slow: bool, enough: bool, least: int) -> str:
    if off:
        return "the arms do not get their shares: find out why before believing anything"
    if not enough:
        return f"wait for {least} labelled answers of each arm"
    if verdict == "worse":
        return "roll back: the challenger is worse"
    if verdict == "undecided":
        return "wait: nothing can be said yet"
    return "do not promote: the challenger is too slow" if slow else f"promote: the challenger is {verdict}"

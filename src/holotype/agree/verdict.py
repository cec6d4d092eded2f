"""From coefficients and consensus to a verdict with its reasons, in the form of the contract."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from holotype.agree.consensus import Consensus
from holotype.agree.contract import (
    Agreement,
    AnnotatorAgreement,
    ClassAgreement,
    ClassPair,
    ConsensusSummary,
    Estimate,
    Images,
    PairKappa,
    Thresholds,
    TruthScore,
    Verdict,
)
from holotype.agree.votes import Votes
from holotype.agreement import Coefficients, confusions, count_votes, disagreements
from holotype.config import AgreeConfig
from holotype.metrics import Interval

__all__ = ["judge"]

_PAIRS = 12
_EXAMPLES = 8
_ONE_CLASS = "all votes are of one class"


def judge(
    votes: Votes,
    found: Coefficients,
    consensus: Consensus,
    *,
    config: AgreeConfig,
    folder: Path,
    truth: Mapping[str, str] | None = None,
    problems: tuple[str, ...] = (),
) -> Agreement:
    """The verdict by alpha, and everything that was measured. `seconds` is left at 0."""
    number = (votes.table >= 0).sum(axis=1)
    counts = count_votes(votes.table, classes=len(votes.classes))
    confused = _confused(votes)
    result = Agreement(
        verdict=_verdict(found.alpha.value, config),
        certain=not math.isnan(found.alpha.value)
        and _verdict(found.alpha.low, config) == _verdict(found.alpha.high, config),
        reasons=(),
        thresholds=Thresholds(accept=config.accept, tentative=config.tentative),
        classes=votes.classes,
        annotators=votes.annotators,
        images=Images(
            compared=int((number >= 2).sum()),
            single=int((number == 1).sum()),
            none=int((number == 0).sum()),
            disputed=int(((counts > 0).sum(axis=1) > 1).sum()),
        ),
        votes=int(number.sum()),
        agreement=_estimate(found.observed),
        cohen_kappa=_estimate(found.cohen, _ONE_CLASS),
        fleiss_kappa=_estimate(found.fleiss, _ONE_CLASS),
        alpha=_estimate(found.alpha, _ONE_CLASS),
        ac1=_estimate(found.ac1, "there is only one class"),
        worst_pair=confused[0] if confused else None,
        confused=confused,
        per_class=_per_class(votes, found),
        per_annotator=_per_annotator(votes, found, consensus),
        pairs=_pairs(votes, found),
        consensus=_summary(votes, consensus),
        truth=None if truth is None else _truth_score(votes, consensus, truth),
        problems=problems,
        folder=str(folder),
        seconds=0.0,
    )
    return result.model_copy(update={"reasons": tuple(_reasons(result, config))})


def _verdict(alpha: float, config: AgreeConfig) -> Verdict:
    if math.isnan(alpha):
        return "undefined"
    if alpha >= config.accept:
        return "accept"
    return "tentative" if alpha >= config.tentative else "rewrite"


def _reasons(result: Agreement, config: AgreeConfig) -> Iterator[str]:
    """Why the verdict is what it is and what to do next, the weightiest first."""
    alpha = result.alpha
    if alpha.value is None or alpha.low is None or alpha.high is None:
        yield (
            "Krippendorff's alpha is undefined, since all votes are of one class: they do not say how well"
            " classes are told apart; give out images of several classes"
        )
        return
    interval = (
        f"Krippendorff's alpha is {alpha.value:.3f} (95 % interval {alpha.low:.3f} to {alpha.high:.3f})"
    )
    yield {
        "accept": f"{interval}, at least {config.accept:g}: the labels can be relied on",
        "tentative": f"{interval}, between {config.tentative:g} and {config.accept:g}: usable for tentative"
        " conclusions; look at the disagreements before training",
    }.get(result.verdict, f"{interval}, below {config.tentative:g}: rewrite the guideline")
    crossed = [line for line in (config.tentative, config.accept) if alpha.low < line <= alpha.high]
    if crossed:
        lines = " and ".join(f"{line:g}" for line in crossed)
        yield f"the interval crosses {lines}: other images might give another verdict; more would decide"
    worst = result.worst_pair
    if worst is not None and result.verdict != "accept":
        yield (
            f"{worst.classes[0]!r} and {worst.classes[1]!r} cause most of the disagreement, {worst.share:.0%}"
            f" ({worst.count} pairs of votes): say in the guideline how to tell them apart"
        )
    yield from _annotator_reasons(result, config)
    used = {name: part.votes for name, part in result.per_class.items()}
    frequent = max(used, key=lambda name: used[name])
    common = used[frequent] / sum(used.values())
    if result.ac1.value is not None and result.ac1.value >= config.accept and alpha.value < config.tentative:
        yield (
            f"Gwet's AC1 is {result.ac1.value:.3f}: annotators agree on most images, but {common:.0%} of the"
            f" votes are {frequent!r}, so alpha rests on the few others"
        )
    if result.images.compared < config.least:
        yield f"only {result.images.compared} images have several votes; {config.least} are asked for"
    if result.problems:
        yield f"problems: {len(result.problems)}, such as {result.problems[0]}"


def _annotator_reasons(result: Agreement, config: AgreeConfig) -> Iterator[str]:
    """Annotators without whom the verdict would be better."""
    order: tuple[Verdict, ...] = ("undefined", "rewrite", "tentative", "accept")
    for name, annotator in result.per_annotator.items():
        without = annotator.alpha_without.value
        if without is None:
            continue
        verdict = _verdict(without, config)
        if order.index(verdict) > order.index(result.verdict):
            yield f"without {name} alpha would be {without:.3f} ({verdict}): talk it over with {name}"


def _estimate(interval: Interval, reason: str = "") -> Estimate:
    if math.isnan(interval.value):
        return Estimate(value=None, low=None, high=None, reason=reason)
    assert not math.isnan(interval.low)
    return Estimate(value=interval.value, low=interval.low, high=interval.high)


def _share(top: float, bottom: float) -> float | None:
    return float(top / bottom) if bottom else None


def _known(value: float) -> float | None:
    return None if math.isnan(value) else min(max(float(value), 0.0), 1.0)


def _per_class(votes: Votes, found: Coefficients) -> dict[str, ClassAgreement]:
    compared = (votes.table >= 0).sum(axis=1) >= 2
    used = count_votes(votes.table[compared], classes=len(votes.classes)).sum(axis=0)
    reasons = np.where(used == 0, "no vote on an image with several", _ONE_CLASS)
    return {
        name: ClassAgreement(
            votes=int(used[i]),
            agreement=_estimate(found.class_observed[i], str(reasons[i])),
            alpha=_estimate(found.class_alpha[i], str(reasons[i])),
        )
        for i, name in enumerate(votes.classes)
    }


def _per_annotator(votes: Votes, found: Coefficients, consensus: Consensus) -> dict[str, AnnotatorAgreement]:
    voted = votes.table >= 0
    compared = voted.sum(axis=1) >= 2
    matrices = confusions(votes.table[compared], consensus.labels[compared], classes=len(votes.classes))
    result = {}
    for r, name in enumerate(votes.annotators):
        others = np.delete(voted, r, axis=1).sum(axis=1)
        alone = "fewer than two others share an image" if (others < 2).all() else _ONE_CLASS
        result[name] = AnnotatorAgreement(
            votes=int(voted[:, r].sum()),
            compared=int((voted[:, r] & compared).sum()),
            empty=votes.empty[r],
            agreement=_estimate(found.with_others[r], "shares no image with another"),
            alpha_without=_estimate(found.alpha_without[r], alone),
            with_consensus=_share(np.trace(matrices[r]), matrices[r].sum()),
            quality=_known(consensus.quality[r]) if (voted[:, r] & compared).any() else None,
            crowdlab_quality=_known(consensus.crowdlab_quality[r]),
            confusion=tuple(tuple(int(n) for n in row) for row in matrices[r]),
        )
    return result


def _pairs(votes: Votes, found: Coefficients) -> tuple[PairKappa, ...]:
    return tuple(
        PairKappa(
            annotators=(votes.annotators[pair.first], votes.annotators[pair.second]),
            images=pair.images,
            agreement=_known(pair.agreement),
            kappa=_estimate(
                pair.kappa, "both used one and the same class" if pair.images else "they share no image"
            ),
        )
        for pair in found.pairs
    )


def _confused(votes: Votes) -> tuple[ClassPair, ...]:
    """The pairs of classes that cause most of the disagreement, each with its most divided images."""
    matrix = np.triu(disagreements(votes.table, classes=len(votes.classes)))
    counts = count_votes(votes.table, classes=len(votes.classes))
    total = matrix.sum()
    pairs = []
    for cell in np.argsort(-matrix, axis=None, kind="stable")[:_PAIRS]:
        first, second = divmod(int(cell), len(matrix))
        if not matrix[first, second]:
            break
        both = counts[:, first] * counts[:, second]
        images = np.argsort(-both, kind="stable")[: min(_EXAMPLES, int((both > 0).sum()))]
        pairs.append(
            ClassPair(
                classes=(votes.classes[first], votes.classes[second]),
                count=int(matrix[first, second]),
                share=float(matrix[first, second] / total),
                paths=tuple(votes.items[i] for i in images),
            )
        )
    return tuple(pairs)


def _summary(votes: Votes, consensus: Consensus) -> ConsensusSummary:
    labels = Counter(int(label) for label in consensus.labels)
    majority = consensus.majority.labels
    return ConsensusSummary(
        labels={name: labels[i] for i, name in enumerate(votes.classes)},
        methods=dict(Counter(method for method in consensus.method if method)),
        tied=int(consensus.majority.tied.sum()),
        overruled=int(((majority >= 0) & (majority != consensus.labels)).sum()),
    )


def _truth_score(votes: Votes, consensus: Consensus, truth: Mapping[str, str]) -> TruthScore | None:
    """None where no voted image has a known class."""
    voted = consensus.labels >= 0
    rows = [i for i, item in enumerate(votes.items) if item in truth and voted[i]]
    if not rows:
        return None
    place = {name: i for i, name in enumerate(votes.classes)}
    right = np.array([place.get(truth[votes.items[i]], -2) for i in rows])
    table = votes.table[rows]
    return TruthScore(
        images=len(rows),
        consensus=float((consensus.labels[rows] == right).mean()),
        majority=float((consensus.majority.labels[rows] == right).mean()),
        annotators={
            name: _share((table[:, r] == right).sum(), (table[:, r] >= 0).sum())
            for r, name in enumerate(votes.annotators)
        },
    )

"""`holotype agree score`: how far annotators agree, who and which classes differ, and one label per image."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from holotype.agree.consensus import Consensus, find_consensus
from holotype.agree.contract import Agreement
from holotype.agree.opinion import predict_items
from holotype.agree.page import write_page
from holotype.agree.plan import read_plan
from holotype.agree.verdict import judge
from holotype.agree.votes import Votes, find_plan, read_votes
from holotype.agreement import count_votes, measure_agreement
from holotype.bundle import write_text
from holotype.config import AgreeConfig
from holotype.dataset import thumbnailer_below
from holotype.errors import ConfigError, DatasetError
from holotype.metrics import Predictions

__all__ = ["CONSENSUS", "DISAGREEMENTS", "score"]

CONSENSUS, DISAGREEMENTS = "consensus.csv", "disagreements.csv"


def score(
    files: Sequence[Path | str],
    *,
    plan: Path | str | None = None,
    model: Path | str | None = None,
    predictions: Predictions | None = None,
    truth: Mapping[str, str] | None = None,
    out: Path | str | None = None,
    config: AgreeConfig | None = None,
) -> Agreement:
    """Measure the agreement of annotators' `files` (see `read_votes`) and find a consensus.

    The verdict follows Krippendorff's alpha: `accept` from `config.accept`, `tentative` from
    `config.tentative`, below `rewrite` the guideline; `undefined` where all votes are of one class. The
    consensus of images with several votes is Dawid and Skene's, or, where `predictions` (out of sample, paths
    as the dataset's) are given or asked of `model` (a bundle that was trained on other images), CROWDLAB's;
    with one vote it is that vote. `truth` maps paths to right labels, to score annotators and consensus
    against.

    Writes agreement.json, agreement.html, consensus.csv (`image_path,label,confidence,votes,method`) and
    disagreements.csv (`image_path,label,confidence,votes,candidates`, the most divided first; `candidates` is
    JSON, votes by class) into `out`, by default `agreement` beside the first file. Paths are those of the
    dataset. `DatasetError` where no image has two votes.
    """
    started = time.perf_counter()
    config = config or AgreeConfig()
    if config.tentative > config.accept:
        raise ConfigError(
            f"tentative ({config.tentative:g}) is above accept ({config.accept:g})", fix="swap them"
        )
    if not files:
        raise ConfigError("no files of votes", fix="give the annotators' files")
    paths = [Path(file) for file in files]
    votes, problems = read_votes(paths, plan=plan)
    _check_comparable(votes, paths[0])
    found = Path(plan) if plan is not None else find_plan(paths)
    root = paths[0].absolute().parent if found is None else Path(read_plan(found).root)
    if model is not None:
        predictions = predict_items(model, votes.items, root=root)
    if predictions is not None:
        votes = _with_classes(votes, predictions.classes)
    coefficients = measure_agreement(
        votes.table, classes=len(votes.classes), samples=config.samples, seed=config.seed
    )
    consensus = find_consensus(votes, predictions=predictions)
    folder = Path(out) if out is not None else paths[0].absolute().parent / "agreement"
    result = judge(
        votes,
        coefficients,
        consensus,
        config=config,
        truth=truth,
        problems=tuple(map(str, problems)),
        folder=folder,
    )
    result = result.model_copy(update={"seconds": time.perf_counter() - started})
    _write(folder, result, votes=votes, consensus=consensus, root=root)
    return result


def _write(folder: Path, result: Agreement, *, votes: Votes, consensus: Consensus, root: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "agreement.json", result.model_dump_json(indent=1) + "\n")
    write_text(folder / CONSENSUS, _consensus_csv(votes, consensus))
    write_text(folder / DISAGREEMENTS, _disagreements_csv(votes, consensus))
    write_page(folder / "agreement.html", result, thumbnail=thumbnailer_below(root))


def _check_comparable(votes: Votes, where: Path) -> None:
    if (votes.table >= 0).any(axis=0).sum() < 2:
        raise DatasetError("there are labels of one annotator only", where=where, fix="give all files")
    if ((votes.table >= 0).sum(axis=1) < 2).all():
        raise DatasetError(
            "no image has labels of two annotators",
            where=where,
            fix="give the files of annotators who share images, with the plan.json they were dealt by",
        )


def _with_classes(votes: Votes, classes: Sequence[str]) -> Votes:
    """Add the classes that only the model knows; those that it does not know are an error."""
    unknown = sorted(set(votes.classes) - set(classes))
    if unknown:
        raise DatasetError(
            f"the model has no class {unknown[0]!r}", fix="use a model of the classes that were voted for"
        )
    return replace(votes, classes=(*votes.classes, *(c for c in classes if c not in votes.classes)))


def _consensus_csv(votes: Votes, consensus: Consensus) -> str:
    counts = (votes.table >= 0).sum(axis=1)
    return _csv(
        ("image_path", "label", "confidence", "votes", "method"),
        (
            (item, votes.classes[label], f"{confidence:.4f}", count, method)
            for item, label, confidence, count, method in zip(
                votes.items, consensus.labels, consensus.confidence, counts, consensus.method, strict=True
            )
            if label >= 0
        ),
    )


def _disagreements_csv(votes: Votes, consensus: Consensus) -> str:
    """The most divided images first, then the least certain."""
    counts = count_votes(votes.table, classes=len(votes.classes))
    rows = np.flatnonzero((counts > 0).sum(axis=1) > 1)
    order = rows[np.lexsort((consensus.confidence[rows], consensus.majority.share[rows]))]
    return _csv(
        ("image_path", "label", "confidence", "votes", "candidates"),
        (
            (
                votes.items[row],
                votes.classes[consensus.labels[row]],
                f"{consensus.confidence[row]:.4f}",
                counts[row].sum(),
                json.dumps(
                    {
                        votes.classes[k]: int(counts[row, k])
                        for k in np.argsort(-counts[row], kind="stable")
                        if counts[row, k]
                    },
                    ensure_ascii=False,
                ),
            )
            for row in order
        ),
    )


def _csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()

"""`holotype audit`: what is wrong with a dataset, known before a model is trained on it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from holotype.audit.balance import balance
from holotype.audit.calibration import unit
from holotype.audit.contract import (
    Audit,
    LabelAccuracy,
    Shift,
    Source,
    Suspect,
    Trait,
    UnreadableImage,
)
from holotype.audit.duplicates import Copies, find_copies, summarise
from holotype.audit.gates import EXIT_CODES, Findings, judge_data, judge_findings, verdict_of
from holotype.audit.health import FileFacts, find_issues, named_columns, shortcuts, unreadable_issues
from holotype.audit.junit import write_junit
from holotype.audit.labels import OutOfSample, label_suspects, out_of_sample
from holotype.audit.leakage import find_leakage, mended_split
from holotype.audit.page import write_page
from holotype.audit.shift import split_shift
from holotype.audit.signatures import Signatures, read_signatures
from holotype.bundle import write_text
from holotype.config import AuditConfig
from holotype.dataset import Dataset, cache_folder, dataset_name, index_dataset, thumbnailer
from holotype.dataset.leaks import write_leaks
from holotype.dataset.revisions import write_revision
from holotype.embeddings import Backbone, embed
from holotype.imbalance import write_rule
from holotype.metrics import binomial_bounds
from holotype.models import input_spec
from holotype.progress import note
from holotype.review import (
    SuspectLabel,
    Suspects,
    draw_sample,
    sample_accuracy,
    write_sample,
    write_suspects,
)

__all__ = ["EXIT_CODES", "Audit", "AuditResult", "audit"]

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class AuditResult:
    """What was found, where the pages are, and the revision that `fix_split` wrote (None: none)."""

    audit: Audit
    folder: Path
    split_revision: int | None

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.audit.verdict]


@dataclass(frozen=True)
class _Evidence:
    """All that is measured once and looked at from several sides."""

    dataset: Dataset
    config: AuditConfig
    signatures: Signatures
    embeddings: Floats
    copies: Copies
    chances: OutOfSample | None


def audit(
    data: Path | str,
    *,
    config: AuditConfig | None = None,
    out: Path | str | None = None,
    junit: Path | str | None = None,
    fix_split: bool = False,
    review_sample: int | None = None,
    device: str = "auto",
) -> AuditResult:
    """Look for whatever makes a classifier trained on `data` worse than its accuracy says.

    Writes `audit.json` and `audit.html` to `out` (default: `audits/NAME`), and JUnit XML to `junit`. Nothing
    of the data is changed: `fix_split` writes a new revision of the splits beside the index, and
    `review_sample` draws that many random images for `holotype agree adjudicate`. `DatasetError` where there
    is nothing to list.
    """
    begun = time.perf_counter()
    config = config or AuditConfig()
    spec = input_spec(config.model, config.data)
    dataset = index_dataset(data, spec=spec, config=config.data)
    target = Path(out) if out is not None else Path("audits") / dataset_name(dataset.source)
    for place in (target, *([Path(junit).parent] if junit is not None else [])):
        place.mkdir(parents=True, exist_ok=True)
    note(f"{len(dataset.table):,} images in {len(dataset.classes)} classes of {dataset.source}")
    folder = cache_folder(dataset.source)
    evidence = _gather(dataset, config, device=device)
    if review_sample is not None:
        _draw_sample(dataset, folder, count=review_sample, seed=config.seed)
    found = _conclude(evidence, folder, begun=begun)
    _remember(found, folder, rule=config.gates.balance)
    revision = None
    if fix_split:
        revision = _fix_split(dataset, evidence.copies, folder)
    write_text(target / "audit.json", found.model_dump_json(indent=1) + "\n")
    write_page(target / "audit.html", found, thumbnail=thumbnailer(dataset))
    if junit is not None:
        write_junit(Path(junit), found)
    return AuditResult(found, target, revision)


def _gather(dataset: Dataset, config: AuditConfig, *, device: str) -> _Evidence:
    signatures = read_signatures(dataset)
    backbone = Backbone(config.model, dataset.spec, device)
    if not len(dataset.table):
        empty = np.zeros(0, dtype=np.int64)
        copies = Copies(empty, empty, empty.reshape(0, 2), np.zeros(0, dtype=np.float32), None)
        return _Evidence(dataset, config, signatures, np.zeros((0, 1), dtype=np.float32), copies, None)
    embeddings = embed(dataset, backbone=backbone)
    copies = find_copies(
        dataset,
        signatures,
        unit(embeddings),
        embed=backbone,
        config=config.duplicates,
        seed=config.seed,
    )
    rows = np.arange(len(dataset.table), dtype=np.int64)
    chances = out_of_sample(
        embeddings,
        dataset.labels(rows),
        copies.cluster,
        classes=len(dataset.classes),
        folds=config.folds,
        seed=config.seed,
    )
    return _Evidence(dataset, config, signatures, embeddings, copies, chances)


def _conclude(evidence: _Evidence, folder: Path, *, begun: float) -> Audit:
    dataset, config = evidence.dataset, evidence.config
    found, traits = _find(evidence, folder)
    gates = (
        *judge_data(dataset, config=config),
        *judge_findings(found, images=len(dataset.table), limits=config.gates),
    )
    verdict, reasons = verdict_of(gates)
    broken = unreadable_issues((file.path, file.error) for file in dataset.unreadable)
    return Audit(
        verdict=verdict,
        reasons=reasons,
        gates=gates,
        source=Source(
            path=str(dataset.source),
            root_hash=dataset.root_hash,
            images=len(dataset.table),
            classes=dataset.classes,
            revision=dataset.revision,
        ),
        balance=found.balance,
        duplicates=found.duplicates,
        leakage=found.leakage,
        label_suspects=found.label_suspects,
        label_accuracy=found.label_accuracy,
        health=(*broken, *found.health),
        traits=traits,
        shortcuts=found.shortcuts,
        shift=found.shift,
        unreadable=tuple(UnreadableImage(path=file.path, error=file.error) for file in dataset.unreadable),
        problems=tuple(str(problem) for problem in dataset.problems),
        seconds=time.perf_counter() - begun,
    )


def _find(evidence: _Evidence, folder: Path) -> tuple[Findings, tuple[Trait, ...]]:
    """All that the gates judge, and what is so of the whole set."""
    dataset, config, table = evidence.dataset, evidence.config, evidence.dataset.table
    paths, labels = table["path"].to_list(), table["label"].to_list()
    facts = FileFacts(
        format=table["format"].to_list(),
        mode=table["mode"].to_list(),
        width=table["width"].to_numpy(),
        height=table["height"].to_numpy(),
        bytes=table["bytes"].to_numpy(),
    )
    measures = evidence.signatures.measures
    issues, traits = find_issues(paths, facts, measures, config=config.health)
    suspects, accuracy = _labels(evidence, folder)
    penalty = None if evidence.chances is None else evidence.chances.penalty
    findings = Findings(
        balance=balance(labels, table["split"].to_list(), rule=config.gates.balance),
        duplicates=summarise(dataset, evidence.copies),
        leakage=find_leakage(dataset, evidence.copies, evidence.embeddings, penalty=penalty),
        label_suspects=suspects,
        label_accuracy=accuracy,
        health=issues,
        shortcuts=shortcuts(named_columns(paths, facts, measures), labels),
        shift=_shift(evidence),
    )
    return findings, traits


def _labels(evidence: _Evidence, folder: Path) -> tuple[tuple[Suspect, ...], LabelAccuracy]:
    dataset = evidence.dataset
    suspects: tuple[Suspect, ...] = ()
    estimate = None
    if evidence.chances is not None:
        suspects, estimate = label_suspects(
            evidence.chances,
            dataset.labels(np.arange(len(dataset.table), dtype=np.int64)),
            paths=dataset.table["path"].to_list(),
            classes=dataset.classes,
            most=evidence.config.suspects,
        )
    reviewed = sample_accuracy(folder, dataset.labelling_hash, root=dataset.root)
    # What was left open is taken for wrong in the lower bound, and for right in the upper.
    right, looked_at = reviewed.reviewed - reviewed.wrong, reviewed.reviewed + reviewed.skipped
    low, _ = binomial_bounds(right, looked_at)
    _, high = binomial_bounds(right + reviewed.skipped, looked_at)
    if looked_at and looked_at == len(dataset.table):
        low, high = right / looked_at, (right + reviewed.skipped) / looked_at
    accuracy = LabelAccuracy(
        estimate=estimate,
        sample=reviewed.sample,
        reviewed=reviewed.reviewed,
        wrong=reviewed.wrong,
        skipped=reviewed.skipped,
        low=low if looked_at else None,
        high=high if looked_at else None,
    )
    return suspects, accuracy


def _shift(evidence: _Evidence) -> tuple[Shift, ...]:
    dataset = evidence.dataset
    found: list[Shift] = []
    for split in dataset.splits:
        if split == "train" or "train" not in dataset.splits:
            continue
        train, other = dataset.rows("train"), dataset.rows(split)
        rows = np.concatenate([train, other])
        shift = split_shift(
            evidence.embeddings[rows],
            np.arange(len(rows)) < len(train),
            groups=evidence.copies.cluster[rows],
            seed=evidence.config.seed,
            split=split,
        )
        found += [shift] if shift is not None else []
    return tuple(found)


def _remember(found: Audit, folder: Path, *, rule: float) -> None:
    """Keep what later verbs ask for beside the index: suspects, leaks, and the rule for unequal classes."""
    doubtful = (
        SuspectLabel(
            path=suspect.path,
            label=suspect.label,
            suggested=suspect.suggested,
            score=suspect.score,
            top=tuple(choice.label for choice in suspect.top),
        )
        for suspect in found.label_suspects
    )
    first: dict[str, SuspectLabel] = {}
    for item in (*_conflicting(found), *doubtful):
        first.setdefault(item.path, item)
    write_suspects(folder, Suspects(root_hash=found.source.root_hash, items=tuple(first.values())))
    write_leaks(folder, found.source.root_hash, found.leakage.leaked)
    write_rule(folder, found.source.root_hash, rule)


def _conflicting(found: Audit) -> Iterator[SuspectLabel]:
    """Copies under several labels, of which all but one are wrong."""
    for cluster in found.duplicates.clusters:
        if cluster.conflict:
            first = cluster.labels[0]
            second = next(label for label in cluster.labels if label != first)
            for path, label in zip(cluster.paths, cluster.labels, strict=True):
                other = second if label == first else first
                yield SuspectLabel(path=path, label=label, suggested=other, score=1.0)


def _draw_sample(dataset: Dataset, folder: Path, *, count: int, seed: int) -> None:
    examples = dataset.table.select("path", "label").iter_rows()
    sample = draw_sample(examples, count=count, seed=seed, root_hash=dataset.labelling_hash)
    write_sample(folder, sample)
    note(f"drew {len(sample.items)} random images; now run: holotype agree adjudicate {dataset.source}")


def _fix_split(dataset: Dataset, copies: Copies, folder: Path) -> int | None:
    changes = mended_split(dataset, copies)
    moved = sum(bool(change.reason) for change in changes)
    if not moved:
        note("no copies lie in different splits: the split stays as it is")
        return None
    revision = write_revision(folder, source="fix-split", changes=changes, root_hash_before=dataset.root_hash)
    note(
        f"revision {revision.number}: {moved} images moved so that copies stay together; it is used from now"
        " on (--set data.revision=0 reads the data as it is)"
    )
    return revision.number

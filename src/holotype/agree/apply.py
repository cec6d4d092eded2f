"""`holotype agree apply`: decisions become a new revision of the dataset's labels."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from holotype.agree.exchange import nearest, read_answers
from holotype.bundle import write_text
from holotype.config import AgreeConfig
from holotype.dataset.hashes import file_hashes
from holotype.dataset.listing import Listing, problems_error
from holotype.dataset.revisions import (
    Change,
    apply_revisions,
    latest_revision,
    note_outdated,
    valid_revisions,
    write_revision,
)
from holotype.dataset.store import cache_folder
from holotype.dataset.table import COLUMNS, group_cell
from holotype.errors import ConfigError, DatasetError
from holotype.progress import note
from holotype.review import Decision, append_decisions, latest_decisions, read_decisions, read_log

__all__ = ["Applied", "LabelChange", "Labels", "apply", "read_labels"]


@dataclass(frozen=True)
class LabelChange:
    """One example whose label has changed. `before` or `after` is "" where it is (was) left out."""

    path: str
    before: str
    after: str
    reason: str


@dataclass(frozen=True)
class Applied:
    """What `apply` did: the revision that is now the latest, and what became of every decision.

    `changed` have another label than before, `dropped` are left out now. `unchanged` were decided to be as
    they are, or were applied before; `missing` are not in the data any more, or are another picture now.
    """

    revision: int
    changed: tuple[LabelChange, ...]
    dropped: tuple[LabelChange, ...]
    unchanged: int
    skipped: int
    missing: int
    out: Path | None = None


@dataclass(frozen=True)
class Labels:
    """The examples of a dataset as its own files say, and as they are by the latest revision.

    `outdated` are the paths, sorted, of files that have other content now than when they were revised, which
    is not applied to them.
    """

    own: Listing
    present: Listing
    revision: int
    outdated: tuple[str, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """Of both, in order."""
        return tuple(sorted({record.label for record in (*self.own.records, *self.present.records)}))

    @property
    def by_path(self) -> dict[str, str]:
        """The present label of every example, or its own where it is left out now."""
        return {**_by_path(self.own), **_by_path(self.present)}


def apply(
    data: Path | str,
    *,
    decisions: Path | None = None,
    out: Path | None = None,
    config: AgreeConfig | None = None,
    new_classes: Sequence[str] = (),
) -> Applied:
    """Make a new revision of all that the decisions change; none where they change nothing.

    `decisions` is a filled queue.csv or a Label Studio export, which is added to those of the page first.
    `out` is a CSV that the whole revised listing is also written to. A decision that was undone, or skipped
    later, gives back the label that the data has. `DatasetError` where a label is neither a class nor one of
    `new_classes`.
    """
    config = config or AgreeConfig()
    data = Path(data)
    if out is not None and out.suffix.lower() != ".csv":
        raise ConfigError("must end in .csv", where=f"--out {out}")
    folder = cache_folder(data)
    labels = read_labels(data, config=config)
    note_outdated(f"revision {labels.revision}", labels.outdated)
    classes = (*labels.classes, *new_classes)
    if decisions is not None:
        _import(folder, decisions, labels=labels, classes=classes)
    outcome = _weigh(folder, labels)
    for change in outcome.changes:
        if change.label is not None and change.label not in classes:
            raise DatasetError(
                f"{change.path} was decided to be {change.label!r}, which is no class of the dataset",
                where=data,
                fix=nearest(change.label, classes),
            )
    revision, before = labels.revision, _by_path(labels.present)
    if outcome.changes:
        now = file_hashes((one.path for one in outcome.changes), root=labels.own.root, folder=folder)
        changes = [one.model_copy(update={"sha256": now.get(one.path)}) for one in outcome.changes]
        revision = write_revision(folder, source="relabel", changes=changes).number
        labels = read_labels(data, config=config)
    else:
        note("no decision changes anything: no new revision")
    if out is not None:
        _write_listing(out, labels.present)
    after = _by_path(labels.present)
    made = [
        LabelChange(one.path, before.get(one.path, ""), after.get(one.path, ""), one.reason)
        for one in outcome.changes
    ]
    return Applied(
        revision=revision,
        changed=tuple(change for change in made if change.after),
        dropped=tuple(change for change in made if not change.after),
        unchanged=outcome.unchanged,
        skipped=outcome.skipped,
        missing=outcome.missing,
        out=out,
    )


def read_labels(data: Path, *, config: AgreeConfig) -> Labels:
    """List a dataset with and without the relabelling of its revisions."""
    from holotype.dataset.source import read_source

    if config.data.revision != "latest":
        raise ConfigError(
            "new decisions go on top of the latest revision",
            where="data.revision",
            fix="leave it out; to work on from an older state, apply it with --out and use that CSV",
        )
    folder = cache_folder(data)
    listing = read_source(data, config=config.data)
    if listing.problems and not listing.records:
        raise problems_error(data, listing.problems, total=len(listing.problems))
    revisions, replaced = valid_revisions(listing, folder, latest_revision(folder))
    return Labels(
        own=apply_revisions(listing, [one for one in revisions if one.source != "relabel"]),
        present=apply_revisions(listing, revisions),
        revision=len(revisions),
        outdated=replaced,
    )


@dataclass
class _Outcome:
    changes: list[Change] = field(default_factory=list)
    unchanged: int = 0
    skipped: int = 0
    missing: int = 0


def _weigh(folder: Path, labels: Labels) -> _Outcome:
    """What the decisions change about the present labels."""
    own, present = _by_path(labels.own), _by_path(labels.present)
    log = read_log(folder, root=labels.own.root)
    note_outdated("decisions", log.outdated)
    # The last decision about each path; None where all were undone.
    decisions = {**dict.fromkeys(sorted(log.undone)), **latest_decisions(log)}
    outcome = _Outcome(missing=len(set(log.outdated) - decisions.keys()))
    for path, decision in decisions.items():
        if path not in own:
            outcome.missing += decision is not None
        elif decision is None or decision.action == "skip":
            outcome.skipped += decision is not None
            if present.get(path) != own[path]:
                outcome.changes.append(Change(path=path, restore=True, reason="decision taken back"))
        elif decision.label == present.get(path):
            outcome.unchanged += 1
        else:
            drop = decision.label is None
            change = Change(path=path, label=decision.label, drop=drop, reason=decision.reason)
            outcome.changes.append(change)
    return outcome


def _by_path(listing: Listing) -> dict[str, str]:
    return {record.path: record.label for record in listing.records}


def _import(folder: Path, file: Path, *, labels: Labels, classes: Sequence[str]) -> None:
    """Add the answers in a file to the log, except for those that it holds already."""
    by_path = labels.by_path
    answers = read_answers(file, paths=by_path, classes=classes)
    root = labels.own.root
    standing, hashes = read_decisions(folder, root=root), file_hashes(answers, root=root, folder=folder)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    fresh = []
    for path, label in answers.items():
        known = standing.get(path)
        if known is None or known.action == "skip" or known.label != label:
            fresh.append(
                Decision(
                    path=path,
                    action="drop" if label is None else "label",
                    label=label,
                    before=by_path[path],
                    reason=f"decided in {file.name}",
                    at=now,
                    sha256=hashes.get(path),
                )
            )
    if fresh:
        append_decisions(folder, fresh)
    note(f"{file}: {len(answers)} answers, {len(fresh)} of them new")


def _write_listing(file: Path, listing: Listing) -> None:
    """`image_path,label,split,annotator,group`, paths relative to the CSV where the images lie below it."""
    root, home = listing.root.resolve(), file.resolve().parent
    prefix = root.relative_to(home) if root.is_relative_to(home) else root
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    for record in listing.records:
        path = (prefix / record.path).as_posix()
        writer.writerow((path, record.label, record.split, record.annotator, group_cell(record)))
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_text(file, stream.getvalue())
    except UnicodeEncodeError as error:
        raise DatasetError(
            "a file name is not UTF-8", where=root, fix="rename it, or do without --out"
        ) from error

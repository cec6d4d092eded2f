"""Revisions: changes of labels and splits that lie over a dataset, which itself is never written to.

Each is a file `revision-0001.json`, … in the dataset's cache folder. None is ever changed or removed, so that
every earlier state of the labels can be had again with `data.revision`; 0 is the data as it is.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import uuid
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from holotype.bundle import write_text
from holotype.dataset.hashes import outdated
from holotype.dataset.listing import Listing, Record, Split
from holotype.errors import DatasetError
from holotype.progress import note

__all__ = [
    "Change",
    "Revision",
    "apply_revisions",
    "latest_revision",
    "note_outdated",
    "read_revisions",
    "revise",
    "valid_revisions",
    "write_revision",
]

_NAME = re.compile(r"revision-(\d{4,})\.json")
_FROZEN = ConfigDict(frozen=True, extra="forbid")


class Change(BaseModel):
    """What becomes of one example: another label, another split, or both; or it is left out.

    `path` is the example's name, with `#xywh=` where it is a part of an image. `restore` takes back earlier
    changes of the label and leaving out. The last word counts: a label brings back what was left out.
    `sha256` is the content of the image's file at the time; None: not known.
    """

    model_config = _FROZEN

    path: str
    label: str | None = None
    split: Split | None = None
    drop: bool = False
    restore: bool = False
    reason: str = ""
    sha256: str | None = None

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        if (self.label is not None) + self.drop + self.restore > 1:
            raise ValueError("only one of label, drop and restore can be meant")
        if self.label == "":
            raise ValueError("the label is empty")
        return self


class Revision(BaseModel):
    """A step from revision `parent` to `number`; `root_hash_before` is that of the dataset it started from.

    A revision with `source` "fix-split" names a split for every example that existed when it was made; files
    added later have none of it.
    """

    model_config = _FROZEN

    number: Annotated[int, Field(ge=1)]
    parent: Annotated[int, Field(ge=0)]
    created: str
    source: Literal["relabel", "fix-split"]
    root_hash_before: str | None = None
    changes: tuple[Change, ...]


@dataclasses.dataclass(frozen=True)
class _State:
    """What all revisions so far say about an example; None: as the data has it."""

    label: str | None = None
    split: Split | None = None
    dropped: bool = False

    def after(self, change: Change) -> _State:
        label, dropped = self.label, self.dropped
        if change.drop or change.restore or change.label is not None:
            label, dropped = change.label, change.drop
        return _State(label, change.split or self.split, dropped)

    def of(self, record: Record) -> Record | None:
        if self.dropped:
            return None
        revised = dataclasses.replace(record, split=self.split or record.split)
        if self.label is None:
            return revised
        # Who gave the old label did not give this one.
        return dataclasses.replace(revised, label=self.label, annotator=None)


def latest_revision(folder: Path) -> int:
    """The highest number of a revision in `folder`; 0 where there is none."""
    names = (_NAME.fullmatch(file.name) for file in folder.iterdir())
    return max((int(found[1]) for found in names if found), default=0)


def read_revisions(folder: Path, number: int) -> tuple[Revision, ...]:
    """Revisions 1 to `number`; `DatasetError` where one is missing or damaged."""
    return tuple(_read(_file(folder, step), step) for step in range(1, number + 1))


def write_revision(
    folder: Path,
    *,
    source: Literal["relabel", "fix-split"],
    changes: Sequence[Change],
    root_hash_before: str | None = None,
) -> Revision:
    """Write the next revision; of two processes that write at once, each gets a number of its own."""
    assert changes, "a revision changes something"
    while True:
        parent = latest_revision(folder)
        revision = Revision(
            number=parent + 1,
            parent=parent,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            source=source,
            root_hash_before=root_hash_before,
            changes=tuple(changes),
        )
        text = json.dumps(revision.model_dump(), indent=1) + "\n"
        if _create(_file(folder, revision.number), text):
            return revision


def revise(listing: Listing, folder: Path, wanted: int | Literal["latest"]) -> tuple[Listing, int]:
    """The listing as of revision `wanted`, and its number.

    `DatasetError` where there is no such revision. Changes of examples that the data does not have any more,
    or whose files have other content now, are passed over with a note.
    """
    latest = latest_revision(folder)
    number = latest if wanted == "latest" else wanted
    if not 0 <= number <= latest:
        known = ", ".join(str(step) for step in range(1, latest + 1))
        raise DatasetError(
            f"there is no revision {number} of its labels",
            where=listing.root,
            fix=f"choose one of 0 (as the data says){f', {known}' if known else ''}: --set data.revision=0",
        )
    if number == 0:
        return listing, 0
    revisions, replaced = valid_revisions(listing, folder, number)
    changed = {change.path for revision in revisions for change in revision.changes}.union(replaced)
    gone = len(changed - {record.path for record in listing.records})
    if gone:
        note(f"revision {number}: {gone} of {len(changed)} changed examples are not in the data any more")
    note_outdated(f"revision {number}", replaced)
    return apply_revisions(listing, revisions), number


def valid_revisions(
    listing: Listing, folder: Path, number: int
) -> tuple[tuple[Revision, ...], tuple[str, ...]]:
    """Revisions 1 to `number` without what they say about other content than the data has at that path now.

    And the paths of that, sorted. Revisions of before hashes were kept are taken as they are.
    """
    revisions = read_revisions(folder, number)
    present = {record.path for record in listing.records}
    changes = (change for revision in revisions for change in revision.changes if change.path in present)
    old = outdated(changes, root=listing.root, folder=folder)
    if not old:
        return revisions, ()
    valid = (
        tuple(change for change in revision.changes if (change.path, change.sha256) not in old)
        for revision in revisions
    )
    kept = tuple(
        revision.model_copy(update={"changes": changes})
        for revision, changes in zip(revisions, valid, strict=True)
    )
    return kept, tuple(sorted({path for path, _ in old}))


def note_outdated(what: str, paths: Sequence[str]) -> None:
    """Say that `what` is not used for these files, whose content is not what it was about."""
    if paths:
        many = "1 file that has" if len(paths) == 1 else f"{len(paths)} files that have"
        note(f"{what}: not used for {many} other content now, first {paths[0]}")


def apply_revisions(listing: Listing, revisions: Iterable[Revision]) -> Listing:
    """The listing with all changes made, in order."""
    states: dict[str, _State] = {}
    for revision in revisions:
        for change in revision.changes:
            states[change.path] = states.get(change.path, _State()).after(change)
    if not states:
        return listing
    untouched = _State()
    revised = (states.get(record.path, untouched).of(record) for record in listing.records)
    # Several annotators' records of one example are the same once none of them gave its label.
    kept = dict.fromkeys(record for record in revised if record is not None)
    return dataclasses.replace(listing, records=tuple(kept))


def _file(folder: Path, number: int) -> Path:
    return folder / f"revision-{number:04d}.json"


def _read(file: Path, number: int) -> Revision:
    try:
        revision = Revision.model_validate(json.loads(file.read_bytes()))
    except (OSError, ValueError, RecursionError) as error:
        what = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise DatasetError(
            f"cannot be read ({what})",
            where=file,
            fix=f"restore it, or use an earlier state of the labels: --set data.revision={number - 1}",
        ) from error
    if revision.number != number:
        raise DatasetError(f"holds revision {revision.number}", where=file, fix="restore its name")
    return revision


def _create(file: Path, text: str) -> bool:
    """Write a file whole and only if there is none of that name; False where there is."""
    scratch = file.with_name(f".revision.{uuid.uuid4().hex[:8]}")
    try:
        write_text(scratch, text)
        if os.name == "nt":
            scratch.rename(file)  # refuses to replace, unlike that of POSIX
        else:
            os.link(scratch, file)
    except FileExistsError:
        return False
    finally:
        scratch.unlink(missing_ok=True)
    return True

"""What people are asked to look at, and what they decided: the queue, the sample, and the log of decisions.

Everything is kept in the dataset's cache folder:

suspects.json        labels that are probably wrong, found by `audit`
review-sample.json   the random sample behind the label-accuracy gate, drawn by `audit`
decisions.jsonl      what was decided, one line each, only ever appended to
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from holotype.bundle import write_text
from holotype.dataset.hashes import outdated
from holotype.errors import DatasetError
from holotype.progress import note

__all__ = [
    "Action",
    "Decision",
    "Item",
    "Log",
    "Reason",
    "Sample",
    "SampleAccuracy",
    "SuspectLabel",
    "Suspects",
    "append_decisions",
    "append_undo",
    "build_queue",
    "draw_sample",
    "latest_decisions",
    "read_decisions",
    "read_log",
    "read_sample",
    "read_suspects",
    "sample_accuracy",
    "write_sample",
    "write_suspects",
]

Reason = Literal["review", "disagreement", "suspect"]
Action = Literal["label", "drop", "skip"]

_SAMPLE, _SUSPECTS, _LOG = "review-sample.json", "suspects.json", "decisions.jsonl"
_FROZEN = ConfigDict(frozen=True, extra="forbid")

Stored = TypeVar("Stored", bound=BaseModel)


@dataclass(frozen=True)
class Item:
    """One example to decide about. `candidates` compete for it, best first, without saying who is for which.

    With "review" among the `reasons` it is shown blind: no candidates, and not its `label`.
    """

    path: str
    label: str
    candidates: tuple[str, ...]
    reasons: tuple[Reason, ...]
    score: float | None = None

    @property
    def blind(self) -> bool:
        return "review" in self.reasons


class Sample(BaseModel):
    """A simple random sample of (path, label) in random order, drawn from the dataset `root_hash`."""

    model_config = _FROZEN

    root_hash: str
    seed: int
    items: tuple[tuple[str, str], ...]


class SuspectLabel(BaseModel):
    """A label that is probably wrong; `score` in [0, 1], higher is surer; `top` the best classes in order."""

    model_config = _FROZEN

    path: str
    label: str
    suggested: str
    score: float
    top: tuple[str, ...] = ()


class Suspects(BaseModel):
    """The suspects of the dataset `root_hash`, the surest first."""

    model_config = _FROZEN

    root_hash: str
    items: tuple[SuspectLabel, ...]


class Decision(BaseModel):
    """What somebody decided about an example whose label was `before`, in `seconds`, at an ISO time.

    "drop": it belongs to no class. "skip": it was looked at and left open. `sha256` is the content of the
    image's file that was looked at; None: not known.
    """

    model_config = _FROZEN

    path: str
    action: Action
    label: str | None = None
    before: str
    reason: str
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    at: str
    sha256: str | None = None

    @model_validator(mode="after")
    def _label_or_none(self) -> Self:
        if (self.label is not None) != (self.action == "label") or self.label == "":
            raise ValueError("a label goes with the action label, and with no other")
        return self


@dataclass(frozen=True)
class Log:
    """The decisions that were not undone, oldest first, and the paths whose every decision was undone.

    `outdated` are the paths, sorted, of decisions about other content than their files have now; these do not
    stand any more.
    """

    standing: tuple[Decision, ...]
    undone: frozenset[str]
    outdated: tuple[str, ...] = ()


class SampleAccuracy(NamedTuple):
    """Of `sample` examples, `reviewed` were decided, `wrong` of those otherwise than they were labelled.

    `skipped` were looked at and left open: hard ones, which must not be taken for right ones.
    """

    reviewed: int
    wrong: int
    sample: int
    skipped: int


def draw_sample(examples: Iterable[tuple[str, str]], *, count: int, seed: int, root_hash: str) -> Sample:
    """Draw `count` of the (path, label) pairs without replacement, or all where there are fewer.

    The draw is by a hash of root hash, seed and path: the same dataset gives the same sample, and a corrected
    dataset one that is independent of it. A sample whose own errors were corrected would prove nothing.
    """

    def key(example: tuple[str, str]) -> bytes:
        name = f"{root_hash}\0{seed}\0{example[0]}".encode("utf-8", "surrogatepass")
        return hashlib.sha256(name).digest()

    unique = dict(examples)
    return Sample(
        root_hash=root_hash, seed=seed, items=tuple(heapq.nsmallest(count, unique.items(), key=key))
    )


def write_sample(folder: Path, sample: Sample) -> None:
    _write(folder / _SAMPLE, sample)


def read_sample(folder: Path) -> Sample | None:
    """The sample kept in `folder`; None where none was drawn."""
    return _read(folder / _SAMPLE, Sample)


def write_suspects(folder: Path, suspects: Suspects) -> None:
    _write(folder / _SUSPECTS, suspects)


def read_suspects(folder: Path) -> Suspects | None:
    """The suspects kept in `folder`; None where no audit looked for them."""
    return _read(folder / _SUSPECTS, Suspects)


def sample_accuracy(folder: Path, root_hash: str, *, root: Path | None = None) -> SampleAccuracy:
    """What the review of the sample of dataset `root_hash` says so far; all 0 where it has no sample.

    Another label than the one at sampling is wrong, and so is an image that belongs to no class. For `root`
    see `read_log`.
    """
    sample = read_sample(folder)
    if sample is None or sample.root_hash != root_hash:
        return SampleAccuracy(0, 0, 0, 0)
    decisions = read_decisions(folder, root=root)
    answers = [(decisions[path], label) for path, label in sample.items if path in decisions]
    reviewed = [(decision, label) for decision, label in answers if decision.action != "skip"]
    wrong = sum(decision.label != label for decision, label in reviewed)
    return SampleAccuracy(len(reviewed), wrong, len(sample.items), len(answers) - len(reviewed))


def build_queue(
    labels: Mapping[str, str],
    *,
    sample: Sample | None = None,
    disagreements: Mapping[str, tuple[str, ...]] | None = None,
    suspects: Suspects | None = None,
) -> tuple[Item, ...]:
    """One item for each example to decide about: the sample, then disagreements, then suspects.

    `labels` are the present ones by path; what is not among them is left out. `disagreements` are the labels
    that annotators gave, best first.
    """
    reasons: dict[str, list[Reason]] = {}
    candidates: dict[str, list[str]] = {}
    scores: dict[str, float] = {}

    def add(path: str, reason: Reason, names: Iterable[str]) -> None:
        if path in labels:
            reasons.setdefault(path, []).append(reason)
            candidates.setdefault(path, []).extend(names)

    for path, _ in sample.items if sample else ():
        add(path, "review", ())
    for path, names in (disagreements or {}).items():
        add(path, "disagreement", names)
    for suspect in suspects.items if suspects else ():
        add(suspect.path, "suspect", (suspect.suggested, suspect.label, *suspect.top))
        scores[suspect.path] = suspect.score
    return tuple(
        Item(
            path=path,
            label=labels[path],
            candidates=() if "review" in why else tuple(dict.fromkeys(candidates[path])),
            reasons=tuple(dict.fromkeys(why)),
            score=scores.get(path),
        )
        for path, why in reasons.items()
    )


def append_decisions(folder: Path, decisions: Sequence[Decision]) -> None:
    """Add decisions to the log; they are on the disk when this returns."""
    _append(folder, [decision.model_dump() for decision in decisions])


def append_undo(folder: Path, path: str) -> None:
    """Take back the last standing decision about `path`; an earlier one about it stands again."""
    _append(folder, [{"undo": path}])


def read_log(folder: Path, *, root: Path | None = None) -> Log:
    """Read the log of decisions. A line that a crash has torn, and any other that is none, is passed over.

    With `root`, where the dataset's paths begin, decisions about other content than its files have now are
    sorted out; older ones, which do not say what was looked at, stand.
    """
    file = folder / _LOG
    standing: dict[int, Decision] = {}
    places: dict[str, list[int]] = {}
    try:
        lines = file.read_bytes().split(b"\n")
    except FileNotFoundError:
        lines = []
    for number, line in enumerate(lines, start=1):
        entry = _parse(line)
        if isinstance(entry, Decision):
            standing[number] = entry
            places.setdefault(entry.path, []).append(number)
        elif isinstance(entry, str):
            if before := places.setdefault(entry, []):
                del standing[before.pop()]
        elif line:
            note(f"{file}:{number}: not a whole decision, left out")
    old = frozenset() if root is None else outdated(standing.values(), root=root, folder=folder)
    return Log(
        standing=tuple(one for one in standing.values() if (one.path, one.sha256) not in old),
        undone=frozenset(path for path, rows in places.items() if not rows),
        outdated=tuple(sorted({path for path, _ in old})),
    )


def read_decisions(folder: Path, *, root: Path | None = None) -> dict[str, Decision]:
    """The last standing decision about each path, in the order in which they were made; see `read_log`."""
    return latest_decisions(read_log(folder, root=root))


def latest_decisions(log: Log) -> dict[str, Decision]:
    """The last standing decision about each path, in the order in which they were made."""
    latest: dict[str, Decision] = {}
    for decision in log.standing:
        latest.pop(decision.path, None)
        latest[decision.path] = decision
    return latest


def _parse(line: bytes) -> Decision | str | None:
    """A decision, the path whose decision is undone, or None where the line is neither."""
    try:
        content = json.loads(line)
        if isinstance(content, dict) and list(content) == ["undo"] and isinstance(content["undo"], str):
            return content["undo"]
        return Decision.model_validate(content)
    except (ValueError, RecursionError):
        return None


def _append(folder: Path, entries: Iterable[dict[str, Any]]) -> None:
    """One write, so that lines of two writers never mix; after a torn line, on a line of its own."""
    lines = "".join(json.dumps(entry) + "\n" for entry in entries).encode()
    with (folder / _LOG).open("a+b") as stream:
        if end := stream.seek(0, os.SEEK_END):
            stream.seek(end - 1)
            lines = lines if stream.read(1) == b"\n" else b"\n" + lines
        stream.write(lines)
        stream.flush()
        os.fsync(stream.fileno())


def _write(file: Path, content: BaseModel) -> None:
    write_text(file, json.dumps(content.model_dump(), indent=1) + "\n")


def _read(file: Path, kind: type[Stored]) -> Stored | None:
    try:
        return kind.model_validate(json.loads(file.read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        what = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise DatasetError(f"cannot be read ({what})", where=file, fix="run holotype audit again") from error

"""The relabel queue as files for other tools, and the answers that come back from them.

queue.csv                  `image_path,label,reason,candidates`; fill in `label`
queue-label-studio.json    the same as tasks to import, where the folder is Label Studio's local files root
label-studio-config.xml    the labelling interface for them
images/                    what is to be looked at; the names tell nothing, as paths often hold the class
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

from holotype.agree.pictures import render
from holotype.bundle import replace_folder, write_text
from holotype.dataset.listing import Problem, problems_error
from holotype.dataset.table import csv_rows
from holotype.errors import ConfigError, DatasetError, ImageError
from holotype.preprocess import Limits
from holotype.progress import note, track
from holotype.review import Item

__all__ = ["NONE", "nearest", "read_answers", "write_queue"]

NONE = "(no class fits)"
"""What stands for a label where an image belongs to no class."""

_CSV, _TASKS, _CONFIG = "queue.csv", "queue-label-studio.json", "label-studio-config.xml"


def write_queue(
    folder: Path, items: Sequence[Item], *, root: Path, classes: Sequence[str], limits: Limits
) -> None:
    """Write the queue into `folder`, a new or empty one or one that this wrote before.

    Images that cannot be shown are left out, with a note.
    """
    if folder.exists() and not (folder / _CSV).is_file() and any(folder.iterdir()):
        raise ConfigError(
            "is in the way and not a relabel queue", where=folder, fix="choose another folder: --out"
        )
    with replace_folder(folder) as scratch:
        images = dict(_write_images(scratch, items, root=root, limits=limits))
        rows = [(images[item.path], item) for item in items if item.path in images]
        write_text(scratch / _CSV, _table(rows))
        write_text(scratch / _TASKS, json.dumps([_task(name, item) for name, item in rows], indent=1) + "\n")
        write_text(scratch / _CONFIG, _interface(classes))


def read_answers(file: Path, *, paths: Iterable[str], classes: Sequence[str]) -> dict[str, str | None]:
    """The answers in a filled queue.csv or a Label Studio export (JSON, JSON-MIN), by path; None: no class.

    Images are named as in the queue or as in the dataset, whose `paths` these are. Rows without an answer say
    nothing. `DatasetError` lists all rows that cannot be used.
    """
    known = {name: path for path in paths for name in (_token(path), path)}
    answers: dict[str, str | None] = {}
    problems: list[Problem] = []
    total = 0
    for row in _rows(file):
        total += 1
        problem = row.problem or _check(row, known=known, classes=classes)
        path = known.get(_key(row.name)) or known.get(row.name)
        label = None if row.label == NONE else row.label
        if problem is None and path is not None and row.label:
            if answers.setdefault(path, label) == label:
                continue
            problem = ("is answered twice and differently", "keep one answer")
        if problem is not None:
            problems.append(Problem(row.where, *problem))
    if problems:
        raise problems_error(file, tuple(problems), total=total)
    return answers


def nearest(label: str, classes: Iterable[str]) -> str:
    """How to mend a label that is no class."""
    near = difflib.get_close_matches(label, list(classes), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}a class that is meant to be new is named with --new-class"


@dataclass(frozen=True)
class _Row:
    """One answer as a file has it; `problem` is (what, fix)."""

    where: str
    name: str
    label: str = ""
    problem: tuple[str, str] | None = None


def _check(row: _Row, *, known: dict[str, str], classes: Sequence[str]) -> tuple[str, str] | None:
    if not row.label:
        return None
    if _key(row.name) not in known and row.name not in known:
        return f"{row.name!r} is no image of the dataset", "give the dataset that the queue was made of"
    if row.label != NONE and row.label not in classes:
        return f"{row.label!r} is no class of the dataset", nearest(row.label, classes)
    return None


def _token(path: str) -> str:
    return hashlib.sha256(path.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _key(name: str) -> str:
    """The token in the name of an image of the queue."""
    return name.rpartition("/")[2].partition(".")[0]


def _write_images(
    folder: Path, items: Sequence[Item], *, root: Path, limits: Limits
) -> Iterator[tuple[str, str]]:
    (folder / "images").mkdir()
    failed: list[str] = []
    with track("writing images", total=len(items)) as progress:
        for item in items:
            progress.advance()
            try:
                content, kind = render(root, item.path, limits=limits)
            except (ImageError, OSError) as error:
                failed.append(f"{item.path}: {error}")
                continue
            name = f"images/{_token(item.path)}{'.png' if kind == 'image/png' else '.jpg'}"
            (folder / name).write_bytes(content)
            yield item.path, name
    if failed:
        note(f"{len(failed)} of {len(items)} images cannot be shown and are left out, first {failed[0]}")


def _table(rows: Sequence[tuple[str, Item]]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(("image_path", "label", "reason", "candidates"))
    for name, item in rows:
        writer.writerow((name, "", _reason(item), " | ".join(sorted(item.candidates))))
    return stream.getvalue()


def _task(name: str, item: Item) -> dict[str, Any]:
    return {
        "data": {
            "image": f"/data/local-files/?d={name}",
            "image_path": name,
            "reason": _reason(item),
            "candidates": " | ".join(sorted(item.candidates)),
        },
        "annotations": [],
        "predictions": [],
    }


def _reason(item: Item) -> str:
    return "review" if item.blind else ", ".join(item.reasons)


def _interface(classes: Sequence[str]) -> str:
    choices = "\n".join(f"    <Choice value={quoteattr(label)}/>" for label in (*classes, NONE))
    return (
        '<View>\n  <Image name="image" value="$image" zoom="true"/>\n'
        '  <Text name="candidates" value="$candidates"/>\n'
        '  <Choices name="label" toName="image" choice="single" showInline="true">\n'
        f"{choices}\n  </Choices>\n</View>\n"
    )


def _rows(file: Path) -> Iterator[_Row]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError("is not UTF-8", where=file, fix="save it as UTF-8") from error
    except OSError as error:
        raise DatasetError(
            f"cannot be read ({error.strerror})", where=file, fix="check --decisions"
        ) from error
    if file.suffix.lower() == ".json":
        return _json_rows(file, text)
    if file.suffix.lower() == ".csv":
        return _csv_rows(file, text)
    raise DatasetError("is neither .csv nor .json", where=file, fix="give queue.csv or an export as JSON")


def _csv_rows(file: Path, text: str) -> Iterator[_Row]:
    names, rows = csv_rows(file, io.StringIO(text, newline=""))
    for column in ("image_path", "label"):
        if column not in names:
            raise DatasetError(
                f"line 1: no column {column!r}", where=file, fix="the first line must name image_path,label"
            )
    for line, row in rows:
        name, label = (str(row[column] or "").strip() for column in ("image_path", "label"))
        yield _Row(f"{file.name}:{line}", name, label)


def _json_rows(file: Path, text: str) -> Iterator[_Row]:
    try:
        tasks = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"is not JSON ({error})", where=file, fix="export it again") from error
    if not isinstance(tasks, list):
        raise DatasetError(
            "is no list of tasks", where=file, fix="export from Label Studio as JSON or JSON-MIN"
        )
    for number, task in enumerate(tasks, start=1):
        where = f"{file.name}: task {number}"
        data = task.get("data", task) if isinstance(task, dict) else None
        name = data.get("image_path") if isinstance(data, dict) else None
        if not isinstance(name, str):
            yield _Row(where, "", problem=("has no image_path", "import the queue that holotype wrote"))
            continue
        choices = _choices(task)
        if len(choices) > 1:
            listed = ", ".join(sorted(choices))
            yield _Row(
                where, name, problem=(f"is answered in several ways: {listed}", "mark one as ground truth")
            )
        else:
            yield _Row(where, name, next(iter(choices), ""))


def _choices(task: dict[str, Any]) -> set[str]:
    """The answers of a task: those marked as ground truth where there are any; never its predictions."""
    annotations = task.get("annotations")
    if not isinstance(annotations, list):  # JSON-MIN
        label = task.get("label")
        return {label} if isinstance(label, str) and label else set()
    valid = [one for one in annotations if isinstance(one, dict) and not one.get("was_cancelled")]
    valid = [one for one in valid if one.get("ground_truth")] or valid
    found: set[str] = set()
    for annotation in valid:
        for result in annotation.get("result") or ():
            value = result.get("value") if isinstance(result, dict) else None
            names = value.get("choices") if isinstance(value, dict) else None
            found.update(name for name in names or () if isinstance(name, str))
    return found

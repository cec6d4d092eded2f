"""What annotators hand back, CSV files, Label Studio exports and folders, as one table of votes."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import numpy.typing as npt

from holotype.agree.contract import Plan
from holotype.agree.plan import CLASSES, PLAN, read_plan
from holotype.dataset.listing import Problem, problems_error
from holotype.dataset.table import csv_rows
from holotype.errors import DatasetError, require
from holotype.preprocess import SUFFIXES

__all__ = ["Votes", "find_plan", "read_votes"]

_COLUMNS = ("image_path", "label", "annotator")
# Label Studio puts this before the name of a file that was uploaded to it.
_UPLOAD = re.compile(r"^[0-9a-f]{8}-")


@dataclass(frozen=True)
class Votes:
    """`table` is `int64[N, R]`: the class, by position, that each annotator gave each item; -1: none.

    `items` are paths as the dataset names them, sorted. `empty` counts, by annotator, the items that were
    given to them (or are listed in their files) and have no label.
    """

    items: tuple[str, ...]
    annotators: tuple[str, ...]
    classes: tuple[str, ...]
    table: npt.NDArray[np.int64]
    empty: tuple[int, ...]


@dataclass(frozen=True)
class _Row:
    """One answer as it stands in a file. `label` is "" where there is none.

    `source` is the name of the file or folder ("" where it says nothing about the annotator), `people` are
    names that the file itself gives, best first.
    """

    where: str
    path: str
    label: str
    source: str
    people: tuple[str, ...] = ()
    certain: bool = False  # `people` is a column of annotators, not an account of some program


@dataclass
class _Ballot:
    """Answers by annotator and item, as they are read. `known` are the images of the plan."""

    plan: Plan | None
    known: frozenset[str]
    labels: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)
    given: dict[str, set[str]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def read_votes(
    files: Sequence[Path | str], *, plan: Path | str | None = None
) -> tuple[Votes, tuple[Problem, ...]]:
    """Read annotators' files; whatever cannot be used is a `Problem` and does not hide the rest.

    - CSV: `image_path,label[,annotator]`; without that column the file is one annotator's, by its name.
    - Label Studio's JSON export: the choice of each annotation that was not cancelled, by `completed_by`, or
      else by the file's name; predictions are not votes.
    - A folder of one annotator, named so: Pascal VOC XML beside the images (all boxes of one class), or
      images sorted into folders by class.

    `plan` (by default the `plan.json` beside the files) translates the names it gave out, which come before
    the dataset's own, and knows the annotators and classes. A label that is empty is no vote. Two different
    answers of one annotator to one image are a problem, and neither counts. `DatasetError`: a file that
    cannot be read at all, no vote in any, or files of one name in different folders, where nothing else says
    whose they are.
    """
    paths = [Path(file) for file in files]
    found = Path(plan) if plan is not None else find_plan(paths)
    dealt = None if found is None else read_plan(found)
    known = frozenset() if dealt is None else frozenset(item.path for item in dealt.items)
    ballot = _Ballot(plan=dealt, known=known)
    sources: list[tuple[Path, list[_Row]]] = []
    broken = []
    for file in paths:
        try:
            sources.append((file, _read(file, ballot.problems, planned=dealt is not None)))
        except DatasetError as error:
            broken.append(error)
    if len(broken) > 1:
        raise DatasetError(f"{len(broken)} files cannot be read: {'; '.join(map(str, broken))}")
    if broken:
        raise broken[0]
    _check_names(sources, plan=dealt)
    rows = [row for _, rows in sources for row in rows]
    for row in rows:
        _cast(row, ballot)
    if dealt is not None:
        _add_unanswered(ballot, dealt, where=str(found))
    votes = _tabulate(ballot)
    if not (votes.table >= 0).any():
        if ballot.problems:
            raise problems_error(paths[0], tuple(ballot.problems), total=len(rows))
        raise DatasetError(
            "there is not one label", where=paths[0] if paths else None, fix="give filled files"
        )
    return votes, tuple(ballot.problems)


def find_plan(files: Sequence[Path]) -> Path | None:
    """The `plan.json` beside the first of `files` that has one."""
    return next((beside for file in files if (beside := file.absolute().parent / PLAN).is_file()), None)


def _check_names(sources: Sequence[tuple[Path, Sequence[_Row]]], *, plan: Plan | None) -> None:
    """`DatasetError` where the name alone makes one annotator of sources in different folders.

    `ada/labels.csv` and `bob/labels.csv` are of two people. In one folder, `ada.csv` and `ada.json` are named
    after one.
    """
    first: dict[str, Path] = {}
    for file, rows in sources:
        nameless = {row.source for row in rows if not row.people and _who(row, plan=plan) == row.source}
        for name in nameless - (plan.tasks.keys() if plan is not None else set()) - {""}:
            other = first.setdefault(name, file)
            if other.resolve().parent != file.resolve().parent:
                same = ", or put all that is one's into one" if file.is_dir() else ""
                column = ", or add an annotator column" if file.suffix.lower() == ".csv" else ""
                raise DatasetError(
                    f"both it and {other} would be the votes of one annotator {name!r}",
                    where=file,
                    fix=f"name each after its annotator{same or column}",
                )


def _read(file: Path, problems: list[Problem], *, planned: bool) -> list[_Row]:
    if file.is_dir():
        return list(_read_folder(file, problems))
    if not file.exists():
        raise DatasetError("no such file", where=file, fix="check the path")
    try:
        if file.suffix.lower() == ".csv":
            return list(_read_csv(file, problems))
        if file.suffix.lower() == ".json":
            return list(_read_label_studio(file, problems, planned=planned))
    except OSError as error:
        raise DatasetError(f"cannot be read ({error.strerror})", where=file) from error
    except UnicodeDecodeError as error:
        raise DatasetError("is not UTF-8", where=file, fix="save it as UTF-8") from error
    raise DatasetError("is no file of votes", where=file, fix="give .csv, .json (Label Studio) or a folder")


def _read_csv(file: Path, problems: list[Problem]) -> Iterator[_Row]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        names, rows = csv_rows(file, stream)
        _check_header(file, [name.strip() for name in names])
        for line, row in rows:
            answer = _csv_row(row, where=f"{file}:{line}", source=file.stem)
            if isinstance(answer, Problem):
                problems.append(answer)
            else:
                yield answer


def _csv_row(row: Mapping[str | None, Any], *, where: str, source: str) -> _Row | Problem:
    if None in row:
        return Problem(where, "more cells than columns", "put text with commas in quotes")
    cells = {str(name).strip(): value for name, value in row.items()}
    path, label, annotator = ((cells.get(name) or "").strip() for name in _COLUMNS)
    if not path:
        return Problem(where, "image_path is empty", "give the image's path or remove the line")
    if "annotator" in cells and not annotator:
        return Problem(where, "annotator is empty", "name who gave this label")
    people = (annotator,) if annotator else ()
    return _Row(where, path, label, source, people=people, certain=bool(people))


def _check_header(file: Path, names: Sequence[str]) -> None:
    if len(names) == 1 and ";" in names[0]:
        raise DatasetError("is separated by semicolons", where=file, fix="save it with commas")
    for name in names:
        near = difflib.get_close_matches(name.lower(), _COLUMNS, n=1, cutoff=0.7)
        if name not in _COLUMNS and near:
            raise DatasetError(f"line 1: unknown column {name!r}", where=file, fix=f"did you mean {near[0]}?")
    for name in _COLUMNS[:2]:
        if name not in names:
            raise DatasetError(
                f"line 1: no column {name!r}",
                where=file,
                fix="the first line must name image_path,label and, with several annotators, annotator",
            )


def _read_label_studio(file: Path, problems: list[Problem], *, planned: bool) -> Iterator[_Row]:
    tasks = _tasks(file)
    source = file.stem.removesuffix("-label-studio")
    paths = _task_paths(tasks, planned=planned)
    for number, (task, path) in enumerate(zip(tasks, paths, strict=True), start=1):
        where = f"{file}:task {task.get('id', number)}"
        annotations = task.get("annotations", [])
        if path is None:
            problems.append(Problem(where, "has no image", "each task needs data.image"))
        elif not isinstance(annotations, list) or not all(isinstance(one, dict) for one in annotations):
            problems.append(Problem(where, "annotations is not a list of objects", "export it again"))
        else:
            if not annotations:
                yield _Row(where, path, "", source="")
            for annotation in annotations:
                answer = _label_studio_row(annotation, where=where, path=path, source=source)
                if isinstance(answer, Problem):
                    problems.append(answer)
                else:
                    yield answer


def _tasks(file: Path) -> list[dict[str, Any]]:
    """The tasks of a Label Studio export; `DatasetError` where it is something else."""
    try:
        tasks = json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DatasetError(f"line {error.lineno}: is not JSON ({error.msg})", where=file) from error
    except RecursionError as error:
        raise DatasetError("is nested too deeply", where=file) from error
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        raise DatasetError(
            "is not a list of tasks", where=file, fix="export from Label Studio as JSON, not JSON-MIN"
        )
    if tasks and not any("annotations" in task or "data" in task for task in tasks):
        raise DatasetError(
            "its tasks have no annotations", where=file, fix="export from Label Studio as JSON, not JSON-MIN"
        )
    return tasks


def _label_studio_row(annotation: Mapping[str, Any], *, where: str, path: str, source: str) -> _Row | Problem:
    people = _people(annotation.get("completed_by"))
    if annotation.get("was_cancelled") is True:
        return _Row(where, path, "", source, people=people)
    results = annotation.get("result")
    if not isinstance(results, list) or not all(isinstance(one, dict) for one in results):
        return Problem(where, "result is not a list of objects", "export it again")
    chosen: list[str] = []
    for one in results:
        value = one.get("value")
        choices = value.get("choices") if isinstance(value, dict) else None
        if one.get("type") == "choices" and isinstance(choices, list):
            chosen += [str(choice).strip() for choice in choices]
    if results and not chosen:
        kinds = ", ".join(sorted({str(one.get("type")) for one in results}))
        return Problem(
            where, f"has no choice ({kinds})", "label with Choices, as label-studio-config.xml does"
        )
    if len(set(chosen)) > 1:
        return Problem(where, f"has several choices ({', '.join(chosen)})", 'use choice="single"')
    return _Row(where, path, chosen[0] if chosen else "", source, people=people)


def _people(value: object) -> tuple[str, ...]:
    """Names of who completed an annotation: Label Studio exports a number, or an object with the e-mail."""
    if isinstance(value, dict):
        email = str(value.get("email") or "")
        names = (email, email.partition("@")[0], str(value.get("username") or ""), str(value.get("id") or ""))
        return tuple(name for name in names if name)
    return () if value is None else (str(value),)


def _task_paths(tasks: Sequence[Mapping[str, Any]], *, planned: bool) -> list[str | None]:
    """The image of each task; None where it has none.

    Uploads go without the prefix that they were given, but for those of one name, which nothing else tells
    apart. Names that a plan gave out may be those of several annotators: it translates them for each.
    """
    found = [_task_path(task.get("data")) for task in tasks]
    uploads: dict[str, set[str]] = {}
    for image in found:
        if image is not None:
            uploads.setdefault(image[1], set()).add(image[0])
    return [
        None if image is None else image[1] if planned or len(uploads[image[1]]) == 1 else image[0]
        for image in found
    ]


def _task_path(data: object) -> tuple[str, str] | None:
    """The image of a task, a local file, an upload or a URL, and as it was called before it was uploaded."""
    if not isinstance(data, dict):
        return None
    texts = [value for value in data.values() if isinstance(value, str)]
    address = data.get("image", texts[0] if len(texts) == 1 else None)
    if not isinstance(address, str) or not address.strip():
        return None
    if "/data/local-files/" in address:
        path = next(iter(parse_qs(urlsplit(address).query).get("d", ())), None)
        return None if path is None else (path, path)
    if "/data/upload/" in address:
        name = unquote(address.rpartition("/")[2])
        return name, _UPLOAD.sub("", name)
    path = unquote(urlsplit(address).path).lstrip("/") if "://" in address else address
    return path, path


def _read_folder(folder: Path, problems: list[Problem]) -> Iterator[_Row]:
    """One annotator's folder; the annotator is called like it."""
    name = folder.absolute().name
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and not file.name.startswith(".")]
    images = [file for file in files if file.suffix.lower() in SUFFIXES]
    boxes = {file.stem: file for file in files if file.suffix.lower() == ".xml" and file.parent == folder}
    yolo = [
        file for file in files if file.suffix.lower() == ".txt" and file.name not in (CLASSES, "classes.txt")
    ]
    if yolo and not boxes:
        raise DatasetError("holds YOLO files", where=folder, fix="save as PascalVOC in LabelImg")
    if not boxes and all(file.parent == folder for file in images):
        raise DatasetError(
            "holds neither Pascal VOC files nor images sorted into folders by class", where=folder
        )
    for image in images:
        inside = image.relative_to(folder)
        label = inside.parts[0] if len(inside.parts) > 1 else ""
        xml = boxes.get(image.stem) if not label else None
        if xml is None:
            yield _Row(str(image), image.name, label, name)
            continue
        answer = _voc_label(xml)
        if isinstance(answer, Problem):
            problems.append(answer)
        else:
            yield _Row(str(xml), image.name, answer, name)


def _voc_label(file: Path) -> str | Problem:
    """The class that all boxes of a Pascal VOC file have; "" where it has none."""
    reader = require("defusedxml.ElementTree", extra="train", purpose="reading Pascal VOC files")
    try:
        root = reader.parse(file).getroot()
    except (SyntaxError, ValueError, LookupError, OSError) as error:  # broken, hostile, odd encoding, gone
        return Problem(str(file), f"is not XML ({error})", "save it again in LabelImg")
    labels = {(box.findtext("name") or "").strip() for box in root.iter("object")}
    if len(labels) > 1:
        return Problem(str(file), f"has boxes of {len(labels)} classes", "leave those of one class")
    return labels.pop() if labels else ""


def _cast(row: _Row, ballot: _Ballot) -> None:
    """Put an answer where it belongs: whose it is, to which image, and whether its class is known."""
    annotator = _who(row, plan=ballot.plan)
    if not annotator:
        return
    if not _is_text(row.path + row.label + annotator):
        ballot.problems.append(Problem(row.where, "a name is not text that UTF-8 can hold", "rename it"))
        return
    item = _item(row.path, annotator, ballot=ballot)
    if item is None:
        fix = "keep the names of files and folders as they were given out"
        ballot.problems.append(Problem(row.where, f"{row.path} is no image of the plan", fix))
        return
    ballot.given.setdefault(annotator, set()).add(item)
    if not row.label:
        return
    if ballot.plan is not None and row.label not in ballot.plan.classes:
        fix = _nearest(row.label, ballot.plan.classes)
        ballot.problems.append(Problem(row.where, f"unknown class {row.label!r}", fix))
        return
    ballot.labels.setdefault((annotator, item), {}).setdefault(row.label, row.where)


def _who(row: _Row, *, plan: Plan | None) -> str:
    """Whose answer this is: a column says it; else the first name the plan knows; else the best there is.

    "" where nobody gave one.
    """
    if plan is not None and not row.certain:
        owner = PurePosixPath(_posix(row.path)).parent.name
        for name in (*row.people, owner, row.source):
            if name in plan.tasks:
                return name
    return (*row.people, row.source)[0]


def _item(path: str, annotator: str, *, ballot: _Ballot) -> str | None:
    """The image as the dataset names it; None where the plan does not know it."""
    path = _posix(path)
    if ballot.plan is None:
        return path
    name, folder = PurePosixPath(path).name, PurePosixPath(path).parent.name
    # A dataset may itself hold a 0001.jpg: a name that was given out comes before one of the dataset's.
    dealt = ballot.plan.tasks.get(folder or annotator, {}).get(name)
    if dealt is not None:
        return dealt
    return path if path in ballot.known else ballot.plan.tasks.get(annotator, {}).get(name)


def _is_text(value: str) -> bool:
    """File systems and JSON escapes can give lone surrogates, which no file of ours could hold."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _posix(path: str) -> str:
    return path.replace("\\", "/").removeprefix("./")


def _nearest(label: str, classes: Iterable[str]) -> str:
    folded = {name.casefold(): name for name in classes}
    near = difflib.get_close_matches(label.casefold(), folded, n=1, cutoff=0.4)
    return f"did you mean {folded[near[0]]}?" if near else f"classes are {', '.join(folded.values())}"


def _add_unanswered(ballot: _Ballot, plan: Plan, *, where: str) -> None:
    """Images that were given out and not answered, and annotators of whom there is nothing."""
    for annotator, tasks in plan.tasks.items():
        if annotator in ballot.given:
            ballot.given[annotator].update(tasks.values())
        else:
            ballot.problems.append(
                Problem(where, f"there is no answer of {annotator}", f"give the file of {annotator} too")
            )


def _tabulate(ballot: _Ballot) -> Votes:
    plan = ballot.plan
    for (annotator, item), labels in sorted(ballot.labels.items()):
        if len(labels) > 1:
            ballot.problems.append(
                Problem(
                    list(labels.values())[-1],
                    f"{annotator} gave {item} different labels ({', '.join(labels)})",
                    "leave one of them",
                )
            )
    votes = {key: next(iter(labels)) for key, labels in ballot.labels.items() if len(labels) == 1}
    classes = plan.classes if plan is not None else tuple(sorted(set(votes.values())))
    known = plan.tasks if plan is not None else {}
    annotators = (*(name for name in known if name in ballot.given), *sorted(set(ballot.given) - set(known)))
    items = tuple(sorted(set().union(*ballot.given.values())))
    row = {item: i for i, item in enumerate(items)}
    column = {name: i for i, name in enumerate(annotators)}
    position = {name: i for i, name in enumerate(classes)}
    table = np.full((len(items), len(annotators)), -1, dtype=np.int64)
    for (annotator, item), label in votes.items():
        table[row[item], column[annotator]] = position[label]
    voted = (table >= 0).sum(axis=0)
    empty = tuple(len(ballot.given[name]) - int(count) for name, count in zip(annotators, voted, strict=True))
    return Votes(items=items, annotators=annotators, classes=classes, table=table, empty=empty)

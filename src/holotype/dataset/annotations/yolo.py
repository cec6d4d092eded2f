"""YOLO text files: a line for each object, `class centre-x centre-y width height` in shares of the image."""

from __future__ import annotations

import itertools
import math
import posixpath
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from holotype.dataset.annotated import Annotated, Annotations, LabelledBox, problem_of
from holotype.dataset.annotations.splits import SplitLists, read_split_lists, read_text
from holotype.dataset.annotations.tree import Tree, reference_parts, split_of_folders
from holotype.dataset.listing import SPLIT_NAMES, Problem, Split
from holotype.errors import DatasetError
from holotype.preprocess import SUFFIXES, Box

__all__ = ["is_yolo", "read_yolo"]

_LINE = re.compile(r"\s*\d+(\s+[-+.\deE]+){4,}\s*")
_ROUNDING = 0.001


def read_yolo(tree: Tree) -> Annotations:
    """Read label files beside the images, or in a `labels` tree that mirrors `images`.

    Class names, in order of their numbers, come from `classes.txt`, `*.names` or `names:` of a YAML file, in
    the folder of the labels or above; where several of them disagree, nothing is guessed. An image without a
    label file is unknown; an empty file says that there are no objects. A line with more corners is a polygon
    (or a turned box) and means the box around it; a sixth number is the confidence of a prediction, which is
    no label. Splits: lists such as `train.txt`, what the YAML file says of folders, or folders named so.
    """
    images: list[Annotated] = []
    problems: list[Problem] = []
    labels = _label_files(tree)
    names = _read_names(tree)
    split_of = _split_rule(tree, names.documents)
    for path, name in labels.items():
        classes = names.of(posixpath.dirname(name))
        try:
            text = read_text(tree.root / name, name=name)
            split = split_of(path)
        except DatasetError as error:
            problems.append(problem_of(error, name))
            continue
        boxes, bad = _boxes(text, name, classes)
        problems += bad
        images.append(Annotated(path, name, boxes, split=split, complete=not bad))
    problems += _orphans(tree, set(labels.values()))
    if not labels:
        raise DatasetError(
            "holds no YOLO labels",
            where=tree.root,
            fix="expected a .txt beside each image, or labels/*.txt beside images/",
        )
    return Annotations(
        tree.images.root,
        tuple(images),
        ignored=tuple(sorted(tree.images.paths - set(labels))),
        problems=tuple(problems),
    )


def is_yolo(tree: Tree) -> bool:
    """Whether label files of images hold what YOLO writes; the first twenty tell."""
    for name in list(_label_files(tree).values())[:20]:
        try:
            lines = read_text(tree.root / name, name=name).split("\n")
        except DatasetError:
            continue
        if any(_LINE.fullmatch(line) for line in lines):
            return True
    return False


def _label_files(tree: Tree) -> dict[str, str]:
    """The label file of each image that has one."""
    present = set(tree.named(".txt"))
    found: dict[str, str] = {}
    for path in sorted(tree.images.paths) if present else ():
        stem = posixpath.splitext(path)[0]
        parts = stem.split("/")
        names = [f"{stem}.txt"]
        places = [i for i, part in enumerate(parts[:-1]) if part == "images"]
        if places:  # as Ultralytics does, only the last one
            names.insert(0, "/".join([*parts[: places[-1]], "labels", *parts[places[-1] + 1 :]]) + ".txt")
        if tree.images.root != tree.root:
            names += [f"labels/{stem}.txt", f"labels/{parts[-1]}.txt", f"{parts[-1]}.txt"]
        name = next((name for name in names if name in present), None)
        if name is not None:
            found[path] = name
    return found


def _orphans(tree: Tree, used: set[str]) -> list[Problem]:
    """Label files of no image: text in the folders of labels that looks like labels."""
    folders = {posixpath.dirname(name) for name in used}
    problems = []
    for name in tree.named(".txt"):
        if name in used or posixpath.dirname(name) not in folders or _is_list(name):
            continue
        try:
            lines = read_text(tree.root / name, name=name).split("\n")
        except DatasetError:
            continue
        if any(_LINE.fullmatch(line) for line in lines):
            problems.append(Problem(name, "has no image", "restore the image, or remove the labels"))
    return problems


def _is_list(name: str) -> bool:
    return posixpath.basename(name).lower() in ("classes.txt", *(f"{split}.txt" for split in SPLIT_NAMES))


@dataclass(frozen=True)
class _Names:
    """Class names by the folder of the file that lists them, and the YAML files among these."""

    root: Path
    lists: dict[str, list[tuple[str, list[str]]]]
    documents: tuple[dict[Any, Any], ...]

    def of(self, folder: str) -> list[str]:
        """The names that hold for labels in `folder`: LabelImg numbers the classes of each folder anew."""
        parts = folder.split("/") if folder else []
        above = ["/".join(parts[:depth]) for depth in range(len(parts), -1, -1)]
        found = [entry for place in above for entry in self.lists.get(place, [])]
        if not found:
            raise DatasetError(
                "has no class names for its YOLO labels",
                where=self.root,
                fix="add classes.txt with a name on each line, in order of the numbers, or data.yaml",
            )
        first, names = found[0]
        other = next((name for name, others in found if others != names), None)
        if other is not None:
            raise DatasetError(
                f"{first} and {other} disagree on the names or order of the classes",
                where=self.root,
                fix="remove the one that does not belong to the labels",
            )
        return names


def _read_names(tree: Tree) -> _Names:
    lists: dict[str, list[tuple[str, list[str]]]] = {}
    documents: list[dict[Any, Any]] = []
    for name in tree.files:
        base = posixpath.basename(name).lower()
        if base == "classes.txt" or base.endswith(".names"):
            lines = read_text(tree.root / name, name=name).rstrip().split("\n")
            names = [line.strip() for line in lines]
        elif base.endswith((".yaml", ".yml")) and (document := _read_yaml(tree.root / name, name)):
            documents.append(document)
            names = _yaml_names(document["names"], name)
        else:
            continue
        lists.setdefault(posixpath.dirname(name), []).append((name, names))
    return _Names(tree.root, lists, tuple(documents))


def _read_yaml(file: Path, name: str) -> dict[Any, Any] | None:
    """A YAML file that names classes; None for any other."""
    text = read_text(file, name=name)
    if not re.search(r"^names\s*:", text, re.MULTILINE):
        return None
    try:
        document = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise DatasetError(f"is not YAML ({error})", where=name, fix="correct it") from error
    if not isinstance(document, dict):
        return None
    if "kpt_shape" in document:
        raise DatasetError("is of keypoints, not of boxes", where=name, fix="export boxes")
    return document


def _yaml_names(names: object, file: str) -> list[str]:
    if isinstance(names, dict) and set(names) == set(range(len(names))):
        names = [names[number] for number in range(len(names))]
    if isinstance(names, list) and all(isinstance(name, str | int) for name in names):
        return [str(name).strip() for name in names]
    raise DatasetError(
        "names: is neither a list nor numbered from 0 without a gap", where=file, fix="list the classes"
    )


def _split_rule(tree: Tree, documents: Sequence[Mapping[Any, Any]]) -> Callable[[str], Split | None]:
    """What tells the split of an image: lists, or folders that a YAML file names, or their own names."""
    lists = _split_lists(tree)
    if lists.files:
        return lists.split_of
    declared: dict[str, Split] = {}
    # Where val is train again, as in small examples, it is train: validation is then taken from it.
    for document, key in itertools.product(documents, ("test", "val", "train")):
        entries = document.get(key)
        for entry in entries if isinstance(entries, list) else [entries]:
            if isinstance(entry, str):
                declared["/".join(reference_parts(entry))] = SPLIT_NAMES[key]

    def split_of(path: str) -> Split | None:
        parts = path.split("/")[:-1]
        above = ("/".join(parts[:depth]) for depth in range(len(parts), 0, -1))
        return next((declared[folder] for folder in above if folder in declared), split_of_folders(path))

    return split_of


def _split_lists(tree: Tree) -> SplitLists:
    """Lists of images at the top, `train.txt` and its like, as Darknet and CVAT write them."""
    files: list[tuple[str, Split]] = []
    for split_name, split in SPLIT_NAMES.items():
        name = f"{split_name}.txt"
        if name in tree.files:
            first = read_text(tree.root / name, name=name).partition("\n")[0].strip()
            if posixpath.splitext(first)[1].lower() in SUFFIXES:
                files.append((name, split))

    def image(line: str) -> str:
        try:
            return tree.images.find_foreign(line, folders=("",))
        except DatasetError:
            return line

    return read_split_lists(tree.root, files, key=image)


def _boxes(text: str, name: str, names: Sequence[str]) -> tuple[tuple[LabelledBox, ...], list[Problem]]:
    boxes: list[LabelledBox] = []
    problems: list[Problem] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{name}: line {number}"
        try:
            label, box = _object(line.split(), names)
        except DatasetError as error:
            problems.append(problem_of(error, where))
        else:
            boxes.append(LabelledBox(box, label, where, relative=True))
    return tuple(boxes), problems


def _object(words: Sequence[str], names: Sequence[str]) -> tuple[str, Box]:
    if len(words) == 6:
        raise DatasetError(
            "has six numbers: a confidence makes it a prediction, not a label", fix="export labels"
        )
    if len(words) < 5 or len(words) % 2 == 0:
        raise DatasetError(f"has {len(words)} words, not 5", fix="write: class x y width height")
    if not re.fullmatch(r"\d{1,9}", words[0], re.ASCII):
        raise DatasetError(
            f"class {words[0]!r} is not a number from 0", fix="write its place in the class names"
        )
    number = int(words[0])
    if number >= len(names) or not names[number]:
        raise DatasetError(
            f"class {number} has no name: there are names for 0 to {len(names) - 1}",
            fix="complete the class names",
        )
    shares = [_share(word) for word in words[1:]]
    if len(shares) > 4:
        across, down = shares[::2], shares[1::2]
        return names[number], Box(min(across), min(down), max(across), max(down))
    x, y, width, height = shares
    return names[number], Box(x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def _share(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not -_ROUNDING <= value <= 1 + _ROUNDING:
        raise DatasetError(
            f"{word} is not between 0 and 1",
            fix="YOLO's coordinates are shares of the image's width and height",
        )
    return value

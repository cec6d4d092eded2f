"""COCO JSON: images, categories and annotations that refer to both by number."""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Container, Sequence
from typing import Any

from holotype.dataset.annotated import Annotated, Annotations, LabelledBox, problem_of
from holotype.dataset.annotations.json_file import JsonFile, as_list, as_number, as_object, as_text
from holotype.dataset.annotations.tree import Images, split_of_name
from holotype.dataset.listing import Problem
from holotype.errors import DatasetError
from holotype.preprocess import Box

__all__ = ["read_coco"]

_Id = int | str


def read_coco(documents: Sequence[JsonFile], *, images: Images) -> Annotations:
    """Read `{"images", "annotations", "categories"}`; `instances_train2017.json` is of train.

    `bbox` is left, top, width, height in pixels. An image without annotations is known to hold no object. A
    crowd (`iscrowd`) is no object to learn from, but its image is not empty. Images are searched in the
    folders that COCO's own layout, Roboflow's and `data.images` use; URLs are not followed.
    """
    found: list[Annotated] = []
    problems: list[Problem] = []
    for document in documents:
        content = as_object(document.value, document.name)
        names = _categories(document, content, problems)
        paths = _images(document, content, images, problems)
        found += _annotated(document, content, names, paths, problems)
    ignored = images.paths - {image.path for image in found}
    return Annotations(images.root, tuple(found), tuple(sorted(ignored)), tuple(problems))


def _categories(document: JsonFile, content: dict[str, Any], problems: list[Problem]) -> dict[_Id, str]:
    names: dict[_Id, str] = {}
    for number, item in enumerate(as_list(content.get("categories"), "categories")):
        where = document.at("categories", number)
        try:
            entry = as_object(item, "category")
            key, name = _id(entry.get("id"), "id"), as_text(entry.get("name"), "name")
        except DatasetError as error:
            problems.append(problem_of(error, where))
            continue
        if names.setdefault(key, name) != name:
            text = f"category {key!r} is {name!r} here and {names[key]!r} before"
            problems.append(Problem(str(where), text, "keep the right name"))
    return names


def _images(
    document: JsonFile, content: dict[str, Any], images: Images, problems: list[Problem]
) -> dict[_Id, tuple[str, int] | None]:
    """Path and position in the list of each image, by id; None where its entry is bad."""
    folders = _image_folders(document.name)
    found: dict[_Id, tuple[str, int] | None] = {}
    entries: list[tuple[int, _Id, str]] = []
    for number, item in enumerate(as_list(content.get("images"), "images")):
        try:
            entry = as_object(item, "image")
            key = _id(entry.get("id"), "id")
            found[key] = None
            name = as_text(entry.get("file_name"), "file_name")
            entries.append((number, key, images.find(name, folders=folders)))
        except DatasetError as error:
            problems.append(problem_of(error, document.at("images", number)))
    # Whose boxes are whose cannot be known where an id or a file is there twice.
    ids, paths = Counter(key for _, key, _ in entries), Counter(path for _, _, path in entries)
    for number, key, path in entries:
        if ids[key] == paths[path] == 1:
            found[key] = path, number
            continue
        text = f"image id {key!r} is there twice" if ids[key] > 1 else f"{path} is there twice"
        problems.append(Problem(str(document.at("images", number)), text, "keep the right one"))
    return found


def _image_folders(name: str) -> list[str]:
    folder = posixpath.dirname(name)
    above = (
        posixpath.dirname(folder)
        if posixpath.basename(folder).lower() in ("annotations", "labels")
        else folder
    )
    words = re.split(r"[_.-]", posixpath.basename(name).rpartition(".")[0])
    split = [word for word in words if split_of_name(f"{word}.json")]
    bases = [posixpath.join(above, part) for part in ("", "images")]
    return [*(posixpath.join(base, word) for word in split for base in bases), folder, *bases, "", *split]


def _annotated(
    document: JsonFile,
    content: dict[str, Any],
    names: dict[_Id, str],
    paths: dict[_Id, tuple[str, int] | None],
    problems: list[Problem],
) -> list[Annotated]:
    boxes: dict[_Id, list[LabelledBox]] = {}
    partial: set[_Id] = set()
    for number, item in enumerate(as_list(content.get("annotations"), "annotations")):
        where = document.at("annotations", number)
        key: _Id | None = None
        try:
            entry = as_object(item, "annotation")
            key = _image_id(entry, paths)
            if entry.get("iscrowd") == 1:
                partial.add(key)
            else:
                boxes.setdefault(key, []).append(LabelledBox(*_box(entry, names), where))
        except DatasetError as error:
            problems.append(problem_of(error, where))
            if key is not None:
                partial.add(key)
    split = split_of_name(document.name)
    return [
        Annotated(
            place[0],
            document.at("images", place[1]),
            tuple(boxes.get(key, ())),
            split=split,
            complete=key not in partial,
        )
        for key, place in paths.items()
        if place is not None
    ]


def _image_id(entry: dict[str, Any], paths: Container[_Id]) -> _Id:
    key = _id(entry.get("image_id"), "image_id")
    if key not in paths:
        raise DatasetError(f"image_id {key!r} is none of the images")
    return key


def _box(entry: dict[str, Any], names: dict[_Id, str]) -> tuple[Box, str]:
    category = _id(entry.get("category_id"), "category_id")
    if category not in names:
        raise DatasetError(f"category_id {category!r} is none of the categories")
    sides = as_list(entry.get("bbox"), "bbox")
    if len(sides) != 4:
        raise DatasetError(f"bbox has {len(sides)} numbers, not 4")
    left, top, width, height = (as_number(side, "a number of bbox") for side in sides)
    return Box(left, top, left + width, top + height), names[category]


def _id(value: object, what: str) -> _Id:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise DatasetError(f"{what} is {'missing' if value is None else 'no number'}")
    return value

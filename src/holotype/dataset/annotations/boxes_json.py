"""Plain JSON: a list of boxes, each with its image and the number of its class."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from holotype.dataset.annotated import Annotated, Annotations, LabelledBox, problem_of
from holotype.dataset.annotations.json_file import JsonFile, as_list, as_number, as_object, as_text
from holotype.dataset.annotations.tree import Images, split_of_name
from holotype.dataset.listing import Problem
from holotype.errors import DatasetError
from holotype.preprocess import Box

__all__ = ["read_boxes_json"]


def read_boxes_json(documents: Sequence[JsonFile], *, images: Images) -> Annotations:
    """Read `{"annotations": [{"image_path", "bbox": [left, top, width, height], "class_id"}]}`, in pixels.

    Without `bbox` the class is that of the whole image. `categories` or `classes`, a list of names or of
    `{"id", "name"}` or a mapping from id to name, names the classes; without one they are called by id.
    """
    found: list[Annotated] = []
    problems: list[Problem] = []
    for document in documents:
        content = as_object(document.value, document.name)
        names = _names(document, content)
        split = split_of_name(document.name)
        for number, item in enumerate(as_list(content.get("annotations"), "annotations")):
            where = document.at("annotations", number)
            path = None
            try:
                entry = as_object(item, "annotation")
                path = _path(as_text(entry.get("image_path"), "image_path"), document.folder, images)
                label = _label(entry.get("class_id"), names)
                box = _box(entry.get("bbox"))
            except DatasetError as error:
                problems.append(problem_of(error, where))
                if path is not None:
                    found.append(Annotated(path, where, split=split, complete=False))
                continue
            if box is None:
                found.append(Annotated(path, where, label=label, split=split))
            else:
                found.append(Annotated(path, where, (LabelledBox(box, label, where),), split=split))
    ignored = images.paths - {image.path for image in found}
    return Annotations(images.root, tuple(found), tuple(sorted(ignored)), tuple(problems))


def _names(document: JsonFile, content: dict[str, Any]) -> dict[str, str] | None:
    key = "categories" if "categories" in content else "classes"
    given = content.get(key)
    if given is None:
        return None
    try:
        if isinstance(given, dict):
            return {str(number): as_text(name, "name") for number, name in given.items()}
        entries = as_list(given, key)
        if all(isinstance(entry, dict) for entry in entries):
            return {str(entry.get("id")): as_text(entry.get("name"), "name") for entry in entries}
        return {str(number): as_text(name, "name") for number, name in enumerate(entries)}
    except DatasetError as error:
        raise DatasetError(error.what, where=document.at(key), fix="name every class") from error


def _path(name: str, folder: str, images: Images) -> str:
    """The image, as in a CSV: relative to the file's folder or absolute; or else by the images' folder."""
    exact = posixpath.normpath(posixpath.join(folder, name))
    if exact not in images.paths and os.path.isfile(images.root / exact):  # noqa: PTH113  (Path's may raise)
        root = images.root.absolute()
        return Path(exact).relative_to(root).as_posix() if Path(exact).is_relative_to(root) else exact
    return images.find(name, folders=(folder, ""))


def _label(value: object, names: dict[str, str] | None) -> str:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise DatasetError(f"class_id is {'missing' if value is None else 'neither a number nor text'}")
    key = as_text(str(value), "class_id")
    if names is None:
        return key
    if key not in names:
        raise DatasetError(f"class_id {key!r} is none of the {len(names)} classes")
    return names[key]


def _box(value: object) -> Box | None:
    if value is None:
        return None
    sides = as_list(value, "bbox")
    if len(sides) != 4:
        raise DatasetError(f"bbox has {len(sides)} numbers, not 4")
    left, top, width, height = (as_number(side, "a number of bbox") for side in sides)
    return Box(left, top, left + width, top + height)

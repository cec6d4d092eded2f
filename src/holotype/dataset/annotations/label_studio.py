"""Label Studio's JSON export: a list of tasks, each with the annotations that people made of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from holotype.dataset.annotated import Annotated, Annotations, LabelledBox, problem_of
from holotype.dataset.annotations.json_file import JsonFile, Place, as_list, as_number, as_object, as_text
from holotype.dataset.annotations.tree import Images, reference_parts, split_of_name
from holotype.dataset.listing import Problem
from holotype.errors import DatasetError
from holotype.preprocess import SUFFIXES, Box

__all__ = ["read_label_studio"]

_SHAPES = frozenset({"polygonlabels", "ellipselabels", "brushlabels", "keypointlabels", "vectorlabels"})
_UPLOAD_PREFIX = re.compile(r"^[0-9a-f]{8}-")


def read_label_studio(documents: Sequence[JsonFile], *, images: Images) -> Annotations:
    """Read rectangles (`rectanglelabels`) and the class of the whole image (`choices`).

    Skipped (`was_cancelled`) annotations do not count; where one is the `ground_truth`, only such count;
    `predictions` are never labels. `completed_by` is the annotator. Rectangles are percentages of the upright
    image; a turned one means the box around it. A submitted annotation without rectangles says that there is
    no object. Images are matched by the end of their path; uploads also without the prefix they were given.
    """
    found: list[Annotated] = []
    problems: list[Problem] = []
    for document in documents:
        for number, item in enumerate(as_list(document.value, document.name)):
            try:
                task = as_object(item, "task")
                counted = _counted(task)
                path = _image(task, document.folder, images) if counted else ""
            except DatasetError as error:
                problems.append(problem_of(error, document.at(number)))
                continue
            for index in counted:
                place = document.at(number, "annotations", index)
                found.append(_annotation(task["annotations"][index], path, place, problems))
    ignored = images.paths - {image.path for image in found}
    return Annotations(images.root, tuple(found), tuple(sorted(ignored)), tuple(problems))


def _counted(task: dict[str, Any]) -> list[int]:
    """Positions of the annotations that count."""
    annotations = [as_object(a, "annotation") for a in as_list(task.get("annotations", []), "annotations")]
    done = [i for i, annotation in enumerate(annotations) if not annotation.get("was_cancelled")]
    return [i for i in done if annotations[i].get("ground_truth")] or done


def _image(task: dict[str, Any], folder: str, images: Images) -> str:
    data = as_object(task.get("data"), "data")
    references = [value for value in data.values() if isinstance(value, str) and _is_image(value)]
    if isinstance(data.get("image"), str):
        references = [data["image"]]
    if len(references) != 1:
        raise DatasetError(
            f"data names {len(references)} images, not one", fix="export tasks with one image each"
        )
    reference = as_text(references[0], "image")
    folders = (folder, "images", "")
    try:
        return images.find(reference, folders=folders)
    except DatasetError:
        name = _UPLOAD_PREFIX.sub("", (reference_parts(reference) or [""])[-1])
        if not name or "/upload/" not in reference:
            raise
        return images.find_foreign(name, folders=folders)


def _is_image(reference: str) -> bool:
    parts = reference_parts(reference)
    return bool(parts) and parts[-1].lower().endswith(tuple(SUFFIXES))


def _annotation(annotation: dict[str, Any], path: str, place: Place, problems: list[Problem]) -> Annotated:
    boxes: list[LabelledBox] = []
    choices: list[str] = []
    complete = True
    try:
        results = as_list(annotation.get("result"), "result")
        annotator = _annotator(annotation.get("completed_by"))
    except DatasetError as error:
        problems.append(problem_of(error, place))
        return Annotated(path, place, complete=False)
    for number, result in enumerate(results):
        where = place.file.at(*place.pointer, "result", number)
        try:
            entry = as_object(result, "result")
            boxes += _rectangles(entry, where)
            choices += _choices(entry)
        except DatasetError as error:
            problems.append(problem_of(error, where))
            complete = False
    if len(choices) > 1:
        given = ", ".join(choices[:3])
        fix = "an image has one class: export one choice for each"
        problems.append(Problem(str(place), f"{len(choices)} choices for {path} ({given})", fix))
        complete, choices = False, []
    return Annotated(
        path,
        place,
        tuple(boxes),
        label=choices[0] if choices and complete else None,
        split=split_of_name(place.file.name),
        annotator=annotator,
        complete=complete,
    )


def _rectangles(result: dict[str, Any], where: Place) -> list[LabelledBox]:
    kind = result.get("type")
    if kind in _SHAPES or kind == "rectangle":
        raise DatasetError(f"{kind} is no labelled rectangle", fix="use RectangleLabels, or remove it")
    if kind != "rectanglelabels":
        return []
    value = as_object(result.get("value"), "value")
    labels = as_list(value.get("rectanglelabels"), "rectanglelabels")
    if len(labels) != 1:
        raise DatasetError(
            f"rectangle has {len(labels)} labels, not one", fix="give it one label, or remove it"
        )
    if result.get("image_rotation"):
        raise DatasetError(
            "was drawn on an image turned in the editor", fix="turn the image file, and draw the box again"
        )
    x, y, width, height = (as_number(value.get(key), key) / 100 for key in ("x", "y", "width", "height"))
    turn = as_number(value.get("rotation", 0), "rotation")
    box = Box(x, y, x + width, y + height)
    return [LabelledBox(box, as_text(labels[0], "label"), where, relative=True, rotation=turn)]


def _choices(result: dict[str, Any]) -> list[str]:
    """The answers about the whole image; those about a region of it are no classes."""
    if result.get("type") != "choices":
        return []
    value = as_object(result.get("value"), "value")
    if "x" in value:
        return []
    answers = as_list(value.get("choices"), "choices")
    return [as_text(answer, "choice") for answer in answers]


def _annotator(value: object) -> str | None:
    """A name for `completed_by`: a number, or an object with e-mail or id."""
    if isinstance(value, dict):
        value = value.get("email") or value.get("id")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise DatasetError("completed_by is neither a number nor a name")
    return as_text(str(value), "completed_by")

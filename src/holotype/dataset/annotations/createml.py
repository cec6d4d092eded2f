"""CreateML JSON: a list of images for each folder, boxes by their centres in pixels."""

from __future__ import annotations

from collections.abc import Sequence

from holotype.dataset.annotated import Annotated, Annotations, LabelledBox, problem_of
from holotype.dataset.annotations.json_file import JsonFile, as_list, as_number, as_object, as_text
from holotype.dataset.annotations.tree import Images, split_of_name
from holotype.dataset.listing import Problem
from holotype.errors import DatasetError
from holotype.preprocess import Box

__all__ = ["read_createml"]

_IMAGE_KEYS = ("image", "imagefilename")
_BOX_KEYS = ("annotations", "annotation")


def read_createml(documents: Sequence[JsonFile], *, images: Images) -> Annotations:
    """Read lists of `{"image", "annotations": [{"label", "coordinates": {"x", "y", "width", "height"}}]}`.

    Images are in the folder of their list. An image with an empty list is known to hold no object; one that
    is in no list is unknown.
    """
    found: list[Annotated] = []
    problems: list[Problem] = []
    for document in documents:
        for number, item in enumerate(as_list(document.value, document.name)):
            try:
                image, bad = _image(document, number, item, images)
            except DatasetError as error:
                problems.append(problem_of(error, document.at(number)))
            else:
                found.append(image)
                problems += bad
    ignored = images.paths - {image.path for image in found}
    return Annotations(images.root, tuple(found), tuple(sorted(ignored)), tuple(problems))


def _image(document: JsonFile, number: int, item: object, images: Images) -> tuple[Annotated, list[Problem]]:
    entry = as_object(item, "entry")
    image_key = next((key for key in _IMAGE_KEYS if key in entry), "image")
    box_key = next((key for key in _BOX_KEYS if key in entry), "annotations")
    path = images.find(as_text(entry.get(image_key), image_key), folders=(document.folder,))
    boxes: list[LabelledBox] = []
    problems: list[Problem] = []
    for index, value in enumerate(as_list(entry.get(box_key), box_key)):
        where = document.at(number, box_key, index)
        try:
            boxes.append(LabelledBox(*_box(as_object(value, "annotation")), where))
        except DatasetError as error:
            problems.append(problem_of(error, where))
    annotated = Annotated(
        path, document.at(number), tuple(boxes), split=split_of_name(document.name), complete=not problems
    )
    return annotated, problems


def _box(value: dict[str, object]) -> tuple[Box, str]:
    label = as_text(value.get("label"), "label")
    place = as_object(value.get("coordinates"), "coordinates")
    x, y, width, height = (as_number(place.get(key), key) for key in ("x", "y", "width", "height"))
    return Box(x - width / 2, y - height / 2, x + width / 2, y + height / 2), label

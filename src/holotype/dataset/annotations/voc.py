"""Pascal VOC, as LabelImg and others write it: one XML file for each image."""

from __future__ import annotations

import math
import posixpath
import re
from collections.abc import Iterator

from holotype.dataset.annotated import Annotated, Annotations, LabelledBox, problem_of
from holotype.dataset.annotations.splits import SplitLists, read_split_lists
from holotype.dataset.annotations.tree import Tree, split_of_folders
from holotype.dataset.annotations.xml_file import Element, read_xml
from holotype.dataset.listing import Problem, Split
from holotype.errors import DatasetError
from holotype.preprocess import Box

__all__ = ["is_voc", "read_voc"]

_IMAGE_FOLDERS = ("JPEGImages", "images")
_SIDES = ("xmin", "ymin", "xmax", "ymax")


def read_voc(tree: Tree) -> Annotations:
    """Read `Annotations/*.xml` with `JPEGImages/`, or XML beside the images.

    Corners are edges in pixels from 0, xmax and ymax exclusive, as LabelImg means them: so the same rectangle
    saved as VOC, YOLO and CreateML is the same box. (The challenge's own files count pixels from 1 and
    include the last: read so, their boxes lack one column and row at the left and top, which the margin
    covers.) The image is `<filename>` in the images' folder, or else the one named like the XML; `<path>` is
    of another machine, and `<size>` is not trusted. `difficult` and `truncated` objects are objects.
    Splits: `ImageSets/Main/{train,val,test}.txt`, `trainval` where it is not divided; or folders named so.
    An image without XML is unknown; XML without objects says that there are none.
    """
    lists = _split_lists(tree)
    images: list[Annotated] = []
    problems: list[Problem] = []
    ignored: list[str] = []
    for name in tree.named(".xml"):
        try:
            root = read_xml(tree.root / name, name=name)
            if root.tag != "annotation":
                ignored.append(name)
                continue
            path = _image_of(root, name, tree)
            split = _split(name, lists) or split_of_folders(name)
        except DatasetError as error:
            problems.append(problem_of(error, name))
            continue
        boxes, bad = _boxes(root, name)
        problems += bad
        images.append(Annotated(path, f"{name}: line {root.line}", boxes, split=split, complete=not bad))
    if not images and not problems:
        raise DatasetError(
            "holds no Pascal VOC", where=tree.root, fix="expected .xml files with <annotation> as their root"
        )
    known = {image.path for image in images}
    return Annotations(
        tree.images.root,
        tuple(images),
        ignored=(*ignored, *sorted(tree.images.paths - known)),
        problems=tuple(problems),
    )


def is_voc(tree: Tree) -> bool:
    """Whether there are XML files of annotations; the first twenty tell."""
    for name in tree.named(".xml")[:20]:
        try:
            with (tree.root / name).open("rb") as stream:
                if b"<annotation" in stream.read(4096):
                    return True
        except OSError:
            continue
    return False


def _image_of(root: Element, name: str, tree: Tree) -> str:
    images = tree.images
    folder, stem = posixpath.dirname(name), posixpath.splitext(posixpath.basename(name))[0]
    folders = _image_folders(folder) + ([""] if images.root != tree.root else [])
    same_stem = images.find_stem(stem, folders=folders)
    filename = re.split(r"[/\\]", root.text_of("filename"))[-1]
    if not filename:
        if same_stem is None:
            raise DatasetError("has no <filename>, and no image is named like it", fix="name the image")
        return same_stem
    try:
        named = images.find(filename, folders=folders)
    except DatasetError:
        if same_stem is None:
            raise
        return same_stem
    if same_stem not in (None, named):
        raise DatasetError(
            f"says it is of {filename}, but {same_stem} is named like it", fix="correct <filename>"
        )
    return named


def _image_folders(folder: str) -> list[str]:
    """Where the images of the XML in `folder` may be, the likeliest first."""
    parts = folder.split("/") if folder else []
    at = [i for i, part in enumerate(parts) if part.lower() == "annotations"]
    if not at:
        return [folder, *(posixpath.join(folder, images) for images in _IMAGE_FOLDERS)]
    above, below = parts[: at[-1]], parts[at[-1] + 1 :]
    mirrored = [posixpath.join(*above, images, *below) for images in _IMAGE_FOLDERS]
    beside = [posixpath.join(*above, images) for images in _IMAGE_FOLDERS]
    return [*mirrored, *beside, folder, "/".join(above)]


def _split_lists(tree: Tree) -> dict[str, SplitLists]:
    """The lists of `ImageSets/Main`, by the folder above them. trainval is the union of train and val."""
    present: dict[str, set[str]] = {}
    for name in tree.named(".txt"):
        above, separator, file = name.rpartition("ImageSets/Main/")
        if separator and "/" not in file:
            present.setdefault(above, set()).add(file)
    lists: dict[str, SplitLists] = {}
    for above, files in present.items():
        wanted: list[tuple[str, Split]] = [
            ("train.txt", "train"),
            ("val.txt", "validation"),
            ("test.txt", "test"),
        ]
        if not {"train.txt", "val.txt"} & files:
            wanted.append(("trainval.txt", "train"))
        chosen = [(f"{above}ImageSets/Main/{file}", split) for file, split in wanted if file in files]
        if chosen:
            lists[above] = read_split_lists(tree.root, chosen, key=str)
    return lists


def _split(name: str, lists: dict[str, SplitLists]) -> Split | None:
    stem = posixpath.splitext(posixpath.basename(name))[0]
    above = max((above for above in lists if name.startswith(above)), key=len, default=None)
    return None if above is None else lists[above].split_of(stem)


def _boxes(root: Element, name: str) -> tuple[tuple[LabelledBox, ...], list[Problem]]:
    boxes: list[LabelledBox] = []
    problems: list[Problem] = []
    for element in _objects(root):
        where = f"{name}: line {element.line}"
        try:
            boxes.append(_box(element, where))
        except DatasetError as error:
            problems.append(problem_of(error, where))
    return tuple(boxes), problems


def _objects(root: Element) -> Iterator[Element]:
    return (child for child in root.children if child.tag == "object")


def _box(element: Element, where: str) -> LabelledBox:
    label = element.text_of("name")
    if not label:
        raise DatasetError("object has no <name>", fix="name its class, or remove it")
    corners = element.child("bndbox")
    if corners is None:
        raise DatasetError(f"object {label!r} has no <bndbox>", fix="draw its box, or remove it")
    sides = [_side(corners, side) for side in _SIDES]
    for low, high in ((0, 2), (1, 3)):
        if sides[low] >= sides[high]:
            raise DatasetError(
                f"box of {label!r} is empty: {_SIDES[low]} {sides[low]:g}, {_SIDES[high]} {sides[high]:g}",
                fix="draw it again, or remove it",
            )
    return LabelledBox(Box(*sides), label, where)


def _side(corners: Element, name: str) -> float:
    text = corners.text_of(name)
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DatasetError(f"<{name}> is {text!r}, not a number", fix="draw the box again, or remove it")
    return number

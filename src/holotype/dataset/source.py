"""Which layout a dataset has, and reading it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from holotype.config import SourceConfig
from holotype.dataset.annotated import Annotations, problem_of
from holotype.dataset.annotations.boxes_json import read_boxes_json
from holotype.dataset.annotations.coco import read_coco
from holotype.dataset.annotations.createml import read_createml
from holotype.dataset.annotations.json_file import JsonFile, read_json
from holotype.dataset.annotations.label_studio import read_label_studio
from holotype.dataset.annotations.tree import Tree, images_among, list_files, split_of_folders
from holotype.dataset.annotations.voc import is_voc, read_voc
from holotype.dataset.annotations.yolo import is_yolo, read_yolo
from holotype.dataset.archive import ENDINGS, is_archive, unpacked
from holotype.dataset.boxes import examples_of
from holotype.dataset.folders import read_folders
from holotype.dataset.listing import Listing, Problem
from holotype.dataset.store import cache_folder
from holotype.dataset.table import read_csv, read_parquet
from holotype.errors import DatasetError
from holotype.fields import printable
from holotype.progress import note

__all__ = ["read_source"]

_Documents = dict[str, JsonFile | DatasetError]

_UNBOXED = frozenset({"folders", "csv", "parquet"})
_JSON: dict[str, Callable[..., Annotations]] = {
    "createml": read_createml,
    "coco": read_coco,
    "label-studio": read_label_studio,
    "json": read_boxes_json,
}
_NAMES = {
    "folders": "class folders",
    "csv": "a CSV file",
    "parquet": "a Parquet file",
    "voc": "Pascal VOC",
    "yolo": "YOLO labels",
    "createml": "CreateML JSON",
    "coco": "COCO JSON",
    "label-studio": "a Label Studio JSON export",
    "json": 'JSON with a list of "annotations"',
}

_FIX = f"say what it is: --set data.format={', '.join(_NAMES)}"

# Folders that hold images without being a class.
_NO_CLASS = frozenset(
    {"images", "jpegimages", "img", "imgs", "labels", "annotations", "obj_train_data", "data"}
)
_SNIFFED = 200
"""JSON files looked into, at most, to tell the layout; class folders may hold one beside each image."""


def read_source(source: Path, *, config: SourceConfig, keep_annotators: bool = False) -> Listing:
    """List the examples of a dataset, whatever its layout, with every bad record as a problem.

    The layout is `config.format`, or told from what is there; `DatasetError` where none fits, or several do.
    Annotators who agree count once, and images they disagree on are problems, unless `keep_annotators`: then
    there is a record for each annotator. An archive is read as the folder that it unpacks to.
    """
    if is_archive(source):
        source = unpacked(source, folder=cache_folder(source), limit_gb=config.max_unpacked_gb)
    return _nameable(_read(source, config=config, keep_annotators=keep_annotators))


def _read(source: Path, *, config: SourceConfig, keep_annotators: bool) -> Listing:
    if not source.exists():
        fix = "give a folder, a table, an annotation file or an archive"
        raise DatasetError("no such dataset", where=source, fix=fix)
    layout = config.format if config.format != "auto" else _told_by_name(source)
    if layout in _UNBOXED:
        return _read_unboxed(source, layout, config=config, keep_annotators=keep_annotators)
    tree = _tree(source, config)
    documents: _Documents = {}
    layout = layout or _told_by_content(source, tree, documents)
    if layout == "folders":
        return _read_unboxed(source, layout, config=config, keep_annotators=keep_annotators)
    if layout in _JSON:
        annotations = _read_json_layout(source, layout, tree, documents)
    elif source.is_file():
        raise DatasetError(f"is a file, not a folder with {_NAMES[layout]}", where=source, fix=_FIX)
    else:
        annotations = read_voc(tree) if layout == "voc" else read_yolo(tree)
    return examples_of(annotations, source=source, config=config, keep_annotators=keep_annotators)


def _nameable(listing: Listing) -> Listing:
    """Examples whose names are not UTF-8, which no table and no JSON can hold, become problems."""
    records, problems = [], list(listing.problems)
    for record in listing.records:
        try:
            f"{record.path}{record.label}".encode()
            records.append(record)
        except UnicodeEncodeError:
            problems.append(Problem(printable(record.path), "its name is not UTF-8", "rename it"))
    return dataclasses.replace(listing, records=tuple(records), problems=tuple(problems))


def _open(tree: Tree, name: str, documents: _Documents) -> JsonFile | DatasetError:
    """A JSON file, parsed at most once."""
    if name not in documents:
        try:
            documents[name] = read_json(tree.root / name, name=name)
        except DatasetError as error:
            documents[name] = error
    return documents[name]


def _told_by_name(source: Path) -> str | None:
    suffix = source.suffix.lower()
    if source.is_dir() or suffix == ".json":
        return None
    if suffix in (".csv", ".parquet"):
        return suffix[1:]
    raise DatasetError(
        f"is neither a folder nor a .csv, .parquet, .json, {', '.join(ENDINGS)} file", where=source, fix=_FIX
    )


def _read_unboxed(source: Path, layout: str, *, config: SourceConfig, keep_annotators: bool) -> Listing:
    idle = [f"data.{key}" for key in ("boxes", "background", "images") if getattr(config, key) is not None]
    if layout == "folders":
        if source.is_file():
            raise DatasetError("is a file, not class folders", where=source, fix=_FIX)
        _note_idle(idle, layout)
        return read_folders(source)
    if source.is_dir():
        raise DatasetError(f"is a folder, not {_NAMES[layout]}", where=source, fix=_FIX)
    _note_idle([key for key in idle if key != "data.images"], layout)
    root = None if config.images is None else _folder(config.images)
    read = read_csv if layout == "csv" else read_parquet
    return read(source, root=root, keep_annotators=keep_annotators)


def _note_idle(settings: Sequence[str], layout: str) -> None:
    if settings:
        note(f"without effect on {_NAMES[layout]}: {', '.join(settings)}")


def _folder(images: str) -> Path:
    folder = Path(images)
    if not folder.is_dir():
        raise DatasetError("no such folder", where=folder, fix="correct --set data.images=FOLDER")
    return folder


def _tree(source: Path, config: SourceConfig) -> Tree:
    if source.is_dir():
        root, files = source, list_files(source)
    else:
        # COCO's own layout: annotations/instances_train2017.json beside the folders of images.
        root = source.parent
        if root.name.lower() == "annotations":
            root = root.parent
        files = (source.relative_to(root).as_posix(),)
    if config.images is not None:
        folder = _folder(config.images)
        return Tree(root, files, images_among(folder, list_files(folder)))
    return Tree(root, files, images_among(root, files if source.is_dir() else list_files(root)))


def _told_by_content(source: Path, tree: Tree, documents: _Documents) -> str:
    if source.is_file():
        document = _open(tree, tree.files[0], documents)
        if isinstance(document, DatasetError):
            raise document
        kind = _kind(document.value)
        if kind is None:
            raise DatasetError(
                f"is none of {', '.join(_NAMES[name] for name in _JSON)}", where=source, fix=_FIX
            )
        return kind
    opened = [_open(tree, name, documents) for name in _likely_json(tree)]
    kinds = {_kind(document.value) for document in opened if isinstance(document, JsonFile)}
    fitting = [name for name in _JSON if name in kinds]
    fitting += [name for name, fits in (("voc", is_voc), ("yolo", is_yolo)) if fits(tree)]
    classes = _class_folders(tree)
    if fitting and len(classes) > 1:
        fitting.append("folders")
    if len(fitting) > 1:
        raise DatasetError(
            f"fits {' and '.join(_NAMES[name] for name in fitting)}",
            where=source,
            fix=f"say which it is: --set data.format={' or '.join(fitting)}",
        )
    broken = next((document for document in opened if isinstance(document, DatasetError)), None)
    if broken is not None and not fitting and not classes:
        raise broken
    return fitting[0] if fitting else "folders"


def _likely_json(tree: Tree) -> list[str]:
    return [name for name in tree.named(".json") if name.count("/") <= 2][:_SNIFFED]


def _kind(value: object) -> str | None:
    """The format of a JSON document."""
    if isinstance(value, dict):
        lists = [key for key in ("annotations", "images", "categories") if isinstance(value.get(key), list)]
        if "annotations" not in lists:
            return None
        if len(lists) == 3:
            return "coco"
        return None if "images" in lists else "json"
    entries = [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []
    if any("data" in entry and {"annotations", "predictions"} & entry.keys() for entry in entries):
        return "label-studio"
    boxed = [entry for entry in entries if {"annotations", "annotation"} & entry.keys()]
    return "createml" if any({"image", "imagefilename"} & entry.keys() for entry in boxed) else None


def _class_folders(tree: Tree) -> set[str]:
    """First folders, below those of splits, that hold images and are not named as formats name theirs."""
    found = set()
    for folder in tree.images.folders:
        parts = [part for part in folder.split("/") if part]
        if _NO_CLASS & {part.lower() for part in parts}:
            continue
        if parts and split_of_folders(f"{parts[0]}/"):
            parts = parts[1:]
        found.update(parts[:1])
    return found


def _read_json_layout(source: Path, layout: str, tree: Tree, documents: _Documents) -> Annotations:
    opened = {name: _open(tree, name, documents) for name in tree.named(".json")}
    wanted = [
        document
        for document in opened.values()
        if isinstance(document, JsonFile) and _kind(document.value) == layout
    ]
    broken = [document for document in opened.values() if isinstance(document, DatasetError)]
    if not wanted:
        if broken:
            raise broken[0]
        raise DatasetError(f"holds no {_NAMES[layout].removeprefix('a ')}", where=source, fix=_FIX)
    annotations = _JSON[layout](wanted, images=tree.images)
    used = {document.name for document in wanted}
    others = [
        name for name, document in opened.items() if isinstance(document, JsonFile) and name not in used
    ]
    return dataclasses.replace(
        annotations,
        ignored=(*annotations.ignored, *others),
        problems=(*annotations.problems, *(problem_of(error, source) for error in broken)),
    )

"""`convert`: any dataset that is read, written as class folders, CSV or Parquet."""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from holotype.bundle import replace_folder, write_bytes
from holotype.config import ConvertConfig
from holotype.contact_sheet import check_sheet, draw_sheet
from holotype.dataset import Listing, Record
from holotype.dataset.folders import DEBRIS
from holotype.dataset.listing import SPLIT_NAMES, SPLITS, Problem, file_and_region, problems_error
from holotype.dataset.revisions import revise
from holotype.dataset.source import read_source
from holotype.dataset.store import cache_folder
from holotype.dataset.table import COLUMNS, group_cell
from holotype.errors import ConfigError, DatasetError, ImageError
from holotype.fields import printable
from holotype.preprocess import SUFFIXES, Box, Limits, Pixels, cut, facts, read_full
from holotype.progress import track

__all__ = ["TARGETS", "Converted", "Target", "convert"]

Target = Literal["folders", "csv", "parquet"]
TARGETS: dict[str, Target] = {"folders": "folders", "csv": "csv", "parquet": "parquet"}

_TABLES: dict[str, Target] = {".csv": "csv", ".parquet": "parquet"}
_SUFFIX_OF = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp", "AVIF": ".avif"} | {
    "BMP": ".bmp",
    "GIF": ".gif",
    "TIFF": ".tif",
    "HEIF": ".heic",
}
_PNG_LEVEL = 3  # a third of the time of zlib's default for 13 % more bytes, on crops of cells
_LONGEST = 180
"""Bytes of a name we make; file systems allow 255, and some tools append to them."""


@dataclass(frozen=True)
class Converted:
    """What was written. `problems` are the bad records, which were left out; `ignored` gave no example.

    `classes` and `splits` count the examples; `splits` is empty where the data names none. `notes` say what
    the target could not hold, or lacks. `preview` is the contact sheet.
    """

    out: Path
    to: Target
    records: int
    classes: dict[str, int]
    splits: dict[str, int]
    problems: tuple[Problem, ...]
    ignored: tuple[str, ...]
    notes: tuple[str, ...]
    preview: Path | None


def convert(
    data: Path | str,
    out: Path | str,
    *,
    to: Target | None = None,
    config: ConvertConfig | None = None,
    preview: Path | str | None = None,
) -> Converted:
    """Read `data` in any layout and write its examples to `out`, whose name says how where `to` does not.

    Labels and splits are those of the revision `config.data.revision`.
    `folders`: `out/[split/]class/file`: whole images byte for byte, regions as PNG of exactly their pixels.
    `csv`, `parquet`: a table of paths, relative to its folder where they are below it, else absolute. `out`
    appears when all is written, or not at all. Good records are written whatever is wrong with others.
    Raises `DatasetError` where nothing can be read or written, or `out` exists.
    """
    data, out, config = Path(data), Path(out), config or ConvertConfig()
    sheet = None if preview is None else Path(preview)
    target = _target(out, to)
    _check_out(data, out, target)
    if sheet is not None:
        check_sheet(sheet)
    listed = read_source(data, config=config.data, keep_annotators=target != "folders")
    listing, _ = revise(listed, cache_folder(data), config.data.revision)
    limits = Limits(max_pixels=config.data.max_pixels)
    written, bad = _WRITERS[target](listing, out, limits) if listing.records else ([], [])
    problems = (*listing.problems, *bad)
    if not written:
        raise _no_example(data, listing, problems)
    if sheet is not None:
        sound = Listing(listing.root, tuple(written))
        draw_sheet(sound, sheet, examples=config.preview, limits=limits)
    return Converted(
        out=out,
        to=target,
        records=len(written),
        classes=dict(sorted(Counter(record.label for record in written).items())),
        splits={split: count for split in SPLITS if (count := sum(r.split == split for r in written))},
        problems=problems,
        ignored=listing.ignored,
        notes=_lost(written, target),
        preview=sheet,
    )


def _no_example(data: Path, listing: Listing, problems: tuple[Problem, ...]) -> DatasetError:
    if problems:
        return problems_error(data, problems, total=len(problems))
    return DatasetError(
        f"gives no example; {len(listing.ignored)} files were passed over",
        where=data,
        fix="images known to hold no object become examples by --set data.background=CLASS",
    )


def _target(out: Path, to: Target | None) -> Target:
    by_name = _TABLES.get(out.suffix.lower())
    if to is None:
        if by_name is None and out.suffix:
            fix = "say what to write: --to folders, csv or parquet"
            raise ConfigError(f"{out.suffix!r} does not say what to write", where=out, fix=fix)
        return by_name or "folders"
    if to != (by_name or "folders"):
        fix = "name a folder" if to == "folders" else f"name it .{to}"
        raise ConfigError(f"is no name for {to}", where=out, fix=fix)
    return to


def _check_out(data: Path, out: Path, target: Target) -> None:
    if out.is_dir() and target == "folders":
        if any(out.iterdir()):
            raise DatasetError("exists and is not empty", where=out, fix="name another folder, or empty it")
    elif out.exists():
        raise DatasetError("exists", where=out, fix="name another file, or remove it")
    if target == "folders" and data.is_dir() and out.resolve().is_relative_to(data.resolve()):
        raise DatasetError(
            "would be part of the data it is made of", where=out, fix="name a folder elsewhere"
        )


def _lost(records: Sequence[Record], target: Target) -> tuple[str, ...]:
    if target != "folders":
        unnamed = sum(record.split is None for record in records)
        if 0 < unnamed < len(records):
            # A revision of the splits names none for files that were added after it.
            return (f"{unnamed} of {len(records)} examples name no split: fill the column, or empty it",)
        return ()
    notes = []
    # Where the data names no validation, it is taken from the rest by each file's own hash.
    if any(record.group for record in records) and "validation" not in {r.split for r in records}:
        notes.append(
            "folders hold no groups: crops of one photo may come into different splits;"
            " a .csv or .parquet keeps them together"
        )
    if any(record.annotator for record in records):
        notes.append("folders do not say who labelled an image; a .csv or .parquet does")
    return tuple(notes)


def _write_folders(listing: Listing, out: Path, limits: Limits) -> tuple[list[Record], list[Problem]]:
    _check_folders(listing)
    places = _places(listing.records)
    files: dict[str, list[tuple[Record, Box | None]]] = {}
    for record in listing.records:
        path, region = file_and_region(record.path)
        files.setdefault(path, []).append((record, region))
    written: list[Record] = []
    problems: list[Problem] = []
    try:
        with replace_folder(out) as scratch, track("writing images", total=len(listing.records)) as progress:
            for folder in {scratch / place.parent for place in places.values()}:
                folder.mkdir(parents=True, exist_ok=True)
            for path, examples in files.items():
                for record, content in _contents(listing.root / path, examples, limits):
                    if isinstance(content, str):
                        problems.append(
                            Problem(printable(record.path), content, "repair the image, or remove it")
                        )
                    else:
                        suffix, data = content
                        place = scratch / places[record]
                        with place.with_name(place.name + suffix).open("xb") as stream:
                            stream.write(data)
                        written.append(record)
                    progress.advance()
            if not written:
                raise problems_error(listing.root, tuple(problems), total=len(problems))
    except OSError as error:
        text = f"cannot be written ({error.strerror}: {error.filename})"
        raise DatasetError(text, where=out, fix="make room, or name another folder") from error
    return written, problems


def _contents(
    file: Path, examples: Sequence[tuple[Record, Box | None]], limits: Limits
) -> Iterable[tuple[Record, tuple[str, bytes] | str]]:
    """For each example of a file the suffix that its name still lacks and its bytes, or what is wrong."""
    try:
        data = file.read_bytes()
        found = facts(data, limits=limits)
    except OSError as error:
        yield from ((record, f"cannot be read ({error.strerror})") for record, _ in examples)
        return
    except ImageError as error:
        yield from ((record, str(error)) for record, _ in examples)
        return
    pixels: Pixels | None = None
    for record, region in examples:
        if region is None:
            known = file.suffix.lower() in SUFFIXES
            yield record, ("" if known else _SUFFIX_OF[found.format], data)
            continue
        try:
            pixels = read_full(data, limits=limits) if pixels is None else pixels
            yield record, ("", _png(cut(pixels, region)))
        except ImageError as error:
            yield record, str(error)


def _png(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=_PNG_LEVEL)
    return buffer.getvalue()


def _check_folders(listing: Listing) -> None:
    splits = {record.split for record in listing.records}
    if None in splits and len(splits) > 1:
        fix = "convert to .csv or .parquet and fill the split column"
        raise DatasetError("some examples name a split and some do not", where=listing.root, fix=fix)
    for label in sorted({record.label for record in listing.records}):
        unfit = label.startswith(".") or label != label.strip() or len(os.fsencode(label)) > _LONGEST
        unfit = unfit or any(letter < " " or letter in "/\\" for letter in label)
        if unfit or label in DEBRIS or (None in splits and label.lower() in SPLIT_NAMES):
            fix = "rename the class, or convert to .csv or .parquet"
            raise DatasetError(f"class {label!r} cannot be the name of a folder", where=listing.root, fix=fix)


def _places(records: Sequence[Record]) -> dict[Record, Path]:
    """`[split/]class/name` for each record; a name that is there twice, in any case, gets a hash."""
    plain = {record: _folder_of(record) / _name_of(record.path) for record in records}
    uses = Counter(place.as_posix().casefold() for place in plain.values())
    return {
        record: place
        if uses[place.as_posix().casefold()] == 1 and len(os.fsencode(place.name)) <= _LONGEST
        else place.with_name(_hashed(place, record.path))
        for record, place in plain.items()
    }


def _hashed(place: Path, path: str) -> str:
    stem = os.fsdecode(os.fsencode(place.stem)[: _LONGEST - 40])
    return f"{stem}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:12]}{place.suffix}"


def _folder_of(record: Record) -> Path:
    return Path(record.label) if record.split is None else Path(record.split, record.label)


def _name_of(path: str) -> str:
    """`photo.jpg`, or `photo-left-top-width-height.png`; never hidden: it would not be found again."""
    path, region = file_and_region(path)
    name = Path(path).name.lstrip(".") or "image"
    if region is None:
        return name
    numbers = region.left, region.top, region.right - region.left, region.bottom - region.top
    return f"{Path(name).stem}-{'-'.join(f'{number:.6g}' for number in numbers)}.png"


def _write_table(
    listing: Listing, out: Path, encode: Callable[[list[tuple[str, ...]]], bytes]
) -> tuple[list[Record], list[Problem]]:
    folder = os.path.abspath(out.parent)  # noqa: PTH100  (Path has none that leaves links alone)
    rows: list[tuple[str, ...]] = []
    written: list[Record] = []
    problems: list[Problem] = []
    for record in listing.records:
        place = os.path.abspath(listing.root / record.path)  # noqa: PTH100
        name = Path(place)
        if name.is_relative_to(folder):
            name = name.relative_to(folder)
        said = record.split or "", record.annotator or "", group_cell(record)
        row = (name.as_posix(), record.label, *said)
        fault = _fault(row)
        if fault:
            problems.append(Problem(printable(record.path), fault, "rename it"))
        else:
            rows.append(row)
            written.append(record)
    if written:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(out, encode(rows))
        except OSError as error:
            fix = "make room, or name another file"
            raise DatasetError(f"cannot be written ({error.strerror})", where=out, fix=fix) from error
    return written, problems


def _fault(row: Sequence[str]) -> str:
    """Why a reader of the table would not get this row back."""
    for name, cell in zip(COLUMNS, row, strict=True):
        if any("\ud800" <= letter <= "\udfff" for letter in cell):
            return f"{name} is not UTF-8"
        if cell != cell.strip():
            return f"{name} begins or ends with a space"
    return ""


def _csv(rows: list[tuple[str, ...]]) -> bytes:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(rows)
    return stream.getvalue().encode()


def _parquet(rows: list[tuple[str, ...]]) -> bytes:
    import polars as pl

    cells = [tuple(cell or None for cell in row) for row in rows]
    stream = io.BytesIO()
    pl.DataFrame(cells, schema=dict.fromkeys(COLUMNS, pl.String), orient="row").write_parquet(stream)
    return stream.getvalue()


_WRITERS: dict[Target, Callable[[Listing, Path, Limits], tuple[list[Record], list[Problem]]]] = {
    "folders": _write_folders,
    "csv": lambda listing, out, _: _write_table(listing, out, _csv),
    "parquet": lambda listing, out, _: _write_table(listing, out, _parquet),
}

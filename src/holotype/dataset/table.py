"""Tables: CSV and Parquet with `image_path,label[,split,annotator,group]`, paths relative to their folder."""

from __future__ import annotations

import csv
import difflib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from holotype.dataset.listing import SPLIT_NAMES, Listing, Problem, Record, file_and_region
from holotype.dataset.settle import Placed, settle
from holotype.errors import DatasetError

__all__ = ["COLUMNS", "csv_rows", "group_cell", "read_csv", "read_parquet"]

_REQUIRED = ("image_path", "label")
COLUMNS = (*_REQUIRED, "split", "annotator", "group")
"""Of a table, in the order in which they are written."""

Row = Mapping[Any, object]


def read_csv(file: Path, *, root: Path | None = None, keep_annotators: bool = False) -> Listing:
    """Read a CSV of labelled paths (UTF-8); bad rows are problems of the result.

    Paths are relative to `root`, default the CSV's folder, and may name a region: `a.jpg#xywh=0,0,10,10`.
    For `keep_annotators` see `settle`.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            names, rows = csv_rows(file, stream)
            _check_header(file, [name.strip() for name in names], place="line 1: ")
            placed = ((f"{file.name}: line {line}", row) for line, row in rows)
            return _listing(file, placed, root=root, keep_annotators=keep_annotators)
    except UnicodeDecodeError as error:
        raise DatasetError("is not UTF-8", where=file, fix="save it as CSV UTF-8") from error
    except OSError as error:
        raise DatasetError(f"cannot be read ({error.strerror})", where=file, fix="check the file") from error


def read_parquet(file: Path, *, root: Path | None = None, keep_annotators: bool = False) -> Listing:
    """Read a Parquet file with the columns of a CSV, all of them text; see `read_csv`."""
    import polars as pl

    try:
        table = pl.read_parquet(file, use_pyarrow=False)
    except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        text = str(error).partition("\n")[0]
        raise DatasetError(f"is not Parquet ({text})", where=file, fix="write it again") from error
    _check_header(file, table.columns, place="")
    wrong = next((name for name, kind in table.schema.items() if kind not in (pl.String, pl.Null)), None)
    if wrong is not None:
        raise DatasetError(f"column {wrong!r} is not text", where=file, fix="write all columns as text")
    rows = (
        (f"{file.name}: row {number}", row) for number, row in enumerate(table.iter_rows(named=True), start=1)
    )
    return _listing(file, rows, root=root, keep_annotators=keep_annotators)


def csv_rows(file: Path, stream: Iterable[str]) -> tuple[Sequence[str], Iterator[tuple[int, Row]]]:
    """The header of a CSV, and its rows, each with the number of the line on which it begins.

    Cells that a row lacks are None; those beyond the header are a list under None. What is not CSV (RFC 4180)
    is a `DatasetError` with the line on which the record begins: a quote that nobody closes would take the
    rest of the file for one cell.
    """
    records = _csv_records(file, stream)
    names = next(records, (1, []))[1]
    return names, ((line, _csv_row(names, cells)) for line, cells in records if cells)


def _csv_records(file: Path, stream: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(stream, strict=True)
    line = 1
    try:
        for cells in reader:
            yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        fix = "close the quotes there, and write a quote inside of quotes twice"
        raise DatasetError(f"line {line}: is not CSV ({error})", where=file, fix=fix) from error


def _csv_row(names: Sequence[str], cells: Sequence[str]) -> Row:
    row: dict[str | None, object] = dict(itertools.zip_longest(names, cells[: len(names)]))
    return row if len(cells) <= len(names) else {**row, None: cells[len(names) :]}


def group_cell(record: Record) -> str:
    """What a table says of an example's group: nothing where that is its own file, as a reader finds it.

    The path is written as it is seen from the table: under its old name, the group would be one of its own,
    split by that name instead of by the file's content, and apart from copies of it.
    """
    own = record.group == file_and_region(record.path)[0]
    return "" if own or record.group is None else record.group


def _listing(
    file: Path, rows: Iterable[tuple[str, Row]], *, root: Path | None, keep_annotators: bool
) -> Listing:
    placed: list[Placed] = []
    problems: list[Problem] = []
    for where, row in rows:
        result = _record(row)
        if isinstance(result, Record):
            placed.append((result, where))
        else:
            problems.append(Problem(where, result, "correct or remove it"))
    if not placed and not problems:
        raise DatasetError("has a header but no rows", where=file, fix="add one for each image")
    records, contradictions = settle(placed, keep_annotators=keep_annotators)
    return Listing(root or file.parent, records, problems=(*problems, *contradictions))


def _check_header(file: Path, found: Sequence[str], *, place: str) -> None:
    if len(found) == 1 and ";" in found[0]:
        raise DatasetError("is separated by semicolons", where=file, fix="save it with commas")
    for name in found:
        if name not in COLUMNS:
            near = difflib.get_close_matches(name, COLUMNS, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}? " if near else ""
            raise DatasetError(
                f"{place}unknown column {name!r}", where=file, fix=f"{hint}columns are {', '.join(COLUMNS)}"
            )
        if found.count(name) > 1:
            raise DatasetError(f"{place}two columns {name!r}", where=file, fix="remove one")
    for name in _REQUIRED:
        if name not in found:
            raise DatasetError(
                f"{place}no column {name!r}", where=file, fix=f"it must have {' and '.join(_REQUIRED)}"
            )


def _record(row: Row) -> Record | str:
    """The record of a row, or what is wrong with it."""
    if None in row:
        return "more cells than columns"
    cells = {str(name).strip(): str(value or "").strip() for name, value in row.items()}
    empty = next((name for name in _REQUIRED if not cells[name]), None)
    if empty is not None:
        return f"{empty} is empty"
    if any("\0" in cell for cell in cells.values()):
        return "holds a NUL character"
    name = cells.get("split", "").lower()
    if name and name not in SPLIT_NAMES:
        return f"split {name!r} is none of train, validation, test"
    path = Path(cells["image_path"]).as_posix()
    file, region = file_and_region(path)
    if region is not None and not (region.right > region.left and region.bottom > region.top):
        return f"the region of {path!r} is empty"
    # Parts of one photo look alike: they belong into one split.
    group = cells.get("group") or (None if region is None else file)
    return Record(
        path=path,
        label=cells["label"],
        split=SPLIT_NAMES[name] if name else None,
        group=group,
        annotator=cells.get("annotator") or None,
    )

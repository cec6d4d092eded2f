"""CSV datasets: `image_path,label[,split,annotator,group]`, paths relative to the CSV's folder."""

from __future__ import annotations

import csv
import difflib
from collections.abc import Mapping
from pathlib import Path

from holotype.dataset.listing import SPLIT_NAMES, Listing, Record
from holotype.errors import DatasetError

__all__ = ["read_csv"]

_REQUIRED = ("image_path", "label")
_COLUMNS = (*_REQUIRED, "split", "annotator", "group")


def read_csv(file: Path) -> Listing:
    """Read a CSV of labelled paths (UTF-8). Every bad row is found before the error is raised."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            _check_header(file, reader.fieldnames)
            records: list[Record] = []
            problems: list[str] = []
            for row in reader:
                result = _record(row)
                if isinstance(result, Record):
                    records.append(result)
                else:
                    problems.append(f"line {reader.line_num}: {result}")
    except UnicodeDecodeError as error:
        raise DatasetError("is not UTF-8", where=file, fix="save it as CSV UTF-8") from error
    except csv.Error as error:
        raise DatasetError(f"is not CSV ({error})", where=file) from error
    if problems:
        shown = "; ".join(problems[:5])
        raise DatasetError(
            f"{len(problems)} bad rows: {shown}", where=file, fix="correct or remove these lines"
        )
    if not records:
        raise DatasetError("has a header but no rows", where=file)
    return Listing(file.parent, tuple(sorted(records, key=lambda r: (r.path, r.label))))


def _check_header(file: Path, names: object) -> None:
    found = [str(name).strip() for name in names] if isinstance(names, (list, tuple)) else []
    if found and len(found) == 1 and ";" in found[0]:
        raise DatasetError("is separated by semicolons", where=file, fix="save it with commas")
    for name in found:
        if name not in _COLUMNS:
            near = difflib.get_close_matches(name, _COLUMNS, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}? " if near else ""
            raise DatasetError(
                f"line 1: unknown column {name!r}", where=file, fix=f"{hint}columns are {', '.join(_COLUMNS)}"
            )
    for name in _REQUIRED:
        if name not in found:
            raise DatasetError(
                f"line 1: no column {name!r}",
                where=file,
                fix=f"the first line must name {','.join(_REQUIRED)}",
            )


def _record(row: Mapping[str | None, str | None]) -> Record | str:
    """The record of a row, or what is wrong with it."""
    if None in row:
        return "more cells than columns"
    cells = {str(name).strip(): (value or "").strip() for name, value in row.items()}
    if not cells["image_path"]:
        return "image_path is empty"
    if not cells["label"]:
        return "label is empty"
    name = cells.get("split", "").lower()
    if name and name not in SPLIT_NAMES:
        return f"split {name!r} is none of train, validation, test"
    return Record(
        path=Path(cells["image_path"]).as_posix(),
        label=cells["label"],
        split=SPLIT_NAMES[name] if name else None,
        group=cells.get("group") or None,
        annotator=cells.get("annotator") or None,
    )

"""Bringing the index and the pixel cache up to date, reading only files that are new or have changed."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from holotype.bundle import sync
from holotype.dataset.listing import Listing, example_name, file_and_region
from holotype.dataset.scan import Scanned, View, scan_files
from holotype.dataset.store import (
    Shape,
    Store,
    affordable_rows,
    copy_rows,
    create_view,
    find_store,
    make_room,
    publish,
)
from holotype.preprocess import Limits, Preprocess
from holotype.progress import track

__all__ = ["contents", "ingest", "read_index"]

_COLUMNS = {
    "path": pl.String,
    "label": pl.String,
    "split": pl.String,
    "group": pl.String,
    "annotator": pl.String,
    "size": pl.Int64,
    "mtime_ns": pl.Int64,
}
_LEARNED = {
    "sha256": pl.String,
    "pixels_sha256": pl.String,
    "bytes": pl.Int64,
    "format": pl.String,
    "mode": pl.String,
    "width": pl.Int64,
    "height": pl.Int64,
    "error": pl.String,
}

# A cache that is short of the limit by less than this is not rebuilt: free disk varies from run to run.
_WORTH_REBUILDING = 0.1


def ingest(
    listing: Listing,
    folder: Path,
    *,
    spec: Preprocess,
    limits: Limits,
    shapes: Sequence[Shape],
    limit_gb: float | None,
) -> tuple[pl.DataFrame, dict[Shape, Store]]:
    """The table of all files (one row a record) and the stores of `shapes`, both also kept in `folder`.

    A shape named twice is kept once.

    Columns: those of the records, bytes, mtime_ns, sha256, pixels_sha256, format, mode, width, height, error
    ("" where readable).
    """
    shapes = list(dict.fromkeys(shapes))
    index = folder / f"index-{spec.digest[:16]}.parquet"
    table = _recall(_stat(listing), index)
    table = _read_broken(table, listing.root, spec=spec, limits=limits)
    stored = affordable_rows(folder, shapes, rows=len(table), limit_gb=limit_gb)
    found = {shape: find_store(folder, shape, spec=spec) for shape in shapes}
    ready = {shape: store for shape, store in found.items() if store is not None}
    todo = _unknown_rows(table, ready, shapes=shapes, stored=stored)
    if not todo:
        _write_index(table, index)
        return table, ready
    needed = stored * sum(shape.bytes for shape in shapes)
    if stored:
        make_room(folder, needed, limit_gb=limit_gb, keep=[store.view.file for store in ready.values()])
    views = [create_view(folder, shape, rows=stored) for shape in shapes] if stored else []
    try:
        _copy_known(table, ready, views, skip=set(todo))
        scanned = _read(table, todo, listing.root, spec=spec, limits=limits, views=views, stored=stored)
        table = _learn(table, scanned)
        digests = [
            content if not error else ""
            for content, error in zip(contents(table)[:stored], table["error"].to_list(), strict=False)
        ]
        for view in views:
            store = publish(folder, view, spec=spec, digests=digests)
            ready[Shape(view.height, view.width)] = store
    except BaseException:
        for view in views:
            view.file.unlink(missing_ok=True)
        raise
    _write_index(table, index)
    return table, ready


def contents(table: pl.DataFrame) -> list[str]:
    """What each row shows: the hash of its file, and which part of it; "" where it was never hashed."""
    rows = table.select("path", "sha256").iter_rows()
    return [digest and example_name(digest, file_and_region(path)[1]) for path, digest in rows]


def read_index(file: Path) -> pl.DataFrame:
    """The table that `ingest` wrote; empty where there is none, or it is damaged or of an older version."""
    nothing = pl.DataFrame(schema={**_COLUMNS, **_LEARNED})
    if not file.is_file():
        return nothing
    try:
        written = pl.read_parquet(file, use_pyarrow=False)
    except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException):
        return nothing
    return written if written.schema.items() >= nothing.schema.items() else nothing


def _stat(listing: Listing) -> pl.DataFrame:
    """The records with size and time of their files; size -1 where there is no such file."""
    rows = []
    for record in listing.records:
        try:
            status = (listing.root / file_and_region(record.path)[0]).stat()
            size, time = status.st_size, status.st_mtime_ns
        except OSError:
            size, time = -1, 0
        rows.append((record.path, record.label, record.split, record.group, record.annotator, size, time))
    return pl.DataFrame(rows, schema=_COLUMNS, orient="row")


def _recall(table: pl.DataFrame, index: Path) -> pl.DataFrame:
    """Add what an earlier run learned about files of the same path, size and time; "" where nothing."""
    key = ["path", "size", "mtime_ns"]
    known = read_index(index).select(*key, *_LEARNED).unique(subset=key, keep="first")
    joined = table.join(known, on=key, how="left", maintain_order="left")
    return joined.with_columns(
        pl.col(name).fill_null("" if kind == pl.String else 0) for name, kind in _LEARNED.items()
    )


def _read_broken(table: pl.DataFrame, root: Path, *, spec: Preprocess, limits: Limits) -> pl.DataFrame:
    """Try again what could not be read: the limits or the installed decoders may have changed.

    Apart from the rest, as no pixels of a file that is still broken have to go into a store.
    """
    rows = np.flatnonzero((table["error"] != "").to_numpy()).tolist()
    if not rows:
        return table
    return _learn(table, _read(table, rows, root, spec=spec, limits=limits, views=(), stored=0))


def _unknown_rows(
    table: pl.DataFrame, ready: dict[Shape, Store], *, shapes: Sequence[Shape], stored: int
) -> list[int]:
    """Rows to read: never read, or readable and not in a store that has room for them."""
    digests, errors = contents(table), table["error"].to_list()
    unhashed = [row for row, digest in enumerate(digests) if not digest and not errors[row]]
    uncached = [
        row
        for row, digest in enumerate(digests[:stored])
        if digest
        and not errors[row]
        and not all(shape in ready and digest in ready[shape].rows for shape in shapes)
    ]
    if not unhashed and stored < len(digests) and len(uncached) < _WORTH_REBUILDING * stored:
        return []
    return sorted(unhashed + uncached)


def _copy_known(
    table: pl.DataFrame, ready: dict[Shape, Store], views: Sequence[View], *, skip: set[int]
) -> None:
    digests = contents(table)
    for view in views:
        store = ready.get(Shape(view.height, view.width))
        if store is not None:
            kept = [row for row in range(view.rows) if row not in skip and digests[row] in store.rows]
            copy_rows(store, view, rows=[(row, digests[row]) for row in kept])


def _read(
    table: pl.DataFrame,
    todo: Sequence[int],
    root: Path,
    *,
    spec: Preprocess,
    limits: Limits,
    views: Sequence[View],
    stored: int,
) -> list[Scanned]:
    names = table["path"].to_list()
    files = [(row, str(root / names[row])) for row in todo]
    results = []
    with track("reading images", total=len(files)) as progress:
        for scanned in scan_files(files, spec=spec, limits=limits, views=views, stored_rows=stored):
            results.append(scanned)
            progress.advance()
    return results


def _learn(table: pl.DataFrame, scanned: Sequence[Scanned]) -> pl.DataFrame:
    columns = {name: table[name].to_list() for name in _LEARNED}
    for result in scanned:
        for name, values in columns.items():
            values[result.row] = getattr(result, name)
    return table.with_columns(
        pl.Series(name, values, dtype=_LEARNED[name]) for name, values in columns.items()
    )


def _write_index(table: pl.DataFrame, index: Path) -> None:
    scratch = index.with_name(f".{uuid.uuid4().hex[:12]}.parquet")
    try:
        table.write_parquet(scratch)
        sync(scratch)
        scratch.replace(index)
    finally:
        scratch.unlink(missing_ok=True)

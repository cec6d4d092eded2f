"""The dataset index: every file with its hashes, label and split, and its pixels on demand."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from holotype.config import DatasetConfig
from holotype.dataset.examples import read_example
from holotype.dataset.ingest import contents, ingest
from holotype.dataset.listing import SPLITS, Listing, Problem, Split, file_and_region, problems_error
from holotype.dataset.revisions import Revision, apply_revisions, latest_revision, revise, valid_revisions
from holotype.dataset.scan import decode_files, decode_now
from holotype.dataset.source import read_source
from holotype.dataset.splits import Fractions, check_classes, choose_split, deviation
from holotype.dataset.store import Shape, Store, cache_folder
from holotype.errors import DatasetError
from holotype.locks import locked
from holotype.preprocess import Limits, Pixels, Preprocess, read_full
from holotype.progress import note

__all__ = [
    "Dataset",
    "Instead",
    "Unreadable",
    "check_splits",
    "index_dataset",
    "margin_shape",
    "open_dataset",
]

Rows = npt.NDArray[np.int64]

_HASHED = ("path", "sha256", "label", "split")  # what a dataset is to whoever is trained or judged on it

Instead = Callable[[int, str], int]
"""A row that cannot be read and why → the row to show instead; raises where that goes too far."""


@dataclass(frozen=True)
class Unreadable:
    """A file that could not be used, and why."""

    path: str
    error: str


@dataclass(frozen=True)
class Dataset:
    """The readable images of a dataset.

    `table` has a row for each: path (with `#xywh=` where it is a part of an image), label, split, group,
    annotator, sha256, pixels_sha256, bytes, format, mode, width, height. `root_hash` covers path, content,
    label and split of all of them. `deviation` says, per class, how far an automatic split is from the wanted
    shares; None where the data came with splits. `revision` is the number of the labels' last change that was
    applied, and of the splits' where `split_revision` names no other; 0 where they are as the data says.
    """

    source: Path
    root: Path
    spec: Preprocess
    classes: tuple[str, ...]
    table: pl.DataFrame
    root_hash: str
    unreadable: tuple[Unreadable, ...]
    ignored: tuple[str, ...]
    problems: tuple[Problem, ...]
    revision: int
    deviation: dict[str, float] | None
    limits: Limits
    stores: dict[Shape, Store]

    @cached_property
    def contents(self) -> tuple[str, ...]:
        """What each row shows: rows with one value have the same bytes and the same part of the image."""
        return tuple(contents(self.table))

    @cached_property
    def _positions(self) -> Rows:
        """The position in `classes` of every row's label; training asks at every step."""
        position = {label: i for i, label in enumerate(self.classes)}
        return np.array([position[label] for label in self.table["label"]], dtype=np.int64)

    @cached_property
    def _cached_rows(self) -> dict[Shape, Rows]:
        """By view: the row of every example in its store; only of views that hold all of them."""
        return {
            shape: np.array([store.rows[content] for content in self.contents], dtype=np.int64)
            for shape, store in self.stores.items()
            if all(content in store.rows for content in self.contents)
        }

    @property
    def labelling_hash(self) -> str:
        """As `root_hash`, but of path, content and label alone: it outlives a new split."""
        return _hash_rows(self.table, "path", "sha256", "label")

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits that have images, in the order train, validation, test."""
        present = set(self.table["split"].unique())
        return tuple(split for split in SPLITS if split in present)

    def rows(self, split: Split) -> Rows:
        """`int64[N]`, the table's rows that belong to `split`, in order of path."""
        return np.flatnonzero((self.table["split"] == split).to_numpy()).astype(np.int64)

    def labels(self, rows: Rows) -> Rows:
        """`int64[N]`, positions in `classes` of the labels of `rows`."""
        return self._positions[rows]

    def paths(self, rows: Rows) -> tuple[str, ...]:
        """The paths of `rows` as the dataset names them: relative to `root`, POSIX."""
        return tuple(self.table["path"].gather(rows))

    def file(self, path: str) -> Path:
        """The image file of an example."""
        return self.root / file_and_region(path)[0]

    def view(self, path: str, *, spec: Preprocess) -> Pixels:
        """`uint8[H, W, 3]`, an example as `spec` shows it; `ImageError` or OSError if it cannot be read."""
        return read_example(self.root, path, spec=spec, limits=self.limits)

    def picture(self, path: str) -> Pixels:
        """`uint8[H, W, 3]`, an example at its own size; `ImageError` or OSError where it cannot be read."""
        file, region = file_and_region(path)
        return read_full((self.root / file).read_bytes(), region=region, limits=self.limits)

    def returned_to(self, table: pl.DataFrame) -> Dataset | None:
        """With the `table` that it had before some of its files could no longer be read, in all its rows.

        None where more has changed than that.
        """
        left = table.filter(pl.col("path").is_in(self.table["path"].implode()))
        if _hash_rows(left, *_HASHED) != self.root_hash:
            return None
        known = set(table["path"])
        return replace(
            self,
            classes=tuple(sorted(table["label"].unique())),
            table=table,
            root_hash=_hash_rows(table, *_HASHED),
            unreadable=tuple(file for file in self.unreadable if file.path not in known),
        )

    def counts(self) -> dict[str, dict[str, int]]:
        """Images per class and split."""
        counted = self.table.group_by("label", "split").len()
        cells = {(label, split): n for label, split, n in counted.iter_rows()}
        return {
            label: {split: cells.get((label, split), 0) for split in self.splits} for label in self.classes
        }

    @property
    def exact(self) -> Shape:
        """The size of the model's input."""
        return Shape(self.spec.height, self.spec.width)

    def uncached(self, shape: Shape) -> int:
        """How many images the cache does not hold in this view."""
        store = self.stores.get(shape)
        return sum(store is None or content not in store.rows for content in self.contents)

    def pixels(
        self, batches: Iterable[Rows], *, shape: Shape | None = None, instead: Instead | None = None
    ) -> Iterator[Pixels]:
        """`uint8[N, H, W, 3]` for each batch of rows: from the cache, or else decoded by worker processes.

        `shape` is a cached view other than the exact one (see `margin_shape`). A file that could be read when
        the dataset was indexed and no longer can is a `DatasetError`, or is shown as the row that
        `instead(row, error)` names.
        """
        wanted = shape or self.exact
        store = self.stores.get(wanted)
        place = self._cached_rows.get(wanted)
        if store is not None and place is not None:
            yield from store.read(place[rows] for rows in batches)
            return
        yield from self._partly_cached(list(batches), wanted, store, instead)

    def _partly_cached(
        self, batches: Sequence[Rows], shape: Shape, store: Store | None, instead: Instead | None
    ) -> Iterator[Pixels]:
        rows_of = store.rows if store is not None else {}
        memory = store.open() if store is not None else None
        lacking = [
            np.array([self.contents[row] not in rows_of for row in rows], dtype=np.bool_) for rows in batches
        ]
        wanted = [rows[absent] for rows, absent in zip(batches, lacking, strict=True)]
        decoded = decode_files((self._files(rows) for rows in wanted if len(rows)), **self._decoding(shape))
        for rows, absent, missing in zip(batches, lacking, wanted, strict=True):
            batch = np.empty((len(rows), shape.height, shape.width, 3), dtype=np.uint8)
            if memory is not None and not absent.all():
                batch[~absent] = memory[[rows_of[self.contents[row]] for row in rows[~absent]]]
            if len(missing):
                fresh = next(decoded)
                for place, error in fresh.errors.items():
                    fresh.pixels[place] = self._replacement(int(missing[place]), error, shape, instead)
                batch[absent] = fresh.pixels
            yield batch

    def _replacement(self, row: int, error: str, shape: Shape, instead: Instead | None) -> Pixels:
        """The pixels of the row that is to be shown instead of a broken one, or of the one after it."""
        if instead is None:
            raise self.lost(row, error)
        while True:
            row = instead(row, error)
            decoded = decode_now(self._files(np.array([row])), **self._decoding(shape))
            if not decoded.errors:
                pixels: Pixels = decoded.pixels[0]
                return pixels
            error = decoded.errors[0]

    def lost(self, row: int, error: str) -> DatasetError:
        """The error about a file that nothing may be shown instead of."""
        return DatasetError(
            f"was readable when the dataset was indexed and is no more ({error})",
            where=self.file(self.paths(np.array([row]))[0]),
            fix="restore the file, or run again to index the dataset anew",
        )

    def _files(self, rows: Rows) -> list[str]:
        return [str(self.root / path) for path in self.paths(rows)]

    def _decoding(self, shape: Shape) -> dict[str, Any]:
        return {"spec": self.spec, "limits": self.limits, "height": shape.height, "width": shape.width}


def margin_shape(size: Shape, *, crop: float) -> Shape:
    """The view in which a crop that keeps the share `crop` of the area still has `size`."""
    scale = 1 / math.sqrt(crop)
    return Shape(round(size.height * scale), round(size.width * scale))


def open_dataset(
    source: Path | str, *, spec: Preprocess, config: DatasetConfig, shapes: Sequence[Shape] = ()
) -> Dataset:
    """Read a class folder or CSV: list, hash, decode once, split, and check it.

    What was read before and has not changed (path, size, time) is taken from the index in the cache folder.
    `shapes` are views beside the exact one to keep in the cache. Raises `DatasetError` where the data cannot
    be used; unreadable files are listed in the result unless they exceed `config.max_unreadable`.
    """
    dataset = index_dataset(source, spec=spec, config=config, shapes=shapes)
    _check_readable(dataset, allowed=config.max_unreadable)
    labels, split = dataset.table["label"].to_list(), dataset.table["split"].to_list()
    try:
        check_classes(labels, split)
    except DatasetError as error:
        raise DatasetError(error.what, where=source, fix=error.fix) from None
    return dataset


def index_dataset(
    source: Path | str, *, spec: Preprocess, config: DatasetConfig, shapes: Sequence[Shape] = ()
) -> Dataset:
    """As `open_dataset`, but without its checks: whatever can be read, for those who look for faults."""
    source = Path(source)
    folder = cache_folder(source)
    listed = read_source(source, config=config)
    listing, revision = _revise(listed, folder, config)
    limits = Limits(max_pixels=config.max_pixels)
    wanted = (Shape(spec.height, spec.width), *shapes)
    with locked(folder):  # of two processes that read it anew at once, the second finds what the first read
        table, stores = ingest(
            listing, folder, spec=spec, limits=limits, shapes=wanted, limit_gb=config.cache_limit_gb
        )
    readable = table.filter(pl.col("error") == "")
    bad = table.filter(pl.col("error") != "").select("path", "error")
    # A revision may name the splits of data that names none; files that came later go by their hash.
    unnamed = not any(record.split for record in listed.records)
    split, gaps = _split(readable, Fractions(config.validation, config.test), fill=unnamed)
    readable = readable.with_columns(pl.Series("split", split, dtype=pl.String)).drop(
        "error", "size", "mtime_ns"
    )
    return Dataset(
        source=source,
        root=listing.root,
        spec=spec,
        classes=tuple(sorted(readable["label"].unique())),
        table=readable,
        root_hash=_hash_rows(readable, *_HASHED),
        unreadable=tuple(Unreadable(path, error) for path, error in bad.iter_rows()),
        ignored=listing.ignored,
        problems=listing.problems,
        revision=revision,
        deviation=gaps,
        limits=limits,
        stores=stores,
    )


def _revise(listing: Listing, folder: Path, config: DatasetConfig) -> tuple[Listing, int]:
    """The listing with the labels of `config.revision`, its number, and the splits that `config` wants."""
    revised, number = revise(listing, folder, config.revision)
    wanted = number if config.split_revision is None else config.split_revision
    if wanted == number:
        return revised, number
    latest = latest_revision(folder)
    if wanted > latest:
        raise DatasetError(
            f"there is no revision {wanted} of its splits",
            where=listing.root,
            fix=f"choose one of 0 (as the data says) to {latest}: --set data.split_revision=0",
        )
    steps, _ = valid_revisions(listing, folder, max(number, wanted))
    parts = (_part(one, labels=one.number <= number, splits=one.number <= wanted) for one in steps)
    return apply_revisions(listing, parts), number


def _part(revision: Revision, *, labels: bool, splits: bool) -> Revision:
    """What a revision says of the labels alone, of the splits alone, of both or of nothing."""
    untold: dict[str, bool | None] = {} if splits else {"split": None}
    if not labels:
        untold |= {"label": None, "drop": False, "restore": False}
    changes = tuple(change.model_copy(update=untold) for change in revision.changes)
    return revision.model_copy(update={"changes": changes})


def check_splits(dataset: Dataset, *needed: Split) -> None:
    """`DatasetError` where one of the splits that are `needed` has no image."""
    lacking = [split for split in needed if split not in dataset.splits]
    if not lacking:
        return
    there = " and ".join(f"{len(dataset.rows(split)):,} in {split}" for split in dataset.splits)
    if dataset.deviation is None and "train" in lacking:
        fix = "name images of every class as train: in a train/ folder, or in the split column"
    else:
        fix = "add images, change data.validation, or place them yourself in train/ and validation/ folders"
    raise DatasetError(f"has no image in {' and '.join(lacking)}: {there}", where=dataset.source, fix=fix)


def _check_readable(dataset: Dataset, *, allowed: float) -> None:
    """`DatasetError` where too many records or files are bad, else a note about them."""
    problems, unreadable, source = dataset.problems, dataset.unreadable, dataset.source
    total = len(dataset.table) + len(unreadable) + len(problems)
    if len(problems) + len(unreadable) > allowed * total:
        if problems:
            broken = (Problem(file.path, file.error, "repair or remove it") for file in unreadable)
            raise problems_error(source, (*problems, *broken), total=total)
        raise DatasetError(
            f"{len(unreadable)} of {total} files are unreadable, first {unreadable[0].path}:"
            f" {unreadable[0].error}",
            where=source,
            fix="repair or remove them, or raise --set data.max_unreadable",
        )
    if problems:
        note(f"{len(problems)} of {total} records cannot be used and are left out, first {problems[0]}")
    if unreadable:
        first = f"{unreadable[0].path}: {unreadable[0].error}"
        note(f"{len(unreadable)} of {total} files are unreadable and left out, first {first}")


def _split(
    table: pl.DataFrame, fractions: Fractions, *, fill: bool
) -> tuple[list[Split], dict[str, float] | None]:
    """The split of each row, and the deviation per class where we chose it.

    Data that names train but not validation gets its validation from train, by the same hash. `fill` lets
    rows without a split have one by their hash beside rows that name theirs.
    """
    named: list[Split | None] = table["split"].to_list()
    # Exact copies have the same content hash, so they never end up on both sides of a split, nor do two parts
    # of one photo, whose group is the photo.
    groups = [
        digest if group is None or group == file_and_region(path)[0] else group
        for path, group, digest in table.select("path", "group", "sha256").iter_rows()
    ]
    if not any(named):
        chosen = [choose_split(group, fractions=fractions) for group in groups]
        return chosen, deviation(table["label"].to_list(), chosen, fractions=fractions)
    if not all(named) and fill:
        named = [
            split or choose_split(group, fractions=fractions)
            for group, split in zip(groups, named, strict=True)
        ]
    if not all(named):
        raise DatasetError(
            "some rows name a split and some do not", fix="fill the split column, or leave it out"
        )
    if "validation" in named:
        return [split for split in named if split], None
    inner = Fractions(fractions.validation, 0.0)
    return [
        choose_split(group, fractions=inner) if split == "train" else split
        for group, split in zip(groups, named, strict=True)
        if split
    ], None


def _hash_rows(table: pl.DataFrame, *columns: str) -> str:
    """SHA-256 over these columns of every image, in order of path."""
    digest = hashlib.sha256()
    for fields in table.sort("path", "label").select(columns).iter_rows():
        digest.update("\0".join(fields).encode() + b"\n")
    return digest.hexdigest()

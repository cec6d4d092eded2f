"""The run folder: its name, `metrics.csv` (no timings, so that equal runs are equal files), `timings.csv`."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from holotype.bundle import write_text
from holotype.errors import ConfigError

__all__ = [
    "METRIC_COLUMNS",
    "TIMING_COLUMNS",
    "Row",
    "RunLog",
    "check_name",
    "create_run",
    "csv_text",
    "read_rows",
]

Row = Mapping[str, float | int | str]

METRIC_COLUMNS = (
    "stage",
    "epoch",
    "learning_rate",
    "l2",
    "train_loss",
    "train_accuracy",
    "train_macro_f1",
    "validation_loss",
    "validation_accuracy",
    "validation_balanced_accuracy",
    "validation_macro_f1",
    "validation_weighted_f1",
    "validation_ece",
    "gradient_norm",
    "update_ratio",
)
TIMING_COLUMNS = (
    "stage",
    "epoch",
    "seconds",
    "images_per_second",
    "data_wait_seconds",
    "augment_seconds",
    "validation_seconds",
    "memory_mb",
    "gpu_memory_mb",
)


@dataclass(frozen=True)
class RunLog:
    """Rows of a run, rewritten atomically at each addition; a killed run leaves whole files.

    Without a folder they are only kept in memory: of several processes the first one alone writes.
    """

    folder: Path | None
    metrics: list[Row] = field(default_factory=list)
    timings: list[Row] = field(default_factory=list)

    @classmethod
    def resume(cls, folder: Path | None, *, metrics: Iterable[Row], timings: Iterable[Row]) -> Self:
        """The log of a run that goes on from a checkpoint with these rows; later ones leave the files."""
        log = cls(folder, list(metrics), list(timings))
        log._write("metrics.csv", log.metrics, METRIC_COLUMNS)
        log._write("timings.csv", log.timings, TIMING_COLUMNS)
        return log

    def add(self, metrics: Row, timings: Row) -> None:
        """Append one epoch; keys are those of METRIC_COLUMNS and TIMING_COLUMNS, missing ones stay empty."""
        self.metrics.append(metrics)
        self._write("metrics.csv", self.metrics, METRIC_COLUMNS)
        self.add_timing(timings)

    def add_timing(self, timings: Row) -> None:
        """Append the time of a step that has no metrics: reading, features, export."""
        self.timings.append(timings)
        self._write("timings.csv", self.timings, TIMING_COLUMNS)

    def _write(self, name: str, rows: Sequence[Row], columns: Sequence[str]) -> None:
        if self.folder is not None:
            write_text(self.folder / name, csv_text(rows, columns, header=True))


def check_name(name: str, *, of: str) -> None:
    """`ConfigError` where no folder can be called `name`."""
    if not name or name in (".", "..") or "/" in name or "\\" in name:
        raise ConfigError(
            f"is not a name for {of}", where=name or "(empty)", fix="use letters, digits, - and _"
        )


def create_run(runs: Path, name: str) -> Path:
    """A fresh folder `runs/name`, or `name-2`, `name-3` … where that is taken."""
    check_name(name, of="a run")
    number = 1
    while True:
        folder = runs / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        except OSError as error:
            raise ConfigError(
                f"cannot be created ({error.strerror})", where=folder, fix="check --runs"
            ) from error
        else:
            return folder


def csv_text(rows: Iterable[Row], columns: Sequence[str], *, header: bool) -> str:
    """Rows as CSV: numbers of six digits, empty where a row lacks a column."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=columns, restval="", lineterminator="\n")
    if header:
        writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    return buffer.getvalue()


def read_rows(text: str) -> list[Row]:
    """The rows of such a CSV: what is a number as a float, empty cells left out."""
    return [
        {name: _number(cell) for name, cell in row.items() if cell}
        for row in csv.DictReader(io.StringIO(text))
    ]


def _number(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell

"""The run folder: its name, `metrics.csv` (no timings, so that equal runs are equal files), `timings.csv`."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from holotype.bundle import write_text
from holotype.errors import ConfigError

__all__ = ["METRIC_COLUMNS", "TIMING_COLUMNS", "Row", "RunLog", "create_run"]

Row = Mapping[str, float | int | str]

METRIC_COLUMNS = (
    "stage",
    "epoch",
    "learning_rate",
    "l2",
    "train_loss",
    "train_accuracy",
    "validation_loss",
    "validation_accuracy",
    "validation_macro_f1",
    "gradient_norm",
)
TIMING_COLUMNS = ("stage", "epoch", "seconds", "images_per_second", "data_wait_seconds")


@dataclass(frozen=True)
class RunLog:
    """Rows of a run, rewritten atomically at each addition; a killed run leaves whole files."""

    folder: Path
    metrics: list[Row] = field(default_factory=list)
    timings: list[Row] = field(default_factory=list)

    def add(self, metrics: Row, timings: Row) -> None:
        """Append one epoch; keys are those of METRIC_COLUMNS and TIMING_COLUMNS, missing ones stay empty."""
        self.metrics.append(metrics)
        _write_csv(self.folder / "metrics.csv", self.metrics, METRIC_COLUMNS)
        self.add_timing(timings)

    def add_timing(self, timings: Row) -> None:
        """Append the time of a step that has no metrics: reading, features, export."""
        self.timings.append(timings)
        _write_csv(self.folder / "timings.csv", self.timings, TIMING_COLUMNS)


def create_run(runs: Path, name: str) -> Path:
    """A fresh folder `runs/name`, or `name-2`, `name-3` … where that is taken."""
    if not name or name in (".", "..") or "/" in name or "\\" in name:
        raise ConfigError(
            "is not a name for a run", where=name or "(empty)", fix="use letters, digits, - and _"
        )
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


def _write_csv(file: Path, rows: list[Row], columns: tuple[str, ...]) -> None:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    write_text(file, buffer.getvalue())

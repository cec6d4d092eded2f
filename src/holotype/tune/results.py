"""What a study found: its trials as rows, the best of them, and the files that hold both."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from optuna.trial import FrozenTrial, TrialState

from holotype.bundle import write_text
from holotype.config import TrainConfig, to_yaml
from holotype.head import LOWER_IS_BETTER
from holotype.runlog import csv_text
from holotype.tune.space import Axis, Label
from holotype.tune.study import replaced

__all__ = [
    "State",
    "TrialRow",
    "TuneResult",
    "short_names",
    "shown",
    "shown_value",
    "trial_rows",
    "write_recipe",
    "write_trials",
]

State = Literal["complete", "pruned", "failed", "interrupted", "lost", "running", "waiting"]
_ORDER: dict[State, int] = {
    "complete": 0, "pruned": 1, "running": 2, "waiting": 3, "failed": 4, "interrupted": 5, "lost": 6,
}  # fmt: skip


@dataclass(frozen=True)
class TrialRow:
    """One trial: what was tried (by key of `train`) and what came of it.

    `value` is the metric of the best epoch on validation, of a pruned trial that of its last; `epochs` counts
    those of fine-tuning. `again` is the trial that has its settings now, where it came to no end.
    """

    number: int
    state: State
    value: float | None
    params: dict[str, Label]
    epochs: int
    seconds: float | None
    scores: dict[str, float]
    error: str | None
    again: int | None


@dataclass(frozen=True)
class TuneResult:
    """Where a study stands: its trials, the best first, and the files about them.

    `images` is how many validation has; `recipe` and `report` are None where no trial is complete.
    """

    folder: Path
    data: Path
    storage: str
    metric: str
    images: int
    trials: tuple[TrialRow, ...]
    best: TrialRow | None
    recipe: Path | None
    report: Path | None
    interrupted: bool

    @property
    def next_command(self) -> str | None:
        """Trains with the best settings, exports and measures the test split, which no trial has seen."""
        if self.recipe is None:
            return None
        return f"holotype train {shlex.quote(str(self.data))} --recipe {shlex.quote(str(self.recipe))}"


def trial_rows(trials: Sequence[FrozenTrial], *, metric: str) -> tuple[TrialRow, ...]:
    """Rows of a study's trials: finished ones first and the best of them at the top, then by number."""
    again = replaced(trials)
    rows = [_row(trial, again=again.get(trial.number)) for trial in trials]
    sign = 1 if metric in LOWER_IS_BETTER else -1

    def place(row: TrialRow) -> tuple[float, ...]:
        value = sign * row.value if row.value is not None and row.state in ("complete", "pruned") else 0.0
        # Of equal accuracies that with the lower loss is the better one, as for the epochs of a run.
        return _ORDER[row.state], value, row.scores.get("log_loss", 0.0), row.number

    return tuple(sorted(rows, key=place))


def _row(trial: FrozenTrial, *, again: int | None) -> TrialRow:
    state = _state(trial)
    # A trial whose process was killed ended when that was noticed.
    seconds = None if trial.duration is None or state == "lost" else trial.duration.total_seconds()
    return TrialRow(
        number=trial.number,
        state=state,
        value=trial.value,
        params=dict(trial.params or trial.system_attrs.get("fixed_params", {})),
        epochs=max(trial.last_step or 0, 0),
        seconds=seconds,
        scores=trial.user_attrs.get("scores", {}),
        error=trial.user_attrs.get("error"),
        again=again,
    )


def _state(trial: FrozenTrial) -> State:
    if trial.state != TrialState.FAIL:
        names: dict[TrialState, State] = {
            TrialState.COMPLETE: "complete",
            TrialState.PRUNED: "pruned",
            TrialState.RUNNING: "running",
            TrialState.WAITING: "waiting",
        }
        return names[trial.state]
    if "error" in trial.user_attrs:
        return "failed"
    return "interrupted" if trial.user_attrs.get("interrupted") else "lost"


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """By key: its last part, or all of it where another column is called so."""
    ends = [key.rpartition(".")[2] for key in keys]
    taken = {"epochs", *(end for end in ends if ends.count(end) > 1)}
    return {key: key if end in taken else end for key, end in zip(keys, ends, strict=True)}


def shown(label: Label) -> str:
    """A setting for people, as YAML has it."""
    return (
        f"{label:.3g}" if isinstance(label, float) else label if isinstance(label, str) else json.dumps(label)
    )


def shown_value(value: float | None, metric: str) -> str:
    """The value of a trial for people."""
    if value is None:
        return "–"
    return f"{value:.4f}" if metric == "log_loss" else f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def write_trials(file: Path, rows: Sequence[TrialRow], axes: Sequence[Axis]) -> None:
    """`trials.csv`, atomically: a row for each trial, a column for each axis of the space."""
    scores = list(dict.fromkeys(name for row in rows for name in row.scores))
    keys = [axis.key for axis in axes]
    columns = ["number", "state", "value", *scores, "epochs", "seconds", *keys, "again", "error"]
    content = [{name: cell for name, cell in _cells(row).items() if cell is not None} for row in rows]
    write_text(file, csv_text(content, columns, header=True))


def _cells(row: TrialRow) -> dict[str, Any]:
    return {
        "number": row.number,
        "state": row.state,
        "value": row.value,
        "epochs": row.epochs,
        "seconds": row.seconds,
        "again": row.again,
        "error": row.error,
        **row.scores,
        **{key: "null" if label is None else label for key, label in row.params.items()},
    }


def write_recipe(file: Path, config: TrainConfig, *, comment: str) -> None:
    """A recipe for `train --recipe`, atomically; `comment` is its first line."""
    write_text(file, f"# {comment}\n{to_yaml(config)}")

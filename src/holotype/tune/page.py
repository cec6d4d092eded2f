"""One self-contained HTML page about a study: what was found, what mattered, and what to do next."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import optuna
from optuna.exceptions import ExperimentalWarning

from holotype.report import Figure, embed_figure, write_html
from holotype.report.style import DARK, LIGHT, Theme
from holotype.tune.plots import history_png, importance_png, parallel_png, slice_png
from holotype.tune.results import TrialRow, TuneResult, short_names, shown, shown_value
from holotype.tune.space import Axis

__all__ = ["importances", "write_page"]

_ENOUGH = 5  # complete trials, below which nothing can be said about what matters


def write_page(file: Path, result: TuneResult, *, study: optuna.Study, axes: Sequence[Axis]) -> None:
    """Write the page about `result`, which has a best trial, to `file`, atomically.

    `MissingExtraError` where matplotlib or Jinja2 is missing.
    """
    shares = importances(study)
    write_html(
        file,
        "tune.html.j2",
        package="holotype.tune",
        filters={"value": lambda number: shown_value(number, result.metric), "short": shown, "time": _time},
        content={
            "result": result,
            "axes": [axis.key for axis in axes],
            "names": short_names([axis.key for axis in axes]),
            "counts": _counts(result.trials),
            "seconds": sum(row.seconds or 0 for row in result.trials),
            "figures": _figures(result, axes, shares),
            "enough": _ENOUGH,
            "error": _standard_error(result),
            "alike": _alike(result),
        },
    )


def importances(study: optuna.Study) -> dict[str, float]:
    """By setting: its share of what the settings explain of the value's variance, the largest first.

    Functional ANOVA over a random forest (Hutter et al. 2014); empty where trials are too few or all equal.
    """
    complete = [trial.value for trial in study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
    if len(complete) < _ENOUGH or len(set(complete)) == 1:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def _figures(
    result: TuneResult, axes: Sequence[Axis], shares: Mapping[str, float]
) -> dict[str, Figure | None]:
    rows, metric = result.trials, result.metric

    def draw(name: str, file: Path, theme: Theme) -> None:
        if name == "history":
            history_png(rows, file, metric=metric, theme=theme)
        elif name == "importance":
            importance_png(shares, file, theme=theme)
        elif name == "slices":
            slice_png(rows, axes, file, metric=metric, theme=theme)
        else:
            parallel_png(rows, axes, file, metric=metric, theme=theme)

    figures: dict[str, Figure | None] = {"importance": None}
    with tempfile.TemporaryDirectory(prefix="holotype-tune-") as scratch:
        for name in ("history", "slices", "parallel", *(("importance",) if shares else ())):
            light, dark = Path(scratch) / f"{name}.png", Path(scratch) / f"{name}_dark.png"
            draw(name, light, LIGHT)
            draw(name, dark, DARK)
            figures[name] = embed_figure(light, dark)
    return figures


def _counts(rows: Sequence[TrialRow]) -> dict[str, int]:
    states = [row.state for row in rows]
    return {state: states.count(state) for state in dict.fromkeys(states)}


def _standard_error(result: TuneResult) -> float | None:
    """That of the best accuracy, by the binomial; None for other metrics."""
    if result.best is None or result.best.value is None or result.metric != "accuracy":
        return None
    share = result.best.value
    return math.sqrt(share * (1 - share) / result.images)


def _alike(result: TuneResult) -> int:
    """Other complete trials within one standard error of the best."""
    error = _standard_error(result)
    if error is None or result.best is None or result.best.value is None:
        return 0
    least = result.best.value - error
    values = [row.value for row in result.trials if row.state == "complete" and row.value is not None]
    return sum(value >= least for value in values) - 1


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 120:
        return f"{seconds:.0f}\N{NO-BREAK SPACE}s"
    return (
        f"{seconds / 60:.0f}\N{NO-BREAK SPACE}min"
        if seconds < 7200
        else f"{seconds / 3600:.1f}\N{NO-BREAK SPACE}h"
    )

"""`holotype tune`: a search over settings of `train` that can be interrupted, shared and gone on with."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from holotype.bundle import write_text
from holotype.config import WITHOUT_EFFECT_ON_RESULTS, TuneConfig, resolve_config, to_yaml
from holotype.dataset import dataset_name
from holotype.errors import ConfigError, TrainingError
from holotype.head import LOWER_IS_BETTER
from holotype.locks import locked, working
from holotype.progress import note
from holotype.runlog import check_name
from holotype.tune.page import write_page
from holotype.tune.results import (
    TrialRow,
    TuneResult,
    short_names,
    shown,
    shown_value,
    trial_rows,
    write_recipe,
    write_trials,
)
from holotype.tune.space import Axis, first_point, read_space, trial_config
from holotype.tune.study import (
    check_same,
    check_url,
    default_storage,
    grid_size,
    open_study,
    places_left,
    pruner,
    reclaim,
    sampler,
    storage_errors,
    visible_url,
)
from holotype.tune.trials import FAILURES, Work, begin_work, run_trial

__all__ = ["TrialRow", "TuneResult", "tune"]


def tune(
    data: Path | str,
    *,
    name: str | None = None,
    config: TuneConfig | None = None,
    overrides: Mapping[str, Any] | None = None,
    runs: Path | str = "runs",
    storage: str | None = None,
    device: str = "auto",
) -> TuneResult:
    """Search the space of `config` for the settings that are best on validation; the test split is not read.

    Ends with `runs/name/trials.csv`, `tune.html` and `best.yaml`, a recipe for `train`. `name` defaults to
    that of the data with `-tune`. The same call goes on with a study that was interrupted or killed, and
    takes part in one that is running: `storage` is the URL of a database that several machines reach, by
    default SQLite in the run folder. Ctrl-C ends it and gives the unfinished trial back. Raises a
    `HolotypeError` that says what, where and the fix.
    """
    if config is None:
        config = resolve_config(TuneConfig, overrides=overrides)
    elif overrides:
        raise ConfigError("give either config, or overrides", where="tune")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "a trial is trained by one process", where="tune", fix="run the same command once per process"
        )
    data = Path(data)
    axes = _check_settings(config)
    if storage is not None:
        check_url(storage)
    folder = _open_folder(Path(runs), name or f"{dataset_name(data)}-tune")
    url = storage or default_storage(folder)
    work = begin_work(data, config, axes, device=device)
    with storage_errors(url), _quiet_optuna(), working(folder) as worker:
        study = _study(url, folder, work)
        try:
            interrupted = False
            _search(study, folder, work, worker=worker)
        except KeyboardInterrupt:
            interrupted = True
        return _conclude(study, folder, work, url=url, interrupted=interrupted)


def _check_settings(config: TuneConfig) -> tuple[Axis, ...]:
    """The axes of the space, after everything about the settings that can be known before a trial."""
    try:
        trial_config(config.train, {})
    except ConfigError as error:
        raise ConfigError(error.what, where=f"train.{error.where}", fix=error.fix) from error
    axes = read_space(config.space, train=config.train)
    if config.sampler == "grid":
        grid_size(axes)
    return axes


def _open_folder(runs: Path, name: str) -> Path:
    """The folder of the study, whether it is there or not."""
    check_name(name, of="a study")
    folder = runs / name
    if (folder / "metrics.csv").exists() or (folder / "last").exists():
        raise ConfigError("is the folder of a training run", where=folder, fix="give another --name")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot be created ({error.strerror})", where=folder, fix="check --runs"
        ) from error
    return folder


def _study(url: str, folder: Path, work: Work) -> optuna.Study:
    """The study, found to be about the same data and settings, ready for its next trial."""
    config = work.config
    begun_with = {
        "root_hash": work.root_hash,
        "space": {axis.key: axis.described for axis in work.axes},
        "train": _compared(config),
    }
    with locked(folder):
        study = open_study(
            url,
            name=folder.name,
            maximize=work.metric not in LOWER_IS_BETTER,
            lost_after=config.lost_after,
        )
        check_same(study, json.loads(json.dumps(begun_with)), name=folder.name)
        write_text(folder / "config.yaml", to_yaml(config))
    first = first_point(work.axes)
    settings = [
        trial_config(config.train, {**first, axis.key: value}) for axis in work.axes for value in axis.probes
    ]
    study.sampler = sampler(study, config, work.axes)
    study.pruner = pruner(config, epochs=max(each.fit.epochs for each in settings))
    return study


def _compared(config: TuneConfig) -> dict[str, Any]:
    """Settings of every trial, without those that may differ between machines and sessions."""
    settings = trial_config(config.train, {})
    other_data = set(type(settings.data).model_fields) - {
        "size",
        "resize",
        "filter",
    }  # the root hash says the rest
    return settings.model_dump(mode="json", exclude=WITHOUT_EFFECT_ON_RESULTS | {"data": other_data})


def _search(study: optuna.Study, folder: Path, work: Work, *, worker: str) -> None:
    """Run trials until there are enough, or the time is up."""
    config = work.config
    asked = config.trials if config.sampler != "grid" else min(config.trials, grid_size(work.axes))
    deadline = None if config.minutes is None else time.monotonic() + 60 * config.minutes

    def tell(study: optuna.Study, trial: FrozenTrial) -> None:
        rows = trial_rows(study.get_trials(deepcopy=False), metric=work.metric)
        write_trials(folder / "trials.csv", rows, work.axes)
        done = next(row for row in rows if row.number == trial.number)
        note(_line(done, rows[0], metric=work.metric, left=places_left(study, asked)))

    while deadline is None or time.monotonic() < deadline:
        reclaim(study, folder)
        with ExitStack() as turn:
            # Until its trial is known to all, no other process of this folder may look how many are left.
            turn.enter_context(locked(folder))
            if not places_left(study, asked):
                return
            try:
                study.optimize(
                    lambda trial: run_trial(trial, work, worker=worker, begun=turn.close),
                    n_trials=1,
                    catch=FAILURES,
                    callbacks=[tell],
                )
            except (UpdateFinishedTrialError, ValueError, AssertionError):  # whatever Optuna makes of it
                if not _given_up(study, worker):
                    raise
                note("this trial was taken for lost and given to another process: its result is left out")
    note(f"the {config.minutes:g} minutes are over")


def _given_up(study: optuna.Study, worker: str) -> bool:
    """Whether another process put an end to our last trial, which had given no sign of life for too long."""
    ours = [trial for trial in study.get_trials(deepcopy=False) if trial.user_attrs.get("worker") == worker]
    if not ours or ours[-1].state != TrialState.FAIL:
        return False
    return not {"error", "interrupted"} & set(ours[-1].user_attrs)


def _conclude(study: optuna.Study, folder: Path, work: Work, *, url: str, interrupted: bool) -> TuneResult:
    """Write what was found so far; `TrainingError` where every trial failed."""
    trials = study.get_trials(deepcopy=False)
    rows = trial_rows(trials, metric=work.metric)
    write_trials(folder / "trials.csv", rows, work.axes)
    best = rows[0] if rows and rows[0].state == "complete" else None
    errors = [row.error for row in rows if row.error is not None]
    if best is None and errors and not interrupted:
        raise TrainingError(
            f"none of {len(rows)} trials came to an end, the first: {errors[0]}",
            where=folder,
            fix="narrow the space and begin another study with --name",
        )
    recipe = None
    if best is not None:
        recipe = folder / "best.yaml"
        comment = f"trial {best.number} of study {folder.name}: {work.metric} {best.value:.4f} on validation"
        write_recipe(recipe, work.settings(best.params), comment=comment)
    result = TuneResult(
        folder=folder,
        data=work.data,
        storage=visible_url(url),
        metric=work.metric,
        images=work.images,
        trials=rows,
        best=best,
        recipe=recipe,
        report=None if best is None else folder / "tune.html",
        interrupted=interrupted,
    )
    if result.report is not None:
        write_page(result.report, result, study=study, axes=work.axes)
    return result


def _line(row: TrialRow, best: TrialRow, *, metric: str, left: int) -> str:
    """One trial for people, as it ends."""
    names = short_names(list(row.params))
    params = ", ".join(f"{names[key]} {shown(label)}" for key, label in row.params.items())
    ended = (
        f"failed, {row.error}"
        if row.state == "failed"
        else f"{row.state}, {metric} {shown_value(row.value, metric)}"
    )
    lead = (
        f"best {shown_value(best.value, metric)} in trial {best.number}, " if best.state == "complete" else ""
    )
    return f"trial {row.number} with {params}: {ended}; {lead}{left} to go"


@contextmanager
def _quiet_optuna() -> Iterator[None]:
    """We tell how trials end ourselves."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)

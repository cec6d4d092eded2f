"""The study behind a search: its database, what it was begun with, how trials are chosen, and lost ones."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import URL, create_engine, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from holotype.config import TuneConfig
from holotype.errors import ConfigError, TrainingError
from holotype.locks import is_gone, locked
from holotype.progress import note
from holotype.tune.space import Axis

__all__ = [
    "check_same",
    "check_url",
    "default_storage",
    "give_back",
    "grid_size",
    "open_study",
    "places_left",
    "pruner",
    "reclaim",
    "replaced",
    "sampler",
    "storage_errors",
    "visible_url",
]

_LARGEST_GRID = 10_000
_TRIES = 2
_ABSENT = "not there"


def default_storage(folder: Path) -> str:
    """The URL of the database in the run folder."""
    return URL.create("sqlite", database=str((folder / "study.db").resolve())).render_as_string()


def check_url(url: str) -> None:
    """`ConfigError` where this is no database URL, or its driver is missing; connects to nothing."""
    try:
        create_engine(url)
    except ArgumentError as error:
        raise ConfigError(
            "is no database URL", where="--storage", fix="such as postgresql://user:password@host/database"
        ) from error
    except ImportError as error:
        raise ConfigError(
            f"needs the Python package {error.name}, which is not installed",
            where=visible_url(url),
            fix="install it: 'psycopg[binary]' for PostgreSQL, mysqlclient for MySQL",
        ) from error


def visible_url(url: str) -> str:
    """The URL without its password."""
    return make_url(url).render_as_string(hide_password=True)


def open_study(url: str, *, name: str, maximize: bool, lost_after: int) -> optuna.Study:
    """The study `name` in the database at `url`, made where it is not there yet.

    `ConfigError` where the database cannot be used.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            storage = _connect(url, lost_after=lost_after)
    except (SQLAlchemyError, StorageInternalError, RuntimeError, OSError) as error:
        line = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"cannot be opened ({line})", where=visible_url(url), fix="check --storage"
        ) from error
    return optuna.create_study(
        storage=storage,
        study_name=name,
        direction="maximize" if maximize else "minimize",
        load_if_exists=True,
    )


def _connect(url: str, *, lost_after: int) -> optuna.storages.RDBStorage:
    """The database; another process may be making its tables at this very moment."""
    options = {"connect_args": {"timeout": 60}} if make_url(url).get_backend_name() == "sqlite" else {}
    for attempt in range(5):
        try:
            return optuna.storages.RDBStorage(
                url,
                engine_kwargs=options,
                heartbeat_interval=lost_after // 5,
                grace_period=lost_after,
                heartbeat_stale_trial_callback=_lost,
            )
        except SQLAlchemyError as error:
            made_by_another = "exists" in str(error) or "duplicate" in str(error)
            if attempt == 4 or not made_by_another:
                raise
            time.sleep(0.5)
    raise AssertionError("the last attempt raises")


@contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Turn a failing database into one line."""
    try:
        yield
    except (SQLAlchemyError, StorageInternalError) as error:
        cause = error.__cause__ or error
        raise TrainingError(
            f"the study's database failed ({str(cause).strip().splitlines()[0]})",
            where=visible_url(url),
            fix="check the disk or the server, then go on with the same command",
        ) from error


def check_same(study: optuna.Study, begun_with: Mapping[str, Any], *, name: str) -> None:
    """Record what a fresh study is begun with; `ConfigError` that names what has changed of an older one."""
    if "begun_with" not in study.user_attrs:
        study.set_user_attr("begun_with", dict(begun_with))
    before, now = dict(_leaves(study.user_attrs["begun_with"])), dict(_leaves(begun_with))
    for key in (*now, *before):
        if before.get(key, _ABSENT) == now.get(key, _ABSENT):
            continue
        was, is_now = (str(values.get(key, _ABSENT)) for values in (before, now))
        what = f"data of root hash {was[:12]}, not {is_now[:12]}" if key == "root_hash" else ""
        raise ConfigError(
            f"was begun with {what or f'{key} {was}, not {is_now}'}",
            where=f"study {name}",
            fix="begin another study with --name, or change it back",
        )


def _leaves(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, Mapping) and not {"low", "high"} <= set(value):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


# --- how trials are chosen and stopped ----------------------------------------------------------------------


class _Seeded(optuna.samplers.BaseSampler):
    """A sampler that is made anew for each trial, so that what it draws depends on nothing but the trials
    before: a study that was interrupted tries what it would have tried."""

    def __init__(self, study: optuna.Study, config: TuneConfig, axes: Sequence[Axis]) -> None:
        self._study = study  # hyperband shows a sampler only those trials that compete with its next one
        self._config = config
        self._axes = axes
        self._inner: optuna.samplers.BaseSampler | None = None

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        before = [other for other in self._study.get_trials(deepcopy=False) if other.number < trial.number]
        place = len(before) - len(replaced(before))
        seed = int(np.random.SeedSequence([self._config.seed, place]).generate_state(1)[0])
        self._inner = self._make(seed)
        self._inner.before_trial(study, trial)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self._chosen.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._chosen.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._chosen.sample_independent(study, trial, param_name, param_distribution)

    @property
    def _chosen(self) -> optuna.samplers.BaseSampler:
        if self._inner is None:
            raise AssertionError("no trial has begun")
        return self._inner

    def _make(self, seed: int) -> optuna.samplers.BaseSampler:
        if self._config.sampler == "random":
            return optuna.samplers.RandomSampler(seed)
        if self._config.sampler == "tpe":
            return optuna.samplers.TPESampler(seed=seed)
        grid = {axis.key: axis.points() for axis in self._axes}
        # Its order comes from its seed, so that one must be the same for all trials.
        return optuna.samplers.GridSampler(grid, seed=self._config.seed)


def sampler(study: optuna.Study, config: TuneConfig, axes: Sequence[Axis]) -> optuna.samplers.BaseSampler:
    """Chooses the next trial, as a function of the seed and the trials before."""
    return _Seeded(study, config, axes)


def grid_size(axes: Sequence[Axis]) -> int:
    """Combinations of a grid; `ConfigError` where they are too many, or an axis has no steps."""
    size = 1
    for axis in axes:
        size *= len(axis.points())
    if size > _LARGEST_GRID:
        raise ConfigError(
            f"{size:,} combinations are no grid to be tried",
            where="space",
            fix="leave choices out, or sampler=tpe",
        )
    return size


def pruner(config: TuneConfig, *, epochs: int) -> optuna.pruners.BasePruner:
    """Stops trials early; that of the first `config.startup` none is stopped is for the caller to see to."""
    if config.pruner == "none" or epochs == 0:
        return optuna.pruners.NopPruner()
    if config.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=epochs)
    # While rates still rise, the lead of a trial says little about its end.
    return optuna.pruners.MedianPruner(n_startup_trials=0, n_warmup_steps=epochs // 4)


# --- trials that were lost ----------------------------------------------------------------------------------


def places_left(study: optuna.Study, trials: int) -> int:
    """How many trials may still be begun: those given back, and new ones up to the number asked for."""
    known = study.get_trials(deepcopy=False)
    waiting = sum(trial.state == TrialState.WAITING for trial in known)
    return waiting + max(trials - len(known) + len(replaced(known)), 0)


def replaced(trials: Sequence[FrozenTrial]) -> dict[int, int]:
    """By number of a trial that came to no end: the number of that which has its settings now."""
    return {
        trial.user_attrs["instead_of"]: trial.number for trial in trials if "instead_of" in trial.user_attrs
    }


def give_back(study: optuna.Study, trial: FrozenTrial, *, blameless: bool = False) -> None:
    """Let the settings of a trial that came to no end be tried again, unless that was their second time.

    One that somebody interrupted is blameless and may be given back any number of times.
    """
    tries = trial.user_attrs.get("tries", 1) + (not blameless)
    if tries <= _TRIES and trial.number not in replaced(study.get_trials(deepcopy=False)):
        study.enqueue_trial(trial.params, user_attrs={"tries": tries, "instead_of": trial.number})


def reclaim(study: optuna.Study, folder: Path) -> None:
    """Give back the trials of processes that were killed.

    One that worked in this folder is known at once, one elsewhere when it has given no sign for long.
    """
    with locked(folder):
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            worker = trial.user_attrs.get("worker")
            if worker is not None and is_gone(folder, worker):
                _lost(study, trial)
                study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        optuna.storages.fail_stale_trials(study)


def _lost(study: optuna.Study, trial: FrozenTrial) -> None:
    note(f"trial {trial.number} was lost: there is no sign of its process")
    give_back(study, trial)

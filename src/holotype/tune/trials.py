"""One trial of a study: training with the settings that the sampler chose, watched epoch by epoch."""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.trial import TrialState

from holotype.config import TrainConfig, TuneConfig
from holotype.errors import ConfigError, DatasetError, ModelError, TrainingError
from holotype.fit import learn, open_session
from holotype.fit.interrupt import interruptible
from holotype.head import Scores
from holotype.tune.space import Axis, first_point, trial_config
from holotype.tune.study import give_back

__all__ = ["FAILURES", "Work", "begin_work", "run_trial"]

FAILURES = (ConfigError, ModelError, TrainingError, MemoryError, torch.OutOfMemoryError)
"""Errors that say something about the settings that were tried: the study goes on with others."""


@dataclass(frozen=True)
class Work:
    """What all trials of this process share; `images` and `root_hash` are of validation and of the data."""

    data: Path
    config: TuneConfig
    axes: tuple[Axis, ...]
    device: str
    metric: str
    images: int
    root_hash: str

    def settings(self, params: Mapping[str, Any]) -> TrainConfig:
        """The settings that the labels of a trial stand for."""
        return trial_config(self.config.train, {axis.key: axis.value(params[axis.key]) for axis in self.axes})


def begin_work(data: Path, config: TuneConfig, axes: tuple[Axis, ...], *, device: str) -> Work:
    """Read the data and build a network: what is wrong with either is known before the first trial."""
    settings = trial_config(config.train, first_point(axes))
    session = open_session(data, settings, device=device, folder=None)
    return Work(
        data=data,
        config=config,
        axes=axes,
        device=device,
        metric=settings.fit.metric,
        images=len(session.dataset.rows("validation")),
        root_hash=session.dataset.root_hash,
    )


def run_trial(trial: optuna.Trial, work: Work, *, worker: str, begun: Callable[[], object]) -> float:
    """Train with suggested settings; returns the metric of the best epoch on validation.

    `begun` is called as soon as others can see that the trial is ours. Raises `TrialPruned` where it is
    stopped early, one of FAILURES where the settings are no good, `KeyboardInterrupt` where somebody wants
    to stop; after that, as after any other error, the same settings are tried again later.
    """
    try:
        trial.set_user_attr("worker", worker)
        params = {axis.key: axis.suggest(trial) for axis in work.axes}
        begun()
        value, pruned = _learn(trial, work, work.settings(params))
    except FAILURES as error:
        trial.set_user_attr("error", " ".join(str(error).split()) or type(error).__name__)
        raise
    except (Exception, KeyboardInterrupt) as error:
        trial.set_user_attr("interrupted", type(error).__name__)
        give_back(trial.study, _frozen(trial), blameless=isinstance(error, KeyboardInterrupt))
        raise
    finally:
        gc.collect()
    if pruned:
        raise optuna.TrialPruned
    return value


def _learn(trial: optuna.Trial, work: Work, settings: TrainConfig) -> tuple[float, bool]:
    """The metric of the best epoch, and whether the trial was stopped early."""
    session = open_session(work.data, settings, device=work.device, folder=None)
    if session.dataset.root_hash != work.root_hash:
        raise DatasetError(
            "has changed while the study ran: files, labels or splits are not what they were",
            where=work.data,
            fix="put it back as it was and go on with the same command, or begin another study",
        )
    pruned = False

    def watch(epoch: int, scores: Scores) -> bool:
        nonlocal pruned
        if epoch == 0 or interrupt.asked:
            return interrupt.asked  # what the head is worth says nothing about settings of fine-tuning
        trial.report(float(getattr(scores, work.metric)), step=epoch)
        asked = trial.should_prune()  # in any case: hyperband keeps a record of its own
        # After the last epoch there is nothing left to save.
        pruned = asked and epoch < settings.fit.epochs and _finished(trial.study) >= work.config.startup
        return pruned

    with interruptible() as interrupt:
        try:
            learned = learn(session, watch=watch)
        except TrainingError:
            if not interrupt.asked:
                raise
    if interrupt.asked or learned.interrupted:
        raise KeyboardInterrupt
    value = float(getattr(learned.scores, work.metric))
    if not math.isfinite(value):
        raise TrainingError(
            f"{work.metric} on validation is {value}", fix="lower fit.optimizer.learning_rate"
        )
    trial.set_user_attr("scores", dataclasses.asdict(learned.scores))
    return value, pruned


def _finished(study: optuna.Study) -> int:
    return len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))


def _frozen(trial: optuna.Trial) -> optuna.trial.FrozenTrial:
    """The trial as the study has it."""
    return trial.study.get_trials(deepcopy=False)[trial.number]

"""Learning rates over the steps of a run: cosine, one-cycle, step or plateau, with a linear warm-up."""

from __future__ import annotations

import math
from typing import Any

import torch

from holotype.config import Cosine, FitConfig, OneCycle, Plateau, Step
from holotype.errors import TrainingError

__all__ = ["Schedule", "build_schedule"]

# The first rate of a warm-up, as a share of the peak.
_START = 0.01
# How far the momentum of one-cycle swings around the optimizer's own: 0.9 gives the usual 0.85 to 0.95.
_SWING = 0.05
_MOST_MOMENTUM = 0.99


def build_schedule(config: FitConfig, *, steps_per_epoch: int) -> Schedule:
    """The schedule of `config` over `config.epochs` epochs."""
    return Schedule(config, steps_per_epoch=steps_per_epoch)


class Schedule:
    """Rates as a pure function of the step; that of plateau also of the epochs judged so far."""

    def __init__(self, config: FitConfig, *, steps_per_epoch: int) -> None:
        self._settings = config.schedule
        self._steps_per_epoch = steps_per_epoch
        self._total = config.epochs * steps_per_epoch
        self._warmup = round(config.warmup * self._total)
        self._falls = 0
        self._waiting = 0

    def factor(self, step: int) -> float:
        """The rate at a step, from 0, as a share of the peak."""
        settings = self._settings
        if isinstance(settings, OneCycle):
            rising, done = _place(settings, step, total=self._total)
            return _between(settings.start, 1.0, done) if rising else _between(1.0, settings.floor, done)
        rise = min(_START + (1 - _START) * step / self._warmup, 1.0) if self._warmup else 1.0
        if isinstance(settings, Cosine):
            return self._cosine(settings, step) if step >= self._warmup else rise
        if isinstance(settings, Step):
            return float(rise * settings.factor ** (step // self._steps_per_epoch // settings.every))
        return float(rise * max(settings.factor**self._falls, settings.floor))

    def set_rates(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Set every group's rate for a step, and with one-cycle its momentum, or beta1."""
        factor = self.factor(step)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
            if isinstance(self._settings, OneCycle):
                self._set_momentum(self._settings, group, step)

    def judge(self, better: bool) -> None:
        """Take note, after each epoch, of whether its metric is the best so far; only plateau cares."""
        if not isinstance(self._settings, Plateau):
            return
        self._waiting = 0 if better else self._waiting + 1
        if self._waiting == self._settings.wait:
            self._falls, self._waiting = self._falls + 1, 0

    def state(self) -> dict[str, int]:
        """What the next rates depend on beside the step."""
        return {"falls": self._falls, "waiting": self._waiting}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        try:
            self._falls, self._waiting = int(state["falls"]), int(state["waiting"])
        except (KeyError, TypeError, ValueError) as error:
            raise TrainingError("not the state of a schedule", where=state, fix="start a new run") from error

    def _cosine(self, settings: Cosine, step: int) -> float:
        """1 at the end of the warm-up, `floor` at the last step."""
        done = (step - self._warmup) / max(self._total - 1 - self._warmup, 1)
        return _between(1.0, settings.floor, min(done, 1.0))

    def _set_momentum(self, settings: OneCycle, group: dict[str, Any], step: int) -> None:
        """Momentum against the rate: highest where that is lowest; nothing for optimizers without."""
        own = group["initial_momentum"]
        if not own:
            return
        low, high = max(own - _SWING, 0.0), min(own + _SWING, _MOST_MOMENTUM)
        rising, done = _place(settings, step, total=self._total)
        momentum = _between(high, low, done) if rising else _between(low, high, done)
        if "momentum" in group:
            group["momentum"] = momentum
        else:
            group["betas"] = (momentum, *group["betas"][1:])


def _place(settings: OneCycle, step: int, *, total: int) -> tuple[bool, float]:
    """Whether a step is in the rising part of one-cycle, and what share of its part is behind it."""
    peak, last = max(settings.rise * total - 1, 0.0), total - 1
    if step <= peak:
        return True, step / peak if peak else 1.0
    return False, (step - peak) / (last - peak) if step < last else 1.0


def _between(start: float, end: float, done: float) -> float:
    """From `start` to `end` along half a cosine, as `done` goes from 0 to 1."""
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2

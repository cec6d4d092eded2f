"""The space that a study searches: axes by key of `train`, checked, and laid over the settings of a trial."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise
from typing import Any

import optuna
from pydantic import BaseModel, ConfigDict, ValidationError

from holotype.config import TrainConfig, resolve_config
from holotype.errors import ConfigError

__all__ = ["Axis", "Choices", "Label", "Range", "first_point", "read_space", "trial_config"]

Label = None | bool | int | float | str
"""What a study stores of a setting; a choice that is a list or a section is stored as its JSON."""

_RANGE_KEYS = frozenset({"low", "high", "log", "step"})
_FIX = "give a list of choices, or {low, high, log, step}"
# Validation images must be the same in every trial, and so must what they are judged by.
_SAME_IMAGES = frozenset({"data.size", "data.resize", "data.filter"})
_GOLDEN = 0.381966  # the end of no step and, between whole numbers, no whole number


@dataclass(frozen=True)
class Choices:
    """A setting with some values to choose from: numbers, names, lists or whole sections."""

    key: str
    values: tuple[Any, ...]

    @property
    def labels(self) -> tuple[Label, ...]:
        """What stands for each value in a study."""
        return tuple(
            json.dumps(value, sort_keys=True) if isinstance(value, list | tuple | dict) else value
            for value in self.values
        )

    @property
    def probes(self) -> tuple[Any, ...]:
        """Values whose validity is that of all."""
        return self.values

    @property
    def described(self) -> list[Any]:
        """As it is written in settings."""
        return list(self.values)

    def suggest(self, trial: optuna.Trial) -> Label:
        """The label that the sampler chooses."""
        label: Label = trial.suggest_categorical(self.key, self.labels)
        return label

    def value(self, label: Label) -> Any:
        """The value that a label stands for."""
        return self.values[self.labels.index(label)]

    def points(self) -> tuple[Label, ...]:
        """Every label, for a grid."""
        return self.labels


@dataclass(frozen=True)
class Range:
    """A number between two ends, both included; `whole` where only whole numbers are settings."""

    key: str
    low: float
    high: float
    log: bool
    step: float | None
    whole: bool

    @property
    def probes(self) -> tuple[float, ...]:
        """Values whose validity is that of all."""
        return (self.low, self.high)

    @property
    def described(self) -> dict[str, Any]:
        """As it is written in settings."""
        step = {} if self.step is None else {"step": self.step}
        return {"low": self.low, "high": self.high, **({"log": True} if self.log else {}), **step}

    def suggest(self, trial: optuna.Trial) -> Label:
        """The number that the sampler chooses."""
        if self.whole:
            low, high, step = int(self.low), int(self.high), int(self.step or 1)
            return trial.suggest_int(self.key, low, high, step=step, log=self.log)
        return trial.suggest_float(self.key, self.low, self.high, step=self.step, log=self.log)

    def value(self, label: Label) -> Any:
        """The number itself."""
        return label

    def points(self) -> tuple[Label, ...]:
        """Every step, for a grid; `ConfigError` where there are no steps."""
        step = self.step or (1.0 if self.whole and not self.log else None)
        if step is None:
            raise ConfigError(
                "a grid needs a list of choices, or a step",
                where=f"space.{self.key}",
                fix="or another sampler",
            )
        count = round((self.high - self.low) / step) + 1
        # In decimals: in binary the last of 0.1, 0.2, ... would be above its own range.
        numbers = [float(Decimal(str(self.low)) + place * Decimal(str(step))) for place in range(count)]
        return tuple(int(number) for number in numbers) if self.whole else tuple(numbers)


Axis = Choices | Range


class _Ends(BaseModel):
    """A range as it is written in settings."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    low: float
    high: float
    log: bool = False
    step: float | None = None


def read_space(space: Mapping[str, Any], *, train: Mapping[str, Any]) -> tuple[Axis, ...]:
    """The axes of `space` over the settings `train`, in order of key.

    Keys may be dotted or nested. `ConfigError` for an unknown key, and for a value that `train` would not
    accept: each value is tried with the others at their first.
    """
    axes = tuple(sorted((_axis(key, value) for key, value in _flat(space)), key=lambda axis: axis.key))
    if not axes:
        raise ConfigError("is empty: there is nothing to search", where="space", fix=_FIX)
    _check_keys([axis.key for axis in axes])
    first = first_point(axes)
    try:
        trial_config(train, first)
    except ConfigError as error:
        raise ConfigError(error.what, where=f"space.{error.where}", fix=error.fix) from error
    return tuple(_checked(axis, first, train=train) for axis in axes)


def first_point(axes: Sequence[Axis]) -> dict[str, Any]:
    """Every axis at its first choice or its lower end."""
    return {axis.key: axis.probes[0] for axis in axes}


def trial_config(train: Mapping[str, Any], point: Mapping[str, Any]) -> TrainConfig:
    """The settings of a trial: those of the study with the values of `point` in their places.

    A value takes the whole place of what was there, so that a section can be one of several.
    """
    settings: dict[str, Any] = dict(train)
    for key, value in point.items():
        settings = _put(settings, key.split("."), value)
    return resolve_config(TrainConfig, recipe=settings)


def _put(settings: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    name, *rest = path
    below = settings.get(name)
    inner = _put(below if isinstance(below, Mapping) else {}, rest, value) if rest else value
    return {**settings, name: inner}


def _flat(space: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys with their axes: `--set space.fit.epochs=[1, 2]` comes as nested mappings."""
    for name, value in space.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value and not _RANGE_KEYS & set(value):
            yield from _flat(value, f"{key}.")
        else:
            yield key, value


def _axis(key: str, value: Any) -> Axis:
    where = f"space.{key}"
    if isinstance(value, list | tuple):
        if not value:
            raise ConfigError("has no choices", where=where, fix=_FIX)
        choices = Choices(key, tuple(value))
        if any(label in choices.labels[:place] for place, label in enumerate(choices.labels)):
            raise ConfigError("names a choice twice", where=where, fix="leave it out")
        return choices
    if not isinstance(value, Mapping):
        raise ConfigError(f"{value!r} is no axis", where=where, fix=_FIX)
    try:
        ends = _Ends.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{name}: {first['msg']} (got {first['input']!r})", where=where, fix=_FIX) from None
    _check_ends(ends, where)
    return Range(key, ends.low, ends.high, ends.log, ends.step, whole=False)


def _check_ends(ends: _Ends, where: str) -> None:
    if ends.low >= ends.high:
        raise ConfigError(f"low {ends.low:g} is not below high {ends.high:g}", where=where)
    if ends.log and ends.step is not None:
        raise ConfigError("log and step exclude each other", where=where, fix="leave one of them out")
    if ends.log and ends.low <= 0:
        raise ConfigError("a logarithmic range begins above 0", where=where, fix="raise low")
    if ends.step is not None:
        steps = (ends.high - ends.low) / ends.step if ends.step > 0 else 0.5
        if not math.isclose(steps, round(steps), abs_tol=1e-8):
            raise ConfigError(
                f"from {ends.low:g} no whole number of steps of {ends.step:g} leads to {ends.high:g}",
                where=where,
                fix="change high or step",
            )


def _check_keys(keys: Sequence[str]) -> None:
    for before, after in pairwise(keys):
        if before == after:
            raise ConfigError("is named twice", where=f"space.{after}")
    for key in keys:
        inside = [other for other in keys if other.startswith(f"{key}.")]
        if inside:
            raise ConfigError(f"holds {inside[0]}, which is another axis", where=f"space.{key}")
        if key == "fit.metric" or (key.partition(".")[0] == "data" and key not in _SAME_IMAGES):
            raise ConfigError(
                "would judge trials by different measures",
                where=f"space.{key}",
                fix=f"set it for all of them: train.{key}",
            )
        if key.partition(".")[0] == "monitor":
            raise ConfigError("changes nothing about the result", where=f"space.{key}", fix="leave it out")


def _checked(axis: Axis, first: Mapping[str, Any], *, train: Mapping[str, Any]) -> Axis:
    """The axis, after trying its values; a range is of whole numbers where no others are accepted."""
    for value in axis.probes:
        try:
            trial_config(train, {**first, axis.key: value})
        except ConfigError as error:
            if error.where == axis.key:
                raise ConfigError(error.what, where=f"space.{axis.key}", fix=error.fix) from error
            raise ConfigError(f"{value!r} does not go with {error}", where=f"space.{axis.key}") from error
    if isinstance(axis, Choices):
        return axis
    try:
        trial_config(train, {**first, axis.key: axis.low + _GOLDEN * (axis.high - axis.low)})
    except ConfigError:
        return _whole(axis)
    return axis


def _whole(axis: Range) -> Range:
    if any(not float(number).is_integer() for number in (axis.low, axis.high, axis.step or 1)):
        raise ConfigError(
            "takes whole numbers only", where=f"space.{axis.key}", fix="round low, high and step"
        )
    return Range(axis.key, axis.low, axis.high, axis.log, axis.step, whole=True)

"""How settings come together: defaults, presets, recipe files and dotted overrides.

A value comes from, weakest first: the defaults of the sections, the preset, the recipe file,
`--set section.key=value` and flags. Python calls use the same models. An unknown key is an error that names
the nearest one.
"""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from holotype.config.training import AUGMENT_PRESETS, PRESETS, AdamW, TrainConfig
from holotype.errors import ConfigError

__all__ = [
    "Setting",
    "merge",
    "parse_assignments",
    "read_recipe",
    "resolve_config",
    "settings_of",
    "to_yaml",
]

Section = TypeVar("Section", bound=BaseModel)

_TAGGED = ("optimizer", "schedule")


@dataclass(frozen=True)
class Setting:
    """One key for `holotype config VERB`; `kind` is which optimizer or schedule has it, where not all do."""

    key: str
    type: str
    default: str
    meaning: str
    kind: str = ""


def resolve_config(
    model: type[Section],
    *,
    recipe: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Section:
    """Merge defaults, preset, recipe and overrides (both nested mappings) into a validated section.

    `ConfigError` where `overrides` choose another preset or optimizer than the recipe, whose own settings
    would keep it from doing what it says.
    """
    merged = merge(dict(recipe or {}), overrides or {})
    if "preset" in model.model_fields:
        _refuse_idle_choices(recipe or {}, overrides or {})
        preset = merged.get("preset", model.model_fields["preset"].default)
        if isinstance(preset, str) and preset in PRESETS:
            merged = merge(_beneath(PRESETS[preset], merged), merged)
    try:
        return model.model_validate(merged)
    except ValidationError as error:
        raise _explain(error, model) from error


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """`["fit.epochs=3", ...]` → `{"fit": {"epochs": 3}}`; values are YAML."""
    result: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key.strip():
            raise ConfigError("not of the form section.key=value", where=f"--set {assignment}")
        try:
            leaf = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError("value is not YAML", where=f"--set {assignment}") from error
        for part in reversed(key.strip().split(".")):
            leaf = {part: leaf}
        result = merge(result, leaf)
    return result


def read_recipe(file: Path) -> dict[str, Any]:
    """A YAML (or JSON) file of nested settings."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot be read ({error.strerror})", where=file, fix="check --recipe") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"not YAML ({' '.join(str(error).split())})", where=file) from error
    if not isinstance(content, dict):
        raise ConfigError("must hold a mapping of sections", where=file)
    return content


def to_yaml(section: BaseModel) -> str:
    """The resolved settings, as a recipe that `--recipe` reads."""
    return yaml.safe_dump(section.model_dump(mode="json"), sort_keys=False)


def settings_of(values: BaseModel, *, prefix: str = "") -> Iterator[Setting]:
    """Every key of a verb, depth first, with type, value and meaning.

    A verb's defaults are the values of its settings resolved from nothing; of sections that were not chosen,
    such as the other optimizers, the values are their own defaults.
    """
    plain = values.model_dump(mode="json")
    for name, field in type(values).model_fields.items():
        key, value = f"{prefix}{name}", getattr(values, name)
        choices = _sections(field.annotation)
        if not choices:
            shown = json.dumps(plain[name])
            yield Setting(key, _type_name(field.annotation), shown, field.description or "")
        elif len(choices) == 1:
            yield from settings_of(value if value is not None else choices[0](), prefix=f"{key}.")
        else:
            for choice in choices:
                kind = choice.model_fields["name"].default
                chosen = value if isinstance(value, choice) else choice()
                for setting in settings_of(chosen, prefix=f"{key}."):
                    meaning = f"{setting.meaning} ({kind})" if setting.meaning else f"which {name}"
                    yield Setting(setting.key, setting.type, setting.default, meaning, kind)


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two nested mappings as one; where both have a value, that of `above` wins."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _refuse_idle_choices(recipe: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
    """`ConfigError` where a recipe, such as that of a whole run, sets what another choice would bring."""
    preset, augmentation = _named(overrides, "preset"), _named(overrides, "augment", "preset")
    brought: dict[str, list[str]] = {"fit.optimizer.name": ["fit.optimizer.learning_rate"]}
    if isinstance(preset, str) and preset in PRESETS:
        brought["preset"] = list(_keys(PRESETS[preset]))
    if isinstance(augmentation, str) and augmentation in AUGMENT_PRESETS:
        brought["augment.preset"] = [f"augment.{key}" for key in AUGMENT_PRESETS["none"]]
    for key, keys in brought.items():
        new, old = (_named(settings, *key.split(".")) for settings in (overrides, recipe))
        optimizer = key == "fit.optimizer.name"
        if optimizer and old is None:
            old = AdamW().name  # as in every preset
        kept = [each for each in keys if _given(recipe, each) and not _given(overrides, each)]
        if new is None or old is None or new == old or not kept:
            continue
        more = f" and {len(kept) - 1} more keys" if len(kept) > 1 else ""
        raise ConfigError(
            f"the recipe (of {key}={old}) sets {kept[0]}{more} in place of {new}",
            where=f"{key}={new}",
            fix=f"set {kept[0]} too, or delete it from the recipe"
            if optimizer
            else f"leave {key} out, or delete those keys from the recipe",
        )


def _keys(settings: Mapping[str, Any], *, prefix: str = "") -> Iterator[str]:
    """The dotted keys of all values in nested mappings."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _keys(value, prefix=f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _given(settings: Mapping[str, Any], key: str) -> bool:
    """Whether nested mappings have a value at a dotted key, be it null."""
    section, _, name = key.rpartition(".")
    inside = _named(settings, *section.split(".")) if section else settings
    return isinstance(inside, Mapping) and name in inside


def _beneath(preset: Mapping[str, Any], given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The preset without what belongs to another choice than the one that was asked for.

    That is its augmentation where another augmentation preset is named, and its optimizer's settings where
    another optimizer is.
    """
    sections = dict(preset)
    if _named(given, "augment", "preset") is not None:
        sections.pop("augment", None)
    own = _named(preset, "fit", "optimizer", "name")
    if _named(given, "fit", "optimizer", "name") not in (None, own):
        sections["fit"] = {key: value for key, value in sections["fit"].items() if key != "optimizer"}
    return sections


def _named(settings: Mapping[str, Any], *keys: str) -> Any:
    """The value at a path of keys; None where there is none."""
    value: Any = settings
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _explain(error: ValidationError, model: type[BaseModel]) -> ConfigError:
    first = error.errors()[0]
    known = list(dict.fromkeys(setting.key for setting in settings_of(model())))
    # A tagged union puts its tag into the location; it is no part of the key.
    parts = [str(part) for part in first["loc"]]
    key = ".".join(part for i, part in enumerate(parts) if not (i and parts[i - 1] in _TAGGED))
    if first["type"] == "union_tag_invalid":
        tags = first["ctx"]
        return ConfigError(f"{tags['tag']!r} is none of {tags['expected_tags']}", where=f"{key}.name")
    if first["type"] == "extra_forbidden" and key in known:
        kinds = [setting.kind for setting in settings_of(model()) if setting.key == key]
        section = key.rpartition(".")[0]
        return ConfigError(
            f"{section}.name={parts[len(section.split('.'))]} has no such setting",
            where=key,
            fix=f"leave it out, or use --set {section}.name={kinds[0]}",
        )
    if first["type"] == "extra_forbidden" and any(
        key == setting.key for setting in settings_of(TrainConfig())
    ):
        return ConfigError(
            "is set when a model is trained, and is in its bundle from then on",
            where=key,
            fix=f"leave it out, or holotype train --set {key}=...",
        )
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.4) or [
            name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]
        ]
        hint = f"did you mean {near[0]}?" if near else "holotype config VERB lists the keys"
        return ConfigError("unknown setting", where=key, fix=hint)
    hint = (
        "write null for none" if first["input"] in ("None", "none") else "holotype config VERB lists the keys"
    )
    return ConfigError(f"{first['msg']} (got {first['input']!r})", where=key, fix=hint)


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [choice for part in typing.get_args(annotation) for choice in _sections(part)]


def _type_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return "|".join(str(argument) for argument in arguments)
    if origin in (typing.Union, types.UnionType):
        return "|".join(_type_name(argument) for argument in arguments)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is tuple:
        return f"list of {_type_name(arguments[0])}"
    return "null" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))

"""Every setting of every verb: frozen sections, presets, recipe files and dotted overrides.

A value comes from, weakest first: the defaults here, the preset, the recipe file, `--set section.key=value`
and flags. Python calls use the same models. An unknown key is an error that names the nearest one.
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
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from holotype.errors import ConfigError

__all__ = [
    "PRESETS",
    "AdamW",
    "AgreeConfig",
    "AuditConfig",
    "AugmentConfig",
    "ConvertConfig",
    "DataConfig",
    "DuplicatesConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FitConfig",
    "GatesConfig",
    "HealthConfig",
    "ModelConfig",
    "PredictConfig",
    "Setting",
    "Sgd",
    "TrainConfig",
    "merge",
    "parse_assignments",
    "read_recipe",
    "resolve_config",
    "settings_of",
    "to_yaml",
]

_FROZEN = ConfigDict(frozen=True, extra="forbid", validate_default=True)

Preset = Literal["probe", "fast", "balanced", "thorough"]


class DataConfig(BaseModel):
    """What is read and how it is cut into splits and pixels."""

    model_config = _FROZEN

    format: Literal[
        "auto", "folders", "csv", "parquet", "voc", "yolo", "createml", "coco", "label-studio", "json"
    ] = Field("auto", description="how the data is laid out; auto: by what is there")
    boxes: Literal["crop", "single", "reject"] | None = Field(
        None,
        description="what to do with labelled boxes: crop: each is an example | single: images whose boxes"
        " are of one class are examples, others are bad records | reject: images with boxes are left out",
    )
    margin: float = Field(
        0.1, ge=0, le=2, description="what crop adds on every side of a box, as a share of its size"
    )
    background: str | None = Field(
        None, description="class of images known to hold no object; None: they are left out"
    )
    images: str | None = Field(
        None, description="folder of the images, where an annotation file is kept elsewhere"
    )
    revision: int | Literal["latest"] = Field(
        "latest", description="which revision of labels and splits; 0: as the data itself says"
    )
    size: int | None = Field(
        None, ge=16, le=2048, description="side of the model's input; None: the weights' own"
    )
    resize: Literal["auto", "squash", "letterbox", "crop"] = Field(
        "auto", description="how an image is fitted into the square; auto: squash, which loses no pixel"
    )
    validation: float = Field(
        0.15, gt=0, lt=0.9, description="share for validation where the data has no such split"
    )
    test: float = Field(0.15, ge=0, lt=0.9, description="share for test where the data has no splits at all")
    max_unreadable: float = Field(
        0.01, ge=0, le=1, description="share of unreadable files and bad records above which we stop"
    )
    cache_limit_gb: float | None = Field(
        None,
        ge=0,
        description="size of the pixel cache; None: a fifth of the free disk; beyond it, decode on the fly",
    )
    max_pixels: int = Field(50_000_000, gt=0, description="largest image that is decoded, in pixels")


class ModelConfig(BaseModel):
    """The network and where its weights come from."""

    model_config = _FROZEN

    name: str = Field(
        "tf_efficientnet_lite0", description="any timm architecture; holotype models lists them"
    )
    weights: str = Field("auto", description="auto: packaged, then the hub | none: random | a file")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the head while fine-tuning")


class AugmentConfig(BaseModel):
    """Random changes of training images; drawn per (seed, epoch, image)."""

    model_config = _FROZEN

    flip: float = Field(
        0.5, ge=0, le=1, description="probability of a horizontal mirror; 0 where mirrored is wrong"
    )
    crop: float = Field(
        0.8, gt=0, le=1, description="least share of the area that a random crop keeps; 1: no crop"
    )


class AdamW(BaseModel):
    """AdamW (Loshchilov & Hutter 2019)."""

    model_config = _FROZEN

    name: Literal["adamw"] = "adamw"
    learning_rate: float = Field(3e-4, gt=0, description="peak rate of the head and the last block")
    weight_decay: float = Field(0.01, ge=0, description="decay of weights; norms and biases have none")


class Sgd(BaseModel):
    """Stochastic gradient descent with momentum."""

    model_config = _FROZEN

    name: Literal["sgd"] = "sgd"
    learning_rate: float = Field(0.1, gt=0, description="peak rate of the head and the last block")
    weight_decay: float = Field(1e-4, ge=0, description="decay of weights; norms and biases have none")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum")


class FitConfig(BaseModel):
    """The two stages of training: a head on frozen features, then fine-tuning from that head."""

    model_config = _FROZEN

    epochs: int = Field(8, ge=0, description="epochs of fine-tuning; 0: only the head is fitted")
    unfreeze: int | Literal["most", "all"] = Field(
        "most", description="how many of the last blocks are fine-tuned; most: the last 60 %"
    )
    scale: float | Literal["auto"] = Field(
        "auto",
        description="side of the images while fine-tuning, as a share of data.size: smaller is faster"
        " (Touvron et al. 2019); auto: 0.8 where the network takes any size, else 1",
    )
    batch_size: int = Field(32, ge=1, description="images per step")
    optimizer: Annotated[AdamW | Sgd, Field(discriminator="name")] = Field(AdamW(), description="adamw | sgd")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="each block's rate is this share of the next one's"
    )
    warmup: float = Field(
        0.1, ge=0, lt=1, description="share of the steps with a rising rate, before the cosine"
    )
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="mass spread over the other classes")
    clip_norm: float | None = Field(1.0, gt=0, description="largest gradient norm; None: no clipping")
    ema: float | None = Field(
        0.99, gt=0, lt=1, description="decay per step of the averaged weights; None: none"
    )
    freeze_norm: bool = Field(True, description="keep the pretrained batch-norm statistics")
    patience: int = Field(5, ge=1, description="epochs without a better metric before stopping")
    metric: Literal["accuracy", "macro_f1", "log_loss"] = Field(
        "accuracy", description="what the best epoch is chosen by, on validation"
    )
    seed: int = Field(0, ge=0, description="seed of everything random")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: the faster of fp32 and half precision, measured at start"
    )
    deterministic: bool = Field(False, description="only deterministic kernels; precision auto becomes fp32")


class TrainConfig(BaseModel):
    """Settings of `train`."""

    model_config = _FROZEN

    preset: Preset = Field("balanced", description="probe: head only | fast | balanced | thorough")
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    augment: AugmentConfig = AugmentConfig()
    fit: FitConfig = FitConfig()


class EvaluateConfig(BaseModel):
    """Settings of `evaluate`."""

    model_config = _FROZEN

    split: Literal["auto", "train", "validation", "test"] = Field(
        "auto", description="auto: test where there is one, else validation"
    )
    runtime: Literal["auto", "torch", "onnxruntime", "openvino"] = Field(
        "auto", description="what runs the model"
    )
    data: DataConfig = DataConfig()


class PredictConfig(BaseModel):
    """Settings of `predict`."""

    model_config = _FROZEN

    top: int = Field(5, ge=1, description="classes listed per image")
    runtime: Literal["auto", "torch", "onnxruntime", "openvino"] = Field(
        "auto", description="what runs the model"
    )
    max_pixels: int = Field(50_000_000, gt=0, description="largest image that is decoded, in pixels")


class ExportConfig(BaseModel):
    """Settings of `export`."""

    model_config = _FROZEN

    images: int = Field(128, ge=64, description="real images pushed through both models by the parity gate")
    data: DataConfig = DataConfig()


class ConvertConfig(BaseModel):
    """Settings of `convert`."""

    model_config = _FROZEN

    preview: int = Field(48, ge=1, le=1000, description="examples drawn on the contact sheet")
    data: DataConfig = DataConfig()


class GatesConfig(BaseModel):
    """What a dataset must fulfil to be called ready."""

    model_config = _FROZEN

    balance: float = Field(1.3, ge=1, description="largest class / smallest class, at most")
    class_size: int = Field(20, ge=1, description="images of the smallest class, at least")
    leakage: float = Field(
        0.0, ge=0, le=1, description="share of validation and test with a copy in another split, at most"
    )
    conflicts: int = Field(0, ge=0, description="groups of copies with different labels, at most")
    label_accuracy: float = Field(
        0.99, gt=0, le=1, description="lower bound of the label accuracy in a reviewed sample, at least"
    )
    health: float = Field(0.05, ge=0, le=1, description="share of images with an issue, at most")
    shortcut: float = Field(
        0.3, ge=0, le=1, description="correlation of a health measure with the class, at most"
    )
    shift: float = Field(
        0.65, ge=0.5, le=1, description="AUC of a classifier that tells train from another split, at most"
    )


class HealthConfig(BaseModel):
    """When an image is odd. Levels are of the model's input, 0 black to 1 white."""

    model_config = _FROZEN

    dark: float = Field(0.2, ge=0, le=1, description="too dark: 95 % of its pixels are below this level")
    light: float = Field(0.85, ge=0, le=1, description="too light: 95 % of its pixels are above this level")
    blur: float = Field(
        0.2, ge=0, description="blurry: sharpness of its edges below this; 0: a smooth ramp, 1: an ideal step"
    )
    information: float = Field(
        3.0, ge=0, le=8, description="low information: entropy of its grey levels below this, in bits"
    )
    aspect: float = Field(3.0, ge=1, description="odd aspect: longer side over shorter side above this")
    size: float = Field(
        4.0, ge=1, description="odd size: side this many times larger or smaller than the median of the set"
    )
    grey: float = Field(0.003, ge=0, le=1, description="grey: mean difference of the channels below this")
    trait: float = Field(
        0.1, gt=0, le=1, description="an issue of more than this share of images is a trait of the set"
    )


class DuplicatesConfig(BaseModel):
    """How copies are searched for."""

    model_config = _FROZEN

    near: bool = Field(
        True, description="also near copies: re-encoded, mirrored, rotated, cropped, brightened"
    )
    false_copies: float = Field(
        0.002, gt=0, lt=1, description="share of the images that may be called copies by chance, as estimated"
    )
    neighbours: int = Field(8, ge=1, le=100, description="nearest images of each that are looked at")
    approximate: bool | Literal["auto"] = Field(
        "auto", description="approximate search (faiss); auto: above 100,000 images"
    )


class AuditConfig(BaseModel):
    """Settings of `audit`."""

    model_config = _FROZEN

    folds: int = Field(5, ge=2, le=20, description="folds of the out-of-sample label check")
    suspects: float = Field(
        0.1, gt=0, le=1, description="share of the images listed as label suspects, at most"
    )
    seed: int = Field(0, ge=0, description="seed of folds, calibration and samples")
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    gates: GatesConfig = GatesConfig()
    health: HealthConfig = HealthConfig()
    duplicates: DuplicatesConfig = DuplicatesConfig()


class AgreeConfig(BaseModel):
    """Settings of `agree`."""

    model_config = _FROZEN

    least: int = Field(200, ge=1, description="images that every annotator gets, at least")
    samples: int = Field(2000, ge=100, description="bootstrap samples behind an interval")
    accept: float = Field(0.80, ge=0, le=1, description="Krippendorff's alpha from which labels are accepted")
    tentative: float = Field(
        0.667, ge=0, le=1, description="alpha from which they are tentative; below, rewrite the guideline"
    )
    seed: int = Field(0, ge=0, description="seed of order, overlap and bootstrap")
    data: DataConfig = DataConfig()


PRESETS: dict[Preset, dict[str, Any]] = {
    "probe": {"fit": {"epochs": 0}},
    "fast": {"fit": {"epochs": 3}},
    "balanced": {"fit": {"epochs": 8}, "augment": {"crop": 0.4}, "model": {"dropout": 0.2}},
    "thorough": {
        "fit": {"epochs": 24, "unfreeze": "all", "scale": 1.0, "patience": 8},
        "augment": {"crop": 0.4},
        "model": {"dropout": 0.2},
    },
}

Section = TypeVar("Section", bound=BaseModel)


@dataclass(frozen=True)
class Setting:
    """One key for `holotype config VERB`."""

    key: str
    type: str
    default: str
    meaning: str


def resolve_config(
    model: type[Section],
    *,
    recipe: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Section:
    """Merge defaults, preset, recipe and overrides (both nested mappings) into a validated section."""
    merged = merge(dict(recipe or {}), overrides or {})
    if "preset" in model.model_fields:
        preset = merged.get("preset", model.model_fields["preset"].default)
        if preset in PRESETS:
            merged = merge(PRESETS[preset], merged)
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
    except yaml.YAMLError as error:
        raise ConfigError(f"not YAML ({' '.join(str(error).split())})", where=file) from error
    if not isinstance(content, dict):
        raise ConfigError("must hold a mapping of sections", where=file)
    return content


def to_yaml(section: BaseModel) -> str:
    """The resolved settings, as a recipe that `--recipe` reads."""
    return yaml.safe_dump(section.model_dump(mode="json"), sort_keys=False)


def settings_of(model: type[BaseModel], *, prefix: str = "") -> Iterator[Setting]:
    """Every key of a verb, depth first, with type, default and meaning."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        choices = _sections(field.annotation)
        if not choices:
            yield Setting(
                key, _type_name(field.annotation), json.dumps(field.default), field.description or ""
            )
        elif len(choices) == 1:
            yield from settings_of(choices[0], prefix=f"{key}.")
        else:
            for choice in choices:
                kind = choice.model_fields["name"].default
                for setting in settings_of(choice, prefix=f"{key}."):
                    meaning = f"{setting.meaning} ({kind})" if setting.meaning else f"which {name}"
                    yield Setting(setting.key, setting.type, setting.default, meaning)


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two nested mappings as one; where both have a value, that of `above` wins."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _explain(error: ValidationError, model: type[BaseModel]) -> ConfigError:
    first = error.errors()[0]
    known = list(dict.fromkeys(setting.key for setting in settings_of(model)))
    # A tagged union puts its tag into the location; it is no part of the key.
    parts = [str(part) for part in first["loc"]]
    key = ".".join(part for i, part in enumerate(parts) if not (i and part in ("adamw", "sgd")))
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.4) or [
            name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]
        ]
        hint = f"did you mean {near[0]}?" if near else "holotype config VERB lists the keys"
        return ConfigError("unknown setting", where=key, fix=hint)
    return ConfigError(
        f"{first['msg']} (got {first['input']!r})", where=key, fix="holotype config VERB lists the keys"
    )


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
    return "none" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))

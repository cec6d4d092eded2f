"""Networks: any timm architecture with our head, pixels in, logits and embedding out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import timm
import torch
from pydantic import BaseModel, ConfigDict
from timm.layers.drop import DropPath
from torch import nn
from torch.nn import functional

from holotype.config import DataConfig, ModelConfig
from holotype.errors import ConfigError, ModelError
from holotype.models.attention import insert_attention
from holotype.models.stem import shrink_stem
from holotype.models.widths import Widths, set_widths
from holotype.preprocess import Preprocess

__all__ = [
    "DEFAULT",
    "Architecture",
    "Classifier",
    "InputRecipe",
    "architecture_of",
    "create",
    "has_weights",
    "head_of",
    "input_spec",
    "known_names",
    "recipe_of",
    "set_head",
]

DEFAULT = "tf_efficientnet_lite0"


class InputRecipe(BaseModel):
    """What the weights were trained to be fed: part of the weights, not of the dataset."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    height: int
    width: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    filter: Literal["bilinear", "bicubic", "lanczos"]
    crop_fraction: float
    fixed_size: bool


class Architecture(BaseModel):
    """All that is needed to build a network again; `architecture.json` of a bundle."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    classes: int
    height: int
    width: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    dropout: float = 0.0
    drop_path: float = 0.0
    attention: Literal["none", "se", "eca", "cbam"] = "none"
    stem: Literal["standard", "small"] = "standard"
    widths: Widths = {}


@dataclass(frozen=True)
class _Head:
    """The last linear layer and its name inside the timm network."""

    name: str
    layer: nn.Linear


class Classifier(nn.Module):
    """cast → normalise → timm network. `uint8[N, H, W, 3]` in; (logits `[N, C]`, embedding `[N, D]`) out.

    While training, `architecture.dropout` of the embedding is dropped on its way to the head: here rather
    than by timm's `drop_rate`, which some families apply after the embedding, and some inside the backbone.
    `kept: float[N, D]` are factors drawn elsewhere to do so; without them torch draws.

    `fresh` names the tensors of `network` that are random beside pretrained ones, the head's aside.
    """

    fresh: frozenset[str]
    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, architecture: Architecture, network: nn.Module) -> None:
        super().__init__()
        self.architecture = architecture
        self.network = network
        self.fresh = frozenset()
        mean, std = torch.tensor(architecture.mean), torch.tensor(architecture.std)
        # (x / 255 - mean) / std as one multiply and one add
        self.register_buffer("scale", (1 / (255 * std)).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", (-mean / std).view(1, 3, 1, 1), persistent=False)

    @property
    def features(self) -> int:
        """D, the length of an embedding."""
        return int(cast("Any", self.network).get_classifier().in_features)

    def forward(
        self, images: torch.Tensor, kept: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = images.permute(0, 3, 1, 2).to(self.scale.dtype) * self.scale + self.shift
        network = cast("Any", self.network)
        embedding = network.forward_head(network.forward_features(pixels), pre_logits=True)
        if kept is None:
            seen = functional.dropout(embedding, self.architecture.dropout, self.training)
        else:
            seen = embedding * kept
        return network.get_classifier()(seen), embedding


def known_names(pattern: str = "*") -> list[str]:
    """timm's architecture names that match a shell pattern, sorted."""
    return sorted(timm.list_models(pattern))


def recipe_of(name: str) -> InputRecipe:
    """The input recipe of an architecture's default weights; an unknown name is a `ModelError`."""
    _check_name(name)
    found = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if found is None:
        return InputRecipe(
            height=224, width=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
            filter="bicubic", crop_fraction=1.0, fixed_size=False,
        )  # fmt: skip
    kernel = found.interpolation if found.interpolation in ("bilinear", "bicubic", "lanczos") else "bicubic"
    return InputRecipe(
        height=found.input_size[1],
        width=found.input_size[2],
        mean=found.mean,
        std=found.std,
        filter=kernel,
        crop_fraction=min(found.crop_pct, 1.0),
        fixed_size=found.fixed_input_size,
    )


def has_weights(name: str) -> bool:
    """Whether timm knows pretrained weights of an architecture."""
    found = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return found is not None and bool(found.has_weights)


def create(architecture: Architecture) -> Classifier:
    """A network with fresh random weights.

    `ModelError` where timm cannot build it, `ConfigError` where its family has no stochastic depth, no place
    for attention modules or no stem that can be made smaller, and these were asked for.
    """
    network = _build(architecture)
    _set_drop_path(network, architecture)
    if architecture.stem == "small":
        shrink_stem(network, name=architecture.name)
    if architecture.attention != "none":
        insert_attention(network, architecture.attention, name=architecture.name)
    set_widths(network, architecture.widths)
    classifier = Classifier(architecture, network)
    head_of(classifier)
    return classifier


def head_of(classifier: Classifier) -> _Head:
    """The final linear layer; `ModelError` for networks that end in anything else."""
    network = cast("Any", classifier.network)
    layer = network.get_classifier()
    if not isinstance(layer, nn.Linear):
        raise ModelError(
            f"its head is {type(layer).__name__}, not one linear layer on an embedding",
            where=classifier.architecture.name,
            fix="choose another architecture (holotype models)",
        )
    return _Head(next(name for name, module in network.named_modules() if module is layer), layer)


def set_head(classifier: Classifier, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Replace the head's weight `[C, D]` and bias `[C]`."""
    head = head_of(classifier).layer
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)


def architecture_of(model: ModelConfig, spec: Preprocess, *, classes: int) -> Architecture:
    """The network that `model` asks for, for images of `spec`."""
    recipe = recipe_of(model.name)
    return Architecture(
        name=model.name,
        classes=classes,
        height=spec.height,
        width=spec.width,
        mean=recipe.mean,
        std=recipe.std,
        dropout=model.dropout,
        drop_path=model.drop_path,
        attention=model.attention,
        stem=model.stem,
    )


def input_spec(model: ModelConfig, data: DataConfig) -> Preprocess:
    """The pixel path of a network on a dataset: size and filter from the weights' recipe."""
    recipe = recipe_of(model.name)
    return Preprocess(
        height=data.size or recipe.height,
        width=data.size or recipe.width,
        resize="squash" if data.resize == "auto" else data.resize,
        crop_fraction=recipe.crop_fraction,
        filter=recipe.filter if data.filter == "auto" else data.filter,
    )


def _build(architecture: Architecture) -> nn.Module:
    recipe = recipe_of(architecture.name)
    options: dict[str, Any] = {"num_classes": architecture.classes, "drop_rate": 0.0}
    if recipe.fixed_size and (architecture.height, architecture.width) != (recipe.height, recipe.width):
        options["img_size"] = (architecture.height, architecture.width)
    if architecture.drop_path:
        options["drop_path_rate"] = architecture.drop_path
    try:
        return timm.create_model(architecture.name, pretrained=False, **options)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        if "drop_path_rate" in str(error):
            raise _no_drop_path(architecture) from error
        raise ModelError(
            f"cannot be built for {architecture.height}x{architecture.width} pixels ({error})",
            where=architecture.name,
            fix=f"use its own size {recipe.height}x{recipe.width} (--set data.size=...)",
        ) from error


def _set_drop_path(network: nn.Module, architecture: Architecture) -> None:
    """Check that stochastic depth is there if asked for; switch off what some families have by default."""
    layers = [module for module in network.modules() if isinstance(module, DropPath)]
    if not architecture.drop_path:
        for layer in layers:
            layer.drop_prob = 0.0
    elif not any(layer.drop_prob for layer in layers):
        raise _no_drop_path(architecture)


def _no_drop_path(architecture: Architecture) -> ConfigError:
    return ConfigError(
        f"{architecture.name} has no stochastic depth",
        where="model.drop_path",
        fix="use 0, or a family that has it, such as EfficientNet, ResNet, ConvNeXt or ViT",
    )


def _check_name(name: str) -> None:
    if timm.is_model(name):
        return
    import difflib

    near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    raise ModelError("unknown architecture", where=name, fix=f"{hint}holotype models PATTERN lists them")

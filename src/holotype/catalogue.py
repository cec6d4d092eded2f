"""`holotype models`: architectures to choose from, with size, published accuracy and measured latency."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch

from holotype.bundle import library_versions, write_text
from holotype.errors import ModelError
from holotype.machine import available_cores, cache_root, machine_name
from holotype.models import DEFAULT, Architecture, create, known_names, recipe_of
from holotype.onnx_export import export_onnx
from holotype.preprocess import Preprocess
from holotype.progress import track
from holotype.runtime import load_onnx
from holotype.timing import measure_latency

__all__ = ["SOURCE", "Entry", "list_models"]

SOURCE = "timm results-imagenet.csv, default weights"
"""Where the published top-1 figures come from; some were measured at a larger test size than the input."""


@dataclass(frozen=True)
class _Reference:
    top1: float
    use: str


_REFERENCE = {
    DEFAULT: _Reference(74.83, "default; CPU and edge, quantizes well, weights packaged"),
    "tf_efficientnet_lite1": _Reference(76.64, "a little more accuracy on the CPU, weights packaged"),
    "tf_efficientnet_lite2": _Reference(77.46, "more accuracy on the CPU, weights packaged"),
    "mobilenetv3_small_100": _Reference(67.66, "smallest: strict latency"),
    "mobilenetv3_large_100": _Reference(75.77, "light: phones"),
    "resnet18": _Reference(73.16, "mobile and edge, runs everywhere"),
    "efficientnet_b0": _Reference(77.69, "small, accurate for its size"),
    "resnet50": _Reference(81.21, "general purpose, the usual baseline"),
    "efficientnet_b4": _Reference(83.41, "high accuracy at moderate size"),
    "convnext_tiny": _Reference(84.45, "high accuracy on a GPU"),
    "vit_base_patch16_224": _Reference(85.10, "much data, a GPU"),
}
"""What people choose between; every other timm architecture works too."""

_MOST = 40


@dataclass(frozen=True)
class Entry:
    """One architecture. Sizes are for its 1,000 ImageNet classes in fp32; unknown figures are None."""

    name: str
    parameters: int
    height: int
    width: int
    top1: float | None
    megabytes: float
    milliseconds: float | None
    use: str


def list_models(pattern: str | None = None, *, measure: bool = False) -> list[Entry]:
    """The reference table, or the architectures that match a shell pattern (at most 40).

    With `measure`, latency is measured on this machine (onnxruntime, one image, every core) and remembered;
    figures measured before are shown either way.
    """
    names = (
        list(_REFERENCE) if pattern is None else known_names(pattern if "*" in pattern else f"*{pattern}*")
    )
    if not names:
        raise ModelError(
            "no architecture matches", where=pattern, fix="try a shorter pattern, such as '*resnet*'"
        )
    if len(names) > _MOST:
        raise ModelError(
            f"matches {len(names)} architectures, more than {_MOST}",
            where=pattern,
            fix="make it more specific",
        )
    if measure:
        _measure(names)
    known = _remembered()
    return [_entry(name, milliseconds=known.get(name)) for name in names]


def _entry(name: str, *, milliseconds: float | None) -> Entry:
    with torch.device("meta"):
        network = timm.create_model(name)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    buffers = sum(buffer.numel() for buffer in network.buffers())
    recipe = recipe_of(name)
    reference = _REFERENCE.get(name)
    return Entry(
        name=name,
        parameters=parameters,
        height=recipe.height,
        width=recipe.width,
        top1=None if reference is None else reference.top1,
        megabytes=(parameters + buffers) * 4 / 1e6,
        milliseconds=milliseconds,
        use="" if reference is None else reference.use,
    )


def _measure(names: list[str]) -> None:
    measured = _remembered()
    lacking = [name for name in names if name not in measured]
    with track("measuring", total=len(lacking)) as progress:
        for name in lacking:
            measured[name] = _latency(name)
            write_text(_memory_file(), json.dumps({"machine": _machine(), "milliseconds": measured}))
            progress.advance(status=name)


def _latency(name: str) -> float:
    recipe = recipe_of(name)
    architecture = Architecture(
        name=name, classes=1000, height=recipe.height, width=recipe.width, mean=recipe.mean, std=recipe.std
    )
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "model.onnx"
        spec = Preprocess(height=recipe.height, width=recipe.width)
        export_onnx(create(architecture), file, classes=(), preprocess=spec)
        runtime = load_onnx(file, threads=available_cores())
    image = np.zeros((1, recipe.height, recipe.width, 3), dtype=np.uint8)
    return measure_latency({name: runtime}, image)[name]


def _remembered() -> dict[str, float]:
    try:
        content = json.loads(_memory_file().read_text())
    except (OSError, ValueError):
        return {}
    return dict(content["milliseconds"]) if content.get("machine") == _machine() else {}


def _machine() -> str:
    """What a latency depends on: another machine or onnxruntime measures anew."""
    return f"{machine_name()}, onnxruntime {library_versions()['onnxruntime']}"


def _memory_file() -> Path:
    folder = cache_root()
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "latency.json"

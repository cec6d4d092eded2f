"""What layers give out while a step is watched: dead units, and batches that frozen statistics do not fit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers.norm import LayerNorm2d
from timm.layers.norm_act import LayerNormAct2d
from torch import nn
from torch.utils.hooks import RemovableHandle

from holotype.models import Classifier

__all__ = ["Signals"]

# Gates (sigmoid, tanh and their like) are left out: a gate that is always open is not dead.
_ACTIVATIONS = (
    "CELU", "ELU", "GELU", "GELUTanh", "HardMish", "HardMishMe", "Hardswish", "LeakyReLU", "Mish", "PReLU",
    "QuickGELU", "ReLU", "ReLU6", "SELU", "SiLU",
)  # fmt: skip

# A unit whose outputs differ by less than this share of the layer's largest tells nothing on.
_CONSTANT = 1e-3

# Of each unit in a batch; reading all of them would double the time of a step.
_ENOUGH = 1024

Norm = nn.modules.batchnorm._BatchNorm


class Signals:
    """Hooks on every activation and batch-norm layer, active between `start` and `stop`.

    A module counts to the stage of the last module before it that has parameters, and so does the axis of
    its units: the last one after a linear layer or layer norm, else the second.
    """

    def __init__(self, classifier: Classifier, stages: Mapping[str, Sequence[nn.Parameter]]) -> None:
        self._units, self._norms = _places(classifier, stages)
        # A module that serves layers of several widths counts once for each.
        self._ranges: dict[tuple[nn.Module, int], _Range] = {}
        self._statistics: dict[Norm, _Statistics] = {}
        self._handles: list[RemovableHandle] = []

    def start(self) -> None:
        """Watch from now on, forgetting what was seen before."""
        self.stop()
        self._ranges, self._statistics = {}, {}
        self._handles = [
            *(module.register_forward_hook(self._see_units) for module in self._units),
            # Layers that follow the batch need no watching: the statistics they use are its own.
            *(m.register_forward_pre_hook(self._see_batch) for m in self._norms if not m.training),
        ]

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def read(self) -> dict[str, float]:
        """`dead/STAGE` and `norm_mismatch/STAGE` of what was watched last: those of the worst layer."""
        found: dict[str, float] = {}
        for (module, _), seen in self._ranges.items():
            key = f"dead/{self._units[module].stage}"
            found[key] = max(found.get(key, 0.0), seen.dead())
        for module, statistics in self._statistics.items():
            key = f"norm_mismatch/{self._norms[module]}"
            found[key] = max(found.get(key, 0.0), statistics.mismatch(module))
        return found

    def _see_units(self, module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        axis = self._units[module].axis % output.dim()
        # After pooling a unit has one value per image: too few to call it dead.
        if output.numel() <= output.shape[0] * output.shape[axis]:
            return
        values = _sampled(output.detach(), axis)
        low, high = values.amin(0), values.amax(0)
        key = module, len(low)
        if key in self._ranges:
            before = self._ranges[key]
            low, high = torch.minimum(low, before.low), torch.maximum(high, before.high)
        self._ranges[key] = _Range(low, high)

    def _see_batch(self, module: Norm, inputs: tuple[torch.Tensor, ...]) -> None:
        values = _sampled(inputs[0].detach(), 1).float()
        variance, mean = torch.var_mean(values, 0, correction=0)
        seen = _Statistics(len(values), mean.cpu().double(), variance.cpu().double())
        before = self._statistics.get(module)
        self._statistics[module] = seen if before is None else before.merged(seen)


@dataclass(frozen=True)
class _Place:
    stage: str
    axis: int


@dataclass(frozen=True)
class _Range:
    """The least and largest output of each unit, `[units]`."""

    low: torch.Tensor
    high: torch.Tensor

    def dead(self) -> float:
        """Share of the units that gave the same for every image and place, as far as the layer can tell."""
        largest = torch.maximum(self.low.abs(), self.high.abs()).max()
        return float((self.high - self.low <= _CONSTANT * largest).float().mean())


@dataclass(frozen=True)
class _Statistics:
    """Of a layer's input: how many values a channel has, their means and variances `float64[channels]`."""

    count: int
    mean: torch.Tensor
    variance: torch.Tensor

    def merged(self, other: _Statistics) -> _Statistics:
        """The statistics of both batches as one (Chan et al. 1983)."""
        count = self.count + other.count
        share = other.count / count
        mean = self.mean + share * (other.mean - self.mean)
        within = (1 - share) * self.variance + share * other.variance
        return _Statistics(count, mean, within + share * (1 - share) * (other.mean - self.mean) ** 2)

    def mismatch(self, module: Norm) -> float:
        """Median over channels of |m - M| / S + |ln(s / S)| of batch mean and deviation m, s, frozen M, S.

        0 where they agree; 1 is a shift by one standard deviation, or a scale that is e times another.
        """
        assert module.running_mean is not None
        assert module.running_var is not None
        # On the CPU: not every device computes in double precision.
        frozen = module.running_var.cpu().double() + module.eps
        shift = (self.mean - module.running_mean.cpu().double()).abs() / frozen.sqrt()
        scale = 0.5 * ((self.variance + module.eps) / frozen).log().abs()
        return float((shift + scale).median())


def _sampled(values: torch.Tensor, axis: int) -> torch.Tensor:
    """`[M, units]`: the values of each unit, from an even grid of places where there are too many."""
    values = values.movedim(axis, -1)
    places = values.shape[1:-1]
    many = values.numel() / values.shape[-1] / _ENOUGH
    stride = max(math.ceil(many ** (1 / max(len(places), 1))), 1)
    return values[:, *(slice(None, None, stride) for _ in places)].reshape(-1, values.shape[-1])


def _is_2d(module: nn.Module) -> bool:
    """timm's layer norms over the channels of maps, whose second axis is that of the units."""
    return isinstance(module, LayerNorm2d | LayerNormAct2d)


def _places(
    classifier: Classifier, stages: Mapping[str, Sequence[nn.Parameter]]
) -> tuple[dict[nn.Module, _Place], dict[Norm, str]]:
    """Where the activation layers and the batch-norm layers with statistics are."""
    owner = {id(p): name for name, parameters in stages.items() for p in parameters}
    units: dict[nn.Module, _Place] = {}
    norms: dict[Norm, str] = {}
    stage, axis = next(iter(stages)), 1
    for module in classifier.network.modules():
        own = next(module.parameters(recurse=False), None)
        if own is not None and type(module).__name__ not in _ACTIVATIONS:
            stage = owner.get(id(own), stage)
            axis = -1 if isinstance(module, nn.Linear | nn.LayerNorm) and not _is_2d(module) else 1
        if type(module).__name__ in _ACTIVATIONS:
            units[module] = _Place(stage, axis)
        if isinstance(module, Norm) and module.running_mean is not None:
            norms[module] = stage
    return units, norms

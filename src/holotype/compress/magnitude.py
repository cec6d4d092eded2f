"""Magnitude pruning: weights near 0 become 0 (Han et al. 2015); the file shrinks only when it is packed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from holotype.config import MagnitudeConfig
from holotype.models import Classifier

__all__ = ["Zeros", "zero_small_weights", "zeros_kept"]


@dataclass(frozen=True)
class Zeros:
    """What was set to 0: by layer, a mask of the weights that stay; and the share of all that does not."""

    masks: Mapping[str, torch.Tensor]
    share: float


def zero_small_weights(classifier: Classifier, config: MagnitudeConfig) -> Zeros:
    """Set the weights of convolutions and linear layers to 0, in place, by threshold or by sparsity.

    With `config.sparsity`, the smallest of all layers together or of each layer; with `config.threshold`, all
    below it.
    """
    weights = {name: layer.weight for name, layer in _layers(classifier)}
    limits = _limits(weights, config)
    masks = {name: weight.detach().abs() >= limits[name] for name, weight in weights.items()}
    with torch.no_grad():
        for name, weight in weights.items():
            weight.mul_(masks[name])
    total = sum(mask.numel() for mask in masks.values())
    return Zeros(masks, 1 - sum(int(mask.sum()) for mask in masks.values()) / total)


@contextmanager
def zeros_kept(classifier: Classifier, zeros: Zeros) -> Iterator[None]:
    """Within, whatever trains the classifier leaves its zeros at 0."""
    layers = dict(_layers(classifier))
    for name, mask in zeros.masks.items():
        parametrize.register_parametrization(layers[name], "weight", _Masked(mask))
    try:
        yield
    finally:
        for name in zeros.masks:
            parametrize.remove_parametrizations(layers[name], "weight", leave_parametrized=True)


class _Masked(nn.Module):
    mask: torch.Tensor

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.mask


def _limits(weights: Mapping[str, torch.Tensor], config: MagnitudeConfig) -> dict[str, float]:
    if config.threshold is not None:
        return dict.fromkeys(weights, config.threshold)
    if config.sparsity is None:
        raise AssertionError("the settings have a threshold or a sparsity")
    if config.scope == "layer":
        return {name: _quantile(weight, config.sparsity) for name, weight in weights.items()}
    together = torch.cat([weight.detach().reshape(-1) for weight in weights.values()])
    return dict.fromkeys(weights, _quantile(together, config.sparsity))


def _quantile(values: torch.Tensor, share: float) -> float:
    # torch.quantile takes no more than 16 million values
    place = max(int(share * values.numel()), 1)
    return float(values.detach().abs().reshape(-1).kthvalue(place).values)


def _layers(classifier: Classifier) -> Iterator[tuple[str, nn.Conv2d | nn.Linear]]:
    for name, module in classifier.network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            yield name, module

"""Networks with fewer channels than timm builds: the shapes of their layers, kept beside the architecture."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from holotype.errors import ModelError

__all__ = ["Widths", "set_widths", "widths_of"]

Widths = dict[str, tuple[int, ...]]
"""Name of a layer, or of a parameter that belongs to none of the usual layers → shape of its weight."""

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


def widths_of(network: nn.Module, plain: nn.Module) -> Widths:
    """The layers of `network` whose weights have another shape than in `plain`, the same network unpruned."""
    usual, own = _shapes(plain), _shapes(network)
    return {name: shape for name, shape in own.items() if usual.get(name) != shape}


def set_widths(network: nn.Module, widths: Mapping[str, tuple[int, ...]]) -> None:
    """Give layers of `network`, in place, weights of other shapes; they are fresh zeros.

    `ModelError` where there is no such layer, or it is of a kind that has no channels.
    """
    layers, others = dict(_layers(network)), dict(_others(network))
    for name, shape in widths.items():
        if name in layers:
            _resize(layers[name], tuple(shape))
        elif name in others:
            owner, _, attribute = name.rpartition(".")
            setattr(network.get_submodule(owner), attribute, nn.Parameter(torch.zeros(shape)))
        else:
            raise ModelError(f"has no layer {name!r} to make narrower", fix="restore the bundle")


def _shapes(network: nn.Module) -> Widths:
    layers = {name: tuple(layer.get_parameter("weight").shape) for name, layer in _layers(network)}
    return layers | {name: tuple(parameter.shape) for name, parameter in _others(network)}


def _others(network: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters outside the usual layers: scales of residual branches, embeddings of positions."""
    owned = {id(parameter) for _, layer in _layers(network) for parameter in layer.parameters()}
    return [(name, parameter) for name, parameter in network.named_parameters() if id(parameter) not in owned]


def _layers(network: nn.Module) -> list[tuple[str, nn.Module]]:
    kinds = (nn.Conv2d, nn.Linear, *_NORMS)
    return [
        (name, module)
        for name, module in network.named_modules()
        if isinstance(module, kinds) and getattr(module, "weight", None) is not None
    ]


def _resize(layer: nn.Module, shape: tuple[int, ...]) -> None:
    outputs = shape[0]
    if isinstance(layer, nn.Conv2d):
        # A depthwise convolution stays one: as many groups as channels.
        depthwise = layer.groups == layer.in_channels and layer.groups > 1
        layer.groups = outputs if depthwise else layer.groups
        layer.out_channels, layer.in_channels = outputs, shape[1] * layer.groups
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = shape
    elif isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = shape
    elif isinstance(layer, nn.GroupNorm):
        layer.num_channels = outputs
    else:
        layer.num_features = outputs  # type: ignore[assignment]
        for name in ("running_mean", "running_var"):
            old = getattr(layer, name)
            setattr(layer, name, torch.zeros(outputs, dtype=old.dtype))
    layer.weight = nn.Parameter(torch.zeros(shape))
    if getattr(layer, "bias", None) is not None:
        layer.bias = nn.Parameter(torch.zeros(outputs))

"""Attention modules in the blocks of a network, in a way that changes nothing before they are trained.

se    squeeze-and-excitation (Hu et al. 2018)
eca   efficient channel attention (Wang et al. 2020)
cbam  channel, then spatial attention (Woo et al. 2018)

Each multiplies features by a gate g in (0, 1) computed from them. Here g = 2 * sigmoid(z) in (0, 2), with the
last layer before z set to 0: every gate starts at exactly 1 and a pretrained network gives the answers it
gave, while the gate has the largest slope it can have.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from timm.layers.cbam import CbamModule
from timm.layers.eca import EcaModule
from timm.layers.squeeze_excite import SEModule
from timm.models import _efficientnet_blocks as mobile
from timm.models import regnet, resnet
from torch import nn

from holotype.errors import ConfigError

__all__ = ["Gate", "insert_attention"]

_PLACES: dict[type[nn.Module], str] = {
    resnet.BasicBlock: "conv2",
    resnet.Bottleneck: "conv3",
    regnet.Bottleneck: "conv2.conv",
    mobile.DepthwiseSeparableConv: "conv_dw",
    mobile.InvertedResidual: "conv_dw",
    mobile.EdgeResidual: "conv_exp",
    mobile.UniversalInvertedResidual: "pw_exp.conv",
}
"""Blocks that call `self.se` where there is one, and the convolution whose channels it then sees."""

_FAMILIES = (
    "ResNet, ResNeXt, RegNetX, EfficientNet-Lite, EfficientNet V2, MobileNet V1 to V4, MNASNet or FBNet"
)


class Gate(nn.Module):
    """2 * sigmoid(z): 1 at z = 0."""

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return 2 * z.sigmoid()


def insert_attention(network: nn.Module, kind: Literal["se", "eca", "cbam"], *, name: str) -> None:
    """Put a module into every block of `network` that has a place for one and none of its own.

    `ConfigError` for families whose blocks have no such place, and where each is taken.
    """
    known = [block for block in network.modules() if type(block) in _PLACES]
    free = [block for block in known if block.se is None or isinstance(block.se, nn.Identity)]
    if not free:
        problem = "already has attention in every block" if known else "has no place for it in its blocks"
        raise ConfigError(
            f"{name} {problem}",
            where=f"model.attention={kind}",
            fix=f"use none, or a network of the families {_FAMILIES}",
        )
    for block in free:
        convolution = cast("nn.Conv2d", block.get_submodule(_PLACES[type(block)]))
        block.se = _module(kind, channels=convolution.out_channels)


def _module(kind: Literal["se", "eca", "cbam"], *, channels: int) -> nn.Module:
    module: Any
    if kind == "se":
        module = SEModule(channels, gate_layer=Gate)
        last = [module.fc2.weight, module.fc2.bias]
    elif kind == "eca":
        module = EcaModule(channels, gate_layer=Gate)
        last = [module.conv.weight]
    else:
        module = CbamModule(channels, gate_layer=Gate)
        # Not the spatial convolution: batch norm would divide its zero variance by almost nothing.
        last = [module.channel.fc2.weight, module.spatial.conv.bn.weight]
    for parameter in last:
        nn.init.zeros_(parameter)
    return cast("nn.Module", module)

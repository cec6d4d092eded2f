"""A stem for images of about 32 pixels, which the usual one shrinks to a quarter before it looks at them."""

from __future__ import annotations

from typing import Any, cast

from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.resnet import ResNet
from torch import nn

from holotype.errors import ConfigError

__all__ = ["shrink_stem"]


def shrink_stem(network: nn.Module, *, name: str) -> None:
    """Give `network` a first convolution of stride 1 and 3x3, and no pooling after it (He et al. 2016, 4.2).

    A first convolution that is 3x3 already keeps its weights. `ConfigError` for other families than ResNet,
    EfficientNet and MobileNet.
    """
    parts = cast("Any", network)
    if isinstance(network, ResNet):
        if isinstance(parts.conv1, nn.Conv2d):
            parts.conv1 = nn.Conv2d(3, parts.conv1.out_channels, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(parts.conv1.weight, mode="fan_out", nonlinearity="relu")
        else:
            parts.conv1[0].stride = (1, 1)
        parts.maxpool = nn.Identity()
    elif isinstance(network, EfficientNet | MobileNetV3):
        parts.conv_stem.stride = (1, 1)
    else:
        raise ConfigError(
            f"the stem of {name} cannot be made smaller",
            where="model.stem=small",
            fix="use standard, or a network of the families ResNet, EfficientNet or MobileNet",
        )

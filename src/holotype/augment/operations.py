"""The operations of a policy that change colours, each on the images of a batch that drew it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from holotype.augment.policy import Operation, Policy

__all__ = ["apply_operations"]

Change = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def apply_operations(planes: torch.Tensor, policy: Policy) -> torch.Tensor:
    """Apply the operations of colour to whole levels `float32[N, 3, H, W]` in [0, 255], in place, in turn.

    Each leaves whole levels, as where images are bytes between operations (Pillow, torchvision).
    """
    for operations, amounts in zip(policy.operations, policy.amounts, strict=True):
        for operation in set(operations.tolist()) & _CHANGES.keys():
            places = (operations == operation).nonzero()[0]
            amount = torch.from_numpy(amounts[places].astype(np.float32)).to(planes.device)
            chosen = torch.from_numpy(places).to(planes.device)
            changed = _CHANGES[operation](planes[chosen], amount[:, None, None, None])
            planes[chosen] = changed.clamp_(0, 255).round_()
    return planes


def _brightness(planes: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    return planes * (1 + amount)


def _colour(planes: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    return _away_from(_grey(planes), planes, amount)


def _contrast(planes: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    return _away_from(_grey(planes).mean((2, 3), keepdim=True), planes, amount)


def _sharpness(planes: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    """Away from the image smoothed by 3 x 3 pixels of which the middle one counts 5/13; the rim stays."""
    if min(planes.shape[2:]) < 3:
        return planes
    rows = planes[:, :, :-2] + planes[:, :, 1:-1] + planes[:, :, 2:]
    smooth = planes.clone()
    inner = smooth[:, :, 1:-1, 1:-1]
    inner.mul_(4).add_(rows[..., :-2]).add_(rows[..., 1:-1]).add_(rows[..., 2:]).div_(13).round_()
    return _away_from(smooth, planes, amount)


def _posterize(planes: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    """Only the highest bits of each level, as many as the amount says."""
    step = torch.exp2(8 - amount)
    return (planes / step).floor_().mul_(step)


def _solarize(planes: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    return torch.where(planes >= amount, 255 - planes, planes)


def _auto_contrast(planes: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """Each channel stretched to 0..255; a channel of one level stays."""
    low, high = planes.amin((2, 3), keepdim=True), planes.amax((2, 3), keepdim=True)
    return torch.where(high > low, (planes - low) * (255 / (high - low).clamp(min=1)), planes)


def _equalize(planes: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """Each channel's histogram made flat by Pillow's table; a channel of one level stays."""
    count = planes.shape[2] * planes.shape[3]
    levels = planes.flatten(0, 1).flatten(1).long()
    first = 256 * torch.arange(len(levels), device=planes.device)[:, None]
    histogram = torch.bincount((levels + first).flatten(), minlength=256 * len(levels)).view(-1, 256)
    # Pillow divides by 255 what all levels but the highest that occurs have together.
    highest = histogram.gather(1, levels.amax(1, keepdim=True))
    step = (count - highest) // 255
    below = histogram.cumsum(1) - histogram
    table = torch.where(
        step > 0,
        ((below + step // 2) // step.clamp(min=1)).clamp_(max=255),
        torch.arange(256, device=planes.device),
    )
    return table.gather(1, levels).view_as(planes).to(planes.dtype)


def _away_from(base: torch.Tensor, planes: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    """1 + amount times the difference from `base`: below 0 towards it, above 0 away from it."""
    return base + (1 + amount) * (planes - base)


def _grey(planes: torch.Tensor) -> torch.Tensor:
    red, green, blue = planes.unbind(1)
    return (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue).round_()[:, None]


_CHANGES: Mapping[int, Change] = {
    Operation.BRIGHTNESS: _brightness,
    Operation.COLOUR: _colour,
    Operation.CONTRAST: _contrast,
    Operation.SHARPNESS: _sharpness,
    Operation.POSTERIZE: _posterize,
    Operation.SOLARIZE: _solarize,
    Operation.AUTO_CONTRAST: _auto_contrast,
    Operation.EQUALIZE: _equalize,
}

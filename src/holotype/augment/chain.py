"""The whole chain of augmentation: geometry, policy, colours, noise, erasing."""

from __future__ import annotations

import torch

from holotype.augment.colour import jitter_colours
from holotype.augment.draws import Draws, Erasing, Noise
from holotype.augment.noise import bank
from holotype.augment.operations import apply_operations
from holotype.augment.parts import for_parts
from holotype.augment.warp import affine, mirror, moves, warp

__all__ = ["augment"]

# The fill of what is erased: normal noise about grey, in levels.
_FILL_MEAN, _FILL_SIGMA = 127.5, 64.0


def augment(images: torch.Tensor, draws: Draws, *, height: int, width: int) -> torch.Tensor:
    """Change `uint8[N, H0, W0, 3]` to `uint8[N, height, width, 3]` on the same device, each as it drew.

    The images may be larger than the result, by the margin that crops are taken from. What is off costs
    nothing: without crop, rotation and moves an image of the wanted size is not interpolated. An image comes
    out the same whatever batch it is in.
    """
    result = torch.empty(len(images), height, width, 3, dtype=torch.uint8, device=images.device)

    def work(part: slice) -> None:
        _augment_into(result[part], images[part], draws[part])

    for_parts(work, count=len(images), pixels=height * width, device=images.device)
    return result


def _augment_into(result: torch.Tensor, images: torch.Tensor, draws: Draws) -> None:
    height, width = result.shape[1:3]
    matrices = affine(draws, image_ratio=images.shape[2] / images.shape[1], ratio=width / height)
    if images.shape == result.shape and not moves(matrices):
        images = mirror(images, draws.flip)
        if not (draws.policy or draws.jitter or draws.noise or draws.erasing):
            result.copy_(images)
            return
        planes = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    else:
        within = draws.angle is None and draws.policy is None
        planes = warp(images, matrices, height=height, width=width, within=within)
    if draws.policy is not None:
        planes = apply_operations(planes, draws.policy)
    if draws.jitter is not None:
        planes = jitter_colours(planes, draws.jitter)
    if draws.noise is not None:
        _add_noise(planes, draws.noise)
    if draws.erasing is not None:
        _erase(planes, draws.erasing)
    torch.stack(planes.round_().clamp_(0, 255).to(torch.uint8).unbind(1), dim=-1, out=result)


def _add_noise(planes: torch.Tensor, noise: Noise) -> None:
    for image, sigma, start in zip(planes, noise.sigma.tolist(), noise.start.tolist(), strict=True):
        image.add_(bank(start, image.shape, device=planes.device), alpha=255 * sigma)


def _erase(planes: torch.Tensor, erasing: Erasing) -> None:
    """Fill the drawn rectangles `planes[..., top:bottom, left:right]` with noise."""
    height, width = planes.shape[2:]
    for place in erasing.chosen.nonzero()[0].tolist():
        left, top, right, bottom = (erasing.boxes[place] * (width, height, width, height)).round().astype(int)
        area = planes[place, :, top:bottom, left:right]
        fill = bank(int(erasing.start[place]), tuple(area.shape), device=planes.device)
        area.copy_(fill * _FILL_SIGMA + _FILL_MEAN)

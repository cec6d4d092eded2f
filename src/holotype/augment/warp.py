"""Geometry: mirror, crop, rotation and the moves of a policy as one affine warp with one interpolation."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from holotype.augment.draws import Draws
from holotype.augment.policy import Operation

__all__ = ["affine", "mirror", "moves", "warp"]

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


def affine(draws: Draws, *, image_ratio: float, ratio: float) -> Floats:
    """Where the result's pixels lie in the image: `float64[N, 2, 3]`, both in [-1, 1] from edge to edge.

    The ratios are width over height of image and result: turns and shears are made in square pixels. A
    positive angle turns what is seen counter-clockwise.
    """
    matrices = np.zeros((len(draws), 3, 3))
    matrices[:, 0, 0] = np.where(draws.flip, -draws.side[:, 0], draws.side[:, 0])
    matrices[:, 1, 1] = draws.side[:, 1]
    matrices[:, 2, 2] = 1
    if draws.angle is not None:
        matrices[:, :2, :2] = _turns(draws.angle, image_ratio) @ matrices[:, :2, :2]
    matrices[:, :2, 2] = draws.centre
    if draws.policy is not None:
        for operations, amounts in zip(draws.policy.operations, draws.policy.amounts, strict=True):
            matrices = matrices @ _policy_moves(operations, amounts, ratio)
    return matrices[:, :2]


def moves(matrices: Floats) -> bool:
    """Whether a warp by `float64[N, 2, 3]` does more than to mirror."""
    plain = np.abs(matrices) == np.eye(2, 3)
    return not plain.all()


def mirror(images: torch.Tensor, flip: npt.NDArray[np.bool_]) -> torch.Tensor:
    """`uint8[N, H, W, 3]` with the images of `flip` mirrored."""
    return torch.where(torch.from_numpy(flip).to(images.device)[:, None, None, None], images.flip(2), images)


def warp(images: torch.Tensor, matrices: Floats, *, height: int, width: int, within: bool) -> torch.Tensor:
    """`uint8[N, H0, W0, 3]` to whole levels `float32[N, 3, height, width]`, bilinear.

    `within` says that nothing beyond the images is shown, which is quicker.

    What a turned crop shows beyond the image is the image reflected at its edge. Black corners would tell the
    network the angle, and the edge's pixels drawn out are streaks that no photo has; reflected texture is
    more of the same.
    """
    theta = torch.from_numpy(matrices.astype(np.float32)).to(images.device)[..., None, None]
    across = _centres(width, images.device)
    down = _centres(height, images.device)[:, None]
    # Each coordinate in a plane of its own, which is as fast to sample by and faster to write.
    grid = torch.empty(len(images), 2, height, width, device=images.device)
    for axis in (0, 1):
        torch.add(theta[:, axis, 0] * across, theta[:, axis, 1] * down + theta[:, axis, 2], out=grid[:, axis])
    planes, places = images.permute(0, 3, 1, 2).float(), grid.permute(0, 2, 3, 1)
    padding = "border" if within else "reflection"
    return functional.grid_sample(planes, places, padding_mode=padding, align_corners=False).round_()


def _centres(count: int, device: torch.device) -> torch.Tensor:
    """Where the centres of `count` pixels lie between the edges at -1 and 1."""
    return (2 * torch.arange(count, dtype=torch.float32, device=device) + 1) / count - 1


def _turns(degrees: Floats, ratio: float) -> Floats:
    """Rotations in square pixels as `float64[N, 2, 2]` in coordinates from edge to edge."""
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.stack(
        [np.stack([cosine, -sine / ratio], axis=1), np.stack([sine * ratio, cosine], axis=1)], axis=1
    )


def _policy_moves(operations: Integers, amounts: Floats, ratio: float) -> Floats:
    """The moves of one operation for each image, `float64[N, 3, 3]`; the identity for all others."""

    def amount(operation: Operation) -> Floats:
        return np.where(operations == operation, amounts, 0.0)

    matrices = np.zeros((len(operations), 3, 3))
    matrices[:, :2, :2] = _turns(amount(Operation.ROTATE), ratio)
    matrices[:, 0, 1] += amount(Operation.SHEAR_X) / ratio
    matrices[:, 1, 0] += amount(Operation.SHEAR_Y) * ratio
    matrices[:, 0, 2] = 2 * amount(Operation.TRANSLATE_X)
    matrices[:, 1, 2] = 2 * amount(Operation.TRANSLATE_Y)
    matrices[:, 2, 2] = 1
    return matrices

"""Augmentation of a batch on the training device, its parameters drawn per (seed, epoch, image).

The draws come from a counter-based generator (Philox, Salmon et al. 2011), so an image gets the same changes
in the same epoch whatever the batch size, the order or the number of processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from holotype.config import AugmentConfig

__all__ = ["Draws", "augment", "draw"]


@dataclass(frozen=True)
class Draws:
    """Parameters for N images: mirrored or not `bool[N]`, and the crop's side and centre `float64[N]`.

    The side is a share of the image's, in (0, 1]; the centre is in [-1, 1] coordinates, corner to corner.
    """

    flip: npt.NDArray[np.bool_]
    side: npt.NDArray[np.float64]
    centre_x: npt.NDArray[np.float64]
    centre_y: npt.NDArray[np.float64]


def draw(config: AugmentConfig, *, seed: int, epoch: int, samples: npt.NDArray[np.int64]) -> Draws:
    """The parameters of `samples` (row numbers of the dataset) in an epoch."""
    uniform = np.empty((len(samples), 4))
    for i, sample in enumerate(samples):
        bits = np.random.Philox(key=seed, counter=[0, 0, epoch, int(sample)])
        uniform[i] = np.random.Generator(bits).random(4)
    side = np.sqrt(config.crop + (1 - config.crop) * uniform[:, 1])
    return Draws(
        flip=uniform[:, 0] < config.flip,
        side=side,
        centre_x=(2 * uniform[:, 2] - 1) * (1 - side),
        centre_y=(2 * uniform[:, 3] - 1) * (1 - side),
    )


def augment(images: torch.Tensor, draws: Draws, *, height: int, width: int) -> torch.Tensor:
    """Crop and mirror `uint8[N, H0, W0, 3]` to `uint8[N, height, width, 3]` in one bilinear warp.

    Without a crop and at the wanted size nothing is interpolated, only mirrored.
    """
    if (draws.side == 1).all() and images.shape[1:3] == (height, width):
        flip = torch.from_numpy(draws.flip).to(images.device)
        return torch.where(flip[:, None, None, None], images.flip(2), images)
    sign = np.where(draws.flip, -1.0, 1.0)
    theta = np.zeros((len(sign), 2, 3), dtype=np.float32)
    theta[:, 0, 0], theta[:, 0, 2] = draws.side * sign, draws.centre_x
    theta[:, 1, 1], theta[:, 1, 2] = draws.side, draws.centre_y
    grid = functional.affine_grid(
        torch.from_numpy(theta).to(images.device), [len(sign), 3, height, width], align_corners=False
    )
    planes = images.permute(0, 3, 1, 2).float()
    warped = functional.grid_sample(planes, grid, padding_mode="border", align_corners=False)
    return warped.round_().clamp_(0, 255).permute(0, 2, 3, 1).to(torch.uint8)

"""TrivialAugment (Mueller & Hutter 2021) and RandAugment (Cubuk et al. 2020): which operations, how strong.

Both draw, uniformly and with replacement, from the fourteen `Operation`s of torchvision. RandAugment
applies `augment.operations` of them at one magnitude m in 0..30; TrivialAugment applies one at a magnitude
drawn from 0, 1, ..., 30. With t = m / 30, an amount is (signed: either way, drawn)

| operation | TrivialAugment, wide | RandAugment | unit |
|---|---|---|---|
| shear x, y | 0.99 t, signed | 0.3 t, signed | shift per pixel, about the centre |
| translate x, y | 32/224 t, signed | 150/331 t, signed | share of the side |
| rotate | 135 t, signed | 30 t, signed | degrees |
| brightness, colour, contrast, sharpness | 0.99 t, signed | 0.9 t, signed | factor - 1 |
| posterize | 8 - round(6 t) | 8 - round(4 t) | bits kept |
| solarize | 255 (1 - t) | 255 (1 - t) | level from which on is inverted |
| identity, auto-contrast, equalize | - | - | |

What differs from torchvision: shears are about the centre (there about a corner), TrivialAugment's
translation is a share of the side (there 32 pixels of any image), and geometry joins the one warp of
`holotype.augment.warp`, so that it is interpolated once, before the operations on colours, and shows no
black.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

__all__ = ["Operation", "Policy", "policy_of"]

Floats = npt.NDArray[np.float64]

_LARGEST_MAGNITUDE = 30


class Operation(IntEnum):
    """What a policy can do to an image."""

    IDENTITY = 0
    SHEAR_X = 1
    SHEAR_Y = 2
    TRANSLATE_X = 3
    TRANSLATE_Y = 4
    ROTATE = 5
    BRIGHTNESS = 6
    COLOUR = 7
    CONTRAST = 8
    SHARPNESS = 9
    POSTERIZE = 10
    SOLARIZE = 11
    AUTO_CONTRAST = 12
    EQUALIZE = 13


_SIGNED = np.array([Operation.SHEAR_X <= each <= Operation.SHARPNESS for each in Operation])
_WIDE = np.array([0, 0.99, 0.99, 32 / 224, 32 / 224, 135, 0.99, 0.99, 0.99, 0.99, 6, 255, 0, 0])
_NARROW = np.array([0, 0.3, 0.3, 150 / 331, 150 / 331, 30, 0.9, 0.9, 0.9, 0.9, 4, 255, 0, 0])


@dataclass(frozen=True)
class Policy:
    """K operations in turn for each of N images: `Operation`s `int64[K, N]`, amounts `float64[K, N]`."""

    operations: npt.NDArray[np.int64]
    amounts: Floats

    def __getitem__(self, places: slice) -> Policy:
        return Policy(self.operations[:, places], self.amounts[:, places])


def policy_of(numbers: Floats, *, magnitude: float | None) -> Policy:
    """What uniform `numbers float64[K, 4, N]` name: RandAugment at `magnitude`, or TrivialAugment for None.

    Of the four numbers the first names the operation, the second the magnitude, the third the sign.
    """
    operations = (numbers[:, 0] * len(Operation)).astype(np.int64)
    if magnitude is None:
        largest, share = _WIDE, np.floor(numbers[:, 1] * (_LARGEST_MAGNITUDE + 1)) / _LARGEST_MAGNITUDE
    else:
        largest, share = _NARROW, np.full_like(numbers[:, 1], magnitude / _LARGEST_MAGNITUDE)
    amounts = largest[operations] * share
    sign = np.where(_SIGNED[operations] & (numbers[:, 2] < 0.5), -1.0, 1.0)
    amounts = np.where(operations == Operation.POSTERIZE, 8 - np.round(amounts), sign * amounts)
    return Policy(operations, np.where(operations == Operation.SOLARIZE, 255 - amounts, amounts))

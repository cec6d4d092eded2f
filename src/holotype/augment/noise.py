"""Gaussian noise out of a bank: a fixed long run of normal numbers, of which each image takes a part.

A fresh normal number for every value of a batch costs more than all other changes together. An image gets the
part of the bank that begins at one of a million drawn places, times a drawn sigma of either sign: two images
whose parts overlap see the same numbers at other pixels.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch

__all__ = ["BANK", "bank"]

BANK = 1 << 20
"""How many places a part of the bank can begin at."""

_KEY = 0


def bank(start: int, shape: tuple[int, ...], *, device: torch.device) -> torch.Tensor:
    """Standard normal numbers `float32[shape]`, the bank from place `start` on; not to be written to."""
    length = math.prod(shape)
    return _numbers(math.ceil(length / BANK), device)[start : start + length].view(shape)


@functools.lru_cache(maxsize=4)
def _numbers(turns: int, device: torch.device) -> torch.Tensor:
    """The bank, followed by itself `turns` times, so that a part can begin anywhere."""
    generator = np.random.Generator(np.random.Philox(key=_KEY))
    once = generator.standard_normal(BANK, dtype=np.float32)
    return torch.from_numpy(np.tile(once, 1 + turns)).to(device)

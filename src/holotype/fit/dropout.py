"""Which features dropout keeps: drawn for each image by itself, so of no order, no batch and no process."""

from __future__ import annotations

import numpy as np
import torch

from holotype.augment import Samples
from holotype.augment.philox import uniforms

__all__ = ["kept_features"]

_STREAM = 2  # beside those of augmentation and of mixing
_LEVELS = 1 << 13
_PER_NUMBER = 4  # pieces of 13 bits of the 53 of a uniform number


def kept_features(samples: Samples, *, rate: float, features: int, seed: int, epoch: int) -> torch.Tensor:
    """Factors `float32[N, D]` of embeddings: 0 with probability `rate`, else 1 / (1 - rate).

    (Srivastava et al. 2014, inverted.) A function of seed, epoch, row and turn alone; the probability is
    exact to 1 / 8192.
    """
    blocks = range(-(-features // (4 * _PER_NUMBER)))
    numbers = uniforms(samples, seed=seed, epoch=epoch, stream=_STREAM, blocks=blocks)
    whole = (numbers.reshape(-1, len(samples)).T * 2.0**53).astype(np.uint64)
    pieces = [whole >> np.uint64(13 * place) & np.uint64(_LEVELS - 1) for place in range(_PER_NUMBER)]
    kept = np.concatenate(pieces, axis=1)[:, :features] >= round(rate * _LEVELS)
    return torch.from_numpy(kept.astype(np.float32) / np.float32(1 - rate))

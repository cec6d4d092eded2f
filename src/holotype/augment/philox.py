"""The counter-based generator Philox4x64-10 (Salmon et al. 2011) for many counters at once.

numpy has the same generator, one object for each counter: setting up 32 of them takes longer than all draws
of a batch do here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from holotype.augment.samples import Samples

__all__ = ["philox", "uniforms"]

Words = npt.NDArray[np.uint64]

_ROUNDS = 10
_WORD = (1 << 64) - 1
_MULTIPLIERS = np.array([[0xD2E7470EE14C6C93], [0xCA5A826395121157]], dtype=np.uint64)
_KEY_STEPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_HALF = np.uint64(32)
_LOW = np.uint64(0xFFFFFFFF)
_FACTOR_HIGH, _FACTOR_LOW = _MULTIPLIERS >> _HALF, _MULTIPLIERS & _LOW


def philox(counters: Words, *, key: int) -> Words:
    """The random words `uint64[4, M]` of M counters `uint64[4, M]`, of which word 0 is the lowest.

    A column holds what `numpy.random.Philox(key=key, counter=c)` gives first for the counter `c` before it.
    """
    even, odd = counters[0::2], counters[1::2]
    keys = [key & _WORD, key >> 64 & _WORD]
    for _ in range(_ROUNDS):
        high, low = _multiply(even)
        even = high[::-1] ^ odd ^ np.array(keys, dtype=np.uint64)[:, None]
        odd = low[::-1]
        keys = [word + step & _WORD for word, step in zip(keys, _KEY_STEPS, strict=True)]
    return np.stack([even[0], odd[0], even[1], odd[1]])


def _multiply(words: Words) -> tuple[Words, Words]:
    """Both halves of the 128-bit products of `uint64[2, M]` with the multipliers, by 32-bit halves."""
    high, low = words >> _HALF, words & _LOW
    middle = high * _FACTOR_LOW
    middle += low * _FACTOR_LOW >> _HALF
    cross = low * _FACTOR_HIGH
    cross += middle & _LOW
    upper = high * _FACTOR_HIGH
    upper += middle >> _HALF
    upper += cross >> _HALF
    return upper, words * _MULTIPLIERS


def uniforms(
    samples: Samples, *, seed: int, epoch: int, stream: int, blocks: Sequence[int]
) -> npt.NDArray[np.float64]:
    """Numbers `float64[B, 4, N]` in [0, 1): four for each sample and each of B numbered blocks of a stream.

    A function of seed, epoch, row, turn, stream and block alone, so of no order and no batch.
    """
    count = len(samples)
    counters = np.empty((4, len(blocks), count), dtype=np.uint64)
    counters[0] = (np.array(blocks, dtype=np.uint64) + np.uint64((stream << 32) + 1))[:, None]
    counters[1] = samples.turns
    counters[2] = epoch
    counters[3] = samples.rows
    words = philox(counters.reshape(4, -1), key=seed)
    numbers: npt.NDArray[np.float64] = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers.reshape(4, len(blocks), count).transpose(1, 0, 2)

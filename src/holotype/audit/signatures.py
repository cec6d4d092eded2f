"""One pass over all pixels: perceptual hash, small picture and health measures of every image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from holotype.audit.alignment import COARSE, shrink
from holotype.audit.health import Measures, join_measures, measure
from holotype.dataset import Dataset
from holotype.preprocess import Pixels
from holotype.progress import track

__all__ = ["Signatures", "all_orientations", "hash_of", "read_signatures", "reduced_to", "signatures_of"]

_BATCH = 64
_HASHED = 32  # side of the grey picture that is transformed
_FREQUENCIES = 8

Hashes = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Signatures:
    """Per image: `hashes: uint64[N, 8]`, one for each orientation; `small: uint8[N, 3, 16, 16]`; measures."""

    hashes: Hashes
    small: npt.NDArray[np.uint8]
    measures: Measures


def read_signatures(dataset: Dataset) -> Signatures:
    """Signatures of every row of `dataset`."""
    rows = np.arange(len(dataset.table), dtype=np.int64)
    batches = [rows[start : start + _BATCH] for start in range(0, len(rows), _BATCH)] or [rows]
    own = dataset.table.select("width", "height").to_numpy()
    hashes, small, measures = [], [], []
    with track("looking at images", total=len(rows)) as progress:
        for batch, pixels in zip(batches, dataset.pixels(batches), strict=True):
            codes, tiny = signatures_of(pixels)
            hashes.append(codes)
            small.append(tiny)
            measures.append(measure(pixels, width=own[batch, 0], height=own[batch, 1]))
            progress.advance(len(pixels))
    return Signatures(np.concatenate(hashes), np.concatenate(small), join_measures(measures))


def signatures_of(pixels: Pixels) -> tuple[Hashes, npt.NDArray[np.uint8]]:
    """Hashes `uint64[N, 8]` and small pictures `uint8[N, 3, 16, 16]` of `uint8[N, H, W, 3]`."""
    reduced = reduced_to(pixels, _HASHED)
    grey = np.tensordot(reduced, np.array([0.299, 0.587, 0.114], dtype=np.float32), axes=(1, 0))
    return hash_of(grey), np.rint(shrink(reduced, COARSE)).astype(np.uint8)


def reduced_to(pixels: Pixels, side: int) -> Floats:
    """`float32[N, 3, side, side]` of `uint8[N, H, W, 3]`: each value is the mean over its area."""
    small = [
        np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BOX)) for image in pixels
    ]
    stacked = np.array(small, dtype=np.float32).reshape(len(small), side, side, 3)
    return np.ascontiguousarray(stacked.transpose(0, 3, 1, 2))


def hash_of(grey: Floats) -> Hashes:
    """Perceptual hashes `uint64[N, 8]` of grey pictures `float32[N, S, S]`, one for each orientation.

    A bit is the sign of one of the 8 x 8 lowest frequencies of the discrete cosine transform, the mean's bit
    being 0 (after Zauner 2010, with signs in place of a median, so that mirroring and turning the picture
    only change signs and swap axes, and all eight hashes come from one transform). Column 0 is upright.
    """
    side = grey.shape[1]
    place = np.pi * (2 * np.arange(side) + 1) / (2 * side)
    cosines = np.cos(np.arange(_FREQUENCIES)[:, None] * place).astype(np.float32)
    spectrum = np.matmul(np.matmul(cosines, grey), cosines.T)
    odd = np.where(np.arange(_FREQUENCIES) % 2, -1, 1).astype(np.float32)
    columns = []
    for turned in (spectrum, spectrum.transpose(0, 2, 1)):
        for down in (1, odd[:, None]):
            for across in (1, odd):
                bits = (turned * down * across > 0).reshape(len(grey), _FREQUENCIES**2)
                bits[:, 0] = False
                columns.append(np.packbits(bits, axis=1).view(np.uint64)[:, 0])
    return np.stack(columns, axis=1)


def all_orientations(hashes: Hashes, others: Hashes) -> npt.NDArray[np.uint8]:
    """Hamming distance `uint8[K]` of pairs, the least over the orientations of the first."""
    return np.asarray(np.bitwise_count(hashes ^ others[:, :1]).min(axis=1), dtype=np.uint8)

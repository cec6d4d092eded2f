"""Which images an epoch shows, and the generator whose draws belong to each of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Samples"]


@dataclass(frozen=True)
class Samples:
    """N showings of images: rows of the dataset `int64[N]`, and their turns `int64[N]`.

    The turn counts, from 0, how often the row was shown before in the same epoch: it is 0 but where images
    are drawn with replacement.
    """

    rows: npt.NDArray[np.int64]
    turns: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, places: slice | npt.NDArray[np.int64]) -> Samples:
        return Samples(self.rows[places], self.turns[places])

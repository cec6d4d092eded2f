"""What is drawn for each image: numbers that belong to (seed, epoch, row, turn) and to nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from holotype.augment.noise import BANK
from holotype.augment.philox import uniforms
from holotype.augment.policy import Policy, policy_of
from holotype.augment.samples import Samples
from holotype.config import AugmentConfig

__all__ = ["Draws", "Erasing", "Jitter", "Noise", "draw"]

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]

_STREAM = 0
# The numbered blocks of the stream: a draw keeps its place, whatever else is on or off.
_CROP, _TURN, _COLOUR, _ERASING, _PLACE, _POLICY = range(6)

# Share of the image and ratio of the sides of what is erased, as in Zhong et al. 2020 and timm.
_ERASED = (0.02, 1 / 3)
_ERASED_RATIO = 1 / 0.3


@dataclass(frozen=True)
class Jitter:
    """Changes of colour, `float64[N]` each: degrees that the hue is turned by, factors of S and of V."""

    hue: Floats
    saturation: Floats
    value: Floats

    def __getitem__(self, places: slice) -> Jitter:
        return Jitter(self.hue[places], self.saturation[places], self.value[places])


@dataclass(frozen=True)
class Noise:
    """Gaussian noise: signed sigma `float64[N]` (white = 1), and where in the bank it starts `int64[N]`."""

    sigma: Floats
    start: Integers

    def __getitem__(self, places: slice) -> Noise:
        return Noise(self.sigma[places], self.start[places])


@dataclass(frozen=True)
class Erasing:
    """Rectangles to erase: which images have one `bool[N]`, boxes `float64[N, 4]` (left, top, right, bottom)
    as shares of the sides, and where in the bank of noise the fill starts `int64[N]`.
    """

    chosen: Bools
    boxes: Floats
    start: Integers

    def __getitem__(self, places: slice) -> Erasing:
        return Erasing(self.chosen[places], self.boxes[places], self.start[places])


@dataclass(frozen=True)
class Draws:
    """Parameters for N images; None where something is off.

    Mirrored or not `bool[N]`; the crop's sides `float64[N, 2]` (x, y) as shares of the image's, in (0, 1],
    and its centre `float64[N, 2]` in [-1, 1] coordinates, corner to corner; the degrees `float64[N]` that
    the crop is turned by about its centre.
    """

    flip: Bools
    side: Floats
    centre: Floats
    angle: Floats | None = None
    policy: Policy | None = None
    jitter: Jitter | None = None
    noise: Noise | None = None
    erasing: Erasing | None = None

    def __len__(self) -> int:
        return len(self.flip)

    def __getitem__(self, places: slice) -> Draws:
        return Draws(
            self.flip[places],
            self.side[places],
            self.centre[places],
            angle=None if self.angle is None else self.angle[places],
            policy=None if self.policy is None else self.policy[places],
            jitter=None if self.jitter is None else self.jitter[places],
            noise=None if self.noise is None else self.noise[places],
            erasing=None if self.erasing is None else self.erasing[places],
        )


def draw(config: AugmentConfig, *, seed: int, epoch: int, samples: Samples) -> Draws:
    """The parameters of `samples` in an epoch: the same for a row and turn, whatever comes with it."""
    operations = {"none": 0, "trivial": 1, "randaugment": config.operations}[config.policy]
    wanted = (
        _CROP,
        *((_TURN,) if config.rotation or config.aspect > 1 or config.noise else ()),
        *((_COLOUR,) if config.hue or config.saturation or config.value or config.noise else ()),
        *((_ERASING, _PLACE) if config.erasing else ()),
        *range(_POLICY, _POLICY + operations),
    )
    numbers = uniforms(samples, seed=seed, epoch=epoch, stream=_STREAM, blocks=wanted)
    block = dict(zip(wanted, numbers, strict=True))
    crop = block[_CROP]
    side = _sides(config, crop[1], block.get(_TURN))
    return Draws(
        flip=crop[0] < config.flip,
        side=side,
        centre=(2 * crop[2:].T - 1) * (1 - side),
        angle=_either_way(block[_TURN][0], config.rotation) if config.rotation else None,
        policy=policy_of(numbers[-operations:], magnitude=_magnitude(config)) if operations else None,
        jitter=_jitter(config, block[_COLOUR]) if config.hue or config.saturation or config.value else None,
        noise=_noise(config.noise, block[_TURN], block[_COLOUR]) if config.noise else None,
        erasing=_erasing(config, block[_ERASING], block[_PLACE]) if config.erasing else None,
    )


def _sides(config: AugmentConfig, number: Floats, turn: Floats | None) -> Floats:
    """Sides of a crop that keeps a uniform share of the area, its ratio log-uniform within what fits."""
    area = config.crop + (1 - config.crop) * number
    side = np.sqrt(area)
    if turn is None or config.aspect == 1:
        return np.stack([side, side], axis=1)
    limit = np.minimum(math.log(config.aspect), -np.log(area))
    stretch = np.exp(0.5 * _either_way(turn[1], limit))
    sides: Floats = np.minimum(np.stack([side * stretch, side / stretch], axis=1), 1.0)
    return sides


def _jitter(config: AugmentConfig, numbers: Floats) -> Jitter:
    return Jitter(
        hue=_either_way(numbers[0], config.hue),
        saturation=1 + _either_way(numbers[1], config.saturation),
        value=1 + _either_way(numbers[2], config.value),
    )


def _noise(sigmas: tuple[float, float], turn: Floats, colour: Floats) -> Noise:
    sigma = sigmas[0] + (sigmas[1] - sigmas[0]) * turn[2]
    return Noise(np.where(colour[3] < 0.5, -sigma, sigma), _start(turn[3]))


def _erasing(config: AugmentConfig, numbers: Floats, place: Floats) -> Erasing:
    """Boxes of a uniform area, a log-uniform ratio and a uniform place; a side longer than the image is cut.

    The paper draws again in that case, which would make the number of draws depend on their values.
    """
    area = _ERASED[0] + (_ERASED[1] - _ERASED[0]) * numbers[1]
    stretch = np.exp(0.5 * _either_way(numbers[2], math.log(_ERASED_RATIO)))
    sides = np.minimum(np.stack([np.sqrt(area) * stretch, np.sqrt(area) / stretch], axis=1), 1.0)
    corner = place[:2].T * (1 - sides)
    return Erasing(
        numbers[0] < config.erasing, np.concatenate([corner, corner + sides], axis=1), _start(numbers[3])
    )


def _magnitude(config: AugmentConfig) -> float | None:
    return config.magnitude if config.policy == "randaugment" else None


def _either_way(number: Floats, limit: float | Floats) -> Floats:
    values: Floats = (2 * number - 1) * limit
    return values


def _start(number: Floats) -> Integers:
    return (number * BANK).astype(np.int64)

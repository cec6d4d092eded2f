"""MixUp (Zhang et al. 2018) and CutMix (Yun et al. 2019), their partners drawn like everything else."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from holotype.augment.parts import for_parts
from holotype.augment.philox import uniforms
from holotype.augment.samples import Samples
from holotype.config import AugmentConfig

__all__ = ["Mix", "draw_mix", "mix", "mix_targets"]

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

_STREAM = 1
_MIX, _CENTRE = range(2)


@dataclass(frozen=True)
class Mix:
    """What N images are mixed with, and how.

    `partners int64[N]` are places in the epoch's whole order; `lam float64[N]` is the image's own share, 1
    where it is left alone; where `cut bool[N]`, the rest is a box of the partner, `boxes int64[N, 4]` (left,
    top, right, bottom), else both are blended.
    """

    partners: Integers
    cut: npt.NDArray[np.bool_]
    lam: Floats
    boxes: Integers

    def __len__(self) -> int:
        return len(self.lam)

    def __getitem__(self, places: slice | npt.NDArray[np.int64]) -> Mix:
        return Mix(self.partners[places], self.cut[places], self.lam[places], self.boxes[places])


def draw_mix(
    config: AugmentConfig, *, seed: int, epoch: int, samples: Samples, pool: int, height: int, width: int
) -> Mix | None:
    """How `samples` are mixed in an epoch that shows `pool` images of that size; None where it is off.

    lam ~ Beta(alpha, alpha). CutMix's box has sides of sqrt(1 - lam) of the image's about a uniform centre
    and is clipped at the edges; its lam is then 1 - the box's true share of the area. Where MixUp and
    CutMix are both on, an image draws one of them, half and half.
    """
    if config.mixup == config.cutmix == 0:
        return None
    first, place = uniforms(samples, seed=seed, epoch=epoch, stream=_STREAM, blocks=(_MIX, _CENTRE))
    partners = (first[0] * pool).astype(np.int64)
    mixed = first[1] < config.mixed
    cut = mixed & (config.cutmix > 0) & ((config.mixup == 0) | (first[2] < 0.5))
    lam = np.where(cut, _beta(config.cutmix, first[3]), _beta(config.mixup, first[3]))
    lam = np.where(mixed, lam, 1.0)
    boxes = _boxes(np.where(cut, lam, 1.0), place, height=height, width=width)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return Mix(partners, cut, np.where(cut, 1 - area / (height * width), lam), boxes)


def mix(images: torch.Tensor, partners: torch.Tensor, mix: Mix) -> torch.Tensor:
    """Mix `uint8[N, H, W, 3]` with as many partners: boxes are copied, blends rounded to whole levels."""
    result = images.clone()

    def work(part: slice) -> None:
        _mix_into(result[part], partners[part], mix[part])

    for_parts(work, count=len(mix), pixels=images.shape[1] * images.shape[2], device=images.device)
    return result


def _mix_into(images: torch.Tensor, partners: torch.Tensor, mix: Mix) -> None:
    for place in mix.cut.nonzero()[0].tolist():
        left, top, right, bottom = mix.boxes[place].tolist()
        images[place, top:bottom, left:right] = partners[place, top:bottom, left:right]
    for place in (~mix.cut & (mix.lam < 1)).nonzero()[0].tolist():
        lam = float(mix.lam[place])
        images[place] = (images[place] * lam).add_(partners[place], alpha=1 - lam).round_()


def mix_targets(targets: torch.Tensor, partner_targets: torch.Tensor, mix: Mix) -> torch.Tensor:
    """lam times the targets `float32[N, C]` plus 1 - lam times the partners'."""
    lam = torch.from_numpy(mix.lam.astype(np.float32)).to(targets.device)[:, None]
    return lam * targets + (1 - lam) * partner_targets


def _beta(alpha: float, number: Floats) -> Floats:
    """Beta(alpha, alpha) by its inverse distribution function; ones where alpha is 0."""
    if alpha == 0:
        return np.ones_like(number)
    if alpha == 1:
        return number
    from scipy.special import betaincinv

    values: Floats = betaincinv(alpha, alpha, number)
    return values


def _boxes(lam: Floats, place: Floats, *, height: int, width: int) -> Integers:
    """Boxes `int64[N, 4]` of 1 - lam of the area about a uniform centre, clipped at the edges."""
    extent = np.array([width, height])
    half = (np.sqrt(1 - lam)[:, None] * extent).astype(np.int64) // 2
    centre = (place[:2].T * extent).astype(np.int64)
    return np.concatenate([np.clip(centre - half, 0, extent), np.clip(centre + half, 0, extent)], axis=1)

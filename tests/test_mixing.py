from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats

from holotype.augment import Mix, Samples, draw_mix, mix, mix_targets
from holotype.config import AugmentConfig

MANY = Samples(np.arange(20_000), np.zeros(20_000, dtype=np.int64))


def config(**changes: float) -> AugmentConfig:
    return AugmentConfig(preset="none", **changes)


def drawn(settings: AugmentConfig, *, samples: Samples = MANY, epoch: int = 1, seed: int = 0) -> Mix:
    mixed = draw_mix(settings, seed=seed, epoch=epoch, samples=samples, pool=500, height=40, width=80)
    assert mixed is not None
    return mixed


def mix_of(lam: npt.ArrayLike, boxes: list[list[int]], *, cut: list[bool]) -> Mix:
    return Mix(
        np.zeros(len(cut), dtype=np.int64), np.array(cut), np.asarray(lam, dtype=float), np.array(boxes)
    )


def images(count: int, *, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 4, 6, 3), dtype=torch.uint8, generator=generator)


def test_mixup_is_the_formula() -> None:
    own, other = images(3, seed=0), images(3, seed=1)
    lam = np.array([0.3, 0.8, 1.0])
    mixed = mix(own, other, mix_of(lam, [[0, 0, 0, 0]] * 3, cut=[False] * 3))
    for place in range(3):
        wanted = lam[place] * own[place].double() + (1 - lam[place]) * other[place].double()
        assert float((mixed[place] - wanted).abs().max()) <= 0.5 + 1e-4
    assert torch.equal(mixed[2], own[2])


def test_cutmix_copies_the_box_and_nothing_else() -> None:
    own, other = images(2, seed=0), images(2, seed=1)
    boxes = [[1, 0, 4, 2], [0, 0, 0, 0]]
    mixed = mix(own, other, mix_of([1 - 6 / 24, 1.0], boxes, cut=[True, True]))
    for row in range(4):
        for column in range(6):
            inside = row < 2 and 1 <= column < 4
            assert torch.equal(mixed[0, row, column], (other if inside else own)[0, row, column])
    assert torch.equal(mixed[1], own[1])


def test_both_labels_are_mixed_by_lam() -> None:
    own, other = torch.eye(3), torch.eye(3)[[1, 1, 0]]
    mixed = mix_targets(own, other, mix_of([0.75, 0.4, 1.0], [[0, 0, 0, 0]] * 3, cut=[False] * 3))
    assert torch.allclose(mixed, torch.tensor([[0.75, 0.25, 0], [0, 1, 0], [0, 0, 1]]))
    assert mixed.dtype == torch.float32


def test_nothing_is_mixed_where_both_are_off() -> None:
    assert draw_mix(config(), seed=0, epoch=1, samples=MANY, pool=5, height=8, width=8) is None


def test_lam_of_cutmix_is_what_the_box_leaves() -> None:
    mixed = drawn(config(cutmix=1.0))
    assert mixed.cut.all()
    left, top, right, bottom = mixed.boxes.T
    assert (left >= 0).all()
    assert (left <= right).all()
    assert (right <= 80).all()
    assert (top >= 0).all()
    assert (top <= bottom).all()
    assert (bottom <= 40).all()
    assert np.array_equal(mixed.lam, 1 - (right - left) * (bottom - top) / 3200)


def test_boxes_are_those_of_the_paper_clipped_at_every_edge() -> None:
    mixed = drawn(config(cutmix=1.0))
    left, top, right, bottom = mixed.boxes.T
    for low, high, side in ((left, right, 80), (top, bottom, 40)):
        assert (low == 0).mean() > 0.1
        assert (high == side).mean() > 0.1
    # Where no edge cuts it, a box is of the image's proportions ...
    inner = (left > 0) & (top > 0) & (right < 80) & (bottom < 40)
    assert (np.abs((right - left)[inner] - 2 * (bottom - top)[inner]) <= 4).all()
    # ... and clipping leaves, on the average, E[lam]: with half the sides a, b = sqrt(1 - lam) / 2, a uniform
    # centre keeps 2 a - a^2 of each side of the image (a <= 1/2), lam ~ U(0, 1).
    half = np.sqrt(1 - (np.arange(100_000) + 0.5) / 100_000) / 2
    assert abs(mixed.lam.mean() - (1 - ((2 * half - half**2) ** 2).mean())) < 0.02


def test_a_box_in_the_middle_has_the_area_that_lam_leaves() -> None:
    mixed = draw_mix(config(cutmix=1.0), seed=0, epoch=1, samples=MANY, pool=9, height=1000, width=1000)
    plain = draw_mix(config(mixup=1.0), seed=0, epoch=1, samples=MANY, pool=9, height=1000, width=1000)
    assert mixed is not None
    assert plain is not None
    left, top, right, bottom = mixed.boxes.T
    inner = (left > 0) & (top > 0) & (right < 1000) & (bottom < 1000)
    assert inner.sum() > 2000
    # The same sample draws the same lam for both, so MixUp tells what CutMix's box was made of.
    assert np.abs(mixed.lam - plain.lam)[inner].max() < 0.005


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_lam_is_beta_distributed(alpha: float) -> None:
    mixed = drawn(config(mixup=alpha))
    assert not mixed.cut.any()
    assert stats.kstest(mixed.lam, stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_an_image_draws_one_of_both_and_some_are_left_alone() -> None:
    mixed = drawn(config(mixup=0.4, cutmix=1.0, mixed=0.6))
    alone = ~mixed.cut & (mixed.lam == 1)
    assert abs(mixed.cut.mean() - 0.3) < 0.015
    assert abs(alone.mean() - 0.4) < 0.015
    assert not mixed.boxes[~mixed.cut].any(axis=1).all()
    assert ((mixed.boxes[:, 2:] - mixed.boxes[:, :2])[~mixed.cut] == 0).all()


def test_partners_are_places_in_the_whole_epoch_whatever_the_batch() -> None:
    settings = config(cutmix=1.0)
    mixed = drawn(settings)
    assert abs(np.bincount(mixed.partners, minlength=500) - 40).max() < 30
    assert mixed.partners.max() == 499
    alone = drawn(settings, samples=MANY[123:124])
    assert alone.partners[0] == mixed.partners[123]
    assert np.array_equal(alone.boxes[0], mixed.boxes[123])
    for other in (
        drawn(settings, epoch=2), drawn(settings, seed=1),
        drawn(settings, samples=Samples(MANY.rows, MANY.turns + 1)),
    ):  # fmt: skip
        assert (other.partners == mixed.partners).mean() < 0.01
        assert not np.array_equal(other.boxes, mixed.boxes)


def test_a_part_of_a_mix_mixes_its_part() -> None:
    own, other = images(8, seed=0), images(8, seed=1)
    samples = MANY[:8]
    mixed = draw_mix(
        config(mixup=1.0, cutmix=1.0), seed=0, epoch=1, samples=samples, pool=8, height=4, width=6
    )
    assert mixed is not None
    assert 0 < mixed.cut.sum() < 8
    together = mix(own, other, mixed)
    for place in range(8):
        part = slice(place, place + 1)
        assert torch.equal(mix(own[part], other[part], mixed[part]), together[part])

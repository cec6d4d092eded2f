from __future__ import annotations

import numpy as np
import torch

from holotype.augment import Draws, augment, draw
from holotype.config import AugmentConfig

SAMPLES = np.arange(200)


def test_draws_depend_on_seed_epoch_and_image_only() -> None:
    config = AugmentConfig()
    together = draw(config, seed=1, epoch=2, samples=SAMPLES)
    alone = draw(config, seed=1, epoch=2, samples=SAMPLES[[150]])
    assert alone.side[0] == together.side[150]
    assert alone.flip[0] == together.flip[150]
    for other in (
        draw(config, seed=2, epoch=2, samples=SAMPLES),
        draw(config, seed=1, epoch=3, samples=SAMPLES),
    ):
        assert not np.array_equal(other.side, together.side)


def test_crop_keeps_at_least_the_share_and_stays_inside() -> None:
    draws = draw(AugmentConfig(crop=0.8), seed=0, epoch=1, samples=np.arange(5000))
    area = draws.side**2
    assert area.min() >= 0.8
    assert area.max() <= 1.0
    assert abs(area.mean() - 0.9) < 0.005
    assert (np.abs(draws.centre_x) + draws.side <= 1 + 1e-12).all()
    assert abs(draws.flip.mean() - 0.5) < 0.03


def test_no_augmentation_changes_nothing() -> None:
    images = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8)
    draws = draw(AugmentConfig(flip=0, crop=1), seed=0, epoch=1, samples=np.arange(4))
    assert torch.equal(augment(images, draws, height=8, width=8), images)


def test_mirror_is_exact() -> None:
    images = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8)
    draws = draw(AugmentConfig(flip=1, crop=1), seed=0, epoch=1, samples=np.arange(4))
    assert torch.equal(augment(images, draws, height=8, width=8), images.flip(2))


def test_warp_of_the_whole_image_is_the_image_and_mirrored_its_mirror() -> None:
    images = torch.randint(0, 256, (2, 9, 9, 3), dtype=torch.uint8)
    # A side a hair below one takes the interpolating path.
    draws = Draws(np.array([False, True]), np.full(2, 1 - 1e-9), np.zeros(2), np.zeros(2))
    warped = augment(images, draws, height=9, width=9)
    assert torch.equal(warped[0], images[0])
    assert torch.equal(warped[1], images[1].flip(1))


def test_crop_shows_the_part_it_names() -> None:
    image = torch.zeros(1, 100, 100, 3, dtype=torch.uint8)
    image[0, :50, :50, 0] = 200
    corner = Draws(np.array([False]), np.array([0.5]), np.array([-0.5]), np.array([-0.5]))
    shown = augment(image, corner, height=40, width=40)
    assert (shown[0, 2:-2, 2:-2, 0] == 200).all()
    other = Draws(np.array([False]), np.array([0.5]), np.array([0.5]), np.array([0.5]))
    assert not augment(image, other, height=40, width=40)[0, 2:-2, 2:-2].any()

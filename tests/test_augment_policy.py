from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as reference

from holotype.augment import Draws, Samples, augment, draw
from holotype.augment.policy import Operation, Policy
from holotype.config import AugmentConfig
from photos import pieces

MANY = Samples(np.arange(20_000), np.zeros(20_000, dtype=np.int64))


def photos(count: int) -> torch.Tensor:
    return torch.from_numpy(np.stack(pieces(side=64)["flower"][:count]))


def applied(images: torch.Tensor, *steps: tuple[Operation, float]) -> torch.Tensor:
    """The images after the same operations, in turn."""
    count = len(images)
    policy = Policy(
        np.array([[operation] * count for operation, _ in steps]),
        np.array([[amount] * count for _, amount in steps]),
    )
    draws = Draws(np.zeros(count, dtype=bool), np.ones((count, 2)), np.zeros((count, 2)), policy=policy)
    return augment(images, draws, height=images.shape[1], width=images.shape[2])


def largest_difference(ours: torch.Tensor, theirs: torch.Tensor) -> int:
    """Between `uint8[N, H, W, 3]` and `uint8[N, 3, H, W]`."""
    return int((ours.int() - theirs.permute(0, 2, 3, 1).int()).abs().max())


@pytest.mark.parametrize("amount", [-0.99, -0.3, 0.0, 0.3, 0.99])
@pytest.mark.parametrize(
    ("operation", "theirs"),
    [
        (Operation.BRIGHTNESS, reference.adjust_brightness),
        (Operation.COLOUR, reference.adjust_saturation),
        (Operation.CONTRAST, reference.adjust_contrast),
        (Operation.SHARPNESS, reference.adjust_sharpness),
    ],
)
def test_enhancements_are_torchvisions(operation: Operation, theirs: object, amount: float) -> None:
    images = photos(6)
    wanted = theirs(images.permute(0, 3, 1, 2), 1 + amount)  # type: ignore[operator]
    # torchvision cuts fractions of a level off, of the grey and of the result; ours are rounded.
    assert largest_difference(applied(images, (operation, amount)), wanted) <= 2


@pytest.mark.parametrize("bits", [2, 4, 7, 8])
def test_posterize_is_torchvisions(bits: int) -> None:
    images = photos(6)
    wanted = reference.posterize(images.permute(0, 3, 1, 2), bits)
    assert largest_difference(applied(images, (Operation.POSTERIZE, bits)), wanted) == 0


@pytest.mark.parametrize("threshold", [0, 127.5, 255])
def test_solarize_is_torchvisions(threshold: float) -> None:
    images = photos(6)
    wanted = reference.solarize(images.permute(0, 3, 1, 2), threshold)
    assert largest_difference(applied(images, (Operation.SOLARIZE, threshold)), wanted) == 0


def flat_and_dark() -> torch.Tensor:
    """Photos, one of a single level, and one of few levels."""
    images = photos(6)
    images[4] = 77
    images[5] = images[5] // 100
    return images


def test_auto_contrast_is_torchvisions() -> None:
    images = flat_and_dark()
    wanted = reference.autocontrast(images.permute(0, 3, 1, 2))
    assert largest_difference(applied(images, (Operation.AUTO_CONTRAST, 0)), wanted) <= 1


def test_equalize_is_torchvisions() -> None:
    images = flat_and_dark()
    wanted = reference.equalize(images.permute(0, 3, 1, 2))
    assert largest_difference(applied(images, (Operation.EQUALIZE, 0)), wanted) == 0


def test_identity_changes_nothing() -> None:
    assert torch.equal(applied(photos(2), (Operation.IDENTITY, 0)), photos(2))


@pytest.mark.parametrize(
    ("operation", "amount", "shear", "angle"),
    [
        (Operation.SHEAR_X, 0.3, (0.3, 0.0), 0.0),
        (Operation.SHEAR_Y, -0.3, (0.0, -0.3), 0.0),
        (Operation.ROTATE, 25.0, (0.0, 0.0), -25.0),
    ],
)
def test_moves_are_torchvisions_about_the_centre(
    operation: Operation, amount: float, shear: tuple[float, float], angle: float
) -> None:
    images = photos(4)
    degrees = [math.degrees(math.atan(factor)) for factor in shear]
    wanted = reference.affine(
        images.permute(0, 3, 1, 2).float(), angle=angle, translate=[0, 0], scale=1, shear=degrees,
        interpolation=reference.InterpolationMode.BILINEAR,
    ).permute(0, 2, 3, 1)  # fmt: skip
    ours = applied(images, (operation, amount))
    middle = (slice(None), slice(16, -16), slice(16, -16))
    assert float((ours.float() - wanted)[middle].abs().max()) <= 1


@pytest.mark.parametrize(("operation", "axis"), [(Operation.TRANSLATE_X, 2), (Operation.TRANSLATE_Y, 1)])
def test_translations_are_shares_of_the_side_and_reflect_the_image_at_its_edge(
    operation: Operation, axis: int
) -> None:
    images = photos(2)
    moved = applied(images, (operation, 8 / 64))
    assert torch.equal(moved.narrow(axis, 0, 56), images.narrow(axis, 8, 56))
    assert torch.equal(moved.narrow(axis, 56, 8), images.narrow(axis, 56, 8).flip(axis))


def test_moves_are_interpolated_once_and_before_the_colours() -> None:
    images = photos(2)
    there_and_back = applied(
        images, (Operation.ROTATE, 20), (Operation.SOLARIZE, 100), (Operation.ROTATE, -20)
    )
    assert torch.equal(there_and_back, applied(images, (Operation.SOLARIZE, 100)))


def test_colour_operations_follow_each_other_in_order() -> None:
    images = photos(2)
    first = applied(images, (Operation.POSTERIZE, 3), (Operation.SOLARIZE, 100))
    second = applied(images, (Operation.SOLARIZE, 100), (Operation.POSTERIZE, 3))
    assert torch.equal(first, applied(applied(images, (Operation.POSTERIZE, 3)), (Operation.SOLARIZE, 100)))
    assert not torch.equal(first, second)


def test_trivial_augment_draws_one_of_fourteen_at_one_of_31_magnitudes() -> None:
    config = AugmentConfig(preset="none", policy="trivial")
    policy = draw(config, seed=0, epoch=1, samples=MANY).policy
    assert policy is not None
    assert policy.operations.shape == (1, 20_000)
    shares = np.bincount(policy.operations[0], minlength=14) / 20_000
    assert np.abs(shares - 1 / 14).max() < 0.01

    def amounts(operation: Operation) -> list[float]:
        return sorted(set(policy.amounts[policy.operations == operation].round(9).tolist()))

    steps = np.arange(31) / 30
    signed = np.unique(np.concatenate([-steps, steps]))
    for operation, largest in (
        (Operation.SHEAR_X, 0.99), (Operation.SHEAR_Y, 0.99), (Operation.TRANSLATE_X, 32 / 224),
        (Operation.TRANSLATE_Y, 32 / 224), (Operation.ROTATE, 135), (Operation.BRIGHTNESS, 0.99),
        (Operation.COLOUR, 0.99), (Operation.CONTRAST, 0.99), (Operation.SHARPNESS, 0.99),
    ):  # fmt: skip
        assert amounts(operation) == pytest.approx(largest * signed)
    assert amounts(Operation.POSTERIZE) == [2, 3, 4, 5, 6, 7, 8]
    assert amounts(Operation.SOLARIZE) == pytest.approx(255 * steps)
    assert amounts(Operation.EQUALIZE) == [0]


def test_randaugment_draws_several_at_one_magnitude() -> None:
    config = AugmentConfig(preset="none", policy="randaugment", operations=2, magnitude=15)
    policy = draw(config, seed=0, epoch=1, samples=MANY).policy
    assert policy is not None
    assert policy.operations.shape == (2, 20_000)
    # The second operation does not depend on the first.
    together = np.bincount(policy.operations[0] * 14 + policy.operations[1], minlength=196) / 20_000
    assert np.abs(together - 1 / 196).max() < 0.003
    for operation, size in (
        (Operation.SHEAR_Y, 0.15), (Operation.TRANSLATE_X, 75 / 331), (Operation.ROTATE, 15),
        (Operation.CONTRAST, 0.45),
    ):  # fmt: skip
        drawn = policy.amounts[policy.operations == operation]
        assert sorted(set(drawn.round(9).tolist())) == pytest.approx([-size, size])
        assert abs((drawn > 0).mean() - 0.5) < 0.04
    assert set(policy.amounts[policy.operations == Operation.POSTERIZE].tolist()) == {6}
    assert set(policy.amounts[policy.operations == Operation.SOLARIZE].tolist()) == {127.5}

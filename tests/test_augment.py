from __future__ import annotations

import colorsys
import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from holotype.augment import Draws, Samples, augment, draw, draw_training_batch, mixed_captions
from holotype.augment.draws import Erasing, Jitter, Noise
from holotype.augment.philox import philox, uniforms
from holotype.config import AugmentConfig
from photos import pieces

EVERYTHING = AugmentConfig(
    crop=0.5, aspect=1.3, erasing=0.5, policy="randaugment", operations=3, hue=180, saturation=1, value=0.5
)


def samples_of(rows: npt.ArrayLike, *, turns: npt.ArrayLike = 0) -> Samples:
    rows = np.asarray(rows, dtype=np.int64)
    return Samples(rows, np.broadcast_to(np.asarray(turns, dtype=np.int64), rows.shape))


SAMPLES = samples_of(np.arange(200))


def still(count: int, **changes: object) -> Draws:
    """Draws that change nothing, but for `changes`."""
    nothing = Draws(np.zeros(count, dtype=bool), np.ones((count, 2)), np.zeros((count, 2)))
    return dataclasses.replace(nothing, **changes)  # type: ignore[arg-type]


def photos(count: int, *, side: int = 64) -> torch.Tensor:
    return torch.from_numpy(np.stack(pieces(side=side)["flower"][:count]))


def noise_images(count: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)


def flattened(value: object) -> list[npt.NDArray[np.generic]]:
    """All arrays of nested draws, images first."""
    if dataclasses.is_dataclass(value):
        parts = [getattr(value, field.name) for field in dataclasses.fields(value)]
        return [array for part in parts for array in flattened(part)]
    if value is None:
        return []
    assert isinstance(value, np.ndarray)
    return [value]


# The generator


@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1, 2**64 + 5])
def test_the_generator_is_numpys(seed: int) -> None:
    samples = samples_of([0, 5, 70_000, 2**40], turns=[0, 0, 3, 2**33])
    numbers = uniforms(samples, seed=seed, epoch=9, stream=2, blocks=(0, 1, 2))
    for place in range(4):
        counter = [2 << 32, int(samples.turns[place]), 9, int(samples.rows[place])]
        generator = np.random.Generator(np.random.Philox(key=seed, counter=counter))
        assert np.array_equal(numbers[:, :, place], generator.random((3, 4)))


def test_words_are_those_of_the_papers_reference_implementation() -> None:
    # Random123, tests/kat_vectors: philox4x64-10 of zeros and of ones.
    zeros = philox(np.zeros((4, 1), dtype=np.uint64), key=0)
    assert [int(word) for word in zeros[:, 0]] == [
        0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B,
    ]  # fmt: skip
    ones = philox(np.full((4, 1), 2**64 - 1, dtype=np.uint64), key=2**128 - 1)
    assert [int(word) for word in ones[:, 0]] == [
        0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0,
    ]  # fmt: skip


def test_draws_depend_on_seed_epoch_row_and_turn_only() -> None:
    together = flattened(draw(EVERYTHING, seed=1, epoch=2, samples=SAMPLES))
    assert len(together) == 14
    alone = flattened(draw(EVERYTHING, seed=1, epoch=2, samples=SAMPLES[np.array([150])]))
    for many, one in zip(together, alone, strict=True):
        axis = many.shape.index(200)
        assert np.array_equal(many.take([150], axis=axis), one)
    for other in (
        draw(EVERYTHING, seed=2, epoch=2, samples=SAMPLES),
        draw(EVERYTHING, seed=1, epoch=3, samples=SAMPLES),
        draw(EVERYTHING, seed=1, epoch=2, samples=samples_of(np.arange(200), turns=1)),
    ):
        for before, after in zip(together, flattened(other), strict=True):
            assert not np.array_equal(before, after)


def test_a_draw_does_not_change_when_another_is_turned_on() -> None:
    alone = draw(AugmentConfig(preset="light"), seed=3, epoch=1, samples=SAMPLES)
    among = draw(AugmentConfig(preset="strong", crop=0.8), seed=3, epoch=1, samples=SAMPLES)
    assert np.array_equal(alone.flip, among.flip)
    assert np.array_equal(alone.side, among.side)
    assert np.array_equal(alone.centre, among.centre)


def test_what_is_off_is_not_drawn() -> None:
    draws = draw(AugmentConfig(preset="light"), seed=0, epoch=1, samples=SAMPLES)
    assert (draws.angle, draws.policy, draws.jitter, draws.noise, draws.erasing) == (None,) * 5


# Geometry


def test_crop_keeps_at_least_the_share_and_stays_inside() -> None:
    draws = draw(AugmentConfig(crop=0.8), seed=0, epoch=1, samples=samples_of(np.arange(5000)))
    area = draws.side.prod(axis=1)
    assert area.min() >= 0.8
    assert area.max() <= 1.0
    assert abs(area.mean() - 0.9) < 0.005
    assert (np.abs(draws.centre) + draws.side <= 1 + 1e-12).all()
    assert abs(draws.flip.mean() - 0.5) < 0.03
    assert draws.angle is not None
    assert -30 <= draws.angle.min() < -29
    assert 29 < draws.angle.max() <= 30


def test_aspect_stretches_within_its_bound_and_keeps_the_area_and_the_image() -> None:
    config = AugmentConfig(crop=0.3, aspect=1.5)
    draws = draw(config, seed=0, epoch=1, samples=samples_of(np.arange(5000)))
    ratio = draws.side[:, 0] / draws.side[:, 1]
    assert 1 / 1.5 - 1e-9 <= ratio.min() < 0.7
    assert 1.45 < ratio.max() <= 1.5 + 1e-9
    assert abs(np.log(ratio).mean()) < 0.01
    area = draws.side.prod(axis=1)
    assert area.min() >= 0.3 - 1e-9
    assert abs(area.mean() - 0.65) < 0.01
    assert draws.side.max() <= 1
    assert (np.abs(draws.centre) + draws.side <= 1 + 1e-12).all()


@pytest.mark.parametrize("shape", [(8, 8), (7, 11)])
def test_no_augmentation_changes_nothing(shape: tuple[int, int]) -> None:
    images = noise_images(4, *shape)
    draws = draw(AugmentConfig(preset="none"), seed=0, epoch=1, samples=samples_of(np.arange(4)))
    assert torch.equal(augment(images, draws, height=shape[0], width=shape[1]), images)


def test_mirror_is_exact() -> None:
    images = noise_images(4, 8, 8)
    draws = draw(AugmentConfig(preset="none", flip=1), seed=0, epoch=1, samples=samples_of(np.arange(4)))
    assert torch.equal(augment(images, draws, height=8, width=8), images.flip(2))


def test_warp_of_the_whole_image_is_the_image_and_mirrored_its_mirror() -> None:
    images = noise_images(2, 9, 9)
    # A side a hair below one takes the interpolating path.
    draws = still(2, flip=np.array([False, True]), side=np.full((2, 2), 1 - 1e-9))
    warped = augment(images, draws, height=9, width=9)
    assert torch.equal(warped[0], images[0])
    assert torch.equal(warped[1], images[1].flip(1))


def test_crop_shows_the_part_it_names() -> None:
    image = torch.zeros(1, 100, 100, 3, dtype=torch.uint8)
    image[0, :50, :50, 0] = 200
    corner = still(1, side=np.full((1, 2), 0.5), centre=np.full((1, 2), -0.5))
    shown = augment(image, corner, height=40, width=40)
    assert (shown[0, 2:-2, 2:-2, 0] == 200).all()
    other = still(1, side=np.full((1, 2), 0.5), centre=np.array([[0.5, -0.5]]))
    assert not augment(image, other, height=40, width=40)[0, 2:-2, 2:-2].any()


def test_turns_by_right_angles_are_exact_and_counter_clockwise() -> None:
    images = noise_images(3, 16, 16)
    turned = augment(images, still(3, angle=np.array([90.0, -90.0, 180.0])), height=16, width=16)
    for place, quarters in enumerate((1, -1, 2)):
        assert torch.equal(turned[place], images[place].rot90(quarters, (0, 1)))


def test_a_turn_is_pillows_where_the_image_is() -> None:
    image = photos(1)
    turned = augment(image, still(1, angle=np.array([20.0])), height=64, width=64)[0].numpy().astype(int)
    wanted = Image.fromarray(image[0].numpy()).rotate(20.0, Image.Resampling.BILINEAR)
    # Pillow's bilinear rotation works with fixed-point weights.
    middle = np.s_[16:-16, 16:-16]
    assert np.abs(turned[middle] - np.asarray(wanted).astype(int)[middle]).max() <= 2


def test_an_image_that_is_not_square_is_turned_without_shear() -> None:
    down, across = np.mgrid[:60, :120]
    distances = np.stack([np.hypot(down - 29.5, (across - 59.5) / 2), np.hypot(down - 29.5, across - 59.5)])
    hills = (255 * np.exp(-((distances / 12) ** 2))).astype(np.uint8)
    images = torch.from_numpy(hills[..., None].repeat(3, axis=3))
    turned = augment(images, still(2, angle=np.full(2, 37.0)), height=60, width=120)
    changed = (turned.int() - images.int()).abs().float().mean((1, 2, 3))
    assert changed[1] < 1  # a round hill stays, but for rounding
    assert changed[0] > 10


def test_turned_corners_are_not_black() -> None:
    image = photos(1).clamp(min=60)
    turned = augment(image, still(1, angle=np.array([45.0])), height=64, width=64)
    assert int(turned.min()) >= 60


@pytest.mark.parametrize(("height", "width"), [(24, 24), (37, 53)])
def test_an_image_comes_out_the_same_in_any_batch(height: int, width: int) -> None:
    images = noise_images(12, round(height * 1.4), round(width * 1.4))
    samples = samples_of(np.arange(12) * 31)
    draws = draw(EVERYTHING, seed=5, epoch=4, samples=samples)
    together = augment(images, draws, height=height, width=width)
    for place in (0, 7, 11):
        one = samples[place : place + 1]
        alone = augment(
            images[place : place + 1],
            draw(EVERYTHING, seed=5, epoch=4, samples=one),
            height=height,
            width=width,
        )
        assert torch.equal(alone[0], together[place])
    order = np.random.default_rng(0).permutation(12)
    shuffled = augment(
        images[order], draw(EVERYTHING, seed=5, epoch=4, samples=samples[order]), height=height, width=width
    )
    assert torch.equal(shuffled, together[order])


def test_global_generators_are_left_alone() -> None:
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]  # noqa: NPY002
    augment(
        noise_images(4, 32, 32), draw(EVERYTHING, seed=0, epoch=1, samples=SAMPLES[:4]), height=24, width=24
    )
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # type: ignore[index]  # noqa: NPY002


def test_threads_change_nothing_and_keep_their_number_to_themselves() -> None:
    images = noise_images(32, 96, 96)
    draws = draw(EVERYTHING, seed=0, epoch=1, samples=SAMPLES[:32])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = augment(images, draws, height=64, width=64)
        torch.set_num_threads(3)
        with torch.inference_mode():
            together = augment(images, draws, height=64, width=64)
        assert torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as fresh:
            assert fresh.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone, together)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_same_levels() -> None:
    images = noise_images(8, 64, 64)
    draws = draw(AugmentConfig(preset="strong"), seed=0, epoch=1, samples=SAMPLES[:8])
    here = augment(images, draws, height=56, width=56).int()
    there = augment(images.cuda(), draws, height=56, width=56).cpu().int()
    assert float(((here - there).abs() <= 1).float().mean()) > 0.999


# Colours


def every_colour(step: int) -> torch.Tensor:
    """All colours of levels 0, step, ..., as `uint8[1, H, W, 3]`."""
    levels = np.arange(0, 256, step, dtype=np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1)
    return torch.from_numpy(cube.reshape(1, len(levels), -1, 3))


@pytest.mark.parametrize(
    ("hue", "saturation", "value"),
    [
        (0, 1, 1), (15, 1, 1), (-15, 1.3, 0.7), (7.5, 0.7, 1.3), (60, 1, 1), (-61, 2, 1), (100, 0.5, 1.1),
        (180, 1, 1), (-180, 1.3, 1.3), (0, 0, 1), (0, 2, 1), (0, 1, 0), (0, 1, 2), (-3, 1.05, 0.95),
    ],
)  # fmt: skip
def test_the_jitter_is_the_hexcone_model(hue: float, saturation: float, value: float) -> None:
    colours = every_colour(17)
    jitter = Jitter(np.array([hue]), np.array([saturation]), np.array([value]))
    changed = augment(colours, still(1, jitter=jitter), height=colours.shape[1], width=colours.shape[2])
    for before, after in zip(colours.view(-1, 3).tolist(), changed.view(-1, 3).tolist(), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*(level / 255 for level in before))
        wanted = colorsys.hsv_to_rgb((h + hue / 360) % 1, min(s * saturation, 1), min(v * value, 1))
        # Half a level of rounding, and what the fused form adds.
        assert max(abs(255 * w - a) for w, a in zip(wanted, after, strict=True)) <= 0.502


def test_the_jitter_is_kornias_conversion_there_and_back() -> None:
    from kornia.color import hsv_to_rgb, rgb_to_hsv

    images = photos(4)
    hue, saturation, value = np.array([[-14.0, 3, 9, 15], [0.7, 0.9, 1.1, 1.3], [1.3, 1, 0.8, 0.7]])
    jitter = Jitter(hue, saturation, value)
    changed = augment(images, still(4, jitter=jitter), height=64, width=64)
    turned, strong, bright = rgb_to_hsv(images.permute(0, 3, 1, 2) / 255).unbind(1)
    column = [torch.from_numpy(v).float()[:, None, None] for v in (np.radians(hue), saturation, value)]
    turned = (turned + column[0]) % (2 * math.pi)
    strong, bright = (strong * column[1]).clamp(max=1), (bright * column[2]).clamp(max=1)
    wanted = hsv_to_rgb(torch.stack([turned, strong, bright], 1)).permute(0, 2, 3, 1)
    assert float((255 * wanted - changed).abs().max()) <= 0.55


def test_jitter_is_drawn_within_its_ranges() -> None:
    jitter = draw(AugmentConfig(), seed=0, epoch=1, samples=samples_of(np.arange(4000))).jitter
    assert jitter is not None
    for values, low, high in (
        (jitter.hue, -15, 15), (jitter.saturation, 0.7, 1.3), (jitter.value, 0.7, 1.3),
    ):  # fmt: skip
        spread = high - low
        assert low <= values.min() < low + 0.01 * spread
        assert high - 0.01 * spread < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.02 * spread


# Noise


def grey(count: int, side: int = 100) -> torch.Tensor:
    return torch.full((count, side, side, 3), 128, dtype=torch.uint8)


def test_noise_is_gaussian_with_the_drawn_sigma() -> None:
    sigma = np.array([0.01, -0.03, 0.05])
    noisy = augment(
        grey(3), still(3, noise=Noise(sigma, np.array([0, 77_777, 2**20 - 5]))), height=100, width=100
    )
    difference = noisy.double().numpy() - 128
    for image, wanted in zip(difference, np.abs(sigma) * 255, strict=True):
        # Rounding to levels adds a variance of 1/12; 30,000 values give the deviation within 0.4 %.
        assert abs(image.std() / math.hypot(wanted, math.sqrt(1 / 12)) - 1) < 0.02
        assert abs(image.mean()) < 4 * wanted / math.sqrt(image.size)
        standard = (image - image.mean()) / image.std()
        assert abs((standard**3).mean()) < 0.08
        assert abs((standard**4).mean() - 3) < 0.2
        assert abs(np.corrcoef(image[..., 0].ravel(), image[..., 1].ravel())[0, 1]) < 0.04
        assert abs(np.corrcoef(image[:, 1:, 0].ravel(), image[:, :-1, 0].ravel())[0, 1]) < 0.04


def test_noise_repeats_for_the_same_sample_and_differs_for_any_other() -> None:
    config = AugmentConfig(preset="none", noise=(0.05, 0.05))

    def shown(*, epoch: int) -> torch.Tensor:
        draws = draw(config, seed=0, epoch=epoch, samples=SAMPLES[:6])
        return augment(grey(6), draws, height=100, width=100)

    first, again, later = shown(epoch=1), shown(epoch=1), shown(epoch=2)
    assert torch.equal(first, again)
    different = torch.cat([first, later]).flatten(1).double().numpy()
    correlation = np.corrcoef(different) - np.eye(12)
    assert np.abs(correlation).max() < 0.04


def test_noise_is_drawn_within_its_range_and_with_either_sign() -> None:
    noise = draw(AugmentConfig(), seed=0, epoch=1, samples=samples_of(np.arange(4000))).noise
    assert noise is not None
    sigma = np.abs(noise.sigma)
    assert 0.01 <= sigma.min() < 0.0105
    assert 0.0495 < sigma.max() <= 0.05
    assert abs((noise.sigma > 0).mean() - 0.5) < 0.03
    assert noise.start.min() >= 0
    assert noise.start.max() < 2**20
    assert len(set(noise.start.tolist())) > 3950


# Erasing


def test_erasing_fills_the_box_and_leaves_the_rest() -> None:
    boxes = np.array([[0.25, 0.5, 0.75, 1.0], [0, 0, 1, 1]])
    erasing = Erasing(np.array([True, False]), boxes, np.array([3, 5]))
    images = torch.zeros(2, 40, 80, 3, dtype=torch.uint8)
    erased = augment(images, still(2, erasing=erasing), height=40, width=80)
    filled = erased[0, 20:, 20:60].double()
    assert abs(float(filled.mean()) - 127.5) < 4
    assert 58 < float(filled.std()) < 66
    erased[0, 20:, 20:60] = 0
    assert not erased.any()


def test_erased_boxes_are_as_the_paper_draws_them() -> None:
    config = AugmentConfig(erasing=0.25)
    erasing = draw(config, seed=0, epoch=1, samples=samples_of(np.arange(8000))).erasing
    assert erasing is not None
    assert abs(erasing.chosen.mean() - 0.25) < 0.02
    assert erasing.boxes.min() >= 0
    assert erasing.boxes.max() <= 1
    sides = erasing.boxes[:, 2:] - erasing.boxes[:, :2]
    area, ratio = sides.prod(axis=1), sides[:, 0] / sides[:, 1]
    assert 0.02 - 1e-9 <= area.min() < 0.021
    assert 0.32 < area.max() <= 1 / 3 + 1e-9
    assert 0.3 - 1e-9 <= ratio.min() < 0.32
    assert 3.1 < ratio.max() <= 1 / 0.3 + 1e-9
    assert abs((ratio > 1).mean() - 0.5) < 0.03


# The picture


def test_captions_name_both_labels_of_a_mixed_image_and_their_shares() -> None:
    targets = np.array([[0.0, 1.0, 0.0], [0.29, 0.0, 0.71], [0.5, 0.5, 0.0]], dtype=np.float32)
    assert mixed_captions(targets, names=("dress", "hat", "shirt")) == [
        "hat",
        "shirt 0.71 + dress 0.29",
        "dress 0.50 + hat 0.50",
    ]


def test_the_picture_shows_images_and_captions(tmp_path: Path) -> None:
    images = photos(12).numpy().repeat(3, axis=0)
    captions = ["t-shirt", "shirt 0.71 + dress 0.29", "a\udc80" + "long " * 40, *["hat"] * 33]
    file = tmp_path / "train_batch.jpg"
    draw_training_batch(images, captions, file)
    with Image.open(file) as sheet:
        assert sheet.format == "JPEG"
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    # 32 of 36 images in four rows of eight, each shown at twice its size.
    assert pixels.shape[1] == 8 * (176 + 8) + 8
    tile = pixels[8 : 8 + 128, 8 : 8 + 128]
    assert np.abs(tile - images[0].repeat(2, axis=0).repeat(2, axis=1)).mean() < 6
    below = pixels[8 + 128 + 1 : 8 + 128 + 36]
    dark = (below.max(axis=2) < 100).any(axis=0)
    assert dark[8 : 8 + 60].any()
    # Nothing of the long caption reaches into the next tile.
    assert not dark[8 + 3 * 184 - 8 : 8 + 3 * 184].any()
    with pytest.raises(OSError, match="missing"):
        draw_training_batch(images, captions, tmp_path / "missing" / "train_batch.jpg")


@pytest.mark.parametrize(("count", "height", "width"), [(1, 32, 32), (5, 300, 200), (3, 2, 700)])
def test_the_picture_holds_any_number_and_size(tmp_path: Path, count: int, height: int, width: int) -> None:
    file = tmp_path / "train_batch.jpg"
    draw_training_batch(noise_images(count, height, width).numpy(), ["x"] * count, file)
    with Image.open(file) as sheet:
        assert sheet.width <= 184 * math.ceil(math.sqrt(2 * count)) + 8

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter
from sklearn.datasets import load_sample_image

from holotype.audit.contract import Issue
from holotype.audit.health import (
    FileFacts,
    Measures,
    find_issues,
    join_measures,
    measure,
    named_columns,
    shortcuts,
    unreadable_issues,
)
from holotype.config import HealthConfig
from holotype.preprocess import Preprocess, read_pixels

CONFIG = HealthConfig()
SPEC = Preprocess()
Alter = Callable[[Image.Image], Image.Image]


@cache
def photo(name: str, *, width: int = 320) -> Image.Image:
    """A real photo (640 x 427), reduced."""
    image = Image.fromarray(load_sample_image(f"{name}.jpg"))
    return image.resize((width, width * 2 // 3), Image.Resampling.LANCZOS)


def seen(*images: Image.Image, quality: int = 90) -> Measures:
    """What is measured of images that went through a JPEG file and the pixel path."""
    views = []
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        views.append(read_pixels(buffer.getvalue(), spec=SPEC))
    widths, heights = zip(*(image.size for image in images), strict=True)
    return measure(np.stack(views), width=np.array(widths), height=np.array(heights))


def plain_facts(count: int, **changes: Any) -> FileFacts:
    facts: dict[str, Any] = {
        "format": ["JPEG"] * count,
        "mode": ["RGB"] * count,
        "width": np.full(count, 400),
        "height": np.full(count, 300),
        "bytes": np.full(count, 12_000),
    }
    return FileFacts(**(facts | changes))


def names(count: int) -> list[str]:
    return [f"train/a/{i:03d}.jpg" for i in range(count)]


def healthy(count: int, **changes: Any) -> Measures:
    """Measures of ordinary photos, with some columns replaced."""
    usual = {
        "shadows": 0.2, "highlights": 0.8, "brightness": 0.5, "contrast": 0.2, "sharpness": 0.7,
        "information": 7.0, "colourfulness": 0.1,
    }  # fmt: skip
    columns = {name: np.full(count, value, dtype=np.float32) for name, value in usual.items()}
    return Measures(**(columns | {name: np.asarray(v, dtype=np.float32) for name, v in changes.items()}))


def issues_of(image: Image.Image) -> set[str]:
    """Issues of one image among nineteen ordinary ones."""
    measures = join_measures([healthy(19), seen(image)])
    facts = plain_facts(20)
    issues, traits = find_issues(names(20), facts, measures, config=CONFIG)
    assert not traits
    assert all(issue.path == "train/a/019.jpg" for issue in issues)
    return {issue.issue for issue in issues}


def moved(image: Image.Image, *, pixels: int) -> Image.Image:
    """As if the camera had moved sideways during the exposure."""
    levels = np.asarray(image, dtype=np.float32)
    return Image.fromarray(
        np.mean([np.roll(levels, step, axis=1) for step in range(pixels)], axis=0).astype(np.uint8)
    )


def flat(image: Image.Image, *, noise: float = 0.0) -> Image.Image:
    random = np.random.default_rng(0).normal(0, noise, (image.height, image.width, 1))
    colour = np.asarray(image, dtype=np.float32).mean(axis=(0, 1))
    return Image.fromarray(np.clip(colour + random, 0, 255).astype(np.uint8))


class TestMeasure:
    @pytest.mark.parametrize("name", ["china", "flower"])
    @pytest.mark.parametrize(
        ("alter", "expected"),
        [
            (lambda image: image, set()),
            (lambda image: image.resize((96, 64)), set()),
            (lambda image: image.resize((36, 24)), set()),
            (lambda image: image.filter(ImageFilter.GaussianBlur(2)), {"blurry"}),
            (lambda image: image.filter(ImageFilter.GaussianBlur(4)), {"blurry"}),
            (lambda image: image.resize((36, 24)).filter(ImageFilter.GaussianBlur(2)), {"blurry"}),
            (lambda image: moved(image, pixels=12), {"blurry"}),
            (lambda image: image.point(lambda level: level * 0.15), {"dark"}),
            (lambda image: image.point(lambda level: 255 - (255 - level) * 0.15), {"light"}),
            (lambda image: image.convert("L").convert("RGB"), {"grey"}),
            (flat, {"low information"}),
            (lambda image: flat(image, noise=1.5), {"low information"}),
        ],
        ids=[
            "as it is", "96 px", "36 px", "blur 2", "blur 4", "36 px blur 2", "moved", "dark", "light",
            "grey", "flat", "flat with noise",
        ],
    )  # fmt: skip
    def test_what_is_planted_is_found_and_nothing_else(
        self, name: str, alter: Alter, expected: set[str]
    ) -> None:
        assert issues_of(alter(photo(name))) == expected

    def test_levels_of_a_known_image(self) -> None:
        pixels = np.zeros((1, 64, 64, 3), dtype=np.uint8)
        pixels[:, :, 16:] = 51  # a quarter black, the rest at one fifth
        found = measure(pixels, width=np.array([64]), height=np.array([64]))
        assert found.brightness[0] == pytest.approx(0.15)
        assert found.contrast[0] == pytest.approx(0.2 * (0.25 * 0.75) ** 0.5)
        assert found.information[0] == pytest.approx(-0.25 * np.log2(0.25) - 0.75 * np.log2(0.75))
        assert (found.shadows[0], found.highlights[0]) == (0.0, pytest.approx(0.2))
        assert found.colourfulness[0] == 0

    def test_colourfulness_is_the_spread_of_the_channels(self) -> None:
        pixels = np.tile(np.array([255, 102, 0], dtype=np.uint8), (1, 32, 32, 1))
        assert measure(pixels, width=np.array([32]), height=np.array([32])).colourfulness[0] == 1

    @pytest.mark.parametrize("contrast", [80, 200])
    def test_a_step_is_sharp_and_a_ramp_is_not_at_any_contrast(self, contrast: int) -> None:
        down, across = np.mgrid[0:224, 0:224]
        step = (((down // 32) + (across // 32)) % 2) * contrast
        ramp = (abs(down % 64 - 32) + abs(across % 64 - 32)) * contrast / 64
        views = np.stack([np.repeat(levels[..., None], 3, axis=2) for levels in (step, ramp)])
        size = np.array([224, 224])
        sharp, soft = measure(views.astype(np.uint8), width=size, height=size).sharpness
        assert sharp == pytest.approx(1.0, abs=0.1)
        assert soft == pytest.approx(0.0, abs=0.1)

    def test_a_small_image_is_judged_at_its_own_size(self) -> None:
        small = photo("china").resize((64, 43), Image.Resampling.LANCZOS)
        enlarged = small.resize((320, 213), Image.Resampling.BICUBIC)
        assert seen(small).sharpness[0] > 0.5
        assert seen(enlarged).sharpness[0] < 0.1

    def test_sharpness_of_what_has_none_is_unknown(self) -> None:
        pixels = np.full((2, 224, 224, 3), 90, dtype=np.uint8)
        pixels[1, :, 100:] = 200
        found = measure(pixels, width=np.array([224, 1]), height=np.array([224, 1]))
        assert np.isnan(found.sharpness).all()

    def test_batches_give_what_the_whole_gives(self) -> None:
        images = [photo("china"), photo("flower"), flat(photo("china"))]
        together = seen(*images)
        parts = join_measures([seen(images[0]), seen(*images[1:])])
        for name, values in vars(together).items():
            assert values.dtype == np.float32
            np.testing.assert_array_equal(values, getattr(parts, name))


class TestFindIssues:
    def find(self, paths: list[str], facts: FileFacts, **columns: Any) -> list[Issue]:
        issues, _ = find_issues(paths, facts, healthy(len(paths), **columns), config=CONFIG)
        return list(issues)

    @pytest.mark.parametrize(
        ("path", "kind", "wrong"),
        [
            ("a/x.jpg", "JPEG", False), ("a/x.JPEG", "MPO", False), ("a/x.jfif", "JPEG", False),
            ("a/x.jpg", "PNG", True), ("a/x.png", "JPEG", True), ("a/x.tif", "TIFF", False),
            ("a/x.webp", "AVIF", True), ("a/x", "PNG", False), ("a.b/x", "PNG", False),
            ("a/x.heic", "HEIF", False), ("a/x.png#xywh=1,2,3.5,4", "PNG", False),
            ("a/x.jpg#xywh=1,2,3.5,4", "PNG", True), ("a/x.dat", "JPEG", True),
        ],
    )  # fmt: skip
    def test_wrong_extension(self, path: str, kind: str, wrong: bool) -> None:
        facts = plain_facts(20, format=["JPEG"] * 19 + [kind])
        found = self.find([*names(19), path], facts)
        assert found == ([Issue(path=path, issue="wrong extension", value=kind)] if wrong else [])

    def test_unusual_modes_are_those_that_most_images_do_not_have(self) -> None:
        few = plain_facts(40, mode=["RGB"] * 35 + ["L", "RGBA", "CMYK", "I;16", "RGB;16B"])
        found = self.find(names(40), few)
        assert [(issue.issue, issue.value) for issue in found] == [
            ("unusual mode", "CMYK"), ("unusual mode", "I;16"), ("unusual mode", "RGB;16B"),
        ]  # fmt: skip
        assert self.find(names(40), plain_facts(40, mode=["I;16"] * 39 + ["RGB"])) == []

    def test_sizes_and_aspects(self) -> None:
        width, height = np.full(40, 400), np.full(40, 300)
        width[5], height[5] = 1, 1
        width[6], height[6] = 4000, 3000
        width[7], height[7] = 900, 200
        found = self.find(names(40), plain_facts(40, width=width, height=height))
        assert [(issue.path, issue.issue, issue.value) for issue in found] == [
            ("train/a/005.jpg", "odd size", "1x1"),
            ("train/a/006.jpg", "odd size", "4000x3000"),
            ("train/a/007.jpg", "odd aspect", 4.5),
        ]

    def test_an_image_with_unknown_sharpness_is_not_blurry(self) -> None:
        assert self.find(names(20), plain_facts(20), sharpness=[np.nan] + [0.7] * 19) == []

    def test_what_is_common_is_a_trait_and_not_listed(self) -> None:
        sharpness = [0.1] * 5 + [0.7] * 35
        dark = [0.1] * 4 + [0.8] * 36
        measures = healthy(40, sharpness=sharpness, highlights=dark)
        issues, traits = find_issues(names(40), plain_facts(40), measures, config=CONFIG)
        assert [(trait.issue, trait.images, trait.prevalence) for trait in traits] == [("blurry", 5, 0.125)]
        assert {issue.issue for issue in issues} == {"dark"}
        assert len(issues) == 4

    def test_one_image_of_a_handful_is_no_trait(self) -> None:
        measures = healthy(5, sharpness=[0.1] + [0.7] * 4)
        issues, traits = find_issues(names(5), plain_facts(5), measures, config=CONFIG)
        assert [issue.issue for issue in issues] == ["blurry"]
        assert traits == ()

    def test_in_a_grey_set_grey_is_a_trait(self) -> None:
        measures = healthy(20, colourfulness=[0.0] * 18 + [0.1] * 2)
        issues, traits = find_issues(names(20), plain_facts(20), measures, config=CONFIG)
        assert issues == ()
        assert [(trait.issue, trait.prevalence) for trait in traits] == [("grey", 0.9)]

    def test_no_images_no_issues(self) -> None:
        assert find_issues([], plain_facts(0), healthy(0), config=CONFIG) == ((), ())

    def test_unreadable_files_by_their_error(self) -> None:
        errors = [
            ("a.jpg", "truncated image"),
            ("b.jpg", "empty file, no image bytes"),
            ("c.jpg", "not an image we read; use JPEG"),
        ]
        found = unreadable_issues(errors)
        assert [issue.issue for issue in found] == ["truncated", "empty", "unreadable"]
        assert [(issue.path, issue.value) for issue in found] == errors


class TestShortcuts:
    def test_correlation_of_a_small_example_by_hand(self) -> None:
        # Ranks 1-3 4-6 7-9: SSb = 3 * (9 + 0 + 9) = 54, SSt = 60, MSw = 6 / 6 = 1; (54 - 2 * 1) / 60.
        values = np.array([1.0, 2, 3, 10, 20, 30, 400, 500, 600])
        labels = ["low"] * 3 + ["mid"] * 3 + ["high"] * 3
        many = {"width": np.tile(values, 1), "height": -values}
        found = shortcuts(many, labels)
        assert found == ()  # nine images could do that by chance, once in 37 sets
        repeated = shortcuts({"width": np.repeat(values, 3)}, [label for label in labels for _ in range(3)])
        # 27 values in threes: SSb = 9 * 2 * 81 = 1458, SSt = 9 * 180 = 1620, MSw = 162 / 24.
        (shortcut,) = repeated
        assert shortcut.correlation == pytest.approx(((1458 - 2 * 162 / 24) / 1620) ** 0.5)
        assert (shortcut.measure, shortcut.low, shortcut.high) == ("width", "low", "high")

    def test_the_strongest_comes_first_and_chance_is_left_out(self) -> None:
        rng = np.random.default_rng(0)
        labels = ["cat", "dog", "cow"] * 100
        shift = np.array([0.0, 1.0, 2.0] * 100)
        columns = {
            "brightness": rng.normal(size=300) + shift,
            "width": rng.normal(size=300) + 9 * shift,
            "contrast": rng.normal(size=300),
            "height": np.full(300, 224.0),
        }
        found = shortcuts(columns, labels)
        assert [shortcut.measure for shortcut in found] == ["width", "brightness"]
        assert found[0].correlation > 0.9 > found[1].correlation > 0.4
        assert (found[0].low, found[0].high) == ("cat", "cow")

    def test_many_small_classes_do_not_inflate_it(self) -> None:
        rng = np.random.default_rng(1)
        labels = [f"{i % 60}" for i in range(180)]
        noise = {f"noise {i}": rng.normal(size=180) for i in range(20)}
        assert shortcuts(noise, labels) == ()
        weak = {"brightness": np.repeat(rng.normal(size=60), 3) * 0.8 + rng.normal(size=180)}
        labels = [f"{i // 3}" for i in range(180)]
        (shortcut,) = shortcuts(weak, labels)
        assert shortcut.correlation == pytest.approx((0.64 / 1.64) ** 0.5, abs=0.1)

    def test_one_extreme_image_changes_little(self) -> None:
        rng = np.random.default_rng(2)
        values = rng.normal(size=200) + np.repeat([0.0, 3.0], 100)
        labels = ["a"] * 100 + ["b"] * 100
        (before,) = shortcuts({"width": values}, labels)
        values[0] = 1e9
        (after,) = shortcuts({"width": values}, labels)
        assert after.correlation == pytest.approx(before.correlation, abs=0.02)

    def test_images_without_the_measure_do_not_count(self) -> None:
        values = np.array([0.0, 1.0] * 50 + [np.nan] * 20)
        labels = ["a", "b"] * 50 + ["c"] * 20
        (shortcut,) = shortcuts({"sharpness": values}, labels)
        assert shortcut.correlation == pytest.approx(1.0)
        assert (shortcut.low, shortcut.high) == ("a", "b")

    def test_one_class_has_no_shortcut(self) -> None:
        assert shortcuts({"width": np.arange(50.0)}, ["a"] * 50) == ()

    def test_columns_are_those_of_files_and_pixels(self) -> None:
        columns = named_columns(["a.jpg", "a.jpg#xywh=0,0,40,30"], plain_facts(2), healthy(2))
        assert list(columns) == [
            "width", "height", "aspect", "bytes per pixel", "brightness", "contrast", "sharpness",
            "information", "colourfulness",
        ]  # fmt: skip
        assert columns["aspect"].tolist() == [400 / 300] * 2
        assert columns["bytes per pixel"][0] == 0.1
        assert np.isnan(columns["bytes per pixel"][1])

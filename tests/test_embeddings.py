"""Embeddings by the frozen backbone: what they are of, and that they are computed once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from digits import write_flat
from holotype.config import DataConfig, ModelConfig
from holotype.dataset import Dataset, cache_folder, index_dataset
from holotype.embeddings import Backbone, embed
from holotype.errors import DatasetError
from holotype.machine import cache_root
from holotype.models import Architecture, input_spec, pretrained, recipe_of
from photos import put

MODEL = ModelConfig()
CONFIG = DataConfig(size=32)
SPEC = input_spec(MODEL, CONFIG)


def index(data: Path, **settings: object) -> Dataset:
    return index_dataset(data, spec=SPEC, config=CONFIG.model_copy(update=settings))


def pixels(dataset: Dataset) -> npt.NDArray[np.uint8]:
    return np.concatenate(list(dataset.pixels([np.arange(len(dataset.table))])))


def kept(data: Path) -> list[Path]:
    return list(cache_folder(data).glob("embeddings-*.npz"))


def write_images(folder: Path, *, count: int) -> Path:
    """Two classes of noise, every picture another."""
    dice = np.random.default_rng(0)
    for number in range(count):
        image = dice.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        put(folder / "ab"[number % 2] / f"{number:03d}.png", image)
    return folder


@pytest.fixture
def no_network() -> Iterator[None]:
    """Fails where a network was run: its file is moved away, and would have been made anew."""
    folder = cache_root() / "backbones"
    Backbone(MODEL, SPEC).runtime  # noqa: B018  (makes the file)
    aside = folder.with_name("aside")
    folder.rename(aside)
    yield
    made = folder.exists()
    if made:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    aside.rename(folder)
    assert not made


class TestValues:
    def test_they_are_the_networks_embedding(self, tmp_path: Path) -> None:
        dataset = index(write_images(tmp_path / "data", count=10))
        found = embed(dataset, backbone=Backbone(MODEL, SPEC))
        recipe = recipe_of(MODEL.name)
        architecture = Architecture(
            name=MODEL.name, classes=2, height=32, width=32, mean=recipe.mean, std=recipe.std
        )
        network = pretrained(architecture)[0].eval()
        with torch.inference_mode():
            wanted = network(torch.from_numpy(pixels(dataset)))[1].numpy()
        assert found.shape == (10, 1280)
        assert found.dtype == np.float32
        assert np.abs(found - wanted).max() < 0.01 * np.abs(wanted).max()

    def test_half_precision_hardly_moves_a_cosine(self, tmp_path: Path) -> None:
        dataset = index(write_flat(tmp_path / "data", images=10))
        backbone = Backbone(MODEL, SPEC)
        whole, half = backbone(pixels(dataset)), embed(dataset, backbone=backbone)
        whole, half = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (whole, half))
        assert np.abs(whole @ whole.T - half @ half.T).max() < 1e-3

    def test_batches_make_no_difference(self) -> None:
        images = np.random.default_rng(0).integers(0, 256, (11, 32, 32, 3), dtype=np.uint8)
        backbone = Backbone(MODEL, SPEC)
        alone = np.concatenate([backbone(image[None]) for image in images])
        assert backbone(images) == pytest.approx(alone, abs=1e-3)

    def test_a_device_that_is_not_there_is_an_error(self, tmp_path: Path) -> None:
        from holotype.errors import ConfigError

        dataset = index(write_images(tmp_path / "data", count=4))
        with pytest.raises(ConfigError, match="unknown device"):
            embed(dataset, backbone=Backbone(MODEL, SPEC, "gpu"))


class TestCache:
    @pytest.mark.parametrize("damage", [b"", b"PK", b"no archive", None])
    def test_what_is_damaged_is_computed_again(self, tmp_path: Path, damage: bytes | None) -> None:
        data = write_images(tmp_path / "data", count=6)
        first = embed(index(data), backbone=Backbone(MODEL, SPEC))
        (file,) = kept(data)
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
        assert np.array_equal(embed(index(data), backbone=Backbone(MODEL, SPEC)), first)
        assert len(file.read_bytes()) == len(whole)
        assert kept(data) == [file]

    @pytest.mark.parametrize("damage", [b"", b"no model"])
    def test_a_damaged_backbone_is_made_again(self, damage: bytes) -> None:
        images = np.zeros((2, 32, 32, 3), dtype=np.uint8)
        wanted = Backbone(MODEL, SPEC)(images)
        file = cache_root() / "backbones" / f"{MODEL.name}-{Backbone(MODEL, SPEC).key}.onnx"
        file.write_bytes(damage)
        assert np.array_equal(Backbone(MODEL, SPEC)(images), wanted)
        assert file.stat().st_size > 1_000_000

    def test_a_second_call_runs_no_network(self, tmp_path: Path, request: pytest.FixtureRequest) -> None:
        data = write_images(tmp_path / "data", count=10)
        first = embed(index(data), backbone=Backbone(MODEL, SPEC))
        (file,) = kept(data)
        status = file.stat()
        request.getfixturevalue("no_network")
        assert np.array_equal(embed(index(data), backbone=Backbone(MODEL, SPEC)), first)
        assert file.stat().st_mtime_ns == status.st_mtime_ns

    def test_equal_pixels_are_computed_once_even_under_other_names(self, tmp_path: Path) -> None:
        data = write_images(tmp_path / "data", count=6)
        for number in range(4):
            source = data / "ab"[number % 2] / f"{number:03d}.png"
            (data / "a" / f"again-{number}.png").write_bytes(source.read_bytes())
        dataset = index(data)
        found = embed(dataset, backbone=Backbone(MODEL, SPEC))
        (file,) = kept(data)
        with np.load(file) as content:
            assert len(content["values"]) == 6
        rows = {path: row for row, path in enumerate(dataset.table["path"])}
        for number in range(4):
            one, other = rows[f"{'ab'[number % 2]}/{number:03d}.png"], rows[f"a/again-{number}.png"]
            assert np.array_equal(found[one], found[other])
        assert len(np.unique(found, axis=0)) == 6

    def test_a_changed_image_is_computed_anew_and_no_other(
        self, tmp_path: Path, request: pytest.FixtureRequest
    ) -> None:
        data = write_images(tmp_path / "data", count=10)
        before = embed(index(data), backbone=Backbone(MODEL, SPEC))
        put(data / "a" / "004.png", np.zeros((32, 32, 3), np.uint8))
        dataset = index(data)
        after = embed(dataset, backbone=Backbone(MODEL, SPEC))
        changed = np.array([path == "a/004.png" for path in dataset.table["path"]])
        assert np.array_equal(before[~changed], after[~changed])
        black = Backbone(MODEL, SPEC)(np.zeros((1, 32, 32, 3), np.uint8))
        assert after[changed] == pytest.approx(black, rel=1e-2, abs=1e-3)
        request.getfixturevalue("no_network")
        assert np.array_equal(embed(index(data), backbone=Backbone(MODEL, SPEC)), after)

    def test_another_order_or_a_part_of_the_images_is_read_back(
        self, tmp_path: Path, request: pytest.FixtureRequest
    ) -> None:
        data = write_images(tmp_path / "data", count=10)
        dataset = index(data)
        before = dict(zip(dataset.table["path"], embed(dataset, backbone=Backbone(MODEL, SPEC)), strict=True))
        (data / "a" / "002.png").rename(data / "b" / "999.png")
        (data / "a" / "004.png").unlink()
        request.getfixturevalue("no_network")
        smaller = index(data)
        after = dict(zip(smaller.table["path"], embed(smaller, backbone=Backbone(MODEL, SPEC)), strict=True))
        assert len(after) == 9
        assert np.array_equal(after["b/999.png"], before["a/002.png"])
        assert all(np.array_equal(after[path], before[path]) for path in after.keys() & before.keys())

    def test_an_interrupted_run_keeps_what_it_had_finished(
        self, tmp_path: Path, request: pytest.FixtureRequest
    ) -> None:
        """The 80th of 100 images is gone when its turn comes, in the second batch of 64."""
        data = write_images(tmp_path / "data", count=100)
        dataset = index(data, cache_limit_gb=0.0)
        lost = dataset.file(dataset.table["path"][80])
        lost.rename(tmp_path / "lost.png")
        with pytest.raises(DatasetError, match="was readable when the dataset was indexed"):
            embed(dataset, backbone=Backbone(MODEL, SPEC))
        (file,) = kept(data)
        with np.load(file) as content:
            finished = content["values"]
        assert len(finished) == 64
        (tmp_path / "lost.png").rename(lost)
        found = embed(dataset, backbone=Backbone(MODEL, SPEC))
        assert np.array_equal(found[:64].astype(np.float16), finished)
        assert np.array_equal(found[80:81].astype(np.float16), self.alone(dataset, 80))
        with np.load(file) as content:
            assert len(content["values"]) == 100
        assert not list(cache_folder(data).glob(".*.npz"))  # nothing half written
        request.getfixturevalue("no_network")
        assert np.array_equal(embed(dataset, backbone=Backbone(MODEL, SPEC)), found)

    def alone(self, dataset: Dataset, row: int) -> npt.NDArray[np.float16]:
        """In the batch of 8 in which the second run met it: rows 64 to 99 were left."""
        start = 64 + (row - 64) // 8 * 8
        (batch,) = dataset.pixels([np.arange(start, min(start + 8, len(dataset.table)))])
        return Backbone(MODEL, SPEC)(batch)[row - start : row - start + 1].astype(np.float16)


class TestKey:
    def test_it_is_the_same_for_the_same(self) -> None:
        assert Backbone(MODEL, SPEC).key == Backbone(ModelConfig(), input_spec(MODEL, CONFIG), "cpu").key

    @pytest.mark.parametrize(
        ("model", "data"),
        [
            (ModelConfig(name="tf_efficientnet_lite1"), CONFIG),
            (ModelConfig(weights="none"), CONFIG),
            (MODEL, DataConfig(size=64)),
            (MODEL, DataConfig(size=32, resize="letterbox")),
        ],
    )
    def test_another_network_weights_or_pixel_path_has_another(
        self, model: ModelConfig, data: DataConfig
    ) -> None:
        assert Backbone(model, input_spec(model, data)).key != Backbone(MODEL, SPEC).key

    def test_weights_of_a_file_go_by_its_content(self, tmp_path: Path) -> None:
        file = tmp_path / "weights.safetensors"
        keys = []
        for content in (b"one", b"two", b"one"):
            file.write_bytes(content)
            keys.append(Backbone(ModelConfig(weights=str(file)), SPEC).key)
        assert keys[0] == keys[2] != keys[1]

    def test_embeddings_of_another_size_lie_beside(self, tmp_path: Path) -> None:
        data = write_images(tmp_path / "data", count=4)
        embed(index(data), backbone=Backbone(MODEL, SPEC))
        config = DataConfig(size=64)
        spec = input_spec(MODEL, config)
        other = embed(index_dataset(data, spec=spec, config=config), backbone=Backbone(MODEL, spec))
        assert len(kept(data)) == 2
        assert not np.allclose(other, embed(index(data), backbone=Backbone(MODEL, SPEC)), rtol=0.1)

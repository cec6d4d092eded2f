"""Finding copies: hashes, alignment, neighbours, and what follows of copies for the splits."""

from __future__ import annotations

import dataclasses
import io
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest
from PIL import Image, ImageEnhance

from digits import write_digits, write_flat
from holotype.audit.alignment import SIDE, aligned_distance, coarse_distance, shrink, symmetries
from holotype.audit.calibration import unit
from holotype.audit.contract import Duplicates
from holotype.audit.duplicates import Copies, find_copies, summarise
from holotype.audit.leakage import find_leakage, mended_split
from holotype.audit.neighbours import hash_pairs, nearest
from holotype.audit.signatures import all_orientations, hash_of, read_signatures, reduced_to, signatures_of
from holotype.config import DataConfig, DuplicatesConfig, ModelConfig
from holotype.dataset import Dataset, cache_folder, index_dataset
from holotype.dataset.leaks import read_leaks, write_leaks
from holotype.dataset.revisions import write_revision
from holotype.embeddings import Backbone, embed
from holotype.models import input_spec
from photos import ALTERED, altered, jpeg, pieces, put

Floats = npt.NDArray[np.float32]
DATA = DataConfig(size=64)
SPEC = input_spec(ModelConfig(), DATA)

TURNS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "upright": lambda a: a,
    "turned left": lambda a: np.rot90(a, 1),
    "turned over": lambda a: np.rot90(a, 2),
    "turned right": lambda a: np.rot90(a, 3),
    "mirrored": lambda a: a[:, ::-1],
    "upside down": lambda a: a[::-1],
    "transposed": lambda a: a.swapaxes(0, 1),
    "transversed": lambda a: np.rot90(a, 2).swapaxes(0, 1),
}
"""All eight orientations of `[H, W, C]`."""


def index(folder: Path, **settings: object) -> Dataset:
    config = DATA.model_copy(update=settings)
    return index_dataset(folder, spec=SPEC, config=config)


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def large_pieces() -> list[np.ndarray]:
    """Pictures of 128 x 128."""
    return [image for name in ("china", "flower") for image in pieces(side=128)[name]]


def prepared(images: list[np.ndarray]) -> Floats:
    """As the audit prepares them for alignment, from a model's input of 128 x 128."""
    stretched = [np.asarray(Image.fromarray(image).resize((128, 128))) for image in images]
    return reduced_to(np.stack(stretched), SIDE)


# -------------------------------------------------------------------------------------------------- hashes


class TestHashes:
    @pytest.mark.parametrize("name", list(TURNS))
    def test_a_turned_or_mirrored_picture_has_one_of_the_eight_hashes(self, name: str) -> None:
        images = np.stack(large_pieces())
        turned = np.stack([TURNS[name](image) for image in images])
        hashes, others = signatures_of(images)[0], signatures_of(turned)[0]
        assert hashes.shape == (len(images), 8)
        assert (hashes == others[:, :1]).any(axis=1).all()
        # A group: the turned picture has the same eight, in another order.
        assert np.array_equal(np.sort(hashes, axis=1), np.sort(others, axis=1))
        assert not all_orientations(hashes, others).any()

    def test_the_eight_hashes_of_a_picture_differ(self) -> None:
        hashes = signatures_of(np.stack(large_pieces()))[0]
        assert all(len(set(row)) == 8 for row in hashes.tolist())

    def test_column_0_is_the_upright_one(self) -> None:
        (image, *_) = large_pieces()
        upright, mirrored = signatures_of(np.stack([image, image[:, ::-1]]))[0]
        assert upright[0] != mirrored[0]
        assert upright[0] == signatures_of(image[None])[0][0, 0]

    def test_brightness_does_not_count(self) -> None:
        grey = np.random.default_rng(0).uniform(50, 100, (4, 32, 32)).astype(np.float32)
        assert np.array_equal(hash_of(grey), hash_of(grey * 2 + 30))

    def test_bits_are_the_signs_of_the_cosine_transform(self) -> None:
        from scipy.fft import dctn

        grey = np.random.default_rng(1).uniform(0, 255, (1, 32, 32)).astype(np.float32)
        bits = dctn(grey[0])[:8, :8] > 0
        bits[0, 0] = False
        assert hash_of(grey)[0, 0] == np.packbits(bits).view(np.uint64)[0]

    def test_encoding_again_moves_few_bits_and_another_picture_many(self) -> None:
        images = large_pieces()
        again = np.stack([decoded(jpeg(image, quality=60)) for image in images])
        hashes, others = signatures_of(np.stack(images))[0], signatures_of(again)[0]
        assert all_orientations(hashes, others).max() <= 6
        first, second = np.triu_indices(len(images), 1)
        assert all_orientations(hashes[first], hashes[second]).min() >= 10


# ----------------------------------------------------------------------------------------------- alignment


class TestAlignment:
    def distance(self, images: list[np.ndarray], others: list[np.ndarray]) -> Floats:
        return aligned_distance(prepared(images), prepared(others))

    def test_a_picture_lies_over_itself(self) -> None:
        assert np.abs(self.distance(large_pieces(), large_pieces())).max() < 1e-3

    @pytest.mark.parametrize("name", list(TURNS))
    def test_orientation_does_not_count(self, name: str) -> None:
        turned = [TURNS[name](image) for image in large_pieces()]
        assert np.abs(self.distance(large_pieces(), turned)).max() < 1e-3

    @pytest.mark.parametrize("offset", [(0, 0), (6, 0), (0, 6), (6, 6), (3, 4)])
    def test_a_crop_of_95_percent_lies_over_the_whole(self, offset: tuple[int, int]) -> None:
        top, left = offset
        cropped = [image[top : top + 122, left : left + 122] for image in large_pieces()]
        assert self.distance(large_pieces(), cropped).max() < 0.05
        mirrored = [image[:, ::-1] for image in cropped]
        assert self.distance(large_pieces(), mirrored).max() < 0.05

    def test_brightness_and_contrast_do_not_count(self) -> None:
        dim = [(image * 0.6 + 40).astype(np.uint8) for image in large_pieces()]
        assert self.distance(large_pieces(), dim).max() < 0.005
        images = [Image.fromarray(image) for image in large_pieces()]
        bright = [np.asarray(ImageEnhance.Brightness(image).enhance(1.2)) for image in images]
        assert np.median(self.distance(large_pieces(), bright)) < 0.01  # some are clipped at white

    def test_different_pictures_are_far_apart(self) -> None:
        images = large_pieces()
        first, second = np.triu_indices(len(images), 1)
        pictures = prepared(images)
        assert aligned_distance(pictures[first], pictures[second]).min() > 0.3

    def test_small_pieces_of_one_photo_are_not_copies_of_each_other(self) -> None:
        images = [image for name in ("china", "flower") for image in pieces()[name]]
        first, second = (rows[::5] for rows in np.triu_indices(len(images), 1))
        pictures = reduced_to(np.stack(images), SIDE)
        assert aligned_distance(pictures[first], pictures[second]).min() > 0.3

    def test_flat_pictures_are_no_copies(self) -> None:
        flat = [np.full((128, 128, 3), level, np.uint8) for level in (0, 90, 90, 255)]
        distances = self.distance(flat[:2] + flat[:2], [flat[1], flat[2], flat[3], large_pieces()[0]])
        assert distances.min() > 0.9

    def test_which_comes_first_hardly_matters(self) -> None:
        images = large_pieces()
        others = [image[4:126, 2:124] for image in images] + images[1:] + images[:1]
        one, other = self.distance(images * 2, others), self.distance(others, images * 2)
        near = one < 0.3
        assert near.sum() == len(images)
        assert np.abs(one - other)[near].max() < 0.02
        assert other[~near].min() > 0.3

    def test_many_pairs_give_what_each_alone_gives(self) -> None:
        pictures = prepared(large_pieces())
        first = np.arange(150) % len(pictures)
        second = (first * 7 + 1) % len(pictures)
        together = aligned_distance(pictures[first], pictures[second])
        alone = [
            aligned_distance(pictures[[i]], pictures[[j]])[0] for i, j in zip(first[:9], second, strict=False)
        ]
        assert together[:9] == pytest.approx(alone, abs=1e-4)
        assert aligned_distance(pictures[:0], pictures[:0]).shape == (0,)

    def test_the_coarse_distance_of_copies_is_small_and_that_of_others_mostly_not(self) -> None:
        images = np.stack(large_pieces())
        small = signatures_of(images)[1]
        turned = signatures_of(np.stack([np.rot90(image) for image in images]))[1]
        assert coarse_distance(small, turned).max() < 1e-3
        first, second = np.triu_indices(len(images), 1)
        assert np.median(coarse_distance(small[first], small[second])) > 0.3

    def test_shrinking_takes_means_and_symmetries_are_all_eight(self) -> None:
        images = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
        assert np.allclose(shrink(images, 4)[:, :, 1, 2], images[:, :, 2:4, 4:6].mean(axis=(2, 3)))
        found = {image.tobytes() for image in symmetries(images)}
        upright = images.transpose(0, 2, 3, 1)
        wanted = [np.stack([turn(image) for image in upright]) for turn in TURNS.values()]
        assert found == {image.transpose(0, 3, 1, 2).tobytes() for image in wanted}


# ---------------------------------------------------------------------------------------------- neighbours


def clustered(rows: int, *, width: int = 32, each: int = 10) -> Floats:
    """`float32[rows, width]` of length 1, in clusters of `each`."""
    dice = np.random.default_rng(0)
    centres = dice.normal(size=(rows // each, width))
    vectors = np.repeat(centres, each, axis=0) + dice.normal(scale=0.5, size=(rows, width))
    return unit(vectors.astype(np.float32))


class TestNearest:
    def test_exact_is_brute_force(self) -> None:
        vectors = clustered(2500)  # more than one block of rows
        rows, distances = nearest(vectors, count=8)
        everything = 1 - vectors.astype(np.float64) @ vectors.T
        np.fill_diagonal(everything, np.inf)
        assert rows.shape == distances.shape == (2500, 8)
        assert np.allclose(distances, np.sort(everything, axis=1)[:, :8], atol=1e-5)
        assert np.allclose(np.take_along_axis(everything, rows, axis=1), distances, atol=1e-5)

    def test_approximate_finds_nearly_the_same_in_the_same_form(self) -> None:
        vectors = clustered(4000)
        exact, far = nearest(vectors, count=8)
        rows, distances = nearest(vectors, count=8, approximate=True)
        assert (rows.shape, rows.dtype, distances.dtype) == (exact.shape, exact.dtype, far.dtype)
        assert (rows != np.arange(4000)[:, None]).all()
        found = [len(set(one) & set(other)) for one, other in zip(rows.tolist(), exact.tolist(), strict=True)]
        assert np.mean(found) / 8 > 0.98
        assert (np.diff(distances, axis=1) >= 0).all()
        true = 1 - (vectors[:, None] * vectors[rows]).sum(axis=2)
        assert np.allclose(distances, true, atol=1e-5)

    @pytest.mark.parametrize("rows", [2, 3, 12, 60])
    def test_approximate_works_on_few(self, rows: int, capfd: pytest.CaptureFixture[str]) -> None:
        vectors = clustered(rows, each=1)
        exact = nearest(vectors, count=3)
        found = nearest(vectors, count=3, approximate=True)
        assert np.array_equal(found[0], exact[0])
        assert np.allclose(found[1], exact[1], atol=1e-5)
        assert capfd.readouterr() == ("", "")  # faiss writes warnings from C++

    def test_one_alone_has_none(self) -> None:
        rows, distances = nearest(clustered(1, each=1), count=8)
        assert rows.shape == distances.shape == (1, 0)


@pytest.fixture(scope="module")
def hashes() -> npt.NDArray[np.uint64]:
    """Of 2,300 smooth random pictures, a third of which are turned and noisy copies of others."""
    dice = np.random.default_rng(0)
    smooth = np.kron(dice.normal(size=(1500, 8, 8)), np.ones((4, 4)))
    turns = list(TURNS.values())
    copies = np.stack([turns[number % 8](one) for number, one in enumerate(smooth[:800])])
    copies = copies + dice.normal(scale=0.6, size=copies.shape)
    pictures = np.concatenate([smooth, copies])
    return hash_of(pictures[dice.permutation(len(pictures))].astype(np.float32))


@pytest.fixture(scope="module")
def table(hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint8]:
    """All distances by brute force, the least over the orientations; above the diagonal, else 255."""
    least = np.full((len(hashes),) * 2, 255, dtype=np.uint8)
    for column in range(8):
        np.minimum(least, np.bitwise_count(hashes[:, column, None] ^ hashes[:, 0]), out=least)
    least[np.tril_indices(len(hashes))] = 255
    return least


class TestHashPairs:
    @pytest.mark.parametrize("within", [0, 3, 7, 12])
    def test_exact_is_brute_force(
        self, hashes: npt.NDArray[np.uint64], table: npt.NDArray[np.uint8], within: int
    ) -> None:
        wanted = np.argwhere(table <= within)
        assert len(wanted) > (600 if within >= 7 else 0)
        assert np.array_equal(hash_pairs(hashes, within=within), wanted)

    @pytest.mark.parametrize("within", [0, 3, 4, 7, 12, 15])
    def test_the_multi_index_finds_the_same(self, hashes: npt.NDArray[np.uint64], within: int) -> None:
        assert np.array_equal(
            hash_pairs(hashes, within=within, approximate=True), hash_pairs(hashes, within=within)
        )

    @pytest.mark.parametrize("approximate", [False, True])
    def test_no_pairs(self, approximate: bool) -> None:
        hashes = signatures_of(np.stack(large_pieces()))[0]
        found = hash_pairs(hashes, within=0, approximate=approximate)
        assert (found.shape, found.dtype) == ((0, 2), np.int64)


# -------------------------------------------------------------------------------------------------- copies


@dataclass(frozen=True)
class Found:
    """A dataset of real pictures with copies, and what was found in it."""

    dataset: Dataset
    groups: set[frozenset[str]]
    copies: Copies
    duplicates: Duplicates
    embeddings: Floats


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Each kind of copy of eight pictures, in train, validation and test, among thirty others."""
    root = tmp_path_factory.mktemp("copies")
    images = [*pieces()["china"][:20], *pieces()["flower"][:18]]
    groups: list[set[str]] = []
    for number, image in enumerate(images):
        label = "china" if number < 20 else "flower"
        name = f"train/{label}/{number:02d}.png"
        if number % 5 == 4:
            name = name.replace("train", ("validation", "test")[number % 2])
        put(root / name, image)
        groups.append({name})
    for number, name in enumerate(ALTERED):
        for place, split in ((number, "validation"), (number + 20, "test")):
            label = "china" if place < 20 else "flower"
            copy = f"{split}/{label}/{name}.jpg"
            put(root / copy, altered(images[place], name, quality=70))
            groups[place].add(copy)
    # One picture in all three splits: as it is, as a lossless other file, and turned.
    put(root / "validation/china/bmp.bmp", images[10])
    put(root / "test/china/turned-too.png", np.rot90(images[10]).copy())
    groups[10] |= {"validation/china/bmp.bmp", "test/china/turned-too.png"}
    dataset = index(root)
    backbone = Backbone(ModelConfig(), SPEC)
    embeddings = embed(dataset, backbone=backbone)
    copies = find_copies(
        dataset,
        read_signatures(dataset),
        unit(embeddings),
        embed=backbone,
        config=DuplicatesConfig(),
        seed=0,
    )
    together = {frozenset(group) for group in groups if len(group) > 1}
    return Found(dataset, together, copies, summarise(dataset, copies), embeddings)


class TestCopies:
    def test_every_group_is_a_cluster_and_there_is_no_other(self, found: Found) -> None:
        assert {frozenset(cluster.paths) for cluster in found.duplicates.clusters} == found.groups
        extra = sum(len(group) - 1 for group in found.groups)
        assert found.duplicates.extra == extra

    def test_clusters_tell_labels_splits_and_kind(self, found: Found) -> None:
        first = found.duplicates.clusters[0]  # the largest, as none is a conflict
        assert len(first.paths) == 3
        assert first.kind == "near"
        for cluster in found.duplicates.clusters:
            assert not cluster.conflict
            for path, label, split in zip(cluster.paths, cluster.labels, cluster.splits, strict=True):
                assert path.startswith(f"{split}/{label}/")

    def test_equal_pixels_in_another_file_format_are_exact(self, found: Found) -> None:
        names = found.dataset.table["path"].to_list()
        pairs = {frozenset((names[i], names[j])): d for (i, j), d in
                 zip(found.copies.pairs.tolist(), found.copies.distances.tolist(), strict=True)}  # fmt: skip
        assert pairs[frozenset(("train/china/10.png", "validation/china/bmp.bmp"))] == 0
        assert all(distance < 0.3 for distance in pairs.values())

    def test_without_near_only_exact_copies_are_found(self, found: Found) -> None:
        copies = find_copies(
            found.dataset,
            read_signatures(found.dataset),
            unit(found.embeddings),
            embed=Backbone(ModelConfig(), SPEC),
            config=DuplicatesConfig(near=False),
            seed=0,
        )
        (cluster,) = summarise(found.dataset, copies).clusters
        assert (cluster.kind, set(cluster.paths)) == (
            "exact", {"train/china/10.png", "validation/china/bmp.bmp"}
        )  # fmt: skip
        assert copies.calibration is None


def made_up(dataset: Dataset, groups: list[list[int]]) -> Copies:
    """Copies that are said to be: all pairs of each group, 0.1 apart."""
    cluster = np.arange(len(dataset.table))
    pairs = []
    for group in groups:
        cluster[group] = group[0]
        pairs += [(i, j) for i in group for j in group if i < j]
    distances = np.full(len(pairs), 0.1, dtype=np.float32)
    return Copies(cluster, cluster, np.array(pairs, dtype=np.int64).reshape(-1, 2), distances, None)


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """120 digits."""
    return index(write_flat(tmp_path_factory.mktemp("flat") / "data"))


class TestLeakage:
    def test_every_copy_outside_of_the_earliest_split_leaks(self, found: Found) -> None:
        leakage = find_leakage(found.dataset, found.copies, found.embeddings, penalty=0.1)
        in_later = {
            path
            for group in found.groups
            for path in group
            if not path.startswith("train/") and any(other.startswith("train/") for other in group)
        } | {
            path
            for group in found.groups
            if not any(other.startswith("train/") for other in group)
            for path in group
            if path.startswith("test/") and any(other.startswith("validation/") for other in group)
        }  # fmt: skip
        assert {copy for _, copy in leakage.pairs} == in_later
        assert list(leakage.pairs) == sorted(leakage.pairs)
        held_out = len(found.dataset.table) - len(found.dataset.rows("train"))
        assert leakage.fraction == pytest.approx(len(in_later) / held_out)
        assert {path for paths in leakage.leaked.values() for path in paths} == in_later
        assert all(path.startswith(split) for split, paths in leakage.leaked.items() for path in paths)

    def test_the_nearest_training_image_is_named(self, tmp_path: Path) -> None:
        dataset = index(write_digits(tmp_path / "data", classes=2, train=4, validation=2, test=2))
        train, test = dataset.rows("train").tolist(), dataset.rows("test").tolist()
        copies = made_up(dataset, [[train[0], train[1], train[2], test[0]]])
        near = copies.pairs.tolist().index(sorted([train[1], test[0]]))
        copies.distances[near] = 0.01
        leakage = find_leakage(dataset, copies, np.zeros((len(dataset.table), 2), np.float32), penalty=None)
        names = dataset.table["path"].to_list()
        assert leakage.pairs == ((names[train[1]], names[test[0]]),)
        assert leakage.effects == ()

    @pytest.mark.parametrize("seed", range(20))
    def test_the_partner_is_the_first_by_split_distance_and_place(self, flat: Dataset, seed: int) -> None:
        """Against the definition, with pairs that were not compared and distances that are equal."""
        dice = np.random.default_rng(seed)
        splits = dice.choice(["train", "validation", "test"], len(flat.table), p=dice.dirichlet([1, 1, 1]))
        dataset = dataclasses.replace(flat, table=flat.table.with_columns(pl.Series("split", splits)))
        rows = dice.permutation(len(splits)).tolist()
        groups = [sorted(rows[start : start + 12]) for start in range(0, 108, 12)]
        copies = made_up(dataset, groups)
        kept = dice.random(len(copies.pairs)) < dice.random()
        pairs = dice.permuted(copies.pairs[kept], axis=1)
        distances = dice.choice([0.0, 0.01, 0.1, 2.0, 2.5], len(pairs)).astype(np.float32)
        copies = dataclasses.replace(copies, pairs=pairs, distances=distances)
        apart = {frozenset(pair): d for pair, d in zip(pairs.tolist(), distances.tolist(), strict=True)}
        rank = {"train": 0, "validation": 1, "test": 2}
        wanted = []
        for group in groups:
            for row in group:
                order = [
                    (rank[splits[other]], apart.get(frozenset((row, other)), 2.0), other)
                    for other in group
                    if rank[splits[other]] < rank[splits[row]]
                ]
                if order:
                    wanted.append((flat.table["path"][min(order)[2]], flat.table["path"][row]))
        nothing = np.zeros((len(splits), 2), np.float32)
        assert list(find_leakage(dataset, copies, nothing, penalty=None).pairs) == sorted(wanted)

    def test_one_picture_tens_of_thousands_of_times_is_no_long_wait(self, flat: Dataset) -> None:
        count = 30_000
        splits = ["train", "test"] * (count // 2)
        paths = [f"{number:05}.png" for number in range(count)]
        dataset = dataclasses.replace(flat, table=pl.DataFrame({"path": paths, "split": splits}))
        star = np.stack([np.zeros(count - 1, np.int64), np.arange(1, count)], axis=1)
        same = np.zeros(count, np.int64)
        copies = Copies(same, same, star, np.zeros(count - 1, np.float32), None)
        begun = time.process_time()
        leakage = find_leakage(dataset, copies, np.zeros((count, 2), np.float32), penalty=None)
        assert time.process_time() - begun < 20  # minutes, where each is compared with each
        assert leakage.pairs == tuple((paths[0], path) for path in paths[1::2])

    def test_copies_inside_of_a_split_leak_nothing(self, tmp_path: Path) -> None:
        dataset = index(write_digits(tmp_path / "data", classes=2, train=4, validation=2, test=2))
        train = dataset.rows("train").tolist()
        copies = made_up(dataset, [train[:3]])
        leakage = find_leakage(dataset, copies, np.zeros((len(dataset.table), 2), np.float32), penalty=0.1)
        assert (leakage.pairs, leakage.fraction, leakage.leaked, leakage.effects) == ((), 0.0, {}, ())

    def test_accuracy_without_the_leaked_images_is_told(self, tmp_path: Path) -> None:
        """Embeddings that say nothing of the class: only what was seen in training is known."""
        dataset = index(write_digits(tmp_path / "data", classes=2, train=16, validation=4, test=20))
        vectors = np.random.default_rng(0).normal(size=(len(dataset.table), 200)).astype(np.float32)
        groups = []
        for label in (0, 1):
            rows = np.flatnonzero(dataset.labels(np.arange(len(dataset.table))) == label)
            train = [row for row in rows if row in dataset.rows("train")]
            test = [row for row in rows if row in dataset.rows("test")]
            groups += [[int(one), int(other)] for one, other in zip(train[:10], test[:10], strict=True)]
        for one, other in groups:
            vectors[other] = vectors[one]
        leakage = find_leakage(dataset, made_up(dataset, groups), vectors, penalty=0.03)
        (effect,) = leakage.effects
        assert (effect.split, effect.leaked, effect.images) == ("test", 20, 40)
        assert effect.without < 0.8
        # All leaked ones are right.
        assert effect.accuracy * 40 == pytest.approx(20 + effect.without * 20)

    def test_leaks_are_kept_for_the_dataset_they_were_found_in(self, tmp_path: Path) -> None:
        write_leaks(tmp_path, "a" * 64, {"test": ["test/0/b.png", "test/0/a.png"]})
        assert read_leaks(tmp_path, "a" * 64, "test") == {"test/0/a.png", "test/0/b.png"}
        assert read_leaks(tmp_path, "a" * 64, "validation") == frozenset()
        assert read_leaks(tmp_path, "b" * 64, "test") is None
        next(tmp_path.iterdir()).write_text("[")
        assert read_leaks(tmp_path, "a" * 64, "test") is None


class TestMendedSplit:
    def test_copies_come_together_and_classes_keep_their_shares(self, tmp_path: Path) -> None:
        dataset = index(write_digits(tmp_path / "data", train=60, validation=20, test=20))
        dice = np.random.default_rng(0)
        rows = dice.permutation(len(dataset.table))
        groups = [rows[start : start + 2 + start % 3].tolist() for start in range(0, 240, 6)]
        copies = made_up(dataset, groups)
        changes = mended_split(dataset, copies)
        before = dict(dataset.table.select("path", "split").iter_rows())
        after = {change.path: change.split for change in changes}
        assert after.keys() == before.keys()  # every image is named
        names = dataset.table["path"].to_list()
        touched = set()
        for group in groups:
            sides = {before[names[row]] for row in group}
            (side,) = {after[names[row]] for row in group}
            assert side in sides
            touched |= {names[row] for row in group} if len(sides) > 1 else set()
        moved = {path for path in before if before[path] != after[path]}
        assert len(moved) > 10
        assert moved <= touched
        assert {change.path for change in changes if change.reason} == moved
        labels = dict(dataset.table.select("path", "label").iter_rows())
        old = Counter((labels[path], split) for path, split in before.items())
        new = Counter((labels[path], split) for path, split in after.items())
        assert max(abs(new[cell] - old[cell]) for cell in old) <= 3

    def test_a_file_that_comes_later_has_a_split_and_moves_no_other(self, tmp_path: Path) -> None:
        data = write_flat(tmp_path / "data")
        later = sorted((data / "0").glob("*.png"))[-8:]
        for file in later:
            file.rename(tmp_path / file.name)
        dataset = index(data)
        one, other = int(dataset.rows("train")[0]), int(dataset.rows("test")[0])
        changes = mended_split(dataset, made_up(dataset, [[one, other]]))
        revision = write_revision(cache_folder(data), source="fix-split", changes=changes)
        mended = index(data)
        assert mended.revision == revision.number
        splits = dict(mended.table.select("path", "split").iter_rows())
        assert splits == {change.path: change.split for change in changes}
        for file in later:
            (tmp_path / file.name).rename(file)
        grown = dict(index(data).table.select("path", "split").iter_rows())
        assert len(grown) == len(splits) + 8
        assert all(grown[path] == split for path, split in splits.items())
        # Those that came are split as ever, by their content.
        untouched = dict(index(data, revision=0).table.select("path", "split").iter_rows())
        assert {path: grown[path] for path in grown.keys() - splits.keys()} == {
            path: untouched[path] for path in grown.keys() - splits.keys()
        }
        assert {path: untouched[path] for path in splits} == dict(
            dataset.table.select("path", "split").iter_rows()
        )

    def test_a_change_of_the_shares_moves_nothing_that_was_named(self, tmp_path: Path) -> None:
        data = write_flat(tmp_path / "data")
        dataset = index(data)
        one, other = int(dataset.rows("train")[0]), int(dataset.rows("test")[0])
        write_revision(
            cache_folder(data),
            source="fix-split",
            changes=mended_split(dataset, made_up(dataset, [[one, other]])),
        )
        now = index(data).table.select("path", "split")
        assert index(data, test=0.5).table.select("path", "split").equals(now)

    def test_other_pictures_of_the_same_names_are_split_by_their_own_content(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        data = write_flat(tmp_path / "data")
        dataset = index(data)
        one, other = int(dataset.rows("train")[0]), int(dataset.rows("test")[0])
        changes = mended_split(dataset, made_up(dataset, [[one, other]]))
        write_revision(cache_folder(data), source="fix-split", changes=changes)
        assert index(data).table.equals(index(data).table)
        assert "other content" not in capsys.readouterr().err
        for file in data.glob("*/*.png"):
            put(file, 255 - decoded(file.read_bytes()))
        assert index(data).table.equals(index(data, revision=0).table)
        told = capsys.readouterr().err
        assert "revision 1: not used for 120 files that have other content now, first 0/0000.png" in told

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from digits import write_digits, write_flat
from holotype.config import DataConfig
from holotype.dataset import Dataset, Shape, margin_shape, open_dataset
from holotype.errors import DatasetError
from holotype.preprocess import Preprocess, read_pixels

SPEC = Preprocess(height=32, width=32)


def read(source: Path, *, shapes: tuple[Shape, ...] = (), **settings: object) -> Dataset:
    return open_dataset(source, spec=SPEC, config=DataConfig(**settings), shapes=shapes)  # type: ignore[arg-type]


def all_pixels(dataset: Dataset, *, shape: Shape | None = None) -> np.ndarray:
    rows = np.arange(len(dataset.table))
    batches = [rows[start : start + 7] for start in range(0, len(rows), 7)]
    return np.concatenate(list(dataset.pixels(batches, shape=shape)))


def spoil_keeping_size_and_time(file: Path) -> None:
    status = file.stat()
    file.write_bytes(bytes(status.st_size))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


class TestFolders:
    def test_splits_are_read_under_every_name(self, tmp_path: Path) -> None:
        data = write_digits(tmp_path / "data")
        (data / "validation").rename(data / "Valid")
        dataset = read(data)
        assert dataset.splits == ("train", "validation", "test")
        assert dataset.counts() == {
            label: {"train": 24, "validation": 8, "test": 8} for label in ("0", "1", "2")
        }
        assert dataset.deviation is None

    def test_without_validation_it_is_taken_from_train(self, tmp_path: Path) -> None:
        data = write_digits(tmp_path / "data", validation=0)
        dataset = read(data, validation=0.3)
        counts = dataset.counts()["0"]
        assert counts["test"] == 8
        assert counts["train"] + counts["validation"] == 24
        assert counts["validation"] > 0

    def test_hidden_files_and_debris_are_skipped_and_other_files_named(self, tmp_path: Path) -> None:
        data = write_flat(tmp_path / "data")
        (data / "0" / ".hidden.png").write_bytes(b"x")
        (data / "0" / "notes.txt").write_text("x")
        (data / "__MACOSX").mkdir()
        (data / "__MACOSX" / "a.png").write_bytes(b"x")
        dataset = read(data)
        assert len(dataset.table) == 120
        assert dataset.ignored == ("0/notes.txt",)

    def test_deeper_folders_belong_to_their_class(self, tmp_path: Path) -> None:
        data = write_flat(tmp_path / "data")
        deep = data / "0" / "2024" / "may"
        deep.mkdir(parents=True)
        for file in list((data / "0").glob("*.png"))[:10]:
            file.rename(deep / file.name)
        assert read(data).counts().keys() == {"0", "1", "2"}
        assert len(read(data).table) == 120

    @pytest.mark.parametrize(
        ("build", "message"),
        [
            (lambda root: None, "has no class folders"),
            (lambda root: (root / "a").mkdir(), "holds no images"),
            (lambda root: ((root / "train").mkdir(), (root / "extra").mkdir()), "'extra'"),
            (lambda root: ((root / "test").mkdir(), (root / "val").mkdir()), "no train folder"),
        ],
    )
    def test_a_layout_we_cannot_read_is_explained(self, tmp_path: Path, build: object, message: str) -> None:
        build(tmp_path)  # type: ignore[operator]
        with pytest.raises(DatasetError, match=message) as caught:
            read(tmp_path)
        assert caught.value.fix

    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match="no such dataset"):
            read(tmp_path / "nothing")


class TestCsv:
    def write(self, tmp_path: Path, text: str) -> Path:
        write_flat(tmp_path)
        file = tmp_path / "labels.csv"
        file.write_text(text, encoding="utf-8-sig")
        return file

    def test_paths_labels_splits_groups_and_annotators(self, tmp_path: Path) -> None:
        write_flat(tmp_path)
        lines = ["image_path,label,split,annotator,group"]
        for label in ("0", "1"):
            for number, file in enumerate(sorted((tmp_path / label).glob("*.png"))):
                split = ("train", "train", "val", "test")[number % 4]
                lines.append(f"{label}/{file.name},digit {label},{split},ann,g{number}")
        file = tmp_path / "labels.csv"
        file.write_text("\n".join(lines))
        dataset = read(file)
        assert dataset.classes == ("digit 0", "digit 1")
        assert dataset.splits == ("train", "validation", "test")
        assert set(dataset.table["annotator"]) == {"ann"}

    def test_wrong_column_names_the_nearest(self, tmp_path: Path) -> None:
        file = self.write(tmp_path, "image_pth,label\n0/a.png,x\n")
        with pytest.raises(
            DatasetError, match=r"labels\.csv: line 1: unknown column 'image_pth'; did you mean image_path"
        ):
            read(file)

    def test_missing_column(self, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match="no column 'label'"):
            read(self.write(tmp_path, "image_path\n0/a.png\n"))

    def test_semicolons_are_named(self, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match="semicolons"):
            read(self.write(tmp_path, "image_path;label\n0/a.png;x\n"))

    def test_every_bad_row_is_listed_with_its_line(self, tmp_path: Path) -> None:
        file = self.write(tmp_path, "image_path,label,split\n,a,train\nx.png,,train\ny.png,b,tset\n")
        with pytest.raises(DatasetError) as caught:
            read(file)
        assert "3 bad rows" in str(caught.value)
        assert all(part in str(caught.value) for part in ("line 2", "line 3", "line 4", "'tset'"))

    def test_not_utf8(self, tmp_path: Path) -> None:
        file = tmp_path / "labels.csv"
        file.write_bytes("image_path,label\nä.png,ö\n".encode("latin-1"))
        with pytest.raises(DatasetError, match="UTF-8"):
            read(file)


class TestSplit:
    def test_adding_files_moves_no_other_file(self, tmp_path: Path) -> None:
        data = write_flat(tmp_path / "data", images=60)
        later = sorted((data / "0").glob("*.png"))[40:]
        for file in later:
            file.rename(tmp_path / file.name)
        before = dict(read(data).table.select("path", "split").iter_rows())
        for file in later:
            (tmp_path / file.name).rename(file)
        after = dict(read(data).table.select("path", "split").iter_rows())
        assert len(after) == len(before) + len(later)
        assert all(after[path] == split for path, split in before.items())

    def test_copies_stay_on_one_side(self, tmp_path: Path) -> None:
        data = write_flat(tmp_path / "data")
        for file in list((data / "1").glob("*.png")):
            (data / "1" / f"copy-{file.name}").write_bytes(file.read_bytes())
        table = read(data).table
        sides = table.group_by("sha256").agg(pl.col("split").n_unique().alias("sides"))
        assert sides["sides"].max() == 1

    def test_deviation_from_the_wanted_shares_is_told(self, tmp_path: Path) -> None:
        dataset = read(write_flat(tmp_path / "data", images=60))
        assert dataset.deviation is not None
        counts = dataset.counts()
        for label, gap in dataset.deviation.items():
            shares = {split: n / 60 for split, n in counts[label].items()}
            wanted = {"train": 0.7, "validation": 0.15, "test": 0.15}
            assert gap == pytest.approx(max(abs(shares[split] - wanted[split]) for split in wanted))

    def test_class_missing_from_a_split_is_an_error(self, tmp_path: Path) -> None:
        data = write_flat(tmp_path / "data")
        (data / "rare").mkdir()
        next((data / "0").glob("*.png")).rename(data / "rare" / "a.png")
        with pytest.raises(DatasetError, match=r"class 'rare' has no image in .*: it has 1 in all"):
            read(data)

    def test_one_class_is_no_classifier(self, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match="only one class"):
            read(write_flat(tmp_path / "data", classes=1))


class TestIndex:
    def test_root_hash_follows_content_label_and_split_but_not_place(self, tmp_path: Path) -> None:
        first = read(write_digits(tmp_path / "a")).root_hash
        second = write_digits(tmp_path / "b")
        assert read(second).root_hash == first
        file = next((second / "train" / "0").glob("*.png"))
        file.rename(second / "train" / "1" / file.name)
        assert read(second).root_hash != first

    def test_hashes_of_files_and_pixels(self, tmp_path: Path) -> None:
        import hashlib

        dataset = read(write_digits(tmp_path / "data"))
        path, sha, pixels, size = dataset.table.select("path", "sha256", "pixels_sha256", "bytes").row(0)
        data = dataset.file(path).read_bytes()
        assert sha == hashlib.sha256(data).hexdigest()
        assert size == len(data)
        assert pixels == hashlib.sha256(read_pixels(data, spec=SPEC).tobytes()).hexdigest()

    def test_unreadable_files_are_listed_and_left_out(self, tmp_path: Path) -> None:
        data = write_digits(tmp_path / "data")
        bad = next((data / "train" / "0").glob("*.png"))
        bad.write_bytes(bad.read_bytes()[:40])
        dataset = read(data, max_unreadable=0.05)
        assert [u.path for u in dataset.unreadable] == [bad.relative_to(data).as_posix()]
        assert dataset.unreadable[0].error
        assert len(dataset.table) == 119

    def test_too_many_unreadable_files_stop_us(self, tmp_path: Path) -> None:
        data = write_digits(tmp_path / "data")
        for bad in list((data / "train" / "0").glob("*.png"))[:2]:
            bad.write_bytes(b"not an image")
        with pytest.raises(DatasetError, match="2 of 120 files are unreadable"):
            read(data)

    def test_a_repaired_file_is_read_again(self, tmp_path: Path) -> None:
        data = write_digits(tmp_path / "data")
        bad = next((data / "train" / "0").glob("*.png"))
        good = bad.read_bytes()
        bad.write_bytes(good[:40])
        read(data, max_unreadable=0.05)
        bad.write_bytes(good)
        assert not read(data).unreadable

    def test_changed_file_is_noticed(self, tmp_path: Path) -> None:
        data = write_digits(tmp_path / "data")
        before = read(data).root_hash
        file = next((data / "train" / "0").glob("*.png"))
        Image.new("RGB", (9, 9)).save(file)
        after = read(data)
        assert after.root_hash != before
        rows = [row for row, path in enumerate(after.table["path"]) if after.file(path) == file]
        assert not next(after.pixels([np.array(rows)])).any()


class TestPixelCache:
    def test_pixels_are_those_of_the_pixel_path(self, tmp_path: Path) -> None:
        dataset = read(write_digits(tmp_path / "data"))
        wanted = [read_pixels(dataset.file(path).read_bytes(), spec=SPEC) for path in dataset.table["path"]]
        assert np.array_equal(all_pixels(dataset), np.stack(wanted))

    def test_nothing_is_decoded_twice(self, tmp_path: Path) -> None:
        data = write_digits(tmp_path / "data")
        shape = margin_shape(Shape(32, 32), crop=0.8)
        first = read(data, shapes=(shape,))
        exact, margin = all_pixels(first), all_pixels(first, shape=shape)
        for path in first.table["path"]:
            spoil_keeping_size_and_time(first.file(path))
        assert np.array_equal(all_pixels(first), exact)
        second = read(data, shapes=(shape,))
        assert not second.unreadable
        assert np.array_equal(all_pixels(second), exact)
        assert np.array_equal(all_pixels(second, shape=shape), margin)

    def test_only_new_files_are_decoded(self, tmp_path: Path) -> None:
        data = write_digits(tmp_path / "data")
        old = read(data)
        before = all_pixels(old)
        for path in old.table["path"]:
            spoil_keeping_size_and_time(old.file(path))
        Image.new("RGB", (9, 9), "red").save(data / "train" / "0" / "zzz.png")
        after = read(data)
        assert len(after.table) == 121
        new = np.array(["zzz" in path for path in after.table["path"]])
        assert np.array_equal(all_pixels(after)[~new], before)
        assert (all_pixels(after)[new][0] == (255, 0, 0)).all()

    @pytest.mark.parametrize("limit", [0.0, 0.0002])
    def test_beyond_the_limit_pixels_are_decoded_on_the_fly(self, tmp_path: Path, limit: float) -> None:
        data = write_digits(tmp_path / "data")
        free = all_pixels(read(data))
        other = tmp_path / "other"
        data.rename(other)
        capped = read(other, cache_limit_gb=limit)
        assert np.array_equal(all_pixels(capped), free)
        stored = sum(len(store.rows) for store in capped.stores.values())
        assert stored < 120
        assert (stored == 0) == (limit == 0)

    def test_margin_view_shows_the_same_at_a_higher_resolution(self, tmp_path: Path) -> None:
        shape = margin_shape(Shape(32, 32), crop=0.8)
        assert (shape.height, shape.width) == (36, 36)
        dataset = read(write_digits(tmp_path / "data"), shapes=(shape,))
        small = all_pixels(dataset)[0]
        large = Image.fromarray(all_pixels(dataset, shape=shape)[0]).resize(
            (32, 32), Image.Resampling.BILINEAR
        )
        assert np.abs(np.asarray(large).astype(int) - small).mean() < 16

    def test_cache_of_another_spec_is_another_cache(self, tmp_path: Path) -> None:
        data = write_digits(tmp_path / "data")
        read(data)
        other = open_dataset(data, spec=SPEC.model_copy(update={"filter": "bilinear"}), config=DataConfig())
        assert all_pixels(other).shape == (120, 32, 32, 3)

    def test_map_of_a_killed_writer_is_removed_after_a_day(self, tmp_path: Path) -> None:
        data = write_digits(tmp_path / "data")
        (store,) = read(data).stores.values()
        stale, fresh = store.view.file.with_name("pixels-a.u8"), store.view.file.with_name("pixels-b.u8")
        for file in (stale, fresh):
            file.write_bytes(b"half")
        os.utime(stale, (1, 1))
        Image.new("RGB", (9, 9), "red").save(data / "train" / "0" / "zzz.png")
        read(data)
        assert not stale.exists()
        assert fresh.exists()

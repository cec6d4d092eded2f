from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

import awkward
from digits import write_digits, write_flat
from holotype.config import DatasetConfig, SourceConfig
from holotype.dataset import (
    Dataset,
    Shape,
    cache_folder,
    dataset_name,
    index_dataset,
    margin_shape,
    open_dataset,
    thumbnailer,
)
from holotype.dataset.listing import example_name, file_and_region
from holotype.dataset.revisions import Change, write_revision
from holotype.dataset.source import read_source
from holotype.errors import DatasetError
from holotype.preprocess import Box, Preprocess, read_full, read_pixels
from photos import jpeg, pieces, put

SPEC = Preprocess(height=32, width=32)


def read(source: Path, *, shapes: tuple[Shape, ...] = (), **settings: object) -> Dataset:
    return open_dataset(source, spec=SPEC, config=DatasetConfig(**settings), shapes=shapes)  # type: ignore[arg-type]


def index(source: Path, **settings: object) -> Dataset:
    return index_dataset(source, spec=SPEC, config=DatasetConfig(**settings))  # type: ignore[arg-type]


def all_pixels(dataset: Dataset, *, shape: Shape | None = None) -> np.ndarray:
    rows = np.arange(len(dataset.table))
    batches = [rows[start : start + 7] for start in range(0, len(rows), 7)]
    return np.concatenate(list(dataset.pixels(batches, shape=shape)))


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root reads everything: within, this process is somebody else."""
    if os.geteuid() != 0:
        yield
        return
    try:
        os.seteuid(65534)
    except OSError:
        pytest.skip("root cannot become anybody else here")
    try:
        yield
    finally:
        os.seteuid(0)


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

    def test_linked_folders_are_searched_at_every_depth(self, tmp_path: Path) -> None:
        data = write_flat(tmp_path / "data", classes=2, images=4)
        far = write_flat(tmp_path / "far", images=3)
        (far / "2").rename(data / "0" / "deep")
        (data / "0" / "deep" / "more").symlink_to(far / "0")
        (data / "linked").symlink_to(far / "1")
        dataset = index(data)
        assert {name: sum(cells.values()) for name, cells in dataset.counts().items()} == {
            "0": 10,
            "1": 4,
            "linked": 3,
        }
        assert dataset.ignored == ()
        assert {path for path in dataset.table["path"] if "more" in path} == {
            f"0/deep/more/{file.name}" for file in (far / "0").iterdir()
        }

    def test_links_that_lead_round_or_back_are_not_followed_but_named(self, tmp_path: Path) -> None:
        data = write_flat(tmp_path / "data", classes=2, images=3)
        one, other = write_flat(tmp_path / "one", classes=1, images=2), tmp_path / "other"
        other.mkdir()
        (one / "over").symlink_to(other)
        (other / "back").symlink_to(one)
        (data / "0" / "self").symlink_to(data / "0")
        (data / "0" / "up").symlink_to(data)
        (data / "0" / "top").symlink_to("/")
        (data / "0" / "ring").symlink_to(one)
        (data / "0" / "ring-again").symlink_to(one / "0")
        (data / "everything").symlink_to(data)
        dataset = index(data)
        counts = {name: sum(cells.values()) for name, cells in dataset.counts().items()}
        assert counts == {"0": 5, "1": 3}
        assert dataset.ignored == (
            "0/ring-again",
            "0/ring/over/back",
            "0/self",
            "0/top",
            "0/up",
            "everything",
        )

    def test_class_folders_without_images_are_named(self, tmp_path: Path) -> None:
        data = write_digits(tmp_path / "data", classes=2)
        (data / "train" / "empty" / "deeper").mkdir(parents=True)
        (data / "test" / "notes").mkdir()
        (data / "test" / "notes" / "read.me").write_text("x")
        assert read(data).ignored == ("test/notes", "test/notes/read.me", "train/empty")
        assert read(data).classes == ("0", "1")

    @pytest.mark.skipif(not hasattr(os, "geteuid"), reason="there are no such permissions")
    @pytest.mark.parametrize("folder", ["", "train", "train/0", "train/0/deep/er"])
    @pytest.mark.parametrize("layout", ["auto", "folders"])
    def test_a_folder_that_cannot_be_read_is_an_error(self, folder: str, layout: str) -> None:
        with tempfile.TemporaryDirectory() as place:  # pytest's own is closed to others than root
            Path(place).chmod(0o755)
            data = write_digits(Path(place) / "data", classes=2, train=2, validation=1, test=1)
            put(data / "train" / "0" / "deep" / "er" / "a.png", jpeg(pieces()["china"][0]))
            with as_nobody():
                assert len(read_source(data, config=SourceConfig()).records) == 9
            (data / folder).chmod(0o000)
            try:
                with as_nobody(), pytest.raises(DatasetError) as caught:
                    read_source(data, config=SourceConfig(format=layout))  # type: ignore[arg-type]
            finally:
                (data / folder).chmod(0o755)
            fix = "make it readable, or move it out of the dataset"
            assert str(caught.value) == f"{data / folder}: cannot be read (Permission denied); {fix}"

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
        assert "3 of 3 records" in str(caught.value)
        assert all(part in str(caught.value) for part in ("line 2", "line 3", "line 4", "'tset'"))

    @pytest.mark.parametrize(
        ("spoilt", "line", "why"),
        [
            ('"{path},0', 21, "unexpected end of data"),
            ('{path},"0', 21, "unexpected end of data"),
            ('"{path}"x,0', 21, "',' expected after '\"'"),
            ('\n\n{path},"0\n0"0"', 23, "',' expected after '\"'"),
        ],
    )
    def test_a_quote_that_nobody_closes_is_named_and_swallows_no_rows(
        self, tmp_path: Path, spoilt: str, line: int, why: str
    ) -> None:
        write_flat(tmp_path)
        rows = [f"{p.parent.name}/{p.name},{p.parent.name}" for p in sorted(tmp_path.glob("*/*.png"))]
        rows[19] = spoilt.format(path=rows[19].partition(",")[0])
        file = put(tmp_path / "labels.csv", "\n".join(["image_path,label", *rows]).encode())
        with pytest.raises(DatasetError) as caught:
            index(file)
        assert str(caught.value).startswith(f"{file}: line {line}: is not CSV ({why}); close the quotes")

    def test_a_quote_before_more_than_one_cell_can_hold_is_named(self, tmp_path: Path) -> None:
        rows = [f"{number:09}.png,a" for number in range(12_000)]
        rows[7] = f'"{rows[7]}'
        file = put(tmp_path / "labels.csv", "\n".join(["image_path,label", *rows]).encode())
        with pytest.raises(DatasetError, match=r"labels\.csv: line 9: is not CSV \(field larger"):
            index(file)

    def test_what_quotes_may_hold_is_read(self, tmp_path: Path) -> None:
        write_flat(tmp_path, classes=2, images=3)
        names = ["a, b.png", 'the "best".png', "two\nlines.png"]
        for file, name in zip(sorted((tmp_path / "0").glob("*.png")), names, strict=True):
            file.rename(file.with_name(name))
        rows = ['"0/a, b.png",zero', '"0/the ""best"".png","ze""ro"', '"0/two\nlines.png","zero\r\n"', ""]
        rows += [f'{file.relative_to(tmp_path)},"one"' for file in sorted((tmp_path / "1").glob("*.png"))]
        text = "\r\n".join(['\ufeff"image_path",label', *rows, ",x"])
        dataset = index(put(tmp_path / "labels.csv", text.encode()))
        found = dict(dataset.table.select("path", "label").iter_rows())
        assert [found.get(f"0/{name}") for name in names] == ["zero", 'ze"ro', "zero"]
        assert sorted(found.values()) == ["one"] * 3 + ['ze"ro', "zero", "zero"]
        (problem,) = dataset.problems
        assert str(problem).startswith("labels.csv: line 11: image_path is empty")

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
        none = np.array([], dtype=np.int64)
        shapes = [batch.shape for batch in capped.pixels([none, capped.rows("test")[:2]])]
        assert shapes == [(0, 32, 32, 3), (2, 32, 32, 3)]

    def test_margin_view_shows_the_same_at_a_higher_resolution(self, tmp_path: Path) -> None:
        shape = margin_shape(Shape(32, 32), crop=0.8)
        assert (shape.height, shape.width) == (36, 36)
        dataset = read(write_digits(tmp_path / "data"), shapes=(shape,))
        small = all_pixels(dataset)[0]
        large = Image.fromarray(all_pixels(dataset, shape=shape)[0]).resize(
            (32, 32), Image.Resampling.BILINEAR
        )
        assert np.abs(np.asarray(large).astype(int) - small).mean() < 16

    def test_a_broken_file_costs_no_new_cache_and_a_repaired_one_is_cached(self, tmp_path: Path) -> None:
        data = write_digits(tmp_path / "data")
        broken, gone = sorted((data / "train" / "0").glob("*.png"))[:2]
        good = broken.read_bytes()
        broken.write_bytes(good[:40])
        rows = [
            f"{p.relative_to(tmp_path)},{p.parent.name},{p.parent.parent.name}" for p in data.rglob("*.png")
        ]
        gone.unlink()
        source = put(tmp_path / "labels.csv", "\n".join(["image_path,label,split", *rows]).encode())

        def cached() -> dict[str, tuple[int, int]]:
            files = (*cache_folder(source).glob("pixels-*.u8"), *cache_folder(source).glob("pixels-*.json"))
            # An index is touched when its store is used.
            status = {file.name: file.stat() for file in files}
            return {
                name: (s.st_ino, s.st_mtime_ns if name.endswith("u8") else 0) for name, s in status.items()
            }

        first = index(source)
        built = cached()
        assert (len(first.unreadable), len(built)) == (2, 2)
        for _ in range(2):
            again = index(source)
            assert again.table.equals(first.table)
            assert again.unreadable == first.unreadable
            assert cached() == built
        for path in first.table["path"]:
            spoil_keeping_size_and_time(first.file(path))
        broken.write_bytes(good)
        repaired = index(source)
        assert [file.path for file in repaired.unreadable] == [gone.relative_to(tmp_path).as_posix()]
        assert repaired.uncached(repaired.exact) == 0
        names = repaired.table["path"].to_list()
        place = names.index(broken.relative_to(tmp_path).as_posix())
        pixels = all_pixels(repaired)
        assert np.array_equal(pixels[place], read_pixels(good, spec=SPEC))
        assert np.array_equal(np.delete(pixels, place, axis=0), all_pixels(first))
        built = cached()
        index(source)
        assert cached() == built

    def test_what_the_limits_allow_now_is_read(self, tmp_path: Path) -> None:
        data = write_flat(tmp_path / "data", images=4)
        Image.new("RGB", (200, 100), "red").save(data / "0" / "large.png")
        assert [file.path for file in index(data, max_pixels=2000).unreadable] == ["0/large.png"]
        dataset = index(data)
        assert not dataset.unreadable
        assert dataset.uncached(dataset.exact) == 0
        row = dataset.table["path"].to_list().index("0/large.png")
        assert (all_pixels(dataset)[row] == (255, 0, 0)).all()

    def test_cache_of_another_spec_is_another_cache(self, tmp_path: Path) -> None:
        data = write_digits(tmp_path / "data")
        read(data)
        other = open_dataset(
            data, spec=SPEC.model_copy(update={"filter": "bilinear"}), config=DatasetConfig()
        )
        assert all_pixels(other).shape == (120, 32, 32, 3)

    @pytest.mark.parametrize("damage", [b"", b"PAR1", b"{", b"[]", b'{"file": 3, "sha256": 3}', None])
    @pytest.mark.parametrize("name", ["index-*.parquet", "pixels-*.json", "pixels-*.u8"])
    def test_what_is_damaged_is_as_if_it_were_not_there(
        self, tmp_path: Path, name: str, damage: bytes | None
    ) -> None:
        data = write_flat(tmp_path / "data", images=4)
        table, pixels = index(data).table, all_pixels(index(data))
        (file,) = cache_folder(data).glob(name)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if damage is None else damage)
        Image.new("RGB", (9, 9), "red").save(data / "0" / "zzz.png")
        for _ in range(2):
            dataset = index(data)
            old = np.array(["zzz" not in path for path in dataset.table["path"]])
            assert dataset.table.filter(pl.Series(old)).equals(table)
            assert np.array_equal(all_pixels(dataset)[old], pixels)
            assert dataset.uncached(dataset.exact) == 0
        for path in dataset.table["path"]:
            spoil_keeping_size_and_time(dataset.file(path))
        assert index(data).table.equals(dataset.table)  # all of it is remembered again

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


def write_crops(folder: Path, *, photos: int = 12) -> Path:
    """A CSV of two crops of each photo, upright and turned ones, one over the edge; some photos twice."""
    lines = ["image_path,label"]
    for number, image in enumerate(pieces()["china"][:photos]):
        data = awkward.with_orientation(image, "JPEG", (1, 6, 3, 8)[number % 4], quality=90)
        names = [f"{number:02d}.jpg", f"again-{number:02d}.jpg"][: 1 + number % 2]
        for name in names:
            put(folder / name, data)
            lines.append(f'"{name}#xywh=5,4,20.5,30",left')
            lines.append(f'"{name}#xywh=30,40,50,50",right')
    return put(folder / "crops.csv", "\n".join(lines).encode())


class TestRegions:
    def test_names_are_read_and_written(self) -> None:
        name = example_name("a b.jpg", Box(1, 2.5, 11, 22.5))
        assert name == "a b.jpg#xywh=1,2.5,10,20"
        assert file_and_region(name) == ("a b.jpg", Box(1, 2.5, 11, 22.5))
        for whole in ("a.jpg", "c#1.jpg", "a.jpg#xywh=1,2,3", "a.jpg#xywh=1,2,3,4.jpg", "a#xywh=-,.,+,e"):
            assert file_and_region(whole) == (whole, None)

    @pytest.mark.parametrize("limit", [None, 0.0])
    def test_pixels_are_those_of_the_region_cached_or_not(self, tmp_path: Path, limit: float | None) -> None:
        source = write_crops(tmp_path / "data")
        dataset = index(source, cache_limit_gb=limit)
        assert bool(dataset.stores) == (limit is None)
        wanted = []
        for path in dataset.table["path"]:
            file, region = file_and_region(path)
            assert dataset.file(path) == tmp_path / "data" / file
            wanted.append(read_pixels((tmp_path / "data" / file).read_bytes(), spec=SPEC, region=region))
        assert np.array_equal(all_pixels(dataset), np.stack(wanted))
        again = index(source, cache_limit_gb=limit)
        assert again.table.equals(dataset.table)
        assert np.array_equal(all_pixels(again), np.stack(wanted))

    def test_a_half_filled_cache_gives_the_same(self, tmp_path: Path) -> None:
        source = write_crops(tmp_path / "data")
        whole = all_pixels(index(source))
        (tmp_path / "data").rename(tmp_path / "other")
        half = index(tmp_path / "other" / "crops.csv", cache_limit_gb=SPEC.height * SPEC.width * 3 * 10e-9)
        assert sum(len(store.rows) for store in half.stores.values()) in range(5, 11)
        assert np.array_equal(all_pixels(half), whole)

    def test_parts_of_a_photo_and_of_its_copies_stay_on_one_side(self, tmp_path: Path) -> None:
        dataset = index(write_crops(tmp_path / "data", photos=30), validation=0.3, test=0.3)
        sides = dataset.table.group_by("sha256").agg(pl.col("split").n_unique(), pl.len())
        assert set(sides["len"]) == {2, 4}
        assert sides["split"].max() == 1
        assert len(dataset.splits) == 3

    def test_size_is_that_of_the_part_inside_of_the_upright_image(self, tmp_path: Path) -> None:
        dataset = index(write_crops(tmp_path / "data", photos=4))
        sizes = {row[0]: row[1:] for row in dataset.table.select("path", "width", "height").iter_rows()}
        assert {size for path, size in sizes.items() if "#xywh=5" in path} == {(20, 30)}
        assert {size for path, size in sizes.items() if "#xywh=30" in path} == {(34, 24)}

    def test_parts_have_hashes_of_their_own(self, tmp_path: Path) -> None:
        table = index(write_crops(tmp_path / "data", photos=4)).table
        assert table["sha256"].n_unique() == 4
        assert table["pixels_sha256"].n_unique() == 8

    def test_picture_and_view_show_the_part(self, tmp_path: Path) -> None:
        dataset = index(write_crops(tmp_path / "data", photos=4))
        spec = Preprocess(height=40, width=50, resize="letterbox")
        thumbnail = thumbnailer(dataset)
        for path in dataset.table["path"]:
            file, region = file_and_region(path)
            data = dataset.file(file).read_bytes()
            assert np.array_equal(dataset.picture(path), read_full(data, region=region))
            assert np.array_equal(dataset.view(path, spec=spec), read_pixels(data, spec=spec, region=region))
            small = thumbnail(path)
            assert small is not None
            assert awkward.decode(small).shape == (160, 160, 3)
        assert thumbnail("gone.jpg") is None

    def test_a_region_outside_of_its_image_is_unreadable_and_harms_no_other(self, tmp_path: Path) -> None:
        put(tmp_path / "a.png", pieces()["china"][0])
        rows = ['"a.png#xywh=0,0,9,9",x', '"a.png#xywh=70,0,9,9",y', "a.png,y"]
        source = put(tmp_path / "crops.csv", "\n".join(["image_path,label", *rows]).encode())
        dataset = index(source)
        assert dataset.table["path"].to_list() == ["a.png", "a.png#xywh=0,0,9,9"]
        ((path, error),) = [(file.path, file.error) for file in dataset.unreadable]
        assert path == "a.png#xywh=70,0,9,9"
        assert "outside" in error


class TestFacts:
    def test_columns_say_what_the_files_are(self, tmp_path: Path) -> None:
        image = pieces()["china"][0][:, :40]
        files: dict[str, tuple[bytes, tuple[str, str, int, int]]] = {
            "photo.jpg": (jpeg(image), ("JPEG", "RGB", 40, 64)),
            "turned.jpg": (awkward.with_orientation(image, "JPEG", 6), ("JPEG", "RGB", 64, 40)),
            "turned.png": (awkward.with_orientation(image, "PNG", 5), ("PNG", "RGB", 64, 40)),
            "turned.tif": (awkward.with_orientation(image, "TIFF", 8), ("TIFF", "RGB", 64, 40)),
            "over.jpg": (awkward.with_orientation(image, "JPEG", 3), ("JPEG", "RGB", 40, 64)),
            "wrong.jpg": (awkward.encode(image, "PNG"), ("PNG", "RGB", 40, 64)),
            "ink.jpg": (awkward.cmyk_jpeg((9, 9, 9, 9), size=(7, 5)), ("JPEG", "CMYK", 7, 5)),
            "deep.png": (awkward.grey16_png(np.zeros((3, 9), np.uint16)), ("PNG", "I;16", 9, 3)),
            "dot.gif": (awkward.encode(Image.new("P", (1, 1)), "GIF"), ("GIF", "P", 1, 1)),
        }
        for name, (data, _) in files.items():
            put(tmp_path / "a" / name, data)
        dataset = index(tmp_path)
        assert not dataset.unreadable
        columns = dataset.table.select("path", "format", "mode", "width", "height").iter_rows()
        assert {path.removeprefix("a/"): tuple(rest) for path, *rest in columns} == {
            name: found for name, (_, found) in files.items()
        }

    def test_an_index_of_before_they_were_kept_is_read_anew(self, tmp_path: Path) -> None:
        data = write_flat(tmp_path / "data", images=4)
        table = index(data).table
        (file,) = cache_folder(data).glob("index-*.parquet")
        pl.read_parquet(file).drop("format", "mode", "width", "height").write_parquet(file)
        assert index(data).table.equals(table)
        assert set(table["width"]) == {32}


class TestForThoseWhoLookForFaults:
    def test_nothing_that_can_be_listed_is_an_error(self, tmp_path: Path) -> None:
        data = write_flat(tmp_path / "data", classes=1, images=3)
        put(data / "0" / "broken.png", b"x")
        dataset = index(data)
        assert dataset.classes == ("0",)
        assert [file.path for file in dataset.unreadable] == ["0/broken.png"]
        for file in data.glob("*/*"):
            file.write_bytes(b"x")
        nothing = index(data)
        assert (len(nothing.table), nothing.classes, nothing.splits) == (0, (), ())
        assert len(nothing.unreadable) == 4
        with pytest.raises(DatasetError, match="4 of 4 files are unreadable"):
            read(data)

    def test_bad_records_are_problems_that_name_their_line(self, tmp_path: Path) -> None:
        write_flat(tmp_path, classes=2, images=2)
        good = [
            f"{file.relative_to(tmp_path).as_posix()},{file.parent.name}" for file in tmp_path.glob("*/*")
        ]
        put(tmp_path / "labels.csv", "\n".join(["image_path,label", *good, ",x"]).encode())
        dataset = index(tmp_path / "labels.csv")
        assert len(dataset.table) == 4
        (problem,) = dataset.problems
        assert str(problem).startswith("labels.csv: line 6: image_path is empty")

    def test_a_name_that_is_not_utf8_is_a_problem(self, tmp_path: Path) -> None:
        data = write_flat(tmp_path / "data", classes=2, images=3)
        try:
            next((data / "0").iterdir()).rename(os.fsdecode(os.fsencode(data / "0") + b"/\xe9.png"))
        except OSError:
            pytest.skip("this file system has only UTF-8 names")
        dataset = index(data)
        assert len(dataset.table) == 5
        assert [str(problem) for problem in dataset.problems] == [
            "0/\\udce9.png: its name is not UTF-8; rename it"
        ]

    def test_the_labelling_outlives_a_new_split_and_no_new_label(self, tmp_path: Path) -> None:
        data = write_flat(tmp_path / "data", images=20)
        first = index(data)
        other_shares = index(data, test=0.5)
        assert other_shares.root_hash != first.root_hash
        assert other_shares.labelling_hash == first.labelling_hash
        path = first.table["path"][0]
        moved = "test" if first.table["split"][0] != "test" else "train"
        write_revision(cache_folder(data), source="fix-split", changes=[Change(path=path, split=moved)])
        assert index(data).labelling_hash == first.labelling_hash
        write_revision(cache_folder(data), source="relabel", changes=[Change(path=path, label="1")])
        relabelled = index(data)
        assert relabelled.revision == 2
        assert relabelled.labelling_hash != first.labelling_hash
        assert index(data, revision=1).labelling_hash == first.labelling_hash
        (data / path).write_bytes(jpeg(pieces()["china"][0]))
        assert index(data, revision=0).labelling_hash != first.labelling_hash

    def test_a_dataset_is_called_as_its_folder_or_file(self, tmp_path: Path) -> None:
        assert dataset_name(put(tmp_path / "birds" / "labels.v2.csv", b"")) == "labels.v2"
        assert dataset_name(tmp_path / "birds") == "birds"

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from digits import write_digits, write_flat
from holotype.agree.apply import apply
from holotype.config import AgreeConfig, ConvertConfig, DatasetConfig, SourceConfig
from holotype.contact_sheet import draw_sheet
from holotype.convert import Converted, convert
from holotype.dataset import index_dataset
from holotype.dataset.listing import Listing, Record, file_and_region
from holotype.dataset.revisions import Change, revise, write_revision
from holotype.dataset.source import read_source
from holotype.dataset.store import cache_folder
from holotype.errors import ConfigError, DatasetError
from holotype.preprocess import Preprocess, read_full

RED, GREEN = (230, 25, 75), (60, 180, 75)


def run(data: Path, out: Path, *, preview: Path | None = None, shown: int = 48, **settings: Any) -> Converted:
    return convert(
        data, out, config=ConvertConfig(preview=shown, data=SourceConfig(**settings)), preview=preview
    )


def read(source: Path, **settings: Any) -> Listing:
    return read_source(source, config=SourceConfig(**settings), keep_annotators=True)


def absolute(listing: Listing) -> set[Record]:
    """Records by the place of their files, wherever the table is kept; so are groups that are files."""
    found = set()
    for record in listing.records:
        path = os.path.normpath(listing.root.absolute() / record.path)
        own = record.group == file_and_region(record.path)[0]
        group = file_and_region(path)[0] if own else record.group
        found.add(dataclasses.replace(record, path=path, group=group))
    return found


def table(file: Path, *rows: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(("image_path,label,split,annotator,group", *rows)))
    return file


def noise(file: Path, size: tuple[int, int] = (60, 40), *, orientation: int = 1, seed: int = 0) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, exif=exif)
    return file


@pytest.fixture
def boxes(tmp_path: Path) -> Path:
    """Photos, one of them turned by its EXIF, with three good boxes and two bad ones."""
    noise(tmp_path / "boxes" / "a.jpg", seed=1)
    noise(tmp_path / "boxes" / "b.png", seed=2)
    noise(tmp_path / "boxes" / "turned.jpg", orientation=6, seed=3)
    entries = [("a.jpg", 4, 5, 20, 10), ("b.png", 30, 20, 99, 99), ("turned.jpg", 1, 41, 30, 18)]
    entries += [("a.jpg", 90, 5, 20, 10), ("gone.jpg", 0, 0, 9, 9)]
    content = [
        {"image_path": name, "bbox": sides, "class_id": ("cat", "dog")[number % 2]}
        for number, (name, *sides) in enumerate(entries)
    ]
    (tmp_path / "boxes" / "boxes.json").write_text(json.dumps({"annotations": content}, indent=1))
    return tmp_path / "boxes"


class TestFolders:
    def test_regions_are_written_pixel_for_pixel_and_bad_records_returned(
        self, boxes: Path, tmp_path: Path
    ) -> None:
        result = run(boxes, tmp_path / "out", boxes="crop", margin=0.1)
        assert (result.to, result.records, result.classes) == ("folders", 3, {"cat": 2, "dog": 1})
        assert ["lies outside" in p.what or "not there" in p.what for p in result.problems] == [True, True]
        written = {file.name: file for file in (tmp_path / "out").rglob("*.png")}
        assert set(written) == {"a-2-4-24-12.png", "b-27-18-33-22.png", "turned-0-39-34-21.png"}
        for record in read(boxes, boxes="crop", margin=0.1).records:
            name, region = file_and_region(record.path)
            wanted = read_full((boxes / name).read_bytes(), region=region)
            (file,) = (f for f in written.values() if f.name.startswith(Path(name).stem))
            assert file.parent.name == record.label
            assert np.array_equal(read_full(file.read_bytes()), wanted)

    def test_regions_between_pixels_are_those_of_read_full(self, tmp_path: Path) -> None:
        photo = noise(tmp_path / "a.png")
        regions = ("0.5,1.5,10.2,7.7", "2.6,3.4,0.2,0.2", "50.5,30,900,900", "-3,-3,8.5,8.49")
        data = table(tmp_path / "t.csv", *(f'"a.png#xywh={region}",x,,,' for region in regions))
        run(data, tmp_path / "out")
        sizes = set()
        for record in read(data).records:
            region = file_and_region(record.path)[1]
            wanted = read_full(photo.read_bytes(), region=region)
            sizes.add(wanted.shape)
            found = [read_full(file.read_bytes()) for file in (tmp_path / "out" / "x").iterdir()]
            assert any(np.array_equal(pixels, wanted) for pixels in found)
        assert len(sizes) == 4

    def test_whole_images_are_copied_byte_for_byte_into_their_splits(self, tmp_path: Path) -> None:
        data = write_digits(tmp_path / "data")
        result = run(data, tmp_path / "out")
        assert result.splits == {"train": 72, "validation": 24, "test": 24}
        before, after = read(data), read(tmp_path / "out")
        assert after.records == before.records
        for record in after.records:
            assert (tmp_path / "out" / record.path).read_bytes() == (data / record.path).read_bytes()

    def test_names_are_unique_and_found_again(self, tmp_path: Path) -> None:
        for number, name in enumerate(("x/a.png", "y/a.png", "z/A.PNG", ".hidden.png", f"{'n' * 250}.png")):
            noise(tmp_path / "in" / name, seed=number)
        noise(tmp_path / "b.jpg", seed=9).rename(tmp_path / "in" / "no-suffix")
        names = [
            file.relative_to(tmp_path).as_posix() for file in (tmp_path / "in").rglob("*") if file.is_file()
        ]
        data = table(tmp_path / "t.csv", *(f"{name},x,,," for name in names))
        run(data, tmp_path / "one")
        run(data, tmp_path / "two")
        listing = read(tmp_path / "one")
        assert not listing.ignored
        assert listing.records == read(tmp_path / "two").records
        contents = {(tmp_path / "one" / record.path).read_bytes() for record in listing.records}
        assert contents == {(tmp_path / name).read_bytes() for name in names}
        assert len(contents) == 6
        assert {"x/hidden.png", "x/no-suffix.jpg"} <= {record.path for record in listing.records}

    @pytest.mark.parametrize(
        "label", ["a/b", "..", ".x", "a\\b", "a\nb", "x" * 300, "Train", "__MACOSX", "@eaDir"]
    )
    def test_classes_that_are_no_folder_names(self, tmp_path: Path, label: str) -> None:
        noise(tmp_path / "a.png")
        data = table(tmp_path / "t.csv", f'a.png,"{label}",,,')
        with pytest.raises(DatasetError, match="cannot be the name of a folder"):
            run(data, tmp_path / "out")
        assert sorted(file.name for file in tmp_path.iterdir()) == ["a.png", "t.csv"]

    def test_a_split_for_some_only(self, tmp_path: Path) -> None:
        data = table(tmp_path / "t.csv", "a.png,x,train,,", "b.png,x,,,")
        with pytest.raises(DatasetError, match="some do not"):
            run(data, tmp_path / "out")

    def test_unreadable_images_are_problems_and_nothing_is_left_where_all_are(self, tmp_path: Path) -> None:
        noise(tmp_path / "good.png")
        (tmp_path / "bad.png").write_bytes(b"no image")
        data = table(tmp_path / "t.csv", "good.png,x,,,", "bad.png,x,,,", '"gone.png#xywh=0,0,9,9",x,,,')
        result = run(data, tmp_path / "out")
        assert result.records == 1
        assert [problem.where for problem in result.problems] == ["bad.png", "gone.png#xywh=0,0,9,9"]
        with pytest.raises(DatasetError, match=r"1 of 1 records cannot be used: bad\.png: not an image"):
            run(table(tmp_path / "t.csv", "bad.png,x,,,"), tmp_path / "none")
        assert not [file for file in tmp_path.iterdir() if "none" in file.name]

    def test_what_folders_cannot_hold_is_said(self, boxes: Path, tmp_path: Path) -> None:
        (note,) = run(boxes, tmp_path / "out", boxes="crop").notes
        assert "crops of one photo may come into different splits" in note
        assert not run(boxes, tmp_path / "out.csv", boxes="crop").notes
        noise(tmp_path / "a.png")
        data = table(tmp_path / "t.csv", "a.png,x,,ann,")
        (note,) = run(data, tmp_path / "other").notes
        assert "who labelled" in note


class TestTables:
    @pytest.mark.parametrize("name", ["out.csv", "out.parquet"])
    def test_there_and_back(self, boxes: Path, tmp_path: Path, name: str) -> None:
        before = read(boxes, boxes="crop")
        result = run(boxes, boxes / name, boxes="crop")
        assert result.records == len(before.records) == 3
        assert len(result.problems) == 2
        beside = read(boxes / name)
        assert beside.records == before.records
        run(boxes, tmp_path / "elsewhere" / name, boxes="crop")
        away = read(tmp_path / "elsewhere" / name)
        assert all(Path(record.path).is_absolute() for record in away.records)
        assert absolute(away) == absolute(before)

    @pytest.mark.parametrize("name", ["out.csv", "out.parquet"])
    def test_annotators_groups_splits_and_awkward_text_survive(self, tmp_path: Path, name: str) -> None:
        rows = [
            'a.png,"line\none, ""two""",train,ann,g 1',
            'a.png,"line\none, ""two""",train,bob,g 1',
            '"b,c.png#xywh=1,2,3,4",ä,val,,',
        ]
        data = table(tmp_path / "t.csv", *rows)
        run(data, tmp_path / name)
        assert read(tmp_path / name).records == read(data).records
        assert len(read(data).records) == 3

    def test_folders_to_table_and_on_to_folders(self, tmp_path: Path) -> None:
        data = write_digits(tmp_path / "data", classes=2, train=3, validation=2, test=2)
        run(data, tmp_path / "t.parquet")
        run(tmp_path / "t.parquet", tmp_path / "out")
        assert read(tmp_path / "out").records == read(data).records

    @pytest.mark.skipif(sys.platform == "darwin", reason="its file names are always UTF-8")
    def test_names_that_no_table_can_hold_are_problems(self, tmp_path: Path) -> None:
        for name in (b"\xff.png", b"good.png"):
            file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/data/x/" + name))
            noise(file)
        result = run(tmp_path / "data", tmp_path / "out.csv")
        assert result.records == 1
        (problem,) = result.problems
        assert problem.what == "its name is not UTF-8"
        problem.where.encode()


def write_boxes(folder: Path, layout: str) -> Path:
    """Forty photos with two boxes each, in `yolo` or `voc`, and an exact copy of each under another name."""
    names = "a", "copy-of-a"
    for number in range(40):
        photo = noise(folder / "images" / f"a{number}.png", (40, 40), seed=number)
        shutil.copy(photo, photo.with_name(f"copy-of-{photo.name}"))
        for stem in (f"{name}{number}" for name in names):
            if layout == "yolo":
                (folder / "labels").mkdir(exist_ok=True)
                (folder / "labels" / f"{stem}.txt").write_text("0 .25 .25 .3 .3\n1 .75 .75 .3 .3\n")
            else:
                boxes = "".join(
                    f"<object><name>{label}</name><bndbox><xmin>{place}</xmin><ymin>{place}</ymin>"
                    f"<xmax>{place + 12}</xmax><ymax>{place + 12}</ymax></bndbox></object>"
                    for label, place in (("cat", 4), ("dog", 20))
                )
                size = "<size><width>40</width><height>40</height><depth>3</depth></size>"
                text = f"<annotation><filename>{stem}.png</filename>{size}{boxes}</annotation>"
                (folder / "images" / f"{stem}.xml").write_text(text)
    if layout == "yolo":
        (folder / "classes.txt").write_text("cat\ndog\n")
    return folder


def splits_of(source: Path, **settings: Any) -> dict[str, str]:
    """The split of each crop, by the name of its file and the region."""
    spec = Preprocess(height=16, width=16)
    dataset = index_dataset(source, spec=spec, config=DatasetConfig(**settings))
    return {Path(path).name: split for path, split in dataset.table.select("path", "split").iter_rows()}


class TestSplitsOfCrops:
    @pytest.mark.parametrize("layout", ["yolo", "voc"])
    def test_they_are_those_of_the_data_wherever_the_table_is_kept(self, tmp_path: Path, layout: str) -> None:
        data = write_boxes(tmp_path / "data", layout)
        settings = {"boxes": "crop", "margin": 0.0}
        wanted = splits_of(data, **settings)
        assert len(wanted) == 160
        assert set(wanted.values()) == {"train", "validation", "test"}
        assert all(wanted[name] == wanted[f"copy-of-{name}"] for name in wanted if name.startswith("a"))
        for out in ("data/in.csv", "beside.csv", "elsewhere/out.csv", "elsewhere/out.parquet"):
            run(data, tmp_path / out, **settings)
            assert splits_of(tmp_path / out) == wanted, out
        config = AgreeConfig(data=DatasetConfig(**settings))
        for out in ("data/applied.csv", "applied.csv", "elsewhere/applied.csv"):
            apply(data, out=tmp_path / out, config=config)
            assert splits_of(tmp_path / out) == wanted, out

    def test_a_group_of_its_own_is_kept(self, tmp_path: Path) -> None:
        noise(tmp_path / "a.png")
        rows = ['"a.png#xywh=1,2,9,9",x,,,patient 7', '"a.png#xywh=3,4,9,9",x,,,', "a.png,x,,,"]
        run(table(tmp_path / "t.csv", *rows), tmp_path / "elsewhere" / "out.csv")
        groups = [record.group for record in read(tmp_path / "elsewhere" / "out.csv").records]
        assert groups == [None, "patient 7", str(tmp_path / "a.png")]


class TestRevision:
    def test_labels_and_splits_are_those_of_the_revision(self, tmp_path: Path) -> None:
        data = write_digits(tmp_path / "data", classes=2, train=4, validation=2, test=3)
        paths = [record.path for record in read(data).records]
        changes = [Change(path=paths[0], label="1"), Change(path=paths[1], drop=True)]
        write_revision(cache_folder(data), source="relabel", changes=changes)
        change = Change(path=paths[2], split="train")
        write_revision(cache_folder(data), source="fix-split", changes=[change])
        for out, settings in (("latest", {}), ("one", {"revision": 1}), ("none", {"revision": 0})):
            run(data, tmp_path / f"{out}.csv", **settings)
            run(data, tmp_path / out, **settings)
        tables = {out: read(tmp_path / f"{out}.csv") for out in ("latest", "one", "none")}
        assert absolute(tables["none"]) == absolute(read(data))
        for number, out in ((1, "one"), (2, "latest")):
            revised, _ = revise(read(data), cache_folder(data), number)
            assert absolute(tables[out]) == absolute(revised)
            assert len(revised.records) == len(paths) - 1
        relabelled, moved = Path(paths[0]).name, Path(paths[2]).name
        assert (tmp_path / "latest" / "test" / "1" / relabelled).is_file()
        assert (tmp_path / "latest" / "train" / "0" / moved).is_file()
        assert (tmp_path / "one" / "test" / "0" / moved).is_file()
        assert (tmp_path / "none" / paths[0]).is_file()

    @pytest.mark.parametrize("out", ["out", "out.csv", "out.parquet"])
    def test_one_that_does_not_exist_is_an_error(self, tmp_path: Path, out: str) -> None:
        data = write_digits(tmp_path / "data", classes=2, train=2, validation=1, test=1)
        with pytest.raises(DatasetError, match="there is no revision 7 of its labels"):
            run(data, tmp_path / out, revision=7)
        assert not (tmp_path / out).exists()

    def test_a_new_label_of_what_two_annotators_labelled_is_written_once(self, tmp_path: Path) -> None:
        noise(tmp_path / "a.png")
        noise(tmp_path / "b.png")
        rows = [f"{name}.png,x,,{who}," for name in "ab" for who in ("ann", "bob")]
        data = table(tmp_path / "t.csv", *rows)
        write_revision(cache_folder(data), source="relabel", changes=[Change(path="a.png", label="y")])
        assert run(data, tmp_path / "out.csv").records == 3
        written = [(r.path, r.label, r.annotator) for r in read(tmp_path / "out.csv").records]
        assert written == [("a.png", "y", None), ("b.png", "x", "ann"), ("b.png", "x", "bob")]

    def test_files_that_came_after_a_new_split_are_told(self, tmp_path: Path) -> None:
        data = write_flat(tmp_path / "data", classes=2, images=3)
        first, *others = (record.path for record in read(data).records)
        changes = [Change(path=path, split="train") for path in others]
        write_revision(cache_folder(data), source="fix-split", changes=changes)
        (note,) = run(data, tmp_path / "out.csv").notes
        assert note.startswith("1 of 6 examples name no split")
        assert {r.path for r in read(tmp_path / "out.csv").records if r.split is None} == {f"data/{first}"}
        with pytest.raises(DatasetError, match="some do not"):
            run(data, tmp_path / "out")


class TestTarget:
    def test_nothing_that_is_there_is_replaced(self, tmp_path: Path) -> None:
        data = table(tmp_path / "t.csv", "a.png,x,,,")
        noise(tmp_path / "a.png")
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "mine.txt").write_text("mine")
        for out in (tmp_path / "full", data, tmp_path / "full" / "mine.txt"):
            with pytest.raises((DatasetError, ConfigError)):
                run(data, out)
        assert (tmp_path / "full" / "mine.txt").read_text() == "mine"
        (tmp_path / "empty").mkdir()
        assert run(data, tmp_path / "empty").records == 1

    def test_folder_within_the_data_would_become_data(self, tmp_path: Path) -> None:
        noise(tmp_path / "data" / "x" / "a.png")
        with pytest.raises(DatasetError, match="part of the data"):
            run(tmp_path / "data", tmp_path / "data" / "out")

    @pytest.mark.parametrize(
        ("out", "to"), [("out.json", None), ("out.csv", "parquet"), ("out", "csv"), ("out.csv", "folders")]
    )
    def test_name_and_kind_must_agree(self, tmp_path: Path, out: str, to: Any) -> None:
        data = table(tmp_path / "t.csv", "a.png,x,,,")
        with pytest.raises(ConfigError):
            convert(data, tmp_path / out, to=to)

    def test_data_without_examples(self, tmp_path: Path) -> None:
        noise(tmp_path / "data" / "a.png")
        (tmp_path / "data" / "x.json").write_text('[{"image": "a.png", "annotations": []}]')
        with pytest.raises(
            DatasetError, match=r"gives no example; 1 files were passed over; .*data\.background"
        ):
            run(tmp_path / "data", tmp_path / "out")


class TestPreview:
    def test_boxes_are_drawn_in_the_colour_of_their_class(self, tmp_path: Path) -> None:
        Image.new("RGB", (400, 300)).save(tmp_path / "a.png")
        rows = ['"a.png#xywh=40,30,120,90",cat,,,', '"a.png#xywh=200,150,160,120",dog,,,']
        data = table(tmp_path / "t.csv", *rows)
        result = run(data, tmp_path / "out.csv", preview=tmp_path / "sheet.png")
        assert result.preview == tmp_path / "sheet.png"
        with Image.open(tmp_path / "sheet.png") as sheet:
            pixels = np.asarray(sheet.convert("RGB"))
        black = np.argwhere((pixels == 0).all(axis=2))
        (top, left), (bottom, right) = black.min(axis=0), black.max(axis=0) + 1
        scale = (right - left) / 400
        assert scale == pytest.approx((bottom - top) / 300, abs=0.01)
        assert scale >= 1
        for colour, (x, y, width, height) in ((RED, (40, 30, 120, 90)), (GREEN, (200, 150, 160, 120))):
            corner = int(left + (x + width) * scale) - 1, int(top + (y + height) * scale) - 1
            middle = int(left + (x + width / 2) * scale), int(top + (y + height / 2) * scale)
            assert tuple(pixels[corner[1], corner[0]]) == colour
            assert tuple(pixels[middle[1], middle[0]]) == (0, 0, 0)

    def test_all_classes_are_sampled_and_always_the_same(self, tmp_path: Path) -> None:
        for number in range(60):
            label = "rare" if number == 17 else "common"
            noise(tmp_path / "data" / label / f"{number}.png", (20, 20), seed=number)
        listing = read(tmp_path / "data")
        assert draw_sheet(listing, tmp_path / "one.png", examples=4) == 4
        draw_sheet(listing, tmp_path / "two.png", examples=4)
        assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
        with Image.open(tmp_path / "one.png") as sheet:
            found = Counter(sheet.convert("RGB").get_flattened_data())
        assert found[RED] > 500
        assert found[GREEN] > 500

    def test_odd_images_and_regions_do_not_stop_it(self, tmp_path: Path) -> None:
        (tmp_path / "broken.png").write_bytes(b"no image")
        noise(tmp_path / "line.png", (300, 1))
        noise(tmp_path / "a.png")
        rows = ["broken.png,x,,,", "gone.png,ä 漢,,,", f"line.png,{'long ' * 200},,,"]
        rows += ['"a.png#xywh=-1e30,5,1e31,1e300",y,,,', '"a.png#xywh=500,5,5,5",y,,,']
        listing = read(table(tmp_path / "t.csv", *rows))
        assert draw_sheet(listing, tmp_path / "sheet.jpg", examples=100) == 5
        with Image.open(tmp_path / "sheet.jpg") as sheet:
            sheet.load()
            assert sheet.format == "JPEG"

    def test_names_that_cannot_be_written(self, tmp_path: Path) -> None:
        data = table(tmp_path / "t.csv", "a.png,x,,,")
        with pytest.raises(ConfigError, match=r"name it \.png or \.jpg"):
            run(data, tmp_path / "out.csv", preview=tmp_path / "sheet.pdf")
        photo = noise(tmp_path / "photo.png")
        before = photo.read_bytes()
        with pytest.raises(DatasetError, match="exists"):
            run(data, tmp_path / "out.csv", preview=photo)
        assert photo.read_bytes() == before
        assert not (tmp_path / "out.csv").exists()

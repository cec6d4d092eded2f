"""Every layout that is read: hand-made files with the traps of each format, and BCCD where it is at hand."""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from holotype.config import SourceConfig
from holotype.dataset.listing import Listing, Problem, Record
from holotype.dataset.source import read_source
from holotype.errors import DatasetError

DATA = Path(os.environ.get("HOLOTYPE_DATA", Path(__file__).parents[2] / "shared" / "data"))


def read(source: Path, *, keep_annotators: bool = False, **data: Any) -> Listing:
    return read_source(source, config=SourceConfig(**data), keep_annotators=keep_annotators)


def crops(source: Path, **data: Any) -> Listing:
    """Boxes as they are: each an example without margin."""
    return read(source, boxes="crop", margin=0, **data)


def picture(file: Path, size: tuple[int, int] = (100, 50), *, orientation: int = 1) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size, "gray").save(file, exif=exif)


def labels(listing: Listing) -> dict[str, str]:
    return {record.path: record.label for record in listing.records}


def only(listing: Listing) -> Problem:
    assert len(listing.problems) == 1, listing.problems
    return listing.problems[0]


def voc(name: str, *objects: str, filename: str = "a.jpg") -> str:
    body = "\n".join(objects)
    return (
        f"<annotation>\n<folder>elsewhere</folder>\n<filename>{filename}</filename>\n"
        f"<path>/home/somebody/{name}</path>\n<size><width>9999</width><height>1</height></size>\n"
        f"{body}\n</annotation>\n"
    )


def voc_object(label: str, *sides: object) -> str:
    names = ("xmin", "ymin", "xmax", "ymax")
    corners = "".join(f"<{name}>{side}</{name}>" for name, side in zip(names, sides, strict=True))
    return f"<object><name>{label}</name><difficult>1</difficult><bndbox>{corners}</bndbox></object>"


def write(file: Path, content: str | bytes | dict[str, Any] | list[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file.write_text(content if isinstance(content, str) else json.dumps(content, indent=1))
    return file


class TestVoc:
    def test_bccd_has_the_counts_of_its_xml(self, tmp_path: Path) -> None:
        archive = DATA / "bccd-voc.tar"
        if not archive.is_file():
            pytest.skip(f"{archive.name} is not here")
        with tarfile.open(archive) as tar:
            tar.extractall(tmp_path, filter="data")
        root = tmp_path / "BCCD"
        drawn: Counter[str] = Counter()
        empty: Counter[str] = Counter()
        for file in (root / "Annotations").glob("*.xml"):
            for found in re.finditer(r"<object>.*?</object>", file.read_text(), re.DOTALL):
                sides = [int(n) for n in re.findall(r"<[xy]m\w\w>(\d+)</", found[0])]
                name = re.findall(r"<name>(\w+)</name>", found[0])[0]
                (drawn if sides[0] < sides[2] and sides[1] < sides[3] else empty)[name] += 1
        assert (drawn + empty) == {"RBC": 4155, "WBC": 372, "Platelets": 361}
        listing = read(root, boxes="crop")
        assert Counter(record.label for record in listing.records) == drawn
        assert len(listing.problems) == empty["RBC"] == empty.total() == 2
        assert "BloodImage_00338.xml: line 158: box of 'RBC' is empty" in str(listing.problems[0])
        by_split = {record.group: record.split for record in listing.records}
        assert Counter(by_split.values()) == {"train": 205, "validation": 87, "test": 72}

    def test_corners_are_edges_and_reach_over_the_image_at_most(self, tmp_path: Path) -> None:
        picture(tmp_path / "JPEGImages" / "a.jpg")
        objects = [voc_object("cell", 10, 20, 30.5, 40), voc_object("cell", "-5", 40, 20, 60)]
        write(tmp_path / "Annotations" / "a.xml", voc("a", *objects))
        listing = crops(tmp_path)
        assert [record.path for record in listing.records] == [
            "JPEGImages/a.jpg#xywh=0,40,20,10",
            "JPEGImages/a.jpg#xywh=10,20,21,20",
        ]
        assert {record.group for record in listing.records} == {"JPEGImages/a.jpg"}
        assert not listing.problems

    def test_size_is_that_of_the_upright_image_not_of_the_xml(self, tmp_path: Path) -> None:
        picture(tmp_path / "a.jpg", (100, 50), orientation=6)
        write(
            tmp_path / "a.xml", voc("a", voc_object("cell", 0, 60, 50, 100), voc_object("cell", 60, 0, 90, 9))
        )
        listing = crops(tmp_path)
        assert list(labels(listing)) == ["a.jpg#xywh=0,60,50,40"]
        assert "lies outside the image of 50 x 100 pixels" in only(listing).what

    def test_every_bad_object_is_listed_with_its_line_and_hides_no_other(self, tmp_path: Path) -> None:
        picture(tmp_path / "a.jpg")
        objects = [
            voc_object("good", 0, 0, 9, 9),
            voc_object("turned", 9, 0, 5, 9),
            "<object><name>no box</name><part><name>p</name><bndbox><xmin>1</xmin></bndbox></part></object>",
            "<object><bndbox/></object>",
            voc_object("worded", "one", 0, 5, 9),
            voc_object("infinite", "-inf", 0, 5, 9),
            voc_object("off", 200, 0, 220, 9),
        ]
        write(tmp_path / "a.xml", voc("a", *objects))
        listing = crops(tmp_path)
        assert list(labels(listing).values()) == ["good"]
        assert [problem.where for problem in listing.problems] == [f"a.xml: line {n}" for n in range(7, 13)]
        for problem, words in zip(
            listing.problems,
            ("xmin 9, xmax 5", "no <bndbox>", "no <name>", "'one'", "'-inf'", "outside"),
            strict=True,
        ):
            assert words in problem.what
            assert problem.fix

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("<annotation>\n<object>\n</annotation>", "line 3: is not XML"),
            (
                '<!DOCTYPE a [<!ENTITY b "c"><!ENTITY d "&b;&b;">]><annotation>&d;</annotation>',
                "line 1: declares entities",
            ),
            (
                '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/hostname">]><annotation>&b;</annotation>',
                "entities",
            ),
            ('<?xml version="1.0" encoding="no-such"?><annotation/>', "a.xml"),
            ("", "is not XML"),
        ],
    )
    def test_hostile_or_broken_xml_is_one_problem(self, tmp_path: Path, text: str, words: str) -> None:
        picture(tmp_path / "a.jpg")
        picture(tmp_path / "b.jpg")
        write(tmp_path / "a.xml", text)
        write(tmp_path / "b.xml", voc("b", voc_object("cell", 0, 0, 9, 9), filename="b.jpg"))
        listing = crops(tmp_path, format="voc")
        assert list(labels(listing).values()) == ["cell"]
        assert words in str(only(listing))

    def test_image_is_found_by_file_name_or_else_by_the_name_of_the_xml(self, tmp_path: Path) -> None:
        for name in ("a.PNG", "b.jpg", "c.jpg", "d.jpg"):
            picture(tmp_path / "images" / name)
        box = voc_object("cell", 0, 0, 9, 9)
        write(tmp_path / "annotations" / "a.xml", voc("a", box, filename="C:\\photos\\gone.jpg"))
        write(tmp_path / "annotations" / "x.xml", voc("x", box, filename="b.jpg"))
        write(tmp_path / "annotations" / "c.xml", voc("c", box, filename="d.jpg"))
        write(tmp_path / "annotations" / "e.xml", voc("e", box, filename="e.jpg"))
        listing = crops(tmp_path)
        assert [record.group for record in listing.records] == ["images/a.PNG", "images/b.jpg"]
        assert [problem.where for problem in listing.problems] == ["annotations/c.xml", "annotations/e.xml"]
        assert "images/c.jpg" in listing.problems[0].what
        assert "'e.jpg' is not there" in listing.problems[1].what
        assert listing.ignored == ("images/c.jpg", "images/d.jpg")

    def test_image_of_another_split_is_not_taken_for_a_missing_one(self, tmp_path: Path) -> None:
        picture(tmp_path / "train" / "b.jpg")
        picture(tmp_path / "test" / "a.jpg")
        box = voc_object("cell", 0, 0, 9, 9)
        write(tmp_path / "train" / "a.xml", voc("a", box))
        write(tmp_path / "train" / "b.xml", voc("b", box, filename="b.jpg"))
        write(tmp_path / "test" / "a.xml", voc("a", box))
        listing = crops(tmp_path)
        assert {(record.group, record.split) for record in listing.records} == {
            ("train/b.jpg", "train"),
            ("test/a.jpg", "test"),
        }
        assert only(listing).where == "train/a.xml"

    def test_lists_of_imagesets_give_splits_and_contradict_each_other_aloud(self, tmp_path: Path) -> None:
        sets = tmp_path / "ImageSets" / "Main"
        for name in "abcde":
            picture(tmp_path / "JPEGImages" / f"{name}.jpg")
            text = voc(name, voc_object("cell", 0, 0, 9, 9), filename=f"{name}.jpg")
            write(tmp_path / "Annotations" / f"{name}.xml", text)
        write(sets / "train.txt", "a\nd\n")
        write(sets / "val.txt", "b\n")
        write(sets / "trainval.txt", "a\nb\nd\n")
        write(sets / "test.txt", "c\nd\n")
        write(sets / "cell_test.txt", "a  1\n")
        listing = crops(tmp_path)
        assert {record.group: record.split for record in listing.records} == {
            "JPEGImages/a.jpg": "train",
            "JPEGImages/b.jpg": "validation",
            "JPEGImages/c.jpg": "test",
        }
        both, neither = listing.problems
        assert both.where == "ImageSets/Main/test.txt: line 2"
        assert "d is in test here and in train at ImageSets/Main/train.txt: line 2" in both.what
        assert neither.where == "Annotations/e.xml"
        assert "in none of" in neither.what

    def test_trainval_alone_is_train(self, tmp_path: Path) -> None:
        picture(tmp_path / "JPEGImages" / "a.jpg")
        write(tmp_path / "Annotations" / "a.xml", voc("a", voc_object("cell", 0, 0, 9, 9)))
        write(tmp_path / "ImageSets" / "Main" / "trainval.txt", "a\n")
        assert [record.split for record in crops(tmp_path).records] == ["train"]

    def test_images_may_be_kept_elsewhere(self, tmp_path: Path) -> None:
        picture(tmp_path / "photos" / "a.jpg")
        write(
            tmp_path / "labels" / "may" / "a.xml", voc("a", voc_object("cell", 0, 0, 9, 9), filename="x.bmp")
        )
        listing = crops(tmp_path / "labels", images=str(tmp_path / "photos"))
        assert listing.root == tmp_path / "photos"
        assert list(labels(listing)) == ["a.jpg#xywh=0,0,9,9"]

    def test_unreadable_image_is_a_problem(self, tmp_path: Path) -> None:
        write(tmp_path / "a.jpg", b"not an image")
        write(tmp_path / "a.xml", voc("a", voc_object("cell", 0, 0, 9, 9)))
        assert "a.jpg cannot be read" in only(crops(tmp_path)).what


class TestPolicy:
    @pytest.fixture
    def data(self, tmp_path: Path) -> Path:
        boxes = {
            "both": [voc_object("cat", 10, 10, 30, 20), voc_object("dog", 40, 10, 50, 20)],
            "cats": [voc_object("cat", 10, 10, 30, 20), voc_object("cat", 40, 10, 50, 20)],
            "empty": [],
            "spoilt": [voc_object("cat", 10, 10, 30, 20), voc_object("cat", 300, 10, 310, 20)],
        }
        for name, objects in boxes.items():
            picture(tmp_path / f"{name}.jpg")
            write(tmp_path / f"{name}.xml", voc(name, *objects, filename=f"{name}.jpg"))
        picture(tmp_path / "unknown.jpg")
        return tmp_path

    def test_boxes_need_a_policy(self, data: Path) -> None:
        with pytest.raises(
            DatasetError, match=r"6 boxes in 3 images; say .*--set data.boxes=crop, single or"
        ):
            read(data)

    def test_crop_adds_the_margin_on_every_side_in_whole_pixels(self, data: Path) -> None:
        paths = list(labels(read(data, boxes="crop", margin=0.25)))
        assert "cats.jpg#xywh=5,7,30,16" in paths
        assert len(paths) == 5

    def test_margin_ends_at_the_image(self, data: Path) -> None:
        assert "cats.jpg#xywh=0,0,70,40" in labels(read(data, boxes="crop", margin=2))

    def test_single_takes_images_of_one_class_and_none_with_a_bad_box(self, data: Path) -> None:
        listing = read(data, boxes="single")
        assert listing.records == (Record("cats.jpg", "cat"),)
        mixed, outside = listing.problems
        assert "both.jpg has boxes of 2 classes (cat, dog)" in mixed.what
        assert outside.where == "spoilt.xml: line 7"
        assert listing.ignored == ("empty.jpg", "spoilt.jpg", "unknown.jpg")

    def test_reject_leaves_images_with_boxes_out(self, data: Path) -> None:
        listing = read(data, boxes="reject", background="nothing")
        assert listing.records == (Record("empty.jpg", "nothing"),)
        assert listing.ignored == ("both.jpg", "cats.jpg", "spoilt.jpg", "unknown.jpg")
        assert not listing.problems

    def test_empty_images_are_background_and_unknown_ones_are_not(self, data: Path) -> None:
        assert read(data, boxes="crop").ignored == ("empty.jpg", "unknown.jpg")
        listing = read(data, boxes="crop", background="nothing")
        assert labels(listing)["empty.jpg"] == "nothing"
        assert listing.ignored == ("unknown.jpg",)

    def test_one_box_drawn_twice_is_one_example_and_under_two_labels_a_problem(self, tmp_path: Path) -> None:
        picture(tmp_path / "a.jpg")
        sides = (10, 10, 30, 20)
        objects = [voc_object(label, *sides) for label in ("cat", "cat")]
        write(tmp_path / "a.xml", voc("a", *objects))
        assert len(crops(tmp_path).records) == 1
        write(tmp_path / "a.xml", voc("a", *objects, voc_object("dog", *sides)))
        listing = crops(tmp_path)
        assert not listing.records
        assert "label 'cat' here and 'dog' at a.xml: line 8" in only(listing).what


class TestYolo:
    def test_folders_that_are_links_are_read_and_those_that_lead_round_are_not(self, tmp_path: Path) -> None:
        picture(tmp_path / "photos" / "deep" / "a.jpg")
        write(tmp_path / "data" / "labels" / "deep" / "a.txt", "0 .5 .5 .2 .4\n")
        write(tmp_path / "data" / "classes.txt", "cat\n")
        (tmp_path / "data" / "images").symlink_to(tmp_path / "photos")
        (tmp_path / "photos" / "round").symlink_to(tmp_path / "photos")
        listing = crops(tmp_path / "data")
        assert labels(listing) == {"images/deep/a.jpg#xywh=40,15,20,20": "cat"}
        assert not listing.problems

    def test_centres_are_shares_of_the_upright_image(self, tmp_path: Path) -> None:
        picture(tmp_path / "a.jpg", (100, 50), orientation=8)
        write(tmp_path / "a.txt", "1 0.5 0.5 0.2 0.4\n\n0 0.1 0.1 0.4 0.2\n")
        write(tmp_path / "classes.txt", "zebra\nape\n")
        assert labels(crops(tmp_path)) == {
            "a.jpg#xywh=20,30,10,40": "ape",
            "a.jpg#xywh=0,0,15,20": "zebra",
        }

    def test_missing_file_is_unknown_and_empty_file_is_background(self, tmp_path: Path) -> None:
        for name in ("a", "b", "c"):
            picture(tmp_path / f"{name}.jpg")
        write(tmp_path / "a.txt", "0 0.5 0.5 1 1\n")
        write(tmp_path / "b.txt", "\n")
        write(tmp_path / "classes.txt", "zebra\n")
        listing = crops(tmp_path, background="none")
        assert labels(listing) == {"a.jpg#xywh=0,0,100,50": "zebra", "b.jpg": "none"}
        assert listing.ignored == ("c.jpg",)

    def test_every_bad_line_is_listed(self, tmp_path: Path) -> None:
        picture(tmp_path / "a.jpg")
        lines = [
            "0 0.5 0.5 0.5 0.5",
            "2 0.5 0.5 0.5 0.5",
            "0 0.5 0.5 0.5 0.5 0.93",
            "0 0.5 0.5",
            "zebra 0.5 0.5 0.5 0.5",
            "0 50 25 20 20",
            "0 nan 0.5 0.5 0.5",
            "0 0.5 0.5 0 0.5",
        ]
        write(tmp_path / "a.txt", "\n".join(lines))
        write(tmp_path / "classes.txt", "zebra\nape")
        listing = crops(tmp_path)
        assert len(listing.records) == 1
        assert [problem.where for problem in listing.problems] == [f"a.txt: line {n}" for n in range(2, 9)]
        for problem, words in zip(
            listing.problems,
            ("class 2", "confidence", "3 words", "'zebra'", "50 is not", "nan is not", "0 x 25 pixels"),
            strict=True,
        ):
            assert words in problem.what

    def test_polygon_is_the_box_around_it(self, tmp_path: Path) -> None:
        picture(tmp_path / "a.jpg")
        write(tmp_path / "a.txt", "0 0.1 0.2 0.5 0.8 0.3 0.4\n")
        write(tmp_path / "classes.txt", "zebra\n")
        assert list(labels(crops(tmp_path))) == ["a.jpg#xywh=10,10,40,30"]

    def test_ultralytics_tree_with_yaml(self, tmp_path: Path) -> None:
        for split in ("train", "val"):
            picture(tmp_path / "images" / split / "a.jpg")
            write(tmp_path / "labels" / split / "a.txt", "1 0.5 0.5 1 1\n")
        write(
            tmp_path / "data.yaml",
            "path: ../elsewhere\ntrain: images/train\nval: images/val\nnames: {0: x, 1: y}\n",
        )
        listing = crops(tmp_path)
        assert [(r.path, r.label, r.split) for r in listing.records] == [
            ("images/train/a.jpg#xywh=0,0,100,50", "y", "train"),
            ("images/val/a.jpg#xywh=0,0,100,50", "y", "validation"),
        ]

    def test_yaml_says_which_folder_is_which_split(self, tmp_path: Path) -> None:
        for folder in ("north", "south"):
            picture(tmp_path / "images" / folder / "a.jpg")
            write(tmp_path / "labels" / folder / "a.txt", "0 0.5 0.5 1 1\n")
        write(tmp_path / "data.yaml", "names: [x]\ntrain: ../images/north\nval: ['./images/south']\n")
        assert [record.split for record in crops(tmp_path).records] == ["train", "validation"]

    def test_lists_of_images_give_splits(self, tmp_path: Path) -> None:
        for name in "ab":
            picture(tmp_path / "obj_train_data" / f"{name}.jpg")
            write(tmp_path / "obj_train_data" / f"{name}.txt", "0 0.5 0.5 1 1\n")
        write(tmp_path / "obj.names", "x\n")
        write(tmp_path / "train.txt", "data/obj_train_data/a.jpg\n")
        write(tmp_path / "valid.txt", "/home/somebody/obj_train_data/b.jpg\n")
        assert [record.split for record in crops(tmp_path).records] == ["train", "validation"]

    def test_each_folder_has_the_class_order_of_its_own_file(self, tmp_path: Path) -> None:
        for folder, names in (("one", "x\ny\n"), ("two", "y\nx\n")):
            picture(tmp_path / folder / "a.jpg")
            write(tmp_path / folder / "a.txt", "0 0.5 0.5 1 1\n")
            write(tmp_path / folder / "classes.txt", names)
        assert list(labels(crops(tmp_path, format="yolo")).values()) == ["x", "y"]

    def test_names_that_disagree_are_not_guessed(self, tmp_path: Path) -> None:
        picture(tmp_path / "a.jpg")
        write(tmp_path / "a.txt", "0 0.5 0.5 1 1\n")
        write(tmp_path / "classes.txt", "x\ny\n")
        write(tmp_path / "data.yaml", "names: [y, x]\n")
        with pytest.raises(DatasetError, match=r"classes.txt and data.yaml disagree"):
            crops(tmp_path)

    def test_without_names(self, tmp_path: Path) -> None:
        picture(tmp_path / "a.jpg")
        write(tmp_path / "a.txt", "0 0.5 0.5 1 1\n")
        with pytest.raises(DatasetError, match=r"no class names.*add classes.txt"):
            crops(tmp_path)

    def test_labels_of_no_image_are_a_problem(self, tmp_path: Path) -> None:
        picture(tmp_path / "a.jpg")
        for name in "ab":
            write(tmp_path / f"{name}.txt", "0 0.5 0.5 1 1\n")
        write(tmp_path / "classes.txt", "x\n")
        write(tmp_path / "notes.txt", "taken in May\n")
        assert only(crops(tmp_path)) == Problem(
            "b.txt", "has no image", "restore the image, or remove the labels"
        )

    @pytest.mark.parametrize("names", ["{0: x, 2: y}", "x", "[[x]]", "[x", "&a [*a]"])
    def test_yaml_without_usable_names(self, tmp_path: Path, names: str) -> None:
        picture(tmp_path / "a.jpg")
        write(tmp_path / "a.txt", "0 0.5 0.5 1 1\n")
        write(tmp_path / "data.yaml", f"names: {names}\n")
        with pytest.raises(DatasetError, match=r"data\.yaml"):
            crops(tmp_path)


def test_one_rectangle_is_the_same_box_in_the_three_formats_of_labelimg(tmp_path: Path) -> None:
    left, top, right, bottom = 1234, 777, 2345, 1999
    x, y = (left + right) / 2 / 4000, (top + bottom) / 2 / 3000
    share = f"{x:.6f} {y:.6f} {(right - left) / 4000:.6f} {(bottom - top) / 3000:.6f}"
    centre = ("cat", (left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
    contents = {
        "voc/a.xml": voc("a", voc_object("cat", left, top, right, bottom)),
        "yolo/a.txt": f"0 {share}\n",
        "yolo/classes.txt": "cat\n",
        "createml/a.json": json.dumps([TestCreateml().entry("a.jpg", centre)]),
    }
    for name, text in contents.items():
        write(tmp_path / name, text)
        picture(tmp_path / name.partition("/")[0] / "a.jpg", (4000, 3000))
    found = {tuple(labels(crops(tmp_path / name))) for name in ("voc", "yolo", "createml")}
    assert found == {("a.jpg#xywh=1234,777,1111,1222",)}


class TestCreateml:
    def entry(self, image: str, *boxes: tuple[str, float, float, float, float]) -> dict[str, Any]:
        keys = ("x", "y", "width", "height")
        return {
            "image": image,
            "verified": False,
            "annotations": [
                {"label": label, "coordinates": dict(zip(keys, numbers, strict=True))}
                for label, *numbers in boxes
            ],
        }

    def test_one_list_for_each_folder_and_centres_in_pixels(self, tmp_path: Path) -> None:
        for folder in ("train", "test"):
            picture(tmp_path / folder / "a.jpg")
        write(tmp_path / "train" / "labels.json", [self.entry("a.jpg", ("cat", 20, 20, 10, 6))])
        write(tmp_path / "test" / "labels.json", [self.entry("a.jpg")])
        listing = crops(tmp_path, background="none")
        assert [(r.path, r.label, r.split) for r in listing.records] == [
            ("test/a.jpg", "none", "test"),
            ("train/a.jpg#xywh=15,17,10,6", "cat", "train"),
        ]

    def test_bad_entries_have_their_line_and_hide_no_other(self, tmp_path: Path) -> None:
        picture(tmp_path / "a.jpg")
        write(
            tmp_path / "labels.json",
            '[{"image": "a.jpg", "annotations": [\n'
            '  {"label": "cat", "coordinates": {"x": 20, "y": 20, "width": 10, "height": 6}},\n'
            '  {"label": "cat", "coordinates": {"x": NaN, "y": 20, "width": 10, "height": 6}},\n'
            '  {"label": " ", "coordinates": {}}]},\n'
            '7, {"image": "gone.jpg", "annotations": []},\n'
            '{"image": "\\ud800.jpg", "annotations": []}]\n',
        )
        listing = crops(tmp_path)
        assert len(listing.records) == 1
        assert [problem.where for problem in listing.problems] == [
            "labels.json: line 3 ([0].annotations[1])",
            "labels.json: line 4 ([0].annotations[2])",
            "labels.json: line 5 ([1])",
            "labels.json: line 5 ([2])",
            "labels.json: line 6 ([3])",
        ]


class TestCoco:
    def document(self, **changes: Any) -> dict[str, Any]:
        return {
            "images": [{"id": 1, "file_name": "a.jpg", "width": 1, "height": 1}],
            "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}],
            "annotations": [
                {"id": 1, "image_id": 1, "category_id": 9, "bbox": [10, 20, 30, 40], "iscrowd": 0}
            ],
        } | changes

    def test_files_of_splits_and_folders_of_images(self, tmp_path: Path) -> None:
        for split in ("train", "val"):
            picture(tmp_path / f"{split}2017" / "a.jpg")
            write(tmp_path / "annotations" / f"instances_{split}2017.json", self.document())
        listing = crops(tmp_path)
        assert [(r.path, r.label, r.split) for r in listing.records] == [
            ("train2017/a.jpg#xywh=10,20,30,30", "dog", "train"),
            ("val2017/a.jpg#xywh=10,20,30,30", "dog", "validation"),
        ]
        alone = crops(tmp_path / "annotations" / "instances_val2017.json")
        assert alone.records == listing.records[1:]
        assert alone.root == tmp_path

    def test_images_may_be_kept_elsewhere(self, tmp_path: Path) -> None:
        picture(tmp_path / "photos" / "a.jpg")
        file = write(tmp_path / "labels" / "coco.json", self.document())
        assert "data.images" in only(crops(file)).fix
        listing = crops(file, images=str(tmp_path / "photos"))
        assert listing.root == tmp_path / "photos"
        assert list(labels(listing)) == ["a.jpg#xywh=10,20,30,30"]
        with pytest.raises(DatasetError, match="no such folder"):
            crops(file, images=str(tmp_path / "none"))

    def test_image_without_annotations_is_empty_and_a_crowd_is_neither(self, tmp_path: Path) -> None:
        for name in "abc":
            picture(tmp_path / f"{name}.jpg")
        images = [{"id": i, "file_name": f"{name}.jpg"} for i, name in enumerate("abc")]
        crowd = {"image_id": 1, "category_id": 7, "bbox": [0, 0, 9, 9], "iscrowd": 1}
        file = write(tmp_path / "coco.json", self.document(images=images[:2], annotations=[crowd]))
        listing = crops(file, background="none")
        assert labels(listing) == {"a.jpg": "none"}
        assert listing.ignored == ("b.jpg", "c.jpg")

    def test_bad_references_are_problems(self, tmp_path: Path) -> None:
        picture(tmp_path / "a.jpg")
        good = self.document()["annotations"][0]
        annotations = [
            good,
            good | {"image_id": 2},
            good | {"category_id": 8},
            good | {"bbox": [1, 2, 3]},
            good | {"bbox": [10**400, 2, 3, 4]},
            good | {"image_id": [1]},
            None,
        ]
        listing = crops(write(tmp_path / "coco.json", self.document(annotations=annotations)))
        assert len(listing.records) == 1
        found = [problem.what for problem in listing.problems]
        for text, words in zip(
            found,
            ("image_id 2", "category_id 8", "3 numbers", "finite", "no number", "missing, not an object"),
            strict=True,
        ):
            assert words in text
        assert re.fullmatch(r"coco\.json: line \d+ \(annotations\[1\]\)", listing.problems[0].where)

    def test_file_that_is_there_twice_is_used_for_neither(self, tmp_path: Path) -> None:
        picture(tmp_path / "a.jpg")
        images = [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "a.jpg"}]
        listing = crops(write(tmp_path / "coco.json", self.document(images=images)))
        assert not listing.records
        assert [problem.what for problem in listing.problems] == ["a.jpg is there twice"] * 2


def rectangle(label: str, x: float, y: float, width: float, height: float, **more: Any) -> dict[str, Any]:
    value = {"x": x, "y": y, "width": width, "height": height, "rotation": 0, "rectanglelabels": [label]}
    return {
        "type": "rectanglelabels",
        "original_width": 1,
        "original_height": 1,
        "value": value | {key: v for key, v in more.items() if key in value},
        **{key: v for key, v in more.items() if key not in value},
    }


def choice(*answers: str) -> dict[str, Any]:
    return {"type": "choices", "from_name": "class", "value": {"choices": list(answers)}}


def task(*annotations: dict[str, Any], image: str = "a.jpg") -> dict[str, Any]:
    prediction = {"result": [rectangle("machine", 0, 0, 100, 100), choice("machine")]}
    return {"id": 1, "data": {"image": image}, "annotations": list(annotations), "predictions": [prediction]}


def by(annotator: Any, *results: dict[str, Any], **flags: bool) -> dict[str, Any]:
    return {"completed_by": annotator, "result": list(results), "was_cancelled": False} | flags


class TestLabelStudio:
    def export(self, tmp_path: Path, *tasks: Any) -> Path:
        for name in ("a.jpg", "b.jpg"):
            picture(tmp_path / "photos" / name, (1000, 500))
        return write(tmp_path / "export.json", list(tasks))

    def test_percentages_and_the_box_around_a_turned_one(self, tmp_path: Path) -> None:
        # The two turned boxes of the same 300 x 100 rectangle are those of label-studio issue 2293.
        file = self.export(
            tmp_path,
            task(by(1, rectangle("cat", 20, 20, 30, 20))),
            task(by(1, rectangle("cat", 20, 20, 30, 20, rotation=90)), image="b.jpg"),
        )
        assert list(labels(crops(file))) == [
            "photos/a.jpg#xywh=200,100,300,100",
            "photos/b.jpg#xywh=100,100,100,300",
        ]

    def test_skipped_do_not_count_and_ground_truth_alone_does(self, tmp_path: Path) -> None:
        file = self.export(
            tmp_path,
            task(by(1, choice("cat"), was_cancelled=True), by(2, choice("dog"))),
            task(by(1, choice("cat")), by(2, choice("dog"), ground_truth=True), image="b.jpg"),
            task(image="never-labelled.jpg"),
        )
        assert labels(read(file)) == {"photos/a.jpg": "dog", "photos/b.jpg": "dog"}

    def test_annotators_are_kept_or_must_agree(self, tmp_path: Path) -> None:
        file = self.export(
            tmp_path,
            task(by(1, choice("cat")), by({"id": 2, "email": "x@y.z"}, choice("cat"))),
            task(by(1, choice("cat")), by(2, choice("dog")), image="b.jpg"),
        )
        listing = read(file)
        assert listing.records == (Record("photos/a.jpg", "cat"),)
        assert "holotype agree score" in only(listing).fix
        assert [(r.path, r.label, r.annotator) for r in read(file, keep_annotators=True).records] == [
            ("photos/a.jpg", "cat", "1"),
            ("photos/a.jpg", "cat", "x@y.z"),
            ("photos/b.jpg", "cat", "1"),
            ("photos/b.jpg", "dog", "2"),
        ]

    def test_two_annotators_boxes_on_one_photo_are_not_twice_the_objects(self, tmp_path: Path) -> None:
        file = self.export(
            tmp_path,
            task(by(1, rectangle("cat", 20, 20, 30, 20)), by(2, rectangle("cat", 21, 20, 30, 20))),
        )
        assert "boxes by 2 of 2 annotators" in only(crops(file)).what
        assert labels(read(file, boxes="single")) == {"photos/a.jpg": "cat"}
        assert len(read(file, boxes="crop", keep_annotators=True).records) == 2

    @pytest.mark.parametrize(
        "reference",
        [
            "/data/upload/3/0a1b2c3d-a.jpg",
            "/data/local-files/?d=set%2Fphotos%2Fa.jpg",
            "s3://bucket/deep/photos/a.jpg",
            "https://example.org/photos/a.jpg?signature=b.jpg",
            "gs://bucket/a.jpg",
            "C:\\photos\\a.jpg",
            "photos/a.jpg",
            "a.jpg",
        ],
    )
    def test_references_are_matched_and_never_fetched(self, tmp_path: Path, reference: str) -> None:
        file = self.export(tmp_path, task(by(1, choice("cat")), image=reference))
        assert labels(read(file)) == {"photos/a.jpg": "cat"}

    @pytest.mark.parametrize(
        "reference", ["https://example.org/c.jpg", "other/a.jpg", "http://[", "/", "\0.jpg"]
    )
    def test_references_to_nothing_here_are_problems(self, tmp_path: Path, reference: str) -> None:
        listing = read(self.export(tmp_path, task(by(1, choice("cat")), image=reference)))
        assert not listing.records
        assert only(listing).where == "export.json: line 2 ([0])"

    def test_what_is_no_class_is_said(self, tmp_path: Path) -> None:
        file = self.export(
            tmp_path,
            task(by(1, choice("cat", "dog"))),
            task(by(1, {"type": "polygonlabels", "value": {}}), image="b.jpg"),
            task(by(1, rectangle("cat", 0, 0, 10, 10, rectanglelabels=["a", "b"]))),
            task(by(1, rectangle("cat", 0, 0, 10, 10, image_rotation=90))),
            task(by(True, choice("cat"))),
            "nonsense",
        )
        listing = read(file, boxes="crop", background="none")
        assert not listing.records
        for problem, words in zip(
            listing.problems,
            (
                "2 choices",
                "polygonlabels",
                "2 labels",
                "turned in the editor",
                "completed_by",
                "text, not an",
            ),
            strict=True,
        ):
            assert words in problem.what
        assert re.fullmatch(
            r"export\.json: line \d+ \(\[1\]\.annotations\[0\]\.result\[0\]\)", listing.problems[1].where
        )

    def test_submitted_without_boxes_is_background(self, tmp_path: Path) -> None:
        file = self.export(
            tmp_path, task(by(1)), task(by(1, {"type": "textarea", "value": {}}), image="b.jpg")
        )
        assert list(labels(crops(file, background="none")).values()) == ["none", "none"]


class TestPlainJson:
    def test_boxes_whole_images_and_class_names(self, tmp_path: Path) -> None:
        picture(tmp_path / "x" / "a.jpg")
        picture(tmp_path / "b.jpg")
        content: dict[str, Any] = {
            "annotations": [
                {"image_path": "x/a.jpg", "bbox": [10, 20, 30, 10], "class_id": 1},
                {"image_path": str(tmp_path / "b.jpg"), "bbox": None, "class_id": 0},
            ]
        }
        file = write(tmp_path / "boxes.json", content)
        assert labels(crops(file)) == {"b.jpg": "0", "x/a.jpg#xywh=10,20,30,10": "1"}
        for classes in (
            ["cat", "dog"],
            {"0": "cat", "1": "dog"},
            [{"id": 1, "name": "dog"}, {"id": 0, "name": "cat"}],
        ):
            write(file, content | {"classes": classes})
            assert labels(crops(file)) == {"b.jpg": "cat", "x/a.jpg#xywh=10,20,30,10": "dog"}

    def test_exact_paths_come_before_guesses(self, tmp_path: Path) -> None:
        for folder in ("set", "set/deep", "away"):
            picture(tmp_path / folder / "a.jpg")
        paths = (
            "deep/a.jpg",
            str(tmp_path / "away" / "a.jpg"),
            "../away/a.jpg",
            str(tmp_path / "set" / "a.jpg"),
        )
        content = {"annotations": [{"image_path": path, "class_id": n} for n, path in enumerate(paths)]}
        listing = read(write(tmp_path / "set" / "boxes.json", content))
        assert labels(listing) == {"deep/a.jpg": "0", paths[1]: "1", "../away/a.jpg": "2", "a.jpg": "3"}

    def test_bad_records(self, tmp_path: Path) -> None:
        picture(tmp_path / "a.jpg")
        content = {
            "classes": ["cat"],
            "annotations": [
                {"image_path": "a.jpg", "bbox": [10, 20, 30, 10], "class_id": 0},
                {"image_path": "a.jpg", "bbox": [10, 20, -30, 10], "class_id": 0},
                {"image_path": "a.jpg", "bbox": "10", "class_id": 0},
                {"image_path": "a.jpg", "class_id": 4},
                {"image_path": "a.jpg", "class_id": True},
                {"image_path": "../../../etc/passwd" * 400, "class_id": 0},
                {"image_path": "", "class_id": 0},
                [],
            ],
        }
        listing = crops(write(tmp_path / "boxes.json", content))
        assert list(labels(listing)) == ["a.jpg#xywh=10,20,30,10"]
        assert len(listing.problems) == 7
        lines = [int(re.findall(r"line (\d+)", problem.where)[0]) for problem in listing.problems]
        text = (tmp_path / "boxes.json").read_text().split("\n")
        # The first problems are of the records, in order; the box is looked at with its image, at the end.
        assert lines[:-1] == sorted(lines[:-1])
        assert all(text[line - 1].strip() in ("{", "[]") for line in lines)

    def test_label_and_boxes_of_one_image_contradict(self, tmp_path: Path) -> None:
        picture(tmp_path / "a.jpg")
        entry = {"image_path": "a.jpg", "class_id": 0}
        content = {"annotations": [entry, entry | {"bbox": [0, 0, 9, 9]}]}
        assert "both a label and boxes" in only(crops(write(tmp_path / "boxes.json", content))).what


class TestTable:
    def test_csv_and_parquet_read_alike(self, tmp_path: Path) -> None:
        rows = [
            {"image_path": "b.jpg#xywh=0,0,10,10", "label": "cat", "split": "val"},
            {"image_path": "a.jpg", "label": "dog", "split": "train"},
        ]
        pl.DataFrame(rows).write_parquet(tmp_path / "t.parquet")
        pl.DataFrame(rows).write_csv(tmp_path / "t.csv")
        listing = read(tmp_path / "t.csv")
        assert listing.records == (
            Record("a.jpg", "dog", "train"),
            Record("b.jpg#xywh=0,0,10,10", "cat", "validation", group="b.jpg"),
        )
        assert read(tmp_path / "t.parquet") == listing
        assert read(tmp_path / "t.csv", images=str(tmp_path / "..")).root == tmp_path / ".."

    @pytest.mark.parametrize(
        ("write_table", "place"),
        [
            (lambda rows, file: pl.DataFrame(rows).write_csv(file.with_suffix(".csv")), "t.csv: line {}"),
            (
                lambda rows, file: pl.DataFrame(rows).write_parquet(file.with_suffix(".parquet")),
                "t.parquet: row {}",
            ),
        ],
    )
    def test_bad_rows_are_problems(
        self, tmp_path: Path, write_table: Callable[..., None], place: str
    ) -> None:
        rows = [
            {"image_path": path, "label": label, "split": split}
            for path, label, split in (
                ("a.jpg", "cat", ""),
                ("", "cat", ""),
                ("b.jpg", None, ""),
                ("c.jpg", "cat", "tset"),
                ("d.jpg#xywh=0,0,-5,10", "cat", ""),
                ("e.jpg", "cat", ""),
                ("e.jpg", "dog", ""),
                ("a.jpg", "cat", ""),
            )
        ]
        write_table(rows, tmp_path / "t")
        (file,) = tmp_path.iterdir()
        listing = read(file)
        assert labels(listing) == {"a.jpg": "cat"}
        first = 2 if file.suffix == ".csv" else 1
        assert [problem.where for problem in listing.problems] == [
            place.format(first + n) for n in range(1, 6)
        ]
        assert place.format(first + 6) in listing.problems[-1].what

    def test_annotators_who_disagree(self, tmp_path: Path) -> None:
        file = write(
            tmp_path / "t.csv",
            "image_path,label,annotator\na.jpg,cat,x\na.jpg,cat,y\nb.jpg,cat,x\nb.jpg,dog,y\nc.jpg,cat,x\n",
        )
        listing = read(file)
        assert listing.records == (Record("a.jpg", "cat"), Record("c.jpg", "cat", annotator="x"))
        assert "agree score" in only(listing).fix
        assert len(read(file, keep_annotators=True).records) == 5

    @pytest.mark.parametrize(
        "content",
        [b"", b"PAR1 nonsense PAR1", b"PAR1" + bytes(64) + b"PAR1"],
    )
    def test_broken_parquet(self, tmp_path: Path, content: bytes) -> None:
        with pytest.raises(DatasetError, match="is not Parquet"):
            read(write(tmp_path / "t.parquet", content))

    def test_parquet_of_numbers(self, tmp_path: Path) -> None:
        pl.DataFrame({"image_path": ["a"], "label": [3]}).write_parquet(tmp_path / "t.parquet")
        with pytest.raises(DatasetError, match="column 'label' is not text"):
            read(tmp_path / "t.parquet")


class TestDetection:
    def test_two_layouts_in_one_folder_are_not_guessed(self, tmp_path: Path) -> None:
        for label in ("cat", "dog"):
            picture(tmp_path / label / "a.jpg")
            write(tmp_path / label / "a.xml", voc("a", voc_object("cell", 0, 0, 9, 9)))
        with pytest.raises(
            DatasetError, match=r"fits Pascal VOC and class folders; .*data.format=voc or folders"
        ):
            read(tmp_path)
        assert list(labels(crops(tmp_path, format="voc")).values()) == ["cell", "cell"]
        assert list(labels(read(tmp_path, format="folders")).values()) == ["cat", "dog"]

    @pytest.mark.parametrize(
        "clutter",
        [
            {"notes.json": "{}", "cat/readme.txt": "words"},
            {"meta.json": "{ not json"},
            {"classes.txt": "cat\ndog\n", "cat/a.txt": "a photo of a cat\n"},
            {"cat/a.xml": "<metadata/>"},
            {"labels.csv": "image_path,label\n"},
        ],
    )
    def test_class_folders_stay_class_folders(self, tmp_path: Path, clutter: dict[str, str]) -> None:
        for label in ("cat", "dog"):
            picture(tmp_path / label / "a.jpg")
        for name, text in clutter.items():
            write(tmp_path / name, text)
        assert list(labels(read(tmp_path)).values()) == ["cat", "dog"]

    def test_format_that_is_not_there(self, tmp_path: Path) -> None:
        picture(tmp_path / "cat" / "a.jpg")
        file = write(tmp_path / "x.json", [])
        for name in ("voc", "yolo", "createml", "coco", "label-studio", "json", "csv", "parquet"):
            with pytest.raises(DatasetError) as caught:
                read(tmp_path, format=name)
            assert caught.value.fix, name
        for name in ("voc", "yolo", "createml", "coco", "label-studio", "json", "folders"):
            with pytest.raises(DatasetError) as caught:
                read(file, format=name)
            assert caught.value.fix, name

    @pytest.mark.parametrize(
        ("name", "content", "words"),
        [
            ("x.json", b'{"annotations": [', "x.json: line 1: is not JSON"),
            ("x.json", b"\xff\xfe[\x00]\x00", "is not UTF-8"),
            ("x.json", b"[" * 200_000, "nested too deeply"),
            ("x.json", b"[" + b"9" * 10_000 + b"]", "is not usable JSON"),
            ("x.json", b"3", "is none of"),
            ("x.json", b'{"images": [], "annotations": []}', "is none of"),
            ("x.tfrecord", b"", "is neither a folder nor"),
        ],
    )
    def test_files_we_cannot_read(self, tmp_path: Path, name: str, content: bytes, words: str) -> None:
        file = write(tmp_path / name, content)
        with pytest.raises(DatasetError, match=words) as caught:
            read(file)
        assert caught.value.fix

    def test_broken_json_is_said_where_nothing_else_fits(self, tmp_path: Path) -> None:
        picture(tmp_path / "images" / "a.jpg")
        write(tmp_path / "annotations" / "coco.json", '{\n"images": [,')
        with pytest.raises(DatasetError, match=r"annotations/coco\.json: line 2: is not JSON"):
            read(tmp_path)

    def test_byte_order_mark_is_no_fault(self, tmp_path: Path) -> None:
        picture(tmp_path / "a.jpg")
        content = json.dumps({"annotations": [{"image_path": "a.jpg", "class_id": 1}]})
        assert labels(read(write(tmp_path / "x.json", b"\xef\xbb\xbf" + content.encode()))) == {"a.jpg": "1"}

    def test_settings_without_effect_are_said(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        picture(tmp_path / "cat" / "a.jpg")
        read(tmp_path, boxes="crop")
        assert "without effect on class folders: data.boxes" in capsys.readouterr().err


SEEDS: Sequence[tuple[str, str]] = (
    ("a.xml", voc("a", voc_object("cat", 1, 2, 30, 40), voc_object("dog", 5, 5, 9, 9))),
    ("a.txt", "0 0.5 0.5 0.25 0.5\n1 0.1 0.2 0.5 0.8 0.3 0.4\n"),
    ("x.json", json.dumps([TestCreateml().entry("a.jpg", ("cat", 20, 20, 10, 6))])),
    ("x.json", json.dumps(TestCoco().document())),
    ("x.json", json.dumps([task(by(1, rectangle("cat", 1, 2, 3, 4))), task(by(2, choice("cat")))])),
    ("x.json", json.dumps({"annotations": [{"image_path": "a.jpg", "bbox": [1, 2, 3, 4], "class_id": 1}]})),
    ("x.csv", "image_path,label,split\na.jpg,cat,train\na.jpg#xywh=1,2,3,4,dog,test\n"),
)


@pytest.mark.parametrize(("name", "text"), SEEDS)
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_damaged_files_give_problems_or_a_clear_error(
    tmp_path: Path, name: str, text: str, data: st.DataObject
) -> None:
    content = bytearray(text.encode())
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(content)))
        removed = data.draw(st.integers(0, 3))
        content[place : place + removed] = data.draw(
            st.binary(max_size=3) | st.sampled_from([b'"', b"null", b"-1e999", b"{}"])
        )
    picture(tmp_path / "a.jpg")
    write(tmp_path / "classes.txt", "cat\ndog\n")
    file = write(tmp_path / name, bytes(content))
    source = tmp_path if name.startswith("a.") else file
    kind = {"a.xml": "voc", "a.txt": "yolo"}.get(name, "auto")
    fatal, listing = None, None
    try:
        listing = crops(source, format=kind)
    except DatasetError as error:
        fatal = error
    if listing is None:
        assert fatal is not None
        assert fatal.fix
    else:
        assert all(problem.where and problem.fix for problem in listing.problems)
        assert all(record.label for record in listing.records)

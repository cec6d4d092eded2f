from __future__ import annotations

import csv
import hashlib
import itertools
import json
import random
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from crowdkit.aggregation import DawidSkene as CrowdKitDawidSkene
from PIL import Image

from digits import write_flat
from holotype import TrainResult
from holotype.agree.consensus import crowdlab, dawid_skene, find_consensus, majority_vote
from holotype.agree.contract import EXIT_CODES, Agreement, Plan
from holotype.agree.plan import plan, read_plan
from holotype.agree.score import score
from holotype.agree.votes import Votes, read_votes
from holotype.agreement import krippendorff_alpha
from holotype.cli import run
from holotype.config import AgreeConfig, DatasetConfig
from holotype.dataset import cache_folder
from holotype.dataset.revisions import Change, write_revision
from holotype.errors import ConfigError, DatasetError, HolotypeError
from holotype.metrics import Predictions

Table = npt.NDArray[np.int64]

QUICK = AgreeConfig(samples=200, least=20)
HOSTILE = "<script>alert('x')</script>"


def simulate(
    seed: int, *, images: int, skills: Sequence[float], classes: int = 4, missing: float = 0.0
) -> tuple[Table, Table]:
    """True classes, and votes of annotators, each right with its skill and wrong in its own way."""
    rng = np.random.default_rng(seed)
    truth = rng.choice(classes, images, p=rng.dirichlet(np.full(classes, 3.0)))
    votes = np.empty((images, len(skills)), dtype=np.int64)
    for r, skill in enumerate(skills):
        confusion = np.stack(
            [
                np.insert(rng.dirichlet(np.full(classes - 1, 0.5)) * (1 - skill), k, skill)
                for k in range(classes)
            ]
        )
        votes[:, r] = [rng.choice(classes, p=confusion[k]) for k in truth]
    votes[rng.random(votes.shape) < missing] = -1
    return truth, votes


def write_csv(file: Path, rows: Sequence[Sequence[object]], *, header: str = "image_path,label") -> Path:
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(header.split(","))
        writer.writerows(rows)
    return file


def read_rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def write_votes(folder: Path, votes: Table, *, classes: Sequence[str], names: Sequence[str]) -> list[Path]:
    """One CSV per annotator, images numbered."""
    return [
        write_csv(
            folder / f"{name}.csv",
            [(f"{i:04d}.jpg", classes[vote] if vote >= 0 else "") for i, vote in enumerate(votes[:, r])],
        )
        for r, name in enumerate(names)
    ]


def label_of(path: str) -> str:
    return Path(path).parent.name


def fill(folder: Path, dealt: Plan, *, wrong: Mapping[str, Mapping[str, str]] | None = None) -> list[Path]:
    """Write every annotator's CSV with the true labels, but for `wrong`: annotator → class → class said."""
    files = []
    for name, tasks in dealt.tasks.items():
        said = (wrong or {}).get(name, {})
        rows = [(f"{name}/{file}", said.get(label_of(path), label_of(path))) for file, path in tasks.items()]
        files.append(write_csv(folder / f"{name}.csv", rows))
    return files


def revision_config(revision: Any) -> AgreeConfig:
    return AgreeConfig(data=DatasetConfig(revision=revision))


@pytest.fixture(scope="session")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 digits in class folders; read-only."""
    return write_flat(tmp_path_factory.mktemp("agree") / "digits", images=20)


@pytest.fixture
def dealt(flat: Path, tmp_path: Path) -> Path:
    """A plan of the digits for ann, bob and cid: 20 in common, 40 dealt out."""
    plan(flat, annotators=["ann", "bob", "cid"], out=tmp_path / "tasks", config=QUICK)
    return tmp_path / "tasks"


class TestPlan:
    def test_common_images_go_to_all_and_the_others_to_one_each(self, dealt: Path) -> None:
        made = read_plan(dealt / "plan.json")
        common = {item.path for item in made.items if item.common}
        assert len(common) == made.common == 20
        shares = [set(tasks.values()) for tasks in made.tasks.values()]
        assert all(common <= share for share in shares)
        rest = [share - common for share in shares]
        assert sorted(map(len, rest)) == [13, 13, 14]
        assert len(set().union(*rest)) == sum(map(len, rest)) == 40

    @pytest.mark.parametrize(
        ("least", "overlap", "common"), [(20, 0.1, 20), (1, 0.5, 30), (1, 0.01, 1), (200, 0.1, 60)]
    )
    def test_the_overlap_is_the_larger_of_share_and_least_and_at_most_all(
        self, flat: Path, tmp_path: Path, least: int, overlap: float, common: int
    ) -> None:
        config = AgreeConfig(least=least)
        made = plan(flat, annotators=["a", "b"], overlap=overlap, out=tmp_path / "out", config=config)
        assert made.common == common

    def test_nothing_an_annotator_gets_tells_a_label_or_anothers_work(self, tmp_path: Path) -> None:
        for label in ("kitten", "puppy"):
            (tmp_path / "data" / label).mkdir(parents=True)
            for i in range(6):
                Image.new("L", (8, 8), 20 * i).save(tmp_path / "data" / label / f"{label}-{i}.png")
        out = tmp_path / "out"
        plan(tmp_path / "data", annotators=["ann", "bob"], out=out)
        for name, other in (("ann", "bob"), ("bob", "ann")):
            seen = [(out / f"{name}.csv").read_text(), (out / f"{name}-label-studio.json").read_text()]
            seen += [str(path.relative_to(out)) for path in (out / name).rglob("*")]
            assert len(seen) == 2 + 12 + 1
            assert not any(word in text for text in seen for word in ("kitten", "puppy", other))

    def test_copies_are_the_images_byte_for_byte_and_no_links(self, dealt: Path, flat: Path) -> None:
        made = read_plan(dealt / "plan.json")
        hashes = {item.path: item.sha256 for item in made.items}
        for name, tasks in made.tasks.items():
            for file, path in tasks.items():
                data = (dealt / name / file).read_bytes()
                assert data == (flat / path).read_bytes()
                assert hashlib.sha256(data).hexdigest() == hashes[path]
                assert not (dealt / name / file).is_symlink()
                assert (dealt / name / file).stat().st_nlink == 1

    def test_order_is_random_of_its_own_for_each_and_repeats_with_the_seed(
        self, flat: Path, tmp_path: Path
    ) -> None:
        config = AgreeConfig(least=60)
        first, again, other = (
            plan(flat, annotators=["a", "b"], out=tmp_path / str(i), config=config.model_copy(update=change))
            for i, change in enumerate(({}, {}, {"seed": 1}))
        )
        assert first.tasks == again.tasks != other.tasks
        orders = [list(tasks.values()) for tasks in first.tasks.values()]
        assert orders[0] != orders[1]
        assert sorted(orders[0]) == sorted(orders[1])
        # Classes are mixed: the labels of neighbours differ about as often as those of random pairs.
        labels = [label_of(path) for path in orders[0]]
        assert sum(a != b for a, b in itertools.pairwise(labels)) > 25

    def test_csv_lists_the_annotators_own_files_without_labels(self, dealt: Path) -> None:
        rows = read_rows(dealt / "bob.csv")
        assert [row["image_path"] for row in rows] == [f"bob/{i:04d}.png" for i in range(1, len(rows) + 1)]
        assert {row["label"] for row in rows} == {""}
        assert all((dealt / row["image_path"]).is_file() for row in rows)

    def test_label_studio_tasks_point_at_the_copies(self, flat: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        plan(flat, annotators=["Ann Böll", "b@c.org"], out=out, config=QUICK)
        for name in ("Ann Böll", "b@c.org"):
            for task in json.loads((out / f"{name}-label-studio.json").read_text()):
                assert list(task) == ["data"]
                prefix, _, path = task["data"]["image"].partition("?d=")
                assert prefix == "/data/local-files/"
                assert re.fullmatch(r"[\w%./-]+", path, re.ASCII)
                assert (out / unquote(path)).is_file()

    def test_label_studio_config_offers_the_classes(self, flat: Path, tmp_path: Path) -> None:
        classes = ["a & b", 'c "d"', "<e>"]
        plan(flat, annotators=["a", "b"], out=tmp_path / "out", classes=classes, config=QUICK)
        root = ET.parse(tmp_path / "out" / "label-studio-config.xml").getroot()
        assert [choice.get("value") for choice in root.iter("Choice")] == classes
        choices = next(root.iter("Choices"))
        assert choices.get("toName") == next(root.iter("Image")).get("name")
        assert (tmp_path / "out" / "a" / "predefined_classes.txt").read_text().splitlines() == classes

    def test_a_folder_of_unlabelled_images_needs_classes(self, tmp_path: Path) -> None:
        loose = tmp_path / "loose"
        loose.mkdir()
        for i in range(5):
            Image.new("RGB", (20, 20), (50 * i, 0, 0)).save(loose / f"{i}.JPG", "JPEG")
        with pytest.raises(ConfigError, match="classes are not known; name the classes"):
            plan(loose, annotators=["a", "b"], out=tmp_path / "out")
        assert not (tmp_path / "out").exists()
        made = plan(loose, annotators=["a", "b"], out=tmp_path / "out", classes=["x", "y"])
        assert [item.path for item in made.items] == [f"{i}.JPG" for i in range(5)]
        assert sorted(made.tasks["a"]) == [f"{i:04d}.jpg" for i in range(1, 6)]

    def test_a_part_of_an_image_is_cut_out(self, tmp_path: Path) -> None:
        image = Image.new("RGB", (40, 30), (255, 0, 0))
        image.paste((0, 0, 255), (10, 5, 30, 25))
        image.save(tmp_path / "photo.png")
        name = "photo.png#xywh=10,5,20,20"
        data = write_csv(tmp_path / "data.csv", [(name, "x"), ("photo.png", "y")])
        made = plan(data, annotators=["a", "b"], out=tmp_path / "out")
        assert sorted(item.path for item in made.items) == ["photo.png", name]
        file = next(file for file, path in made.tasks["a"].items() if path == name)
        with Image.open(tmp_path / "out" / "a" / file) as part:
            assert part.size == (20, 20)
            assert part.getcolors() == [(400, (0, 0, 255))]

    def test_images_and_classes_are_those_of_the_revision(self, tmp_path: Path) -> None:
        data = write_flat(tmp_path / "digits", images=3)
        paths = [file.relative_to(data).as_posix() for file in sorted(data.glob("*/*.png"))]
        changes = [Change(path=paths[0], label="nought"), Change(path=paths[1], drop=True)]
        write_revision(cache_folder(data), source="relabel", changes=changes)
        asked = {"latest": "latest", "none": 0}
        made = {
            name: plan(data, annotators=["a", "b"], out=tmp_path / name, config=revision_config(revision))
            for name, revision in asked.items()
        }
        assert [item.path for item in made["latest"].items] == [paths[0], *paths[2:]]
        assert made["latest"].classes == ("0", "1", "2", "nought")
        assert [item.path for item in made["none"].items] == paths
        assert made["none"].classes == ("0", "1", "2")
        with pytest.raises(DatasetError, match="there is no revision 7 of its labels"):
            plan(data, annotators=["a", "b"], out=tmp_path / "seven", config=revision_config(7))
        assert not (tmp_path / "seven").exists()

    def test_unreadable_images_are_named_and_left_out(self, tmp_path: Path) -> None:
        data = write_flat(tmp_path / "digits", images=20)
        (data / "0" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
        (data / "1" / "box.txt").write_text("no image")
        config = AgreeConfig(least=20, data=DatasetConfig(max_unreadable=0.1))
        made = plan(data, annotators=["a", "b"], out=tmp_path / "out", config=config)
        assert len(made.items) == 60
        assert len(made.problems) == 1
        assert made.problems[0].startswith("0/broken.png: ")
        with pytest.raises(DatasetError, match=r"1 of 61 records cannot be used: 0/broken\.png"):
            plan(data, annotators=["a", "b"], out=tmp_path / "strict", config=AgreeConfig(least=20))

    @pytest.mark.parametrize(
        ("annotators", "message"),
        [
            (["ann"], "at least two annotators"),
            (["ann", "Ann"], "'Ann' occurs twice"),
            (["ann", "../bob"], r"'\.\./bob' cannot be a file name"),
            (["ann", ""], "'' cannot be a file name"),
            (["ann", "nul.x"], "cannot be a file name"),
            (["ann", "bob."], "cannot be a file name"),
            (["ann", "ann.csv"], "cannot be a file name"),
            (["ann", "a\nb"], "cannot be a file name"),
        ],
    )
    def test_unfit_annotators_are_refused(
        self, flat: Path, tmp_path: Path, annotators: list[str], message: str
    ) -> None:
        with pytest.raises(ConfigError, match=message):
            plan(flat, annotators=annotators, out=tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("classes", [["x"], ["x", "x"], ["x", " y"], ["x", "a\nb"], ["x", ""]])
    def test_unfit_classes_are_refused(self, flat: Path, tmp_path: Path, classes: list[str]) -> None:
        with pytest.raises(ConfigError, match="classes: "):
            plan(flat, annotators=["a", "b"], out=tmp_path / "out", classes=classes)

    @pytest.mark.parametrize("overlap", [0, -0.1, 1.5])
    def test_an_impossible_overlap_is_refused(self, flat: Path, tmp_path: Path, overlap: float) -> None:
        with pytest.raises(ConfigError, match="overlap"):
            plan(flat, annotators=["a", "b"], overlap=overlap, out=tmp_path / "out")

    def test_a_folder_in_use_is_refused_and_an_empty_one_filled(self, flat: Path, tmp_path: Path) -> None:
        used, empty = tmp_path / "used", tmp_path / "empty"
        used.mkdir()
        empty.mkdir()
        (used / "ann.csv").write_text("work of weeks")
        with pytest.raises(ConfigError, match="not empty"):
            plan(flat, annotators=["ann", "bob"], out=used)
        assert (used / "ann.csv").read_text() == "work of weeks"
        plan(flat, annotators=["ann", "bob"], out=empty, config=QUICK)
        assert (empty / "plan.json").is_file()
        assert sorted(tmp_path.iterdir()) == [empty, used]


class TestVotes:
    def test_plan_beside_the_files_translates_names(self, dealt: Path) -> None:
        files = fill(dealt, read_plan(dealt / "plan.json"))
        votes, problems = read_votes(files)
        assert problems == ()
        assert votes.annotators == ("ann", "bob", "cid")
        assert votes.classes == ("0", "1", "2")
        assert len(votes.items) == 60
        for item, row in zip(votes.items, votes.table, strict=True):
            assert {votes.classes[vote] for vote in row if vote >= 0} == {label_of(item)}
        assert sorted((votes.table >= 0).sum(axis=1).tolist()) == [1] * 40 + [3] * 20

    def test_windows_paths_bare_names_and_moved_files_are_understood(
        self, dealt: Path, tmp_path: Path
    ) -> None:
        made = read_plan(dealt / "plan.json")
        away = tmp_path / "away"
        away.mkdir()
        files = []
        for name, style in {"ann": "C:\\work\\ann\\{}", "bob": "{}", "cid": "./cid/{}"}.items():
            rows = [(style.format(file), label_of(path)) for file, path in made.tasks[name].items()]
            files.append(write_csv(away / f"{name}.csv", rows))
        files[2] = files[2].rename(away / "cid (1).csv")
        votes, problems = read_votes(files, plan=dealt / "plan.json")
        assert problems == ()
        assert votes.annotators == ("ann", "bob", "cid")
        assert (votes.table >= 0).sum() == 60 + 40

    def test_names_that_were_given_out_come_before_the_datasets_own(self, tmp_path: Path) -> None:
        loose = tmp_path / "loose"
        loose.mkdir()
        for i in range(1, 10):
            Image.new("L", (8, 8), i).save(loose / f"{i:04d}.png")
        out = tmp_path / "out"
        made = plan(loose, annotators=["ann", "bob"], out=out, classes=["odd", "even"])
        assert any(name != path for name, path in made.tasks["ann"].items())
        for style in ("{}", "{}/"):
            files = []
            for who in ("ann", "bob"):
                rows = [
                    (style.format(who) + name if "/" in style else name, ("even", "odd")[int(path[:4]) % 2])
                    for name, path in made.tasks[who].items()
                ]
                files.append(write_csv(out / f"{who}.csv", rows))
            votes, problems = read_votes(files)
            assert problems == ()
            for item, row in zip(votes.items, votes.table, strict=True):
                assert [votes.classes[vote] for vote in row] == [("even", "odd")[int(item[:4]) % 2]] * 2

    def test_paths_of_the_dataset_itself_are_understood(self, dealt: Path) -> None:
        made = read_plan(dealt / "plan.json")
        rows = [(item.path, label_of(item.path), who) for item in made.items for who in ("ann", "expert")]
        file = write_csv(dealt / "all.csv", rows, header="image_path,label,annotator")
        votes, problems = read_votes([file])
        assert [problem.what for problem in problems] == [
            "there is no answer of bob",
            "there is no answer of cid",
        ]
        assert votes.annotators == ("ann", "expert")
        for item, row in zip(votes.items, votes.table, strict=True):
            assert [votes.classes[vote] for vote in row] == [label_of(item)] * 2

    def test_one_file_with_a_column_of_annotators(self, tmp_path: Path) -> None:
        rows = [
            ("a.jpg", "cat", "bob"),
            ("a.jpg", "dog", "ann"),
            ("b.jpg", "dog", "bob"),
            ("b.jpg", "", "ann"),
        ]
        file = write_csv(tmp_path / "all.csv", rows, header="image_path,label,annotator")
        votes, problems = read_votes([file])
        assert problems == ()
        assert votes.items == ("a.jpg", "b.jpg")
        assert votes.annotators == ("ann", "bob")
        assert votes.classes == ("cat", "dog")
        assert votes.table.tolist() == [[1, 0], [-1, 1]]
        assert votes.empty == (1, 0)

    def test_every_bad_row_is_named_and_hides_no_other(self, tmp_path: Path) -> None:
        file = tmp_path / "ann.csv"
        file.write_text("image_path,label\na.jpg,cat\n,cat\nb.jpg,cat,x,y\nc.jpg,dog\nc.jpg,cat\nd.jpg,dog\n")
        votes, problems = read_votes([file])
        assert [(problem.where, problem.what) for problem in problems] == [
            (f"{file}:3", "image_path is empty"),
            (f"{file}:4", "more cells than columns"),
            (f"{file}:6", "ann gave c.jpg different labels (dog, cat)"),
        ]
        assert all(problem.fix for problem in problems)
        assert dict(zip(votes.items, votes.table[:, 0].tolist(), strict=True)) == {
            "a.jpg": 0,
            "c.jpg": -1,
            "d.jpg": 1,
        }

    def test_what_quotes_may_hold_is_read(self, tmp_path: Path) -> None:
        text = '\ufeffimage_path,"label"\r\n"a,\r\nb.jpg","the ""cat"""\r\n,x\r\n'
        (tmp_path / "ann.csv").write_bytes(text.encode())
        votes, problems = read_votes([tmp_path / "ann.csv"])
        assert (votes.items, votes.classes) == (("a,\r\nb.jpg",), ('the "cat"',))
        assert [problem.where for problem in problems] == [f"{tmp_path / 'ann.csv'}:4"]

    def test_the_same_answer_twice_is_one_vote(self, tmp_path: Path) -> None:
        files = [write_csv(tmp_path / name, [("a.jpg", "cat")]) for name in ("ann.csv", "bob.csv")]
        votes, problems = read_votes([*files, files[0]])
        assert problems == ()
        assert votes.table.tolist() == [[0, 0]]

    def test_files_of_one_name_in_different_folders_are_not_one_annotators(self, tmp_path: Path) -> None:
        files = []
        for who in ("ada", "bob"):
            (tmp_path / who).mkdir()
            files.append(write_csv(tmp_path / who / "labels.csv", [("a.jpg", "cat"), ("b.jpg", "dog")]))
        with pytest.raises(DatasetError) as caught:
            read_votes(files)
        assert str(caught.value) == (
            f"{files[1]}: both it and {files[0]} would be the votes of one annotator 'labels';"
            " name each after its annotator, or add an annotator column"
        )
        for who, file in zip(("ada", "bob"), files, strict=True):
            rows = [("a.jpg", "cat", who), ("b.jpg", "dog", who)]
            write_csv(file, rows, header="image_path,label,annotator")
        assert read_votes(files)[0].annotators == ("ada", "bob")

    def test_several_files_of_one_annotator(self, dealt: Path, tmp_path: Path) -> None:
        here = tmp_path / "here"
        here.mkdir()
        first = write_csv(here / "ada.csv", [("a.jpg", "cat")])
        export = here / "ada-label-studio.json"
        export.write_text(json.dumps([choice_task(1, "dog", completed_by=None)]))
        votes, problems = read_votes([first, export])
        assert (votes.annotators, votes.items, problems) == (("ada",), ("0001.jpg", "a.jpg"), ())
        # What a plan knows is an annotator's name wherever it lies.
        files = fill(dealt, read_plan(dealt / "plan.json"))
        rows = files[0].read_text().splitlines()
        (tmp_path / "later").mkdir()
        later = tmp_path / "later" / files[0].name
        later.write_text("\n".join([rows[0], *rows[10:]]))
        files[0].write_text("\n".join(rows[:10]))
        votes, problems = read_votes([*files, later])
        assert (votes.annotators, problems) == (("ann", "bob", "cid"), ())
        assert sorted((votes.table >= 0).sum(axis=1).tolist()) == [1] * 40 + [3] * 20

    def test_unknown_classes_and_images_of_a_plan(self, dealt: Path) -> None:
        files = fill(dealt, read_plan(dealt / "plan.json"))
        text = files[0].read_text().splitlines()
        text[1] = text[1].rpartition(",")[0] + ",seven"
        text[2] = "ann/9999.png,1"
        files[0].write_text("\n".join(text))
        votes, problems = read_votes(files)
        assert [str(problem) for problem in problems] == [
            f"{files[0]}:2: unknown class 'seven'; classes are 0, 1, 2",
            f"{files[0]}:3: ann/9999.png is no image of the plan;"
            " keep the names of files and folders as they were given out",
        ]
        assert votes.empty == (2, 0, 0)

    def test_the_nearest_class_is_suggested(self, flat: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        made = plan(flat, annotators=["a", "b"], out=out, classes=["t-shirt", "dress"], config=QUICK)
        files = [write_csv(out / f"{n}.csv", [(f"{n}/{f}", "dress") for f in made.tasks[n]]) for n in "ab"]
        files[0].write_text(files[0].read_text().replace("dress", "T-Shirt", 1))
        _, problems = read_votes(files)
        assert [problem.fix for problem in problems] == ["did you mean t-shirt?"]

    def test_an_annotator_without_a_file_is_named(self, dealt: Path) -> None:
        files = fill(dealt, read_plan(dealt / "plan.json"))
        votes, problems = read_votes(files[:2])
        assert votes.annotators == ("ann", "bob")
        assert [problem.what for problem in problems] == ["there is no answer of cid"]

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.csv", "image_path;label\na;b\n", "separated by semicolons"),
            ("a.csv", "image_path,lable\na,b\n", "unknown column 'lable'; did you mean label?"),
            ("a.csv", "image_path,label,anotator\na,b,c\n", "did you mean annotator?"),
            ("a.csv", "image_path\na\n", "no column 'label'"),
            ("a.csv", "", "no column 'image_path'"),
            ("a.csv", b"image_path,label\n\xff\xfe,b\n", "not UTF-8"),
            ("a.csv", "image_path,label\na,\n", "there is not one label"),
            ("a.csv", 'image_path,label\na,x\nb,"y\nc,y\n', "line 3: is not CSV (unexpected end of data)"),
            ("a.csv", 'image_path,label\na,x\n"b"c,y\n', "line 3: is not CSV (',' expected after '\"')"),
            ("a.json", "[{", "line 1: is not JSON"),
            ("a.json", "[" * 100_000, "nested too deeply"),
            ("a.json", '{"image": "x"}', "not a list of tasks"),
            ("a.json", '[{"image": "x", "choice": "cat"}]', "not JSON-MIN"),
            ("a.txt", "x", "is no file of votes"),
        ],
    )
    def test_files_that_cannot_be_read_at_all(
        self, tmp_path: Path, name: str, content: str | bytes, message: str
    ) -> None:
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(DatasetError, match=re.escape(message)) as caught:
            read_votes([file])
        assert str(caught.value).startswith(str(file))

    def test_all_unreadable_files_are_named_at_once(self, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match=r"2 files cannot be read: .*no\.csv.*gone\.json"):
            read_votes([tmp_path / "no.csv", tmp_path / "gone.json"])

    def test_columns_of_their_own_are_left_alone(self, tmp_path: Path) -> None:
        file = write_csv(tmp_path / "a.csv", [("a.jpg", "cat", "unsure")], header="image_path,label,remark")
        votes, problems = read_votes([file])
        assert (votes.table.tolist(), problems) == ([[0]], ())

    def test_damaged_files_give_our_errors_and_no_others(self, dealt: Path, tmp_path: Path) -> None:
        files = fill(dealt, read_plan(dealt / "plan.json"))
        export = tmp_path / "export.json"
        export.write_text(json.dumps([choice_task(i, "cat") for i in range(20)]))
        rng, failed = random.Random(0), []
        for file in (files[0], export):
            original = file.read_bytes()
            for _ in range(150):
                data = bytearray(original)
                for _ in range(rng.randint(1, 8)):
                    at = rng.randrange(len(data))
                    data[at : at + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3))
                file.write_bytes(data)
                try:
                    votes, problems = read_votes([file])
                except HolotypeError as error:
                    failed.append(str(error))
                else:
                    assert votes.table.max() < len(votes.classes)
                    assert all(problem.where and problem.fix for problem in problems)
        assert failed
        assert not any("\n" in line for line in failed)


def choice_task(number: int, label: str | None, *, by: object = 1, **changes: object) -> dict[str, Any]:
    """A task as Label Studio exports it, with one annotation."""
    result = [
        {"type": "choices", "from_name": "label", "to_name": "image", "value": {"choices": [label]}}
        for _ in range(label is not None)
    ]
    annotation = {
        "id": 100 + number,
        "completed_by": by,
        "result": result,
        "was_cancelled": False,
        "ground_truth": False,
    }
    return {
        "id": number,
        "data": {"image": f"/data/upload/1/0a1b2c3d-{number:04d}.jpg"},
        "annotations": [annotation | changes],
        "predictions": [{"result": [{"type": "choices", "value": {"choices": ["predicted"]}}]}],
    }


class TestLabelStudio:
    def test_people_are_told_apart_and_predictions_are_no_votes(self, tmp_path: Path) -> None:
        ann = {"id": 8, "email": "ann@x.org"}
        first, second = choice_task(1, "cat", by=7), choice_task(2, "dog", by=ann)
        first["annotations"] = [*first["annotations"], *choice_task(1, "dog", by=ann)["annotations"]]
        file = tmp_path / "export.json"
        file.write_text(json.dumps([first, second]))
        votes, problems = read_votes([file])
        assert problems == ()
        assert votes.items == ("0001.jpg", "0002.jpg")
        assert votes.annotators == ("7", "ann@x.org")
        assert votes.classes == ("cat", "dog")
        assert votes.table.tolist() == [[0, 1], [-1, 1]]

    def test_several_exports_in_which_people_are_named(self, tmp_path: Path) -> None:
        files = []
        for number, folder in enumerate(("first", "second"), start=1):
            (tmp_path / folder).mkdir()
            files.append(tmp_path / folder / "export.json")
            files[-1].write_text(json.dumps([choice_task(number, "cat", by=7), choice_task(3, "dog", by=8)]))
        votes, problems = read_votes(files)
        assert (votes.annotators, problems) == (("7", "8"), ())
        assert votes.table.tolist() == [[0, -1], [0, -1], [-1, 1]]

    def test_exports_that_name_nobody_are_not_one_annotators(self, tmp_path: Path) -> None:
        files = []
        for folder in ("first", "second"):
            (tmp_path / folder).mkdir()
            files.append(tmp_path / folder / "export.json")
            files[-1].write_text(json.dumps([choice_task(1, "cat", completed_by=None)]))
        with pytest.raises(DatasetError, match="would be the votes of one annotator 'export'; name each"):
            read_votes(files)

    def test_uploads_of_one_name_are_told_apart(self, tmp_path: Path) -> None:
        tasks = [choice_task(number, label) for number, label in enumerate(("cat", "dog", "cat"), start=1)]
        for task, name in zip(tasks, ("aaaaaaaa-1.jpg", "bbbbbbbb-1.jpg", "cccccccc-2.jpg"), strict=True):
            task["data"] = {"image": f"/data/upload/1/{name}"}
        (tmp_path / "e.json").write_text(json.dumps(tasks))
        votes, problems = read_votes([tmp_path / "e.json"])
        assert problems == ()
        assert votes.items == ("2.jpg", "aaaaaaaa-1.jpg", "bbbbbbbb-1.jpg")
        assert votes.table.tolist() == [[0], [0], [1]]

    def test_cancelled_and_empty_annotations_are_no_votes(self, tmp_path: Path) -> None:
        untouched = {"id": 4, "data": {"image": "a.jpg"}, "annotations": []}
        tasks = [
            choice_task(1, "cat", was_cancelled=True),
            choice_task(2, None),
            choice_task(3, "cat"),
            untouched,
        ]
        (tmp_path / "e.json").write_text(json.dumps(tasks))
        votes, problems = read_votes([tmp_path / "e.json"])
        assert problems == ()
        assert votes.annotators == ("1",)
        assert votes.items == ("0001.jpg", "0002.jpg", "0003.jpg")
        assert votes.table.tolist() == [[-1], [-1], [0]]
        assert votes.empty == (2,)

    def test_what_is_no_single_choice_is_a_problem(self, tmp_path: Path) -> None:
        several = [{"type": "choices", "value": {"choices": ["cat", "dog"]}}]
        boxes = [{"type": "rectanglelabels", "value": {"x": 1, "rectanglelabels": ["cat"]}}]
        tasks = [
            choice_task(1, "cat", result=several),
            choice_task(2, "cat", result=boxes),
            choice_task(3, "cat", result="x"),
            {"id": 4, "data": {}, "annotations": []},
            choice_task(5, "cat"),
        ]
        file = tmp_path / "e.json"
        file.write_text(json.dumps(tasks))
        votes, problems = read_votes([file])
        assert [problem.where for problem in problems] == [f"{file}:task {i}" for i in range(1, 5)]
        assert votes.items == ("0005.jpg",)

    def test_an_export_of_the_planned_tasks_is_the_annotators(self, dealt: Path) -> None:
        made = read_plan(dealt / "plan.json")
        files = []
        for by, name in enumerate(made.annotators):
            tasks = json.loads((dealt / f"{name}-label-studio.json").read_text())
            for number, task in enumerate(tasks):
                path = made.tasks[name][task["data"]["image"].rpartition("/")[2]]
                task["annotations"] = choice_task(number, label_of(path), by=by)["annotations"]
            files.append(dealt / f"project-{by}-at-2026-01-02.json")
            files[-1].write_text(json.dumps(tasks))
        votes, problems = read_votes(files)
        assert problems == ()
        assert votes.annotators == made.annotators
        for item, row in zip(votes.items, votes.table, strict=True):
            assert votes.classes[row.max()] == label_of(item)

    def test_text_that_no_file_can_hold_is_a_problem(self, tmp_path: Path) -> None:
        tasks = [
            choice_task(1, "\ud800"),
            choice_task(2, "cat"),
            choice_task(3, "cat", by={"email": "\udc80"}),
        ]
        (tmp_path / "e.json").write_text(json.dumps(tasks))
        votes, problems = read_votes([tmp_path / "e.json"])
        assert [problem.where.rpartition(":")[2] for problem in problems] == ["task 1", "task 3"]
        assert (votes.items, votes.annotators) == (("0002.jpg",), ("1",))

    def test_uploaded_images_are_found_by_name_and_person(self, dealt: Path) -> None:
        made = read_plan(dealt / "plan.json")
        name, path = next(iter(made.tasks["bob"].items()))
        task = choice_task(1, label_of(path), by={"id": 3, "email": "bob@x.org"})
        task["data"] = {"image": f"/data/upload/4/deadbeef-{name}"}
        (dealt / "export.json").write_text(json.dumps([task]))
        votes, _ = read_votes([dealt / "export.json"])
        assert votes.annotators == ("bob",)
        assert votes.table[votes.items.index(path), 0] >= 0

    def test_uploads_of_one_name_that_a_plan_gave_to_several(self, dealt: Path) -> None:
        made = read_plan(dealt / "plan.json")
        tasks = []
        for number, who in enumerate(("ann", "bob")):
            task = choice_task(number, label_of(made.tasks[who]["0001.png"]), by={"id": number, "email": who})
            tasks.append(task | {"data": {"image": f"/data/upload/4/{number:08x}-0001.png"}})
        (dealt / "export.json").write_text(json.dumps(tasks))
        votes, problems = read_votes([dealt / "export.json"])
        assert [problem.what for problem in problems] == ["there is no answer of cid"]
        for place, who in enumerate(("ann", "bob")):
            assert votes.table[votes.items.index(made.tasks[who]["0001.png"]), place] >= 0


def voc(*labels: str) -> str:
    """A file of LabelImg with one box per label; its file name is another machine's."""
    boxes = "".join(f"<object><name>{label}</name></object>" for label in labels)
    return f"<annotation><filename>elsewhere.png</filename>{boxes}</annotation>"


class TestFolders:
    def test_pascal_voc_beside_the_images(self, dealt: Path) -> None:
        tasks = read_plan(dealt / "plan.json").tasks["ann"]
        names = [Path(name).stem for name in tasks]
        texts = {Path(name).stem: voc(label_of(path), label_of(path)) for name, path in tasks.items()}
        texts[names[0]] = voc("0", "1")
        texts[names[1]] = voc()
        texts[names[2]] = "<annotation><object>"
        texts[names[3]] = f'<!DOCTYPE a [<!ENTITY x "0">]>{voc("&x;")}'
        del texts[names[4]]
        for stem, text in texts.items():
            (dealt / "ann" / f"{stem}.xml").write_text(text)
        votes, problems = read_votes([dealt / "ann"])
        bad = sorted(Path(problem.where).stem for problem in problems if problem.where.endswith(".xml"))
        assert bad == sorted([names[0], *names[2:4]])
        assert votes.annotators == ("ann",)
        assert votes.empty == (5,)
        assert (votes.table >= 0).sum() == len(names) - 5

    def test_images_sorted_into_folders(self, tmp_path: Path) -> None:
        for name, labels in {"ann": "aab", "bob": "ab."}.items():
            for number, label in enumerate(labels):
                home = tmp_path / name / ("" if label == "." else label)
                home.mkdir(parents=True, exist_ok=True)
                Image.new("L", (8, 8)).save(home / f"{number}.png")
        votes, problems = read_votes([tmp_path / "ann", tmp_path / "bob"])
        assert problems == ()
        assert votes.items == ("0.png", "1.png", "2.png")
        assert votes.table.tolist() == [[0, 0], [0, 1], [1, -1]]

    def test_folders_of_one_name_are_not_one_annotators(self, tmp_path: Path) -> None:
        for name in ("ann", "bob"):
            (tmp_path / name / "images" / "a").mkdir(parents=True)
            Image.new("L", (8, 8)).save(tmp_path / name / "images" / "a" / "0.png")
        message = "one annotator 'images'; name each after its annotator, or put all that is one's into one"
        with pytest.raises(DatasetError, match=message):
            read_votes([tmp_path / "ann" / "images", tmp_path / "bob" / "images"])

    def test_yolo_and_untouched_folders_are_refused_with_the_way_out(self, dealt: Path) -> None:
        with pytest.raises(DatasetError, match="neither Pascal VOC files nor images sorted into folders"):
            read_votes([dealt / "ann"])
        (dealt / "ann" / "0001.txt").write_text("0 0.5 0.5 1 1\n")
        with pytest.raises(DatasetError, match="YOLO files; save as PascalVOC"):
            read_votes([dealt / "ann"])


def crowd_kit(votes: Table, *, steps: int) -> npt.NDArray[np.float64]:
    rows, columns = np.nonzero(votes >= 0)
    frame = pd.DataFrame({"task": rows, "worker": columns, "label": votes[rows, columns]})
    probabilities = CrowdKitDawidSkene(n_iter=steps, tol=-1).fit_predict_proba(frame)
    return probabilities.sort_index().sort_index(axis=1).to_numpy()


class TestDawidSkene:
    @pytest.mark.filterwarnings("ignore:The (inplace|copy) keyword")
    @pytest.mark.parametrize("seed", range(3))
    def test_equals_crowd_kit_step_by_step_without_smoothing(self, seed: int) -> None:
        _, votes = simulate(seed, images=300, skills=[0.9, 0.8, 0.7, 0.6], missing=0.25)
        votes = votes[(votes >= 0).sum(axis=1) >= 2]
        for steps in (1, 2, 25):
            found = dawid_skene(votes, classes=4, smoothing=1e-10, steps=steps, tolerance=0)
            np.testing.assert_allclose(found.probabilities, crowd_kit(votes, steps=steps), atol=1e-6)

    def test_first_step_by_hand(self) -> None:
        votes = np.array([[0, 0, 1], [1, 1, 1]])  # shares of class 1: 1/3 and 1
        found = dawid_skene(votes, classes=2, smoothing=2, steps=1)
        np.testing.assert_allclose(found.prior, [(2 / 3 + 1) / 4, (4 / 3 + 1) / 4])
        # True 0, said 0 and 1: two pseudo-votes are right, one more goes to each.
        np.testing.assert_allclose(found.confusion[0], [[11 / 14, 3 / 14], [4 / 16, 12 / 16]])
        np.testing.assert_allclose(found.confusion[2], [[9 / 14, 5 / 14], [3 / 16, 13 / 16]])
        assert not found.converged

    def test_every_step_raises_the_objective(self) -> None:
        for smoothing in (1e-6, 0.1, 1.0, 5.0):
            _, votes = simulate(1, images=120, skills=[0.8, 0.6, 0.4], missing=0.2)
            steps = np.diff(dawid_skene(votes, classes=4, smoothing=smoothing, tolerance=0).objective)
            assert len(steps) > 3
            assert (steps >= -1e-9).all()

    def test_beats_the_majority_where_one_annotator_is_bad(self) -> None:
        for seed in range(5):
            truth, votes = simulate(seed, images=400, skills=[0.9, 0.85, 0.35])
            majority = majority_vote(votes, classes=4)
            # A tie is broken in favour of the majority as often as chance would.
            right = (majority.labels == truth).sum() + majority.tied.sum() / 2
            found = dawid_skene(votes, classes=4)
            assert (found.probabilities.argmax(axis=1) == truth).sum() > right
            assert found.quality.argmin() == 2

    def test_learns_the_annotators_confusions(self) -> None:
        truth, votes = simulate(3, images=4000, skills=[0.9, 0.8, 0.7, 0.75])
        found = dawid_skene(votes, classes=4)
        for r in range(4):
            for k in range(4):
                said = votes[truth == k, r]
                actual = np.bincount(said, minlength=4) / len(said)
                np.testing.assert_allclose(found.confusion[r, k], actual, atol=0.05)
        np.testing.assert_allclose(found.prior, np.bincount(truth, minlength=4) / 4000, atol=0.02)

    def test_probabilities_are_those_of_all_images_also_without_votes(self) -> None:
        _, votes = simulate(0, images=50, skills=[0.9, 0.8])
        votes[0], votes[1, 0] = -1, -1
        found = dawid_skene(votes, classes=4)
        np.testing.assert_allclose(found.probabilities.sum(axis=1), 1)
        np.testing.assert_allclose(found.probabilities[0], found.prior)
        expected = found.prior * found.confusion[1, :, votes[1, 1]]
        np.testing.assert_allclose(found.probabilities[1], expected / expected.sum())

    def test_images_with_one_vote_do_not_change_what_is_learned(self) -> None:
        _, votes = simulate(0, images=80, skills=[0.9, 0.8, 0.7])
        alone = np.full((500, 3), -1)
        alone[:, 2] = 1
        learned = dawid_skene(votes, classes=4)
        np.testing.assert_array_equal(
            dawid_skene(np.vstack([votes, alone]), classes=4).confusion, learned.confusion
        )


class TestConsensus:
    def test_majority_reports_ties_and_breaks_none(self) -> None:
        votes = np.array([[0, 0, 1], [0, 1, -1], [2, 1, 0], [-1, -1, -1], [-1, 2, -1]])
        found = majority_vote(votes, classes=3)
        assert found.labels.tolist() == [0, -1, -1, -1, 2]
        assert found.tied.tolist() == [False, True, True, False, False]
        assert found.share.tolist() == pytest.approx([2 / 3, 1 / 2, 1 / 3, 0, 1])

    def test_crowdlab_uses_what_the_model_says(self) -> None:
        truth, votes = simulate(2, images=300, skills=[0.85, 0.7, 0.55], missing=0.1)
        votes = votes[keep := (votes >= 0).any(axis=1)]
        truth = truth[keep]
        probabilities = np.full((len(votes), 4), 0.05)
        probabilities[np.arange(len(votes)), truth] = 0.85
        found = crowdlab(votes, probabilities)
        majority = majority_vote(votes, classes=4)
        assert (found.labels == truth).mean() > (majority.labels == truth).mean() + 0.05
        assert ((found.confidence >= 0) & (found.confidence <= 1)).all()
        assert (np.isnan(found.vote_quality) == (votes < 0)).all()
        assert found.quality.argsort().tolist() == [2, 1, 0]

    def test_crowdlab_copes_with_annotators_without_votes_and_without_agreement(self) -> None:
        votes = np.array([[0, -1, 1], [1, -1, 0], [2, -1, -1]])
        found = crowdlab(votes, np.full((3, 3), 1 / 3))
        assert np.isnan(found.quality[1])
        assert not np.isnan(found.quality[[0, 2]]).any()

    def test_crowdlab_does_not_depend_on_numpys_global_generator_nor_touch_it(self) -> None:
        votes = np.array([[0, 0], [1, 1], *[[0, 1], [1, 0]] * 10])
        results = []
        for seed in range(4):
            np.random.seed(seed)  # noqa: NPY002
            results.append(crowdlab(votes, np.full((22, 2), 1 / 2)))
            after = np.random.random()  # noqa: NPY002
            np.random.seed(seed)  # noqa: NPY002
            assert np.random.random() == after  # noqa: NPY002
        for result in results[1:]:
            np.testing.assert_array_equal(result.labels, results[0].labels)
            np.testing.assert_array_equal(result.confidence, results[0].confidence)

    def test_an_only_vote_stands_with_its_own_confidence(self) -> None:
        _, table = simulate(0, images=200, skills=[0.95, 0.9, 0.4])
        table[150:, :2] = -1
        table[199] = -1
        names = tuple(f"{i}.jpg" for i in range(200))
        votes = Votes(names, ("a", "b", "c"), tuple("wxyz"), table, (0, 50, 50))
        found = find_consensus(votes)
        assert found.labels[150:199].tolist() == table[150:199, 2].tolist()
        assert found.labels[199] == -1
        assert set(found.method[150:199]) == {"single"}
        assert found.method[199] == ""
        assert np.isnan(found.confidence[199])
        assert found.confidence[150:199].mean() < 0.8 < found.confidence[:150].mean()

    def test_predictions_of_some_images_are_used_for_these(self) -> None:
        truth, table = simulate(0, images=60, skills=[0.8, 0.7, 0.6])
        names = tuple(f"{i:02d}.jpg" for i in range(60))
        votes = Votes(names, ("a", "b", "c"), tuple("wxyz"), table, (0, 0, 0))
        probabilities = np.full((40, 4), 0.1)
        probabilities[np.arange(40), 3 - truth[39::-1]] = 0.7  # its own order of images and of classes
        model = Predictions(tuple("zyxw"), names[39::-1], truth[39::-1], probabilities)
        found = find_consensus(votes, predictions=model)
        assert found.method == ("crowdlab",) * 40 + ("dawid-skene",) * 20
        assert (found.labels[:40] == truth[:40]).mean() > 0.95
        elsewhere = Predictions(tuple("zyxw"), tuple("abc"), truth[:3], probabilities[:3])
        with pytest.raises(DatasetError, match="cover no image with two votes"):
            find_consensus(votes, predictions=elsewhere)


class TestScore:
    def test_files_of_a_plan_become_a_verdict_and_labels(self, dealt: Path, flat: Path) -> None:
        made = read_plan(dealt / "plan.json")
        result = score(fill(dealt, made, wrong={"cid": {"2": "1"}}), config=QUICK)
        assert result.images.compared == 20
        assert result.images.single == 40
        assert result.images.none == 0
        assert result.worst_pair is not None
        assert result.worst_pair.classes == ("1", "2")
        assert result.worst_pair.share == 1
        assert {label_of(path) for path in result.worst_pair.paths} == {"2"}
        assert result.per_annotator["cid"].alpha_without.value == 1
        assert result.per_class["0"].alpha.value == 1
        assert result.per_class["1"].alpha.value < 1  # type: ignore[operator]
        common = {item.path for item in made.items if item.common}
        twos = sum(label_of(path) == "2" for path in common)
        assert result.images.disputed == twos
        labels = read_rows(dealt / "agreement" / "consensus.csv")
        assert all((flat / row["image_path"]).is_file() for row in labels)
        assert {row["method"] for row in labels} == {"dawid-skene", "single"}
        assert all(row["label"] == label_of(row["image_path"]) for row in labels if row["votes"] == "3")
        disputed = read_rows(dealt / "agreement" / "disagreements.csv")
        assert {row["image_path"] for row in disputed} == {p for p in common if label_of(p) == "2"}
        assert {row["candidates"] for row in disputed} == {'{"2": 2, "1": 1}'}

    def test_agreement_json_is_what_is_returned(self, dealt: Path, tmp_path: Path) -> None:
        files = fill(dealt, read_plan(dealt / "plan.json"), wrong={"bob": {"0": "1"}})
        result = score(files, out=tmp_path / "there", config=QUICK)
        assert Agreement.model_validate_json((tmp_path / "there" / "agreement.json").read_bytes()) == result
        assert result.folder == str(tmp_path / "there")
        assert sorted(file.name for file in (tmp_path / "there").iterdir()) == [
            "agreement.html",
            "agreement.json",
            "consensus.csv",
            "disagreements.csv",
        ]

    @pytest.mark.parametrize(
        ("skill", "verdict", "code"), [(0.97, "accept", 0), (0.9, "tentative", 3), (0.6, "rewrite", 4)]
    )
    def test_verdict_follows_alpha(self, tmp_path: Path, skill: float, verdict: str, code: int) -> None:
        _, votes = simulate(0, images=1500, skills=[skill] * 3)
        names = ["ann", "bob", "cid"]
        result = score(write_votes(tmp_path, votes, classes="wxyz", names=names), config=QUICK)
        assert result.alpha.value == pytest.approx(krippendorff_alpha(votes, classes=4))
        assert (result.verdict, result.exit_code, result.certain) == (verdict, code, True)
        assert EXIT_CODES[result.verdict] == code
        named = [reason for reason in result.reasons if "tell them apart" in reason]
        assert bool(named) == (verdict != "accept")
        assert ("rewrite the guideline" in result.reasons[0]) == (verdict == "rewrite")

    def test_an_interval_across_a_threshold_is_said(self, tmp_path: Path) -> None:
        _, votes = simulate(1, images=60, skills=[0.9, 0.9])
        alpha = krippendorff_alpha(votes, classes=4)
        files = write_votes(tmp_path, votes, classes="wxyz", names=["ann", "bob"])
        config = QUICK.model_copy(update={"accept": alpha + 0.01, "tentative": 0.1})
        result = score(files, config=config)
        assert (result.verdict, result.certain) == ("tentative", False)
        assert any("the interval crosses" in reason for reason in result.reasons)
        sure = score(files, config=QUICK.model_copy(update={"accept": 0.99, "tentative": 0.1}))
        assert (sure.verdict, sure.certain) == ("tentative", True)
        assert not any("the interval crosses" in reason for reason in sure.reasons)

    def test_one_bad_annotator_is_named(self, tmp_path: Path) -> None:
        _, votes = simulate(0, images=400, skills=[0.97, 0.97, 0.3])
        files = write_votes(tmp_path, votes, classes="wxyz", names=["ann", "bob", "cid"])
        result = score(files, config=QUICK)
        assert any(reason.startswith("without cid alpha would be 0.9") for reason in result.reasons)
        assert not any(reason.startswith(("without ann", "without bob")) for reason in result.reasons)

    def test_truth_scores_annotators_and_consensus(self, tmp_path: Path) -> None:
        truth, votes = simulate(5, images=400, skills=[0.92, 0.85, 0.3])
        files = write_votes(tmp_path, votes, classes="wxyz", names=["ann", "bob", "cid"])
        known = {f"{i:04d}.jpg": "wxyz"[k] for i, k in enumerate(truth)}
        found = score(files, truth=known, config=QUICK).truth
        assert found is not None
        assert found.images == 400
        for r, name in enumerate(("ann", "bob", "cid")):
            assert found.annotators[name] == pytest.approx((votes[:, r] == truth).mean())
        assert found.consensus > found.majority
        assert score(files, truth={"other.jpg": "w"}, config=QUICK).truth is None

    def test_a_models_probabilities_choose_crowdlab(self, tmp_path: Path) -> None:
        truth, votes = simulate(6, images=200, skills=[0.8, 0.7, 0.6])
        files = write_votes(tmp_path, votes, classes="wxyz", names=["ann", "bob", "cid"])
        probabilities = np.full((200, 5), 0.05)
        probabilities[np.arange(200), truth] = 0.8
        names = tuple(f"{i:04d}.jpg" for i in range(200))
        model = Predictions(tuple("wxyzv"), names, truth, probabilities)
        result = score(files, predictions=model, config=QUICK)
        assert result.consensus.methods == {"crowdlab": 200}
        assert result.classes == tuple("wxyzv")
        assert all(part.crowdlab_quality is not None for part in result.per_annotator.values())
        labels = [row["label"] for row in read_rows(tmp_path / "agreement" / "consensus.csv")]
        assert np.mean([a == "wxyz"[b] for a, b in zip(labels, truth, strict=True)]) > 0.95
        narrow = Predictions(tuple("wxy"), names, truth, probabilities[:, :3])
        with pytest.raises(DatasetError, match="the model has no class 'z'"):
            score(files, predictions=narrow, config=QUICK)

    def test_one_class_only_is_undefined_and_no_success(self, tmp_path: Path) -> None:
        files = write_votes(tmp_path, np.zeros((30, 2), dtype=np.int64), classes="w", names=["ann", "bob"])
        result = score(files, config=QUICK)
        assert (result.verdict, result.exit_code, result.certain) == ("undefined", 4, False)
        assert result.alpha.value is None
        assert result.alpha.reason == "all votes are of one class"
        assert result.agreement.value == 1
        assert "undefined" in result.reasons[0]
        assert "NaN" not in (tmp_path / "agreement" / "agreement.json").read_text()

    def test_rare_classes_behind_a_low_alpha_are_explained(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        votes = (rng.random((400, 2)) < 0.03).astype(np.int64)
        result = score(write_votes(tmp_path, votes, classes="wx", names=["ann", "bob"]), config=QUICK)
        assert result.verdict == "rewrite"
        assert any("AC1" in reason and "'w'" in reason for reason in result.reasons)

    def test_missing_votes_are_counted(self, tmp_path: Path) -> None:
        _, votes = simulate(0, images=100, skills=[0.9, 0.9, 0.9])
        votes[:10], votes[10:30, 1:], votes[30:35, 2] = -1, -1, -1
        files = write_votes(tmp_path, votes, classes="wxyz", names=["ann", "bob", "cid"])
        result = score(files, config=QUICK)
        images = result.images
        assert (images.none, images.single, images.compared) == (10, 20, 70)
        assert result.votes == 70 * 3 - 5 + 20
        assert [part.empty for part in result.per_annotator.values()] == [10, 30, 35]
        assert [part.compared for part in result.per_annotator.values()] == [70, 70, 65]
        assert len(read_rows(tmp_path / "agreement" / "consensus.csv")) == 90
        for part in result.per_annotator.values():
            assert sum(map(sum, part.confusion)) == part.compared

    def test_few_images_and_problems_are_said(self, tmp_path: Path) -> None:
        _, votes = simulate(0, images=12, skills=[0.9, 0.9])
        files = write_votes(tmp_path, votes, classes="wxyz", names=["ann", "bob"])
        files[0].write_text(files[0].read_text() + ",w\n")
        result = score(files, config=QUICK)
        assert "only 12 images have several votes; 20 are asked for" in result.reasons
        assert len(result.problems) == 1
        assert result.problems[0].startswith(f"{files[0]}:14: image_path is empty; ")

    def test_what_cannot_be_scored_is_refused(self, tmp_path: Path) -> None:
        one = write_csv(tmp_path / "ann.csv", [("a.jpg", "x")])
        other = write_csv(tmp_path / "bob.csv", [("b.jpg", "x")])
        with pytest.raises(DatasetError, match="of one annotator only"):
            score([one], config=QUICK)
        with pytest.raises(DatasetError, match="no image has labels of two annotators"):
            score([one, other], config=QUICK)
        with pytest.raises(ConfigError, match="no files of votes"):
            score([], config=QUICK)
        with pytest.raises(ConfigError, match=r"tentative \(0\.9\) is above accept \(0\.8\)"):
            score([one, other], config=AgreeConfig(tentative=0.9))
        with pytest.raises(ConfigError, match="is not a plan of holotype"):
            score([one, other], plan=write_csv(tmp_path / "plan.json", []), config=QUICK)
        assert not (tmp_path / "agreement").exists()


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.scripts = 0
        self.images: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self.scripts += tag == "script"
        self.links += [values[name] for name in ("href", "src", "srcset") if name in values]
        self.images += [values["src"]] if tag == "img" else []

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parse(file: Path) -> _Page:
    page = _Page()
    page.feed(file.read_text(encoding="utf-8"))
    return page


class TestPage:
    def test_shows_pictures_and_figures_and_asks_nobody(self, dealt: Path) -> None:
        files = fill(dealt, read_plan(dealt / "plan.json"), wrong={"cid": {"2": "1"}, "bob": {"0": "1"}})
        result = score(files, config=QUICK)
        page = parse(dealt / "agreement" / "agreement.html")
        assert page.images
        assert all(source.startswith("data:image/jpeg;base64,") for source in page.images)
        assert all(link.startswith(("data:", "#")) for link in page.links)
        text = " ".join(page.text)
        assert f"{result.alpha.value:.3f}" in text
        for words in ("Gwet's AC1", "Fleiss' kappa", "Cohen's kappa", "Confusion matrices", *result.reasons):
            assert words in text

    def test_hostile_names_stay_text(self, tmp_path: Path) -> None:
        rows = [
            (f"{HOSTILE}{i}.jpg", HOSTILE if i % 3 or who == "a" else "{{ 7*7 }}", who)
            for i in range(9)
            for who in ("a", HOSTILE)
        ]
        file = write_csv(tmp_path / "all.csv", rows, header="image_path,label,annotator")
        score([file], config=QUICK)
        page = parse(tmp_path / "agreement" / "agreement.html")
        assert page.scripts == 1
        text = "".join(page.text)
        assert HOSTILE in text
        assert "{{ 7*7 }}" in text

    def test_many_classes_are_listed_not_tabled(self, tmp_path: Path) -> None:
        classes = [f"class {i:02d}" for i in range(30)]
        votes = np.repeat(np.arange(120)[:, None] % 30, 2, axis=1)
        votes[0, 1] = 7
        score(write_votes(tmp_path, votes, classes=classes, names=["ann", "bob"]), config=QUICK)
        html = (tmp_path / "agreement" / "agreement.html").read_text()
        assert "The most frequent differences from the consensus" in html
        assert len(html) < 100_000


class TestModel:
    def test_a_bundle_is_asked_and_decides_what_two_people_dispute(
        self, digits: Path, probe: TrainResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = tmp_path / "annotation"
        assert run(["agree", "plan", str(digits), "--annotators", "ada,grace", "--out", str(folder)]) == 0
        tasks = json.loads((folder / "plan.json").read_text())["tasks"]
        truth = {path: Path(path).parts[-2] for path in tasks["ada"].values()}
        disputed = sorted(truth)[::10]
        for name, images in tasks.items():
            wrong = {path: str((int(truth[path]) + 1) % 3) for path in disputed} if name == "grace" else {}
            rows = [f"{name}/{image},{wrong.get(path, truth[path])}" for image, path in images.items()]
            (folder / f"{name}.csv").write_text("image_path,label\n" + "\n".join(rows) + "\n")
        capsys.readouterr()
        files = [str(folder / "ada.csv"), str(folder / "grace.csv")]
        run(["agree", "score", *files, "--model", str(probe.best), "--json", "--quiet"])
        result = json.loads(capsys.readouterr().out)
        assert result["images"]["disputed"] == len(disputed)
        with (folder / "agreement" / "consensus.csv").open() as stream:
            consensus = {row["image_path"]: row for row in csv.DictReader(stream)}
        assert {row["method"] for row in consensus.values()} == {"crowdlab"}
        settled = [consensus[path]["label"] == truth[path] for path in disputed]
        assert sum(settled) >= 0.75 * len(disputed)  # by votes alone it is one against one

    def test_a_model_of_other_classes_is_refused(
        self, tmp_path: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        Image.new("RGB", (40, 40), "red").save(tmp_path / "x.png")
        for name in ("ada", "grace"):
            (tmp_path / f"{name}.csv").write_text("image_path,label\nx.png,cat\n")
        files = [str(tmp_path / "ada.csv"), str(tmp_path / "grace.csv")]
        assert run(["agree", "score", *files, "--model", str(tiny_bundle)]) == 1
        assert "the model has no class 'cat'" in capsys.readouterr().err

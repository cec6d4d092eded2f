"""`holotype audit` as a user meets it: planted faults, verdicts, exit codes, and what it must not do."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from PIL import Image, ImageDraw

import awkward
from digits import write_digits, write_flat
from holotype.audit import EXIT_CODES, audit
from holotype.cli import run
from holotype.config import AuditConfig, DataConfig, DuplicatesConfig, GatesConfig
from holotype.dataset import cache_folder, index_dataset
from holotype.dataset.leaks import read_leaks
from holotype.errors import DatasetError
from holotype.models import input_spec
from holotype.review import read_suspects
from photos import ALTERED, altered, jpeg, pieces, put

QUICK = ("--set", "data.size=64", "--set", "folds=2")
CHEAP = (*QUICK, "--set", "duplicates.near=false")
"""Exact copies alone: nothing is altered and aligned."""


@dataclass(frozen=True)
class Outcome:
    code: int
    found: dict[str, Any]
    err: str

    def gate(self, name: str) -> dict[str, Any]:
        return next(gate for gate in self.found["gates"] if gate["name"] == name)

    @property
    def findings(self) -> dict[str, Any]:
        """All but what a clock says."""
        return {key: value for key, value in self.found.items() if key != "seconds"}


def call(data: Path, *arguments: object, out: Path) -> Outcome:
    """`holotype audit DATA --json …`; fails where stdout holds anything but one JSON object."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with redirect_stdout(stdout), redirect_stderr(stderr):
        code = run(["audit", str(data), "--out", str(out), "--json", *(str(a) for a in arguments)])
    assert "Traceback" not in stderr.getvalue()
    found = json.loads(stdout.getvalue())
    assert stdout.getvalue().count("\n") == 1
    assert code == EXIT_CODES[found["verdict"]]
    return Outcome(code, found, stderr.getvalue())


def photos(folder: Path, *, label: str, split: str, images: list[np.ndarray]) -> list[str]:
    """Write PNG files and return their paths as the dataset names them."""
    names = [f"{split}/{label}/{number:03d}.png" for number in range(len(images))]
    for name, image in zip(names, images, strict=True):
        put(folder / name, image)
    return names


def everything_in(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {
        file.relative_to(folder).as_posix(): (file.read_bytes(), file.stat().st_mtime_ns) for file in files
    }


# ------------------------------------------------------------------------------------- one folder of faults


@dataclass(frozen=True)
class Planted:
    """A folder with every fault of a kind, what its audits said, and which pictures are copies."""

    folder: Path
    before: dict[str, tuple[bytes, int]]
    copies: dict[frozenset[str], str]
    leaked: set[str]
    first: Outcome
    second: Outcome
    mended: Outcome
    out: Path


def plant(folder: Path) -> tuple[dict[frozenset[str], str], set[str]]:
    china, flower = (list(pieces()[name]) for name in ("china", "flower"))
    clean = {}
    for label, images in (("china", china[:31]), ("flower", flower[:20])):
        for split, part in (("train", images[10:]), ("validation", images[:5]), ("test", images[5:10])):
            clean[label, split] = photos(folder, label=label, split=split, images=part)
    copies: dict[frozenset[str], str] = {}
    leaked = set()
    # Near copies, inside of train and from train into test.
    for place, name in enumerate(ALTERED):
        for label, offset, split in (("china", 10, "train"), ("flower", 10, "test")):
            original = clean[label, "train"][place]
            image = (china if label == "china" else flower)[offset + place]
            copy = f"{split}/{label}/{name}.jpg"
            put(folder / copy, altered(image, name))
            copies[frozenset((original, copy))] = "near"
            leaked |= {copy} if split == "test" else set()
    # The same bytes in train and validation, and under two labels.
    for original, copy in (
        ("train/china/005.png", "validation/china/again.png"),
        ("train/flower/006.png", "train/china/flower.png"),
    ):
        put(folder / copy, (folder / original).read_bytes())
        copies[frozenset((original, copy))] = "exact"
    leaked.add("validation/china/again.png")
    # Files.
    put(folder / "train/china/truncated.jpg", jpeg(china[31])[:900])
    put(folder / "train/china/wrong.jpg", awkward.encode(china[32], "PNG"))
    grey = np.asarray(Image.fromarray(china[33]).convert("L"), dtype=np.uint16)
    put(folder / "train/china/deep.png", awkward.grey16_png(grey * 257))
    put(folder / "train/flower/ink.jpg", jpeg(Image.fromarray(flower[20]).convert("CMYK")))
    put(folder / "train/flower/dot.png", np.full((1, 1, 3), 90, np.uint8))
    put(folder / "train/flower/empty.jpg", b"")
    put(folder / "train/flower/letter.jpg", b"Dear customer,\n")
    put(folder / "train/flower/.hidden.jpg", jpeg(flower[0]))
    # A class with two images.
    put(folder / "train/rare/a.png", china[34])
    put(folder / "train/rare/b.png", flower[21])
    return copies, leaked


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Planted]:
    root = tmp_path_factory.mktemp("planted")
    data, out = root / "data", root / "out"
    copies, leaked = plant(data)
    before = everything_in(data)
    folders = [data, *(entry for entry in data.rglob("*") if entry.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    first = call(data, *QUICK, "--junit", root / "gates.xml", out=out)
    second = call(data, *QUICK, "--fix-split", out=root / "second")
    mended = call(data, *QUICK, out=root / "mended")
    yield Planted(data, before, copies, leaked, first, second, mended, out)
    for folder in folders:
        folder.chmod(0o755)


class TestPlantedFaults:
    def test_it_is_unusable_and_says_why(self, planted: Planted) -> None:
        first = planted.first
        assert first.code == 4
        assert first.found["verdict"] == "unusable"
        failed = {gate["name"] for gate in first.found["gates"] if gate["passed"] is False}
        assert {"unreadable", "splits", "balance", "class_size", "leakage", "conflicts"} <= failed
        assert all(gate["advice"] for gate in first.found["gates"] if gate["passed"] is False)
        assert first.gate("splits")["advice"].endswith("missing: rare in validation, rare in test")
        assert "'rare'" in first.gate("class_size")["advice"]
        assert first.gate("class_size")["value"] == 2
        assert [reason.partition(":")[0] for reason in first.found["reasons"]] == ["unreadable", "splits"]

    def test_json_has_what_the_contract_promises(self, planted: Planted) -> None:
        found = planted.first.found
        for gate in found["gates"]:
            assert gate.keys() >= {"name", "passed", "value", "threshold", "advice"}
        assert found["balance"].keys() >= {"counts", "max_min_ratio"}
        for cluster in found["duplicates"]["clusters"]:
            assert cluster.keys() >= {"paths", "kind", "conflict"}
        assert found["leakage"].keys() >= {"pairs", "fraction"}
        assert found["label_suspects"]
        for suspect in found["label_suspects"]:
            assert suspect.keys() >= {"path", "label", "suggested", "score"}
        for issue in found["health"]:
            assert issue.keys() >= {"path", "issue", "value"}
        scores = [suspect["score"] for suspect in found["label_suspects"]]
        assert scores == sorted(scores, reverse=True)

    def test_unreadable_files_are_listed_with_the_reason_and_hidden_ones_are_not_there(
        self, planted: Planted
    ) -> None:
        found = planted.first.found
        reasons = {file["path"]: file["error"] for file in found["unreadable"]}
        assert reasons.keys() == {
            "train/china/truncated.jpg", "train/flower/empty.jpg", "train/flower/letter.jpg"
        }  # fmt: skip
        assert "truncated" in reasons["train/china/truncated.jpg"]
        assert "empty" in reasons["train/flower/empty.jpg"]
        assert "not an image" in reasons["train/flower/letter.jpg"]
        assert planted.first.gate("unreadable")["value"] == pytest.approx(
            3 / (3 + sum(found["balance"]["counts"].values()))
        )
        assert ".hidden" not in json.dumps(found)

    @pytest.mark.parametrize(
        ("path", "issue", "value"),
        [
            ("train/china/truncated.jpg", "truncated", "truncated image"),
            ("train/flower/empty.jpg", "empty", "empty file, no image bytes"),
            ("train/flower/letter.jpg", "unreadable", None),
            ("train/china/wrong.jpg", "wrong extension", "PNG"),
            ("train/china/deep.png", "unusual mode", "I;16"),
            ("train/flower/ink.jpg", "unusual mode", "CMYK"),
            ("train/flower/dot.png", "odd size", "1x1"),
        ],
    )
    def test_odd_files_are_found(self, planted: Planted, path: str, issue: str, value: str | None) -> None:
        found = {(one["path"], one["issue"]): one["value"] for one in planted.first.found["health"]}
        assert (path, issue) in found
        assert value is None or found[path, issue] == value

    def test_counts(self, planted: Planted) -> None:
        balance = planted.first.found["balance"]
        # 31 + 4 near copies + 1 exact + 1 of the other class + 2 odd; 20 + 4 near + 2 odd.
        assert balance["counts"] == {"china": 39, "flower": 26, "rare": 2}
        assert balance["max_min_ratio"] == pytest.approx(39 / 2)

    def test_all_copies_are_found_and_nothing_else(self, planted: Planted) -> None:
        clusters = planted.first.found["duplicates"]["clusters"]
        assert {frozenset(cluster["paths"]): cluster["kind"] for cluster in clusters} == planted.copies

    def test_one_image_under_two_labels_is_a_conflict_and_comes_first(self, planted: Planted) -> None:
        conflicting = [cluster["conflict"] for cluster in planted.first.found["duplicates"]["clusters"]]
        assert conflicting == [True] + [False] * (len(conflicting) - 1)
        first = planted.first.found["duplicates"]["clusters"][0]
        assert set(first["paths"]) == {"train/flower/006.png", "train/china/flower.png"}
        assert planted.first.gate("conflicts")["value"] == 1
        queue = read_suspects(cache_folder(planted.folder))
        assert queue is not None
        assert {item.path for item in queue.items[:2]} == set(first["paths"])
        assert {(item.label, item.suggested) for item in queue.items[:2]} == {
            ("china", "flower"), ("flower", "china")
        }  # fmt: skip

    def test_leakage_names_the_training_image_first(self, planted: Planted) -> None:
        leakage = planted.first.found["leakage"]
        assert {copy for _, copy in leakage["pairs"]} == planted.leaked
        assert {frozenset(pair) for pair in leakage["pairs"]} <= planted.copies.keys()
        assert all(source.startswith("train/") for source, _ in leakage["pairs"])
        held_out = sum(
            count
            for cells in planted.first.found["balance"]["by_split"].values()
            for split, count in cells.items()
            if split != "train"
        )
        assert leakage["fraction"] == pytest.approx(len(planted.leaked) / held_out)
        assert {effect["split"]: effect["leaked"] for effect in leakage["effects"]} == {
            "validation": 1, "test": 4
        }  # fmt: skip
        root_hash = planted.first.found["source"]["root_hash"]
        kept = read_leaks(cache_folder(planted.folder), root_hash, "test")
        assert kept == {path for path in planted.leaked if path.startswith("test/")}

    def test_a_folder_that_may_not_be_written_to_is_left_as_it_was(self, planted: Planted) -> None:
        assert everything_in(planted.folder) == planted.before

    def test_files_agree_with_what_is_printed(self, planted: Planted) -> None:
        found = planted.first.found
        assert json.loads((planted.out / "audit.json").read_text()) == found
        page = (planted.out / "audit.html").read_text()
        assert "Not usable" in page
        assert "data:image/jpeg;base64," in page
        assert all(file["path"] in page for file in found["unreadable"])
        suite = ET.parse(planted.out.with_name("gates.xml")).getroot().find("testsuite")
        assert suite is not None
        cases = {
            case.get("name"): False if case.find("failure") is not None else
            None if case.find("skipped") is not None else True
            for case in suite.iter("testcase")
        }  # fmt: skip
        assert cases == {gate["name"]: gate["passed"] for gate in found["gates"]}

    def test_the_same_data_gives_the_same_findings(self, planted: Planted) -> None:
        assert planted.second.findings == planted.first.findings


class TestFixSplit:
    """`planted.second` wrote a new split."""

    @pytest.fixture
    def splits(self, planted: Planted) -> tuple[dict[str, str], dict[str, str]]:
        """By path, as the folders say and as of the revision."""
        both = []
        for revision in (0, 1):
            config = DataConfig(size=64, revision=revision)
            dataset = index_dataset(
                planted.folder, spec=input_spec(AuditConfig().model, config), config=config
            )
            assert dataset.revision == revision
            both.append(dict(dataset.table.select("path", "split").iter_rows()))
        return both[0], both[1]

    def test_no_copies_are_left_in_two_splits(self, planted: Planted) -> None:
        assert "revision 1: " in planted.second.err
        mended = planted.mended
        assert mended.found["source"]["revision"] == 1
        assert mended.found["leakage"] == {"pairs": [], "fraction": 0.0, "leaked": {}, "effects": []}
        assert mended.gate("leakage")["passed"] is True
        assert {frozenset(c["paths"]) for c in mended.found["duplicates"]["clusters"]} == set(planted.copies)

    def test_only_torn_copies_moved_and_each_to_a_split_of_its_own_copies(
        self, planted: Planted, splits: tuple[dict[str, str], dict[str, str]]
    ) -> None:
        before, after = splits
        torn = [pair for pair in planted.copies if len({before[path] for path in pair}) > 1]
        assert {path for path in before if before[path] != after[path]} <= set().union(*torn)
        for pair in planted.copies:
            assert len({after[path] for path in pair}) == 1
            assert {after[path] for path in pair} <= {before[path] for path in pair}

    def test_classes_keep_their_shares(self, planted: Planted) -> None:
        before, after = (o.found["balance"]["by_split"] for o in (planted.first, planted.mended))
        for label, cells in before.items():
            for split, count in cells.items():
                assert abs(after[label][split] - count) <= 1

    def test_revision_0_is_the_old_split(self, splits: tuple[dict[str, str], dict[str, str]]) -> None:
        before, after = splits
        assert before.keys() == after.keys()
        assert all(path.startswith(f"{split}/") for path, split in before.items())


# ------------------------------------------------------------------------------------------------ verdicts


def shapes(folder: Path, *, each: int = 30) -> Path:
    """Two classes that differ in a drawn shape and in nothing else: rings and crosses of random colours."""
    backgrounds = [image for name in ("china", "flower") for image in pieces()[name]]
    dice = np.random.default_rng(0)
    for number in range(each):
        split = "test" if number % 6 == 4 else "validation" if number % 6 == 5 else "train"
        colour = tuple(int(level) for level in dice.integers(0, 256, 3))
        for place, label in enumerate(("cross", "ring")):
            # Both classes get pieces of both photos.
            image = Image.fromarray(backgrounds[(2 * number + place) % len(backgrounds)])
            draw = ImageDraw.Draw(image)
            if label == "ring":
                draw.ellipse((12, 12, 52, 52), outline=colour, width=8)
            else:
                draw.line((12, 12, 52, 52), fill=colour, width=8)
                draw.line((12, 52, 52, 12), fill=colour, width=8)
            put(folder / split / label / f"{number:03d}.png", np.asarray(image))
    return folder


class TestVerdicts:
    def test_a_clean_balanced_set_is_ready(self, tmp_path: Path) -> None:
        outcome = call(shapes(tmp_path / "data"), *QUICK, out=tmp_path / "out")
        assert (outcome.code, outcome.found["verdict"]) == (0, "ready")
        assert not any(gate["passed"] is False for gate in outcome.found["gates"])
        # What was not measured is said, with the command that measures it.
        assert outcome.gate("label_accuracy")["passed"] is None
        assert any("holotype audit --review-sample 300" in why for why in outcome.found["reasons"])
        assert outcome.found["duplicates"]["clusters"] == []
        calibration = outcome.found["duplicates"]["calibration"]
        assert min(calibration["found"].values()) >= 0.9
        assert calibration["false_copies"] <= 0.002 + 1e-9

    def test_a_gate_is_what_the_settings_say(self, tmp_path: Path) -> None:
        data = write_digits(tmp_path / "data", classes=2)
        for file in sorted((data / "train" / "1").glob("*.png"))[:20]:
            file.unlink()
        # Shapes of digits go with their class, and that is all right.
        flags = (*CHEAP, "--set", "gates.shortcut=1", "--set", "gates.class_size=10")
        strict = call(data, *flags, out=tmp_path / "strict")
        assert (strict.code, strict.found["verdict"]) == (3, "fix")
        assert [reason.partition(":")[0] for reason in strict.found["reasons"]] == ["balance"]
        assert strict.gate("balance") == {
            "name": "balance",
            "passed": False,
            "value": 2.0,
            "threshold": 1.3,
            "severity": "fix",
            "advice": "collect 11 more images of '1', or train with --set fit.imbalance=logit-adjust",
        }
        loose = call(data, *flags, "--set", "gates.balance=10", out=tmp_path / "loose")
        assert (loose.code, loose.found["verdict"]) == (0, "ready")
        assert loose.gate("balance")["threshold"] == 10

    def test_python_says_what_the_command_line_says(self, tmp_path: Path) -> None:
        data = write_flat(tmp_path / "data", classes=2, images=12)
        config = AuditConfig(
            folds=2,
            data=DataConfig(size=64),
            duplicates=DuplicatesConfig(near=False),
            gates=GatesConfig(class_size=5),
        )
        result = audit(data, config=config, out=tmp_path / "out")
        assert result.folder == tmp_path / "out"
        assert result.split_revision is None
        printed = call(data, *CHEAP, "--set", "gates.class_size=5", out=tmp_path / "other")
        assert result.exit_code == printed.code
        assert result.audit.model_dump(mode="json", exclude={"seconds"}) == printed.findings


class TestOddSets:
    """Sets that are too small or too strange to say much of, none of which may end in a traceback."""

    def test_an_empty_folder_is_an_error_in_one_line(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        assert run(["audit", str(tmp_path), "--json"]) == 1
        out, err = capfd.readouterr()
        assert out == ""
        assert len(err.strip().splitlines()) == 1
        assert "has no class folders" in err

    def test_a_folder_without_images_is_an_error(self, tmp_path: Path) -> None:
        put(tmp_path / "a" / "notes.txt", b"x")
        with pytest.raises(DatasetError, match="holds no images"):
            audit(tmp_path)

    @pytest.mark.parametrize("labels", ["a", "ab", "aaabbb", "aaaaaa", "aaaaaab"])
    def test_a_handful_of_images(self, tmp_path: Path, labels: str) -> None:
        for number, label in enumerate(labels):
            put(tmp_path / "data" / label / f"{number}.png", pieces()["china"][number])
        outcome = call(tmp_path / "data", "--set", "data.size=64", "--fix-split", out=tmp_path / "out")
        assert outcome.found["source"]["images"] == len(labels)
        assert outcome.found["source"]["classes"] == sorted(set(labels))
        assert outcome.found["duplicates"]["clusters"] == []
        assert outcome.gate("class_size")["passed"] is False
        if len(set(labels)) == 1:
            assert outcome.found["verdict"] == "unusable"
            assert outcome.found["label_suspects"] == []
            assert outcome.gate("classes")["passed"] is False

    def test_one_picture_again_and_again(self, tmp_path: Path) -> None:
        for number, label in enumerate("ababab"):
            put(tmp_path / "data" / label / f"{number}.png", pieces()["china"][0])
        outcome = call(tmp_path / "data", *QUICK, out=tmp_path / "out")
        (cluster,) = outcome.found["duplicates"]["clusters"]
        assert (len(cluster["paths"]), cluster["kind"], cluster["conflict"]) == (6, "exact", True)
        assert outcome.found["duplicates"]["extra"] == 5
        assert outcome.gate("conflicts")["passed"] is False

    def test_nothing_but_broken_files(self, tmp_path: Path) -> None:
        for number, label in enumerate("aabb"):
            put(tmp_path / "data" / label / f"{number}.jpg", jpeg(pieces()["china"][number])[:200])
        outcome = call(tmp_path / "data", *QUICK, "--fix-split", "--review-sample", 300, out=tmp_path / "out")
        assert outcome.found["verdict"] == "unusable"
        assert len(outcome.found["unreadable"]) == 4
        assert outcome.gate("unreadable")["value"] == 1.0
        assert outcome.gate("classes")["value"] == 0
        assert (tmp_path / "out" / "audit.html").is_file()

    def test_pictures_without_any_detail_are_copies_only_where_they_are_equal(self, tmp_path: Path) -> None:
        for number, level in enumerate((10, 60, 60, 110, 160, 210)):
            image = np.full((64, 64, 3), level, np.uint8)
            put(tmp_path / "data" / "ab"[number % 2] / f"{number}.png", image)
        outcome = call(tmp_path / "data", *QUICK, out=tmp_path / "out")
        assert [sorted(c["paths"]) for c in outcome.found["duplicates"]["clusters"]] == [
            ["a/2.png", "b/1.png"]
        ]

    def test_a_name_that_is_not_utf8_is_a_problem_and_no_crash(self, tmp_path: Path) -> None:
        data = write_flat(tmp_path / "data", classes=2, images=6)
        file = next((data / "0").glob("*.png"))
        try:
            file.rename(os.fsdecode(os.fsencode(data / "0") + b"/\xff.png"))
        except OSError:
            pytest.skip("this file system has only UTF-8 names")
        outcome = call(data, *CHEAP, out=tmp_path / "out")
        assert outcome.found["problems"] == ["0/\\udcff.png: its name is not UTF-8; rename it"]
        assert outcome.gate("unreadable")["value"] == pytest.approx(1 / 12)

    def test_without_out_the_report_goes_below_audits(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = write_flat(tmp_path / "data", classes=2, images=2)
        monkeypatch.chdir(tmp_path)
        config = AuditConfig(data=DataConfig(size=64), duplicates=DuplicatesConfig(near=False))
        assert audit(data, config=config).folder == Path("audits/data")
        assert {file.name for file in (tmp_path / "audits" / "data").iterdir()} == {
            "audit.json",
            "audit.html",
        }

from __future__ import annotations

import base64
import hashlib
import io
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from PIL import Image

from holotype import errors
from holotype.audit.balance import balance
from holotype.audit.contract import (
    Audit,
    Calibration,
    Choice,
    Cluster,
    Duplicates,
    Gate,
    Issue,
    LabelAccuracy,
    Leakage,
    LeakageEffect,
    Shift,
    Shortcut,
    Source,
    Suspect,
    Trait,
    UnreadableImage,
)
from holotype.audit.junit import write_junit
from holotype.audit.page import write_page
from holotype.dataset import Split

HOSTILE = "<script>alert('x')</script>"
QUOTES = '"><img src=x onerror=alert(1)>{{ 7*7 }}'


def cluster(
    number: int, *, labels: tuple[str, ...], splits: tuple[Split, ...], kind: str = "near"
) -> Cluster:
    return Cluster(
        paths=tuple(
            f"{split}/{label}/{number}-{i}.jpg"
            for i, (label, split) in enumerate(zip(labels, splits, strict=True))
        ),
        labels=labels,
        splits=splits,
        kind=kind,  # type: ignore[arg-type]
        conflict=len(set(labels)) > 1,
    )


LEAK = cluster(0, labels=("cat", "cat"), splits=("train", "test"), kind="exact")
CONFLICT = cluster(1, labels=("cat", HOSTILE), splits=("train", "test"))
AGAIN = cluster(2, labels=("dog",) * 6, splits=("train",) * 6)


def gate(
    name: str, passed: bool | None, value: float | None, threshold: float, advice: str = "mend it"
) -> Gate:
    return Gate(name=name, passed=passed, value=value, threshold=threshold, advice=advice, severity="fix")


def suspect(number: int) -> Suspect:
    top = (Choice(label=QUOTES, probability=0.9), Choice(label="dog", probability=0.06))
    return Suspect(path=f"train/dog/s{number:05d}.jpg", label="dog", suggested=QUOTES, score=0.9, top=top)


def audited(**changes: Any) -> Audit:
    """An audit that found something of everything."""
    labels = ["cat"] * 60 + ["dog"] * 30 + [HOSTILE] * 9 + [QUOTES]
    splits: list[Split] = ["test", "train"] * 50
    counted = balance(labels, splits, rule=1.3)
    arguments: dict[str, Any] = {
        "verdict": "fix",
        "reasons": ("2 % of validation and test are copies of training images", f"class {HOSTILE} is small"),
        "gates": (
            gate("leakage", False, 0.02, 0.0, "holotype audit DATA --fix-split"),
            gate("label_accuracy", None, None, 0.99, "draw a sample"),
            gate("balance", False, 60.0, 1.3, "collect more"),
            gate("class_size", True, 30, 20, "never shown"),
            gate("shortcut", False, 0.41, 0.3),
            gate("shift", False, 0.8, 0.65),
        ),
        "source": Source(
            path="/data/my pets", root_hash="d" * 64, images=100, classes=tuple(counted.counts), revision=2
        ),
        "balance": counted,
        "duplicates": Duplicates(
            clusters=(AGAIN, LEAK, CONFLICT),
            extra=7,
            calibration=Calibration(
                hash_distance=9,
                embedding_distance=0.07,
                pixel_distance=0.12,
                found={"cropped 5 %": 0.93},
                false_copies=1e-3,
                copies=600,
                random_pairs=100_000,
            ),
        ),
        "leakage": Leakage(
            pairs=((LEAK.paths[0], LEAK.paths[1]), (CONFLICT.paths[0], CONFLICT.paths[1])),
            fraction=0.04,
            leaked={"test": (LEAK.paths[1], CONFLICT.paths[1])},
            effects=(LeakageEffect(split="test", accuracy=0.9123, without=0.8456, leaked=2, images=50),),
        ),
        "label_suspects": tuple(suspect(i) for i in range(3)),
        "label_accuracy": LabelAccuracy(
            estimate=0.97, sample=300, reviewed=290, wrong=4, skipped=10, low=0.968, high=0.995
        ),
        "health": (
            Issue(path="train/dog/b.jpg", issue="blurry", value=0.15),
            Issue(path="train/dog/a.jpg", issue="blurry", value=0.05),
            Issue(path="train/dog/c.jpg#xywh=1,2,3,4", issue="unusual mode", value="CMYK"),
            Issue(path="train/<b>cut</b>.jpg", issue="truncated", value="truncated image"),
        ),
        "traits": (Trait(issue="grey", images=80, prevalence=0.8),),
        "shortcuts": (Shortcut(measure="width", correlation=0.41, low="cat", high=QUOTES),),
        "shift": (Shift(split="test", auc=0.8, low=0.75, high=0.85),),
        "unreadable": (UnreadableImage(path="train/<b>cut</b>.jpg", error="truncated image"),),
        "problems": ("labels.csv:17: label is empty; fill it in",),
        "seconds": 12.34,
    }
    return Audit(**(arguments | changes))


def nothing_found() -> Audit:
    labels = ["cat"] * 10 + ["dog"] * 10
    return audited(
        verdict="ready",
        reasons=(),
        gates=(gate("leakage", True, 0.0, 0.0),),
        balance=balance(labels, ["train"] * 20, rule=1.3),
        duplicates=Duplicates(clusters=(), extra=0, calibration=None),
        leakage=Leakage(pairs=(), fraction=0, leaked={}, effects=()),
        label_suspects=(),
        label_accuracy=LabelAccuracy(
            estimate=None, sample=0, reviewed=0, wrong=0, skipped=0, low=None, high=None
        ),
        health=(),
        traits=(),
        shortcuts=(),
        shift=(),
        unreadable=(),
        problems=(),
    )


def no_images() -> Audit:
    return audited(verdict="unusable", balance=balance([], [], rule=1.3), gates=())


def photo(path: str) -> bytes | None:
    if path.endswith("a.jpg"):
        return None
    buffer = io.BytesIO()
    Image.new("RGB", (48, 64), (len(path) % 256, 90, 40)).save(buffer, "JPEG")
    return buffer.getvalue()


class Page(HTMLParser):
    """Tags, attributes and visible text of a page, as a browser would see them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(html)
        self.words = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th", "dt", "dd", "li", "title"):
            self.text += "\n"

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def pictures(self) -> list[str]:
        """The paths of all pictures and of those that are missing, in order."""
        return [a["title"] for _, a in self.tags if "picture" in a.get("class", "").split()]


def written(folder: Path, audit: Audit) -> Page:
    write_page(folder / "report.html", audit, thumbnail=photo)
    return Page((folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return written(tmp_path_factory.mktemp("audit"), audited())


class TestPage:
    def test_nothing_comes_from_elsewhere(self, page: Page) -> None:
        links = [v for _, a in page.tags for n, v in a.items() if n in ("src", "srcset", "href", "action")]
        assert links
        assert all(link.startswith(("data:image/jpeg;base64,", "#")) for link in links)
        assert not [tag for tag, _ in page.tags if tag == "link"]
        style = (Path(errors.__file__).parent / "audit/audit.css").read_text()
        assert "url(" not in style
        assert "@import" not in style

    def test_the_browser_is_told_to_fetch_and_run_nothing_else(self, page: Page) -> None:
        policy = next(a["content"] for _, a in page.tags if "http-equiv" in a)
        assert "default-src 'none'" in policy
        scripts = re.findall(r"<script>(.*?)</script>", page.html, re.DOTALL)
        assert len(scripts) == 1
        digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
        assert f"script-src 'sha256-{digest}'" in policy

    def test_hostile_names_are_text(self, page: Page) -> None:
        assert page.text.count(HOSTILE) >= 3
        assert page.text.count(QUOTES) >= 3
        assert "train/<b>cut</b>.jpg" in page.text
        assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]
        assert not [a for tag, a in page.tags if tag == "img" and a["src"] == "x"]

    def test_links_lead_to_sections_that_exist(self, page: Page) -> None:
        targets = {a["href"][1:] for tag, a in page.tags if tag == "a"}
        assert targets == {a["id"] for tag, a in page.tags if tag == "section"}

    def test_the_verdict_comes_first_with_its_reasons(self, page: Page) -> None:
        assert page.words.index("Fix first") < page.words.index("are copies of training images")
        assert page.words.index("are copies of training images") < page.words.index("what to do")

    def test_gates_with_value_threshold_and_advice(self, page: Page) -> None:
        assert "leakage failed 2.0 % ≤ 0 % holotype audit DATA --fix-split" in page.words
        assert "label accuracy not measured ≥ 99 % draw a sample" in page.words
        assert "balance failed 60 ≤ 1.3 collect more" in page.words
        assert "class size passed 30 ≥ 20 shortcut" in page.words
        assert "never shown" not in page.text

    def test_what_to_do_names_the_commands_for_this_data(self, page: Page) -> None:
        data = "'/data/my pets'"
        commands = [
            f"holotype agree adjudicate {data} decide on",
            f"holotype agree apply {data}",
            f"holotype audit {data} --fix-split",
            f"holotype audit {data} --review-sample 300",
            f"holotype agree adjudicate {data} look at it",
            f"holotype audit {data} measure again",
            f"holotype train {data} --set fit.imbalance=logit-adjust",
        ]
        places = [page.words.index(command) for command in commands]
        assert places == sorted(places)
        assert f"{HOSTILE} +38" in page.words  # 60 / 1.3 rounded up, less 9

    def test_a_sample_that_is_not_finished_is_not_drawn_again(self, tmp_path: Path) -> None:
        begun = LabelAccuracy(estimate=None, sample=300, reviewed=90, wrong=0, skipped=9, low=0.96, high=1)
        found = written(tmp_path, audited(label_accuracy=begun))
        assert "--review-sample" not in found.words
        assert "holotype agree adjudicate '/data/my pets' look at it" in found.words

    def test_pairs_across_splits_with_conflicts_first(self, page: Page) -> None:
        shown = page.pictures[:4]
        assert shown == [*CONFLICT.paths, *LEAK.paths]
        assert "different labels · near copy" in page.words
        assert "1 picture is under different labels." in page.words
        assert "4.0 % of validation and test" in page.words
        assert "test 50 2 91.2 % 84.6 %" in page.words

    def test_copies_within_a_split_are_cut_short(self, page: Page) -> None:
        assert page.pictures[4:8] == list(AGAIN.paths[:4])
        assert "and 2 more of it" in page.words

    def test_suspects_with_both_labels_and_probabilities(self, page: Page) -> None:
        assert page.pictures[8:11] == [suspect(i).path for i in range(3)]
        assert f"labelled dog suggested {QUOTES} probabilities {QUOTES} 90.0 % dog 6.0 %" in page.words
        assert "(10 left open), 4 are labelled wrongly: the labels are 96.8 % to 99.5 % right" in page.words

    def test_health_by_issue_the_worst_first(self, page: Page) -> None:
        assert page.pictures[11:] == ["train/dog/a.jpg", "train/dog/b.jpg", "train/dog/c.jpg#xywh=1,2,3,4"]
        assert "grey: 80.0 % of the images" in page.words
        assert "1 unreadable file, left out" in page.words
        assert "labels.csv:17: label is empty" in page.words

    def test_a_picture_that_cannot_be_read_is_a_grey_box(self, page: Page) -> None:
        missing = [a["title"] for _, a in page.tags if "missing" in a.get("class", "")]
        assert missing == ["train/dog/a.jpg"]

    def test_the_rest_of_the_findings(self, page: Page) -> None:
        for expected in (
            f"width 0.41 cat {QUOTES}",
            "test 0.800 0.750 – 0.850",
            "has 60 times the images of the smallest",
            "cropped 5 % 93.0 %",
            "chance would make copies of 0.10 % of the images, by 100,000 random pairs",
            "d" * 64,
            "12.3 s",
        ):
            assert expected in page.words

    def test_asks_for_each_thumbnail_once(self, tmp_path: Path) -> None:
        asked: list[str] = []
        audit = audited(health=(Issue(path=suspect(0).path, issue="dark", value=0.1),))
        write_page(tmp_path / "p.html", audit, thumbnail=asked.append)
        assert len(asked) == len(set(asked)) > 5

    @pytest.mark.parametrize("audit", [nothing_found(), no_images()], ids=["nothing found", "no images"])
    def test_nothing_found_and_no_images(self, tmp_path: Path, audit: Audit) -> None:
        found = written(tmp_path, audit)
        assert ("Ready" in found.words) == (audit.verdict == "ready")
        assert ("Not usable" in found.words) == (audit.verdict == "unusable")
        if audit.verdict == "ready":
            assert found.pictures == []
            assert "holotype train '/data/my pets'" in found.words
            for sentence in (
                "No picture was found twice.",
                "No label looks wrong.",
                "Every file could be read.",
            ):
                assert sentence in found.words

    def test_one_picture_tens_of_thousands_of_times_is_no_long_wait(self, tmp_path: Path) -> None:
        splits: tuple[Split, ...] = ("train", "test") * 30_000
        one = cluster(0, labels=("cat",) * 59_999 + ("dog",), splits=splits)
        pairs = tuple((one.paths[0], path) for path in one.paths[1::2])
        audit = audited(
            duplicates=Duplicates(clusters=(AGAIN, one), extra=59_999, calibration=None),
            leakage=Leakage(pairs=pairs, fraction=0.5, leaked={}, effects=()),
        )
        begun = time.process_time()
        found = written(tmp_path, audit)
        assert time.process_time() - begun < 10  # half a minute, where each is looked for among all
        assert "29,976 more pairs" in found.words
        # The only pair under two labels comes first.
        assert found.html.index(one.paths[-1]) < found.html.index(one.paths[1])

    def test_the_page_of_a_huge_set_stays_small(self, tmp_path: Path) -> None:
        labels = [f"class {i % 5000}" for i in range(100_000)]
        leaks = [cluster(i, labels=("cat", "cat"), splits=("train", "test")) for i in range(3000)]
        copies = [cluster(9000 + i, labels=("dog",) * 9, splits=("train",) * 9) for i in range(3000)]
        issues = ("dark", "light", "blurry", "grey", "odd size", "truncated")
        audit = audited(
            balance=balance(labels, ["train"] * 100_000, rule=1.3),
            duplicates=Duplicates(clusters=(*leaks, *copies), extra=9, calibration=None),
            leakage=Leakage(
                pairs=tuple((c.paths[0], c.paths[1]) for c in leaks), fraction=0.5, leaked={}, effects=()
            ),
            label_suspects=tuple(suspect(i) for i in range(10_000)),
            health=tuple(Issue(path=f"{i}.jpg", issue=issues[i % 6], value=0.01) for i in range(60_000)),
            unreadable=tuple(UnreadableImage(path=f"{i}.jpg", error="broken") for i in range(10_000)),
            problems=tuple(f"line {i}: broken" for i in range(10_000)),
        )
        found = written(tmp_path, audit)
        assert len(found.pictures) < 350
        assert len(re.sub(r"base64,[^\"]*", "", found.html)) < 500_000
        for left_out in (
            "2,976 more pairs",
            "9,964 more suspects",
            "4,800 more classes",
            "9,800 more records",
        ):
            assert left_out in found.words


class TestJunit:
    def suite(self, folder: Path, audit: Audit) -> ET.Element:
        write_junit(folder / "junit.xml", audit)
        root = ET.parse(folder / "junit.xml").getroot()
        assert root.tag == "testsuites"
        (suite,) = root
        return suite

    def test_one_case_for_each_gate(self, tmp_path: Path) -> None:
        suite = self.suite(tmp_path, audited())
        cases = suite.findall("testcase")
        assert [case.get("name") for case in cases] == [gate.name for gate in audited().gates]
        assert [[child.tag for child in case] for case in cases] == [
            ["failure"], ["skipped"], ["failure"], [], ["failure"], ["failure"],
        ]  # fmt: skip
        assert {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped", "time")} == {
            "tests": "6", "failures": "4", "errors": "0", "skipped": "1", "time": "12.340",
        }  # fmt: skip

    def test_failures_say_what_and_what_to_do(self, tmp_path: Path) -> None:
        cases = self.suite(tmp_path, audited()).findall("testcase")
        failure, skipped = cases[0].find("failure"), cases[1].find("skipped")
        assert failure is not None
        assert failure.get("message") == "leakage is 0.02, the threshold is 0"
        assert failure.get("type") == "fix"
        assert failure.text == "holotype audit DATA --fix-split"
        assert skipped is not None
        assert skipped.get("message") == "not measured: draw a sample"

    def test_only_what_every_reader_knows(self, tmp_path: Path) -> None:
        # The schema of Jenkins' xunit plugin, junit-10.xsd: attributes by element, and the order of children.
        allowed = {
            "testsuites": {"name", "time", "tests", "failures", "errors"},
            "testsuite": {"name", "tests", "failures", "errors", "time", "skipped"},
            "testcase": {"classname", "name", "time"},
            "failure": {"message", "type"},
            "skipped": {"message", "type"},
            "system-out": set(),
        }
        suite = self.suite(tmp_path, audited())
        for element in ET.parse(tmp_path / "junit.xml").iter():
            assert set(element.attrib) <= allowed[element.tag]
        assert [child.tag for child in suite] == ["testcase"] * 6 + ["system-out"]
        assert suite.findtext("system-out", "").startswith("verdict: fix\n2 % of")

    def test_control_characters_and_markup_survive_as_text(self, tmp_path: Path) -> None:
        advice = f"\x00\x1b[31m{HOSTILE} ]]> \ufffe caf\udce9 \N{GRINNING FACE}"
        suite = self.suite(tmp_path, audited(gates=(gate("a\x07b", False, 1, 0, advice),), reasons=(advice,)))
        (case,) = suite.findall("testcase")
        assert case.get("name") == "a\ufffdb"
        assert case.findtext("failure") == (
            f"\ufffd\ufffd[31m{HOSTILE} ]]> \ufffd caf\\udce9 \N{GRINNING FACE}"
        )

    def test_no_gates(self, tmp_path: Path) -> None:
        assert self.suite(tmp_path, no_images()).get("tests") == "0"

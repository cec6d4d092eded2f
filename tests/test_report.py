from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from holotype import errors
from holotype.errors import DatasetError, MissingExtraError
from holotype.metrics import Predictions, evaluate_predictions
from holotype.report import (
    BundleSummary,
    DatasetSummary,
    Finding,
    Report,
    UnreadableFile,
    build_report,
    confusion_png,
    history_png,
    reliability_png,
    write_page,
    write_report,
)
from holotype.report.style import DARK
from holotype.terminal import show_report

HOSTILE = ("<script>alert('x')</script>", '"><img src=x onerror=alert(1)>', "{{ 7*7 }} & $\\frac{1}{0}$")
HISTORY: list[dict[str, float | int | str]] = [
    {
        "stage": "head" if row < 2 else "finetune",
        "epoch": row + 1,
        "train_loss": 1 / (row + 1),
        "validation_loss": 1.2 / (row + 1),
        "validation_accuracy": 0.8 + 0.02 * row,
        "validation_macro_f1": 0.7 + 0.02 * row,
    }
    for row in range(5)
]


def draw(classes: tuple[str, ...], *, images: int = 120, seed: int = 0, strength: float = 3.0) -> Predictions:
    rng = np.random.default_rng(seed)
    labels = np.arange(images) % len(classes)
    logits = rng.normal(size=(images, len(classes)))
    logits[np.arange(images), labels] += strength
    odds = np.exp(logits)
    paths = tuple(f"test/{classes[label]}/{i}.jpg" for i, label in enumerate(labels))
    return Predictions(classes, paths, labels, odds / odds.sum(axis=1, keepdims=True))


def names(count: int) -> tuple[str, ...]:
    return tuple(f"class number {i}" for i in range(count))


def report_on(predictions: Predictions, **changes: Any) -> Report:
    counts = {name: {"train": 8, "validation": 1, "test": 1} for name in predictions.classes}
    unreadable = (UnreadableFile(path="test/<b>x</b>.jpg", error="truncated image"),)
    arguments: dict[str, Any] = {
        "dataset": DatasetSummary(
            path="/data/clothes", root_hash="d" * 64, images=3781, counts=counts, unreadable=unreadable
        ),
        "bundle": BundleSummary(hash="b" * 64, path="runs/clothes/best"),
        "runtime": "onnxruntime CPU",
        "split": "test",
        "seconds": 1.5,
        "history": HISTORY,
    }
    return build_report(predictions, **(arguments | changes))


def photo(path: str) -> bytes | None:
    """A thumbnail whose colour tells the image; every fifth is missing."""
    if "5" in path:
        return None
    buffer = io.BytesIO()
    Image.new("RGB", (48, 64), (len(path) % 256, 90, 40)).save(buffer, "JPEG")
    return buffer.getvalue()


class Page(HTMLParser):
    """Tags, attributes and visible text of a page, as a browser would see them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def text_in_words(self) -> str:
        """The text with every kind of space as one plain space."""
        return " ".join(self.text.split())

    def attributes(self, *wanted: str) -> list[str]:
        return [value for _, attrs in self.tags for name, value in attrs.items() if name in wanted]

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "new"
    predictions = draw(HOSTILE + names(5))
    write_report(folder, report_on(predictions), predictions=predictions, thumbnail=photo)
    return folder


@pytest.fixture(scope="module")
def page(written: Path) -> Page:
    return Page((written / "report.html").read_text(encoding="utf-8"))


class TestBuildReport:
    def test_metrics_and_counts_are_those_of_the_predictions(self) -> None:
        predictions = draw(names(4))
        report = report_on(predictions)
        expected = evaluate_predictions(predictions)
        for name, interval in expected.items():
            estimate = getattr(report.metrics, name)
            assert (estimate.value, estimate.low, estimate.high) == (
                interval.value,
                interval.low,
                interval.high,
            )
        assert report.images == 120
        assert [score.support for score in report.per_class.values()] == [30] * 4
        assert list(report.per_class) == list(report.confusion.classes) == list(names(4))
        assert [sum(row) for row in report.confusion.counts] == [30] * 4

    def test_mistakes_are_the_most_certain_wrong_answers_first(self) -> None:
        predictions = draw(names(6), images=400, strength=1.0)
        report = report_on(predictions)
        wrong = predictions.predicted != predictions.labels
        certainty = np.sort(predictions.probabilities.max(axis=1)[wrong])[::-1]
        assert [m.probability for m in report.mistakes] == certainty[:24].tolist()
        for mistake in report.mistakes:
            row = predictions.paths.index(mistake.path)
            assert mistake.label == predictions.classes[predictions.labels[row]]
            assert mistake.predicted == predictions.classes[predictions.predicted[row]]
            assert mistake.label_probability == predictions.probabilities[row, predictions.labels[row]]

    def test_equal_mistakes_come_in_the_order_of_their_paths(self) -> None:
        predictions = Predictions(
            ("a", "b"), ("c.jpg", "a.jpg", "b.jpg"), np.array([0, 0, 0]), np.tile([0.1, 0.9], (3, 1))
        )
        assert [m.path for m in report_on(predictions).mistakes] == ["a.jpg", "b.jpg", "c.jpg"]

    def test_confused_pairs_carry_their_most_certain_images(self) -> None:
        shares = np.array([[0.4, 0.6], [0.1, 0.9], [0.3, 0.7], [0.2, 0.8], [0.45, 0.55], [0.8, 0.2]])
        predictions = Predictions(("cat", "dog"), tuple("uvwxyz"), np.array([0, 0, 0, 0, 0, 1]), shares)
        first, second = report_on(predictions).confused
        assert (first.label, first.predicted, first.count) == ("cat", "dog", 5)
        assert first.paths == ("v", "x", "w", "u")
        assert (second.label, second.predicted, second.count, second.paths) == ("dog", "cat", 1, ("z",))

    def test_is_deterministic(self) -> None:
        predictions = draw(names(5))
        assert report_on(predictions).model_dump_json() == report_on(predictions).model_dump_json()

    def test_says_that_a_split_without_images_cannot_be_measured(self) -> None:
        nothing = Predictions(("a", "b"), (), np.zeros(0, dtype=np.int64), np.zeros((0, 2)))
        with pytest.raises(DatasetError, match="test split has no images"):
            report_on(nothing)

    def test_file_names_that_are_not_utf8_are_spelled_out(self) -> None:
        name = b"caf\xe9".decode("utf-8", "surrogateescape")
        predictions = draw((name, "tea"), strength=0.0)
        report = report_on(predictions)
        assert report.confusion.classes[0] == r"caf\udce9"
        assert report.confused[0].paths
        assert Report.model_validate_json(report.model_dump_json()) == report


class TestContract:
    def test_report_json_has_the_promised_keys(self, written: Path) -> None:
        content = json.loads((written / "report.json").read_text(encoding="utf-8"))
        assert set(content) == {
            "metrics", "per_class", "confusion", "confused", "mistakes", "dataset", "bundle", "runtime",
            "split", "seconds", "leaked", "history", "diagnosis", "looked_for", "sureness",
        }  # fmt: skip
        assert set(content["metrics"]) == {
            "accuracy", "balanced_accuracy", "macro_f1", "weighted_f1", "log_loss", "ece",
        }  # fmt: skip
        assert all(set(metric) == {"value", "low", "high"} for metric in content["metrics"].values())
        assert list(content["per_class"]) == content["confusion"]["classes"]
        assert set(content["per_class"][HOSTILE[0]]) == {"precision", "recall", "f1", "support"}
        assert set(content["dataset"]) == {
            "path", "root_hash", "images", "counts", "unreadable", "deviation",
        }  # fmt: skip
        assert content["dataset"]["counts"][HOSTILE[0]] == {"train": 8, "validation": 1, "test": 1}
        assert content["dataset"]["deviation"] is None
        assert set(content["bundle"]) == {"hash", "path"}
        assert set(content["confused"][0]) == {"label", "predicted", "count", "paths"}
        assert set(content["mistakes"][0]) == {
            "path", "label", "predicted", "probability", "label_probability",
        }  # fmt: skip
        assert content["history"] == HISTORY

    def test_survives_a_round_trip(self, written: Path) -> None:
        report = report_on(draw(HOSTILE + names(5)))
        assert Report.model_validate_json((written / "report.json").read_bytes()) == report

    def test_unknown_keys_and_changes_are_refused(self) -> None:
        report = report_on(draw(names(2)))
        with pytest.raises(ValidationError):
            Report.model_validate(report.model_dump() | {"extra": 1})
        with pytest.raises(ValidationError):
            report.split = "train"  # type: ignore[misc]

    def test_a_diverged_loss_in_the_history_is_still_json(self) -> None:
        report = report_on(draw(names(2)), history=[{"epoch": 1, "train_loss": float("nan")}])
        assert json.loads(report.model_dump_json())["history"] == [{"epoch": 1, "train_loss": "NaN"}]


class TestPage:
    def test_nothing_comes_from_elsewhere(self, page: Page) -> None:
        for link in page.attributes("src", "srcset", "href", "action", "data"):
            assert link.startswith(("data:image/png;base64,", "data:image/jpeg;base64,", "#")), link[:80]
        assert page.count("link") == 0
        assert page.count("script") == 1
        style = (Path(errors.__file__).parent / "report/templates/report.css").read_text()
        assert "url(" not in style
        assert "@import" not in style

    def test_the_browser_is_told_to_fetch_and_run_nothing_else(self, page: Page, written: Path) -> None:
        policy = next(a["content"] for tag, a in page.tags if "http-equiv" in a)
        assert "default-src 'none'" in policy
        html = (written / "report.html").read_text(encoding="utf-8")
        script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)
        assert script is not None
        digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
        assert f"script-src 'sha256-{digest}'" in policy

    def test_hostile_names_are_text(self, page: Page) -> None:
        for name in HOSTILE:
            assert name in page.text
        assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]
        assert "test/<b>x</b>.jpg" in page.text
        assert any(name in title for name in HOSTILE for title in page.attributes("title"))

    def test_figures_are_embedded_light_and_dark(self, page: Page) -> None:
        figures = [a for tag, a in page.tags if tag == "img" and a.get("class", "") != "picture"]
        dark = [a["srcset"] for tag, a in page.tags if tag == "source"]
        assert [a["alt"].split()[0] for a in figures] == ["Confusion", "Reliability", "Loss,"]
        assert len(dark) == 3
        for uri in [*(a["src"] for a in figures), *dark]:
            image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
            image.load()
            assert image.format == "PNG"

    def test_every_picture_is_there_or_a_grey_box(self, page: Page) -> None:
        report = report_on(draw(HOSTILE + names(5)))
        shown = [m.path for m in report.mistakes]
        shown += [path for i, p in enumerate(report.confused) if p.count > 1 or i < 6 for path in p.paths]
        pictures = [a for tag, a in page.tags if tag == "img" and a.get("class") == "picture"]
        missing = [a for tag, a in page.tags if tag == "span" and "missing" in a.get("class", "")]
        assert sorted(a["title"] for a in pictures) == sorted(path for path in shown if "5" not in path)
        assert sorted(a["title"] for a in missing) == sorted(path for path in shown if "5" in path)
        assert missing

    def test_says_what_matters(self, page: Page) -> None:
        report = report_on(draw(HOSTILE + names(5)))
        accuracy = report.metrics.accuracy
        text = page.text_in_words
        assert f"{100 * accuracy.value:.1f} %" in text
        assert "accuracy on 120 test images" in text
        assert f"{100 * accuracy.low:.1f} – {100 * accuracy.high:.1f} %" in text
        for expected in (
            "1 unreadable file, left out",
            "d" * 64,
            "b" * 64,
            "onnxruntime CPU",
            "3,781 images",
        ):
            assert expected in text

    def test_asks_for_each_thumbnail_once(self, tmp_path: Path) -> None:
        predictions = draw(names(3), strength=0.5)
        confusion_png(report_on(predictions).confusion, tmp_path / "c.png")
        asked: list[str] = []

        def thumbnail(path: str) -> None:
            asked.append(path)

        figures = {"confusion": tmp_path / "c.png", "reliability": tmp_path / "c.png"}
        write_page(tmp_path / "p.html", report_on(predictions), figures=figures, thumbnail=thumbnail)
        assert asked
        assert len(asked) == len(set(asked))

    def test_deviation_of_an_automatic_split_is_shown(self, tmp_path: Path) -> None:
        predictions = draw(names(2))
        report = report_on(predictions)
        dataset = report.dataset.model_copy(update={"deviation": {names(2)[0]: 0.0123}, "unreadable": ()})
        confusion_png(report.confusion, tmp_path / "c.png")
        figures = {"confusion": tmp_path / "c.png", "reliability": tmp_path / "c.png"}
        write_page(
            tmp_path / "p.html", report_on(predictions, dataset=dataset), figures=figures, thumbnail=photo
        )
        page = Page((tmp_path / "p.html").read_text(encoding="utf-8"))
        assert "1.2 pp" in page.text_in_words
        assert "Every file could be read." in page.text


class TestWriteReport:
    def test_leaves_four_files_and_nothing_else(self, written: Path) -> None:
        assert sorted(p.name for p in written.iterdir()) == [
            "confusion_matrix.png", "reliability.png", "report.html", "report.json",
        ]  # fmt: skip
        for name in ("confusion_matrix.png", "reliability.png"):
            with Image.open(written / name) as image:
                image.load()
                assert image.width > 600

    def test_zero_mistakes_and_no_history(self, tmp_path: Path) -> None:
        labels = np.arange(40) % 2
        perfect = Predictions(("a", "b"), tuple(f"{i}.jpg" for i in range(40)), labels, np.eye(2)[labels])
        write_report(tmp_path, report_on(perfect, history=()), predictions=perfect, thumbnail=photo)
        text = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text_in_words
        assert "100.0 % accuracy on 40 test images" in text
        assert "still allow an error rate of up to 7.5 %" in text
        assert "No two classes were confused." in text
        assert "Training" not in text

    def test_sixty_classes(self, tmp_path: Path) -> None:
        predictions = draw(names(60), images=600)
        write_report(tmp_path, report_on(predictions), predictions=predictions, thumbnail=lambda path: None)
        page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
        assert all(name in page.text for name in names(60))

    def test_the_json_is_written_even_where_nothing_can_be_drawn(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(errors.importlib.util, "find_spec", lambda name: None)
        predictions = draw(names(2))
        with pytest.raises(MissingExtraError, match=r"holotype\[train\]"):
            write_report(tmp_path, report_on(predictions), predictions=predictions, thumbnail=photo)
        assert [p.name for p in tmp_path.iterdir()] == ["report.json"]

    def test_importing_the_room_loads_no_drawing_library(self) -> None:
        code = "import sys, holotype.report; sys.exit(bool({'matplotlib', 'jinja2'} & set(sys.modules)))"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


FINDINGS = (
    Finding(
        name="learning-rate-high",
        severity="warning",
        evidence="The loss became nan <b>in step 3</b>.",
        meaning="Each step overshoots.",
        settings=("fit.optimizer.learning_rate=0.001", "fit.warmup=0.1"),
    ),
    Finding(name="input-bound", severity="note", evidence="12.0 % of the time.", meaning="It waits."),
)


class TestDiagnosis:
    def write(self, folder: Path, **changes: Any) -> Page:
        predictions = draw(names(2))
        report = report_on(predictions, **changes)
        confusion_png(report.confusion, folder / "c.png")
        figures = {"confusion": folder / "c.png", "reliability": folder / "c.png"}
        write_page(folder / "p.html", report, figures=figures, thumbnail=photo)
        return Page((folder / "p.html").read_text(encoding="utf-8"))

    def test_each_finding_with_its_evidence_and_settings_to_copy(self, tmp_path: Path) -> None:
        page = self.write(tmp_path, diagnosis=FINDINGS)
        assert "#diagnosis" in page.attributes("href")
        for said in ("Learning rate too high", "<b>in step 3</b>", "Waiting for data", "It waits."):
            assert said in page.text
        assert "--set fit.optimizer.learning_rate=0.001" in page.text
        assert [a["class"] for tag, a in page.tags if a.get("class", "").startswith("finding")] == [
            "finding warning", "finding note",
        ]  # fmt: skip

    def test_a_run_without_findings_says_so(self, tmp_path: Path) -> None:
        text = self.write(tmp_path, looked_for=("overfitting", "learning-rate-high")).text_in_words
        assert "Nothing found. Looked for: overfitting, learning rate too high." in text

    def test_a_head_alone_has_nothing_to_look_for(self, tmp_path: Path) -> None:
        assert "Only a head was fitted" in self.write(tmp_path, history=HISTORY[:2]).text_in_words

    def test_an_evaluation_has_none(self, tmp_path: Path) -> None:
        assert "Diagnosis" not in self.write(tmp_path, history=()).text

    def test_is_part_of_the_contract(self) -> None:
        report = report_on(draw(names(2)), diagnosis=FINDINGS)
        assert Report.model_validate_json(report.model_dump_json()) == report
        assert json.loads(report.model_dump_json())["diagnosis"][0] == {
            "name": "learning-rate-high",
            "severity": "warning",
            "evidence": "The loss became nan <b>in step 3</b>.",
            "meaning": "Each step overshoots.",
            "settings": ["fit.optimizer.learning_rate=0.001", "fit.warmup=0.1"],
        }
        old = report.model_dump(mode="json")
        del old["diagnosis"]
        assert Report.model_validate(old).diagnosis == ()

    def test_the_terminal_says_it_too(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        show_report(report_on(draw(names(2)), diagnosis=FINDINGS), tmp_path)
        lines = capsys.readouterr().out.splitlines()
        assert "warning  learning-rate-high: The loss became nan <b>in step 3</b>." in lines
        assert "         --set fit.warmup=0.1" in lines
        show_report(report_on(draw(names(2))), tmp_path)
        assert "diagnosis" not in capsys.readouterr().out


class TestPlots:
    @pytest.mark.parametrize("count", [1, 2, 14, 15, 130])
    def test_confusion_of_any_size(self, tmp_path: Path, count: int) -> None:
        predictions = draw(names(count), images=4 * count)
        confusion_png(report_on(predictions).confusion, tmp_path / "c.png")
        with Image.open(tmp_path / "c.png") as image:
            image.load()
            assert 300 < image.width < 3200

    @pytest.mark.parametrize(
        "name",
        ["$x_1$ and $", "", "line\nbreak\tand tab", "犬", "🐕", "x" * 300, "\u202eright to left", "^{_\\"],
        ids=["formula", "empty", "control", "chinese", "emoji", "long", "bidi", "tex"],
    )
    def test_any_class_name_can_be_drawn(self, tmp_path: Path, name: str) -> None:
        confusion_png(report_on(draw((name, "dog"))).confusion, tmp_path / "c.png")
        with Image.open(tmp_path / "c.png") as image:
            assert image.width < 3000, "long names are shortened"

    def test_the_same_figure_has_the_same_bytes_and_dark_is_another(self, tmp_path: Path) -> None:
        predictions = draw(names(3))
        confusion = report_on(predictions).confusion
        for name in ("1", "2"):
            confusion_png(confusion, tmp_path / f"c{name}.png")
            reliability_png(predictions, tmp_path / f"r{name}.png")
        assert (tmp_path / "c1.png").read_bytes() == (tmp_path / "c2.png").read_bytes()
        assert (tmp_path / "r1.png").read_bytes() == (tmp_path / "r2.png").read_bytes()
        confusion_png(confusion, tmp_path / "dark.png", theme=DARK)
        with Image.open(tmp_path / "dark.png") as dark, Image.open(tmp_path / "c1.png") as light:
            assert np.asarray(dark.convert("L")).mean() < 128 < np.asarray(light.convert("L")).mean()

    def test_history(self, tmp_path: Path) -> None:
        assert history_png(HISTORY, tmp_path / "h.png") is True
        with Image.open(tmp_path / "h.png") as image:
            image.load()

    @pytest.mark.parametrize("rows", [[], [{"epoch": 1, "note": "x"}], [{"train_loss": float("nan")}]])
    def test_no_history_no_file(self, tmp_path: Path, rows: list[dict[str, float | int | str]]) -> None:
        assert history_png(rows, tmp_path / "h.png") is False
        assert not (tmp_path / "h.png").exists()

    @pytest.mark.parametrize(
        "rows",
        [
            [{"train_loss": "0.5"}, {"train_loss": ""}, {"train_loss": "NaN"}],
            [{"validation_accuracy": 0.5, "stage": "$head_"}],
            [{"epoch": e, "train_loss": 1.0, "validation_macro_f1": 0.1} for e in range(100)],
        ],
        ids=["text with gaps", "one row", "no accuracy"],
    )
    def test_partial_history(self, tmp_path: Path, rows: list[dict[str, float | int | str]]) -> None:
        assert history_png(rows, tmp_path / "h.png") is True

    def test_the_last_stage_has_its_own_panels_beneath(self, tmp_path: Path) -> None:
        heights = []
        for more in ({}, {"gradient_norm": 1.0, "learning_rate": 0.1}):
            history_png([{**row, **more} for row in HISTORY], tmp_path / "h.png")
            with Image.open(tmp_path / "h.png") as image:
                heights.append(image.height)
        assert heights[1] > 1.3 * heights[0]

    def test_drawing_leaves_pyplot_alone(self, tmp_path: Path) -> None:
        code = (
            "import sys, numpy as np; from pathlib import Path; from holotype.metrics import Predictions;"
            "from holotype.report import reliability_png;"
            "p = Predictions(('a', 'b'), ('x',), np.array([0]), np.array([[0.7, 0.3]]));"
            f"reliability_png(p, Path({str(tmp_path / 'r.png')!r}));"
            "sys.exit('matplotlib.pyplot' in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
        assert (tmp_path / "r.png").exists()

"""Label errors and label accuracy: which images are suspected, and what a reviewed sample proves."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import beta

from digits import write_digits
from holotype.audit import audit
from holotype.audit.contract import Audit, Gate
from holotype.audit.labels import label_suspects, out_of_sample
from holotype.cli import run
from holotype.config import AuditConfig, DataConfig, DuplicatesConfig
from holotype.dataset import cache_folder
from holotype.dataset.revisions import Change, write_revision
from holotype.head import Features, logistic_path
from holotype.review import Action, Decision, append_decisions, read_sample
from photos import put

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]


def points(counts: tuple[int, ...], *, apart: float = 3.0, width: int = 8) -> tuple[Floats, Rows]:
    """Embeddings `float32[N, width]` in one cloud for each class, and their labels."""
    dice = np.random.default_rng(0)
    labels = np.repeat(np.arange(len(counts)), counts)
    clouds = dice.normal(scale=apart, size=(len(counts), width))[labels]
    return (clouds + dice.normal(size=clouds.shape)).astype(np.float32), labels


# ------------------------------------------------------------------------------------------------ suspects


@pytest.fixture(scope="module")
def flipped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Audit, dict[str, tuple[str, str]]]:
    """The audit of 150 digits of which ten lie under a wrong label; these by path: (label, class)."""
    root = tmp_path_factory.mktemp("flipped")
    data = write_digits(root / "data", train=40, validation=5, test=5)
    wrong = {}
    for number in range(10):
        true, label = str(number % 3), str((number + 1 + number % 2) % 3)
        file = sorted((data / "train" / true).glob("[0-9]*.png"))[3 * number]
        file.rename(data / "train" / label / f"moved-{file.name}")
        wrong[f"train/{label}/moved-{file.name}"] = (label, true)
    config = AuditConfig(data=DataConfig(size=64), duplicates=DuplicatesConfig(near=False), suspects=0.2)
    return audit(data, config=config, out=root / "out").audit, wrong


class TestSuspects:
    def test_wrong_labels_come_first_with_the_true_class(
        self, flipped: tuple[Audit, dict[str, tuple[str, str]]]
    ) -> None:
        found, wrong = flipped
        first = found.label_suspects[: len(wrong)]
        hits = [suspect for suspect in first if suspect.path in wrong]
        assert len(hits) >= 8
        right = [s for s in found.label_suspects if wrong.get(s.path) == (s.label, s.suggested)]
        assert len(right) >= 9

    def test_they_are_ranked_and_tell_their_two_best_classes(
        self, flipped: tuple[Audit, dict[str, tuple[str, str]]]
    ) -> None:
        found, _ = flipped
        scores = [suspect.score for suspect in found.label_suspects]
        assert scores == sorted(scores, reverse=True)
        assert len(scores) <= 30
        for suspect in found.label_suspects:
            best, second = suspect.top
            assert suspect.suggested == best.label != suspect.label
            assert best.probability >= second.probability
            if second.label == suspect.label:
                assert second.probability == pytest.approx(1 - suspect.score, abs=1e-6)

    def test_the_estimate_is_near_the_truth_and_gates_nothing(
        self, flipped: tuple[Audit, dict[str, tuple[str, str]]]
    ) -> None:
        found, wrong = flipped
        estimate = found.label_accuracy.estimate
        assert estimate is not None
        assert 1 - estimate == pytest.approx(len(wrong) / 150, abs=0.04)
        assert next(gate for gate in found.gates if gate.name == "label_accuracy").passed is None

    def test_no_more_are_listed_than_asked_for(self) -> None:
        vectors, labels = points((40, 40))
        labels[:10] = 1
        chances = out_of_sample(vectors, labels, np.arange(80), classes=2, folds=4, seed=0)
        assert chances is not None
        paths = [f"{row}" for row in range(80)]
        found, _ = label_suspects(chances, labels, paths=paths, classes=("a", "b"), most=0.05)
        assert {int(suspect.path) for suspect in found} <= set(range(10))
        assert len(found) == 4


class TestOutOfSample:
    def own(self, vectors: Floats, labels: Rows, clusters: Rows) -> Floats:
        found = out_of_sample(vectors, labels, clusters, classes=2, folds=5, seed=0)
        assert found is not None
        assert found.judged.all()
        assert np.allclose(found.probabilities.sum(axis=1), 1, atol=1e-5)
        return found.probabilities[np.arange(len(labels)), labels]

    def test_copies_are_never_judged_by_their_copies(self) -> None:
        """Noise with random labels, every image twice: only who has seen the copy knows the label."""
        dice = np.random.default_rng(0)
        vectors = np.tile(dice.normal(size=(60, 100)), (2, 1)).astype(np.float32)
        labels = np.tile(dice.integers(0, 2, 60), 2)
        apart = self.own(vectors, labels, np.arange(120))
        together = self.own(vectors, labels, np.tile(np.arange(60), 2))
        assert (apart > 0.5).mean() > 0.75
        assert 0.3 < (together > 0.5).mean() < 0.65

    def test_images_of_a_class_are_dealt_to_different_folds(self) -> None:
        """In folds drawn without regard to it, a class of two would be whole in one of them now and then."""
        vectors, labels = points((2, 30, 2))
        for seed in range(6):
            found = out_of_sample(vectors, labels, np.arange(34), classes=3, folds=3, seed=seed)
            assert found is not None
            assert found.judged.all()

    def test_a_class_that_a_model_has_not_seen_is_not_judged_by_it(self) -> None:
        vectors, labels = points((12, 12, 1))
        found = out_of_sample(vectors, labels, np.arange(25), classes=3, folds=4, seed=0)
        assert found is not None
        assert np.array_equal(found.judged, labels != 2)
        suspects, estimate = label_suspects(
            found, labels, paths=[f"{row}" for row in range(25)], classes=("a", "b", "c"), most=1.0
        )
        assert all(suspect.label != "c" and suspect.suggested != "c" for suspect in suspects)
        assert estimate == 1.0

    def test_a_class_of_copies_of_one_picture_is_not_judged(self) -> None:
        vectors, labels = points((12, 12, 6))
        clusters = np.where(labels == 2, 24, np.arange(30))
        found = out_of_sample(vectors, labels, clusters, classes=3, folds=4, seed=0)
        assert found is not None
        assert np.array_equal(found.judged, labels != 2)

    @pytest.mark.parametrize("counts", [(9,), (1, 9), (9, 1), (1, 1, 9), (1, 1, 1, 1, 1, 1)])
    def test_where_no_two_classes_can_be_judged_nothing_is(self, counts: tuple[int, ...]) -> None:
        vectors, labels = points(counts)
        clusters = np.arange(len(labels))
        assert out_of_sample(vectors, labels, clusters, classes=len(counts), folds=5, seed=0) is None

    def test_fewer_images_than_folds_are_not_judged(self) -> None:
        vectors, labels = points((2, 2))
        assert out_of_sample(vectors, labels, np.arange(4), classes=2, folds=5, seed=0) is None

    def test_the_same_seed_gives_the_same_and_another_other_folds(self) -> None:
        vectors, labels = points((30, 30), apart=0.5)
        one, same, other = (
            out_of_sample(vectors, labels, np.arange(60), classes=2, folds=5, seed=seed) for seed in (1, 1, 2)
        )
        assert one is not None
        assert same is not None
        assert other is not None
        assert np.array_equal(one.probabilities, same.probabilities)
        assert not np.allclose(one.probabilities, other.probabilities, atol=1e-3)


class TestLogisticPath:
    def test_it_is_the_regression_of_scikit_learn(self) -> None:
        from sklearn.linear_model import LogisticRegression

        vectors, labels = points((30, 20, 40), apart=0.8)
        vectors = vectors * np.arange(1, 9, dtype=np.float32) + 5  # of several scales
        penalties = (0.3, 0.1, 0.03)
        logits = logistic_path(Features(vectors, labels), vectors, classes=3, penalties=penalties)
        deviation = vectors.std(axis=0)
        inputs = (vectors - vectors.mean(axis=0)) / np.hypot(deviation, np.median(deviation))
        for l2, values in zip(penalties, logits, strict=True):
            # Mean cross-entropy + l2 / 2 |W|^2 is C times the sum of both, C = 1 / (l2 N).
            theirs = LogisticRegression(C=1 / (l2 * len(labels)), max_iter=1000, tol=1e-8).fit(inputs, labels)
            wanted = theirs.decision_function(inputs)
            ours = values - values.mean(axis=1, keepdims=True)
            assert ours == pytest.approx(wanted - wanted.mean(axis=1, keepdims=True), abs=0.01)

    def test_each_is_told_for_other_inputs_than_it_was_fitted_on(self) -> None:
        vectors, labels = points((30, 30))
        train = Features(vectors[::2], labels[::2])
        (logits,) = logistic_path(train, vectors[1::2], classes=2, penalties=(0.1,))
        assert logits.shape == (30, 2)
        assert (logits.argmax(axis=1) == labels[1::2]).all()


# ------------------------------------------------------------------------------------------ label accuracy


def write_many(folder: Path, *, images: int) -> Path:
    """Digits of 8 x 8 in one class: nothing but their labels is looked at."""
    from sklearn.datasets import load_digits

    for number, digit in enumerate(load_digits().images[:images]):
        put(folder / "digit" / f"{number:03d}.png", (digit * 15).astype(np.uint8))
    return folder


def decide(data: Path, answer: Callable[[int, str], tuple[Action, str | None]], *, count: int) -> None:
    """Review the first `count` images of the sample: `answer` gives (action, label) by place and label."""
    sample = read_sample(cache_folder(data))
    assert sample is not None
    decisions = []
    for place, (path, label) in enumerate(sample.items[:count]):
        action, decided = answer(place, label)
        decisions.append(
            Decision(
                path=path,
                action=action,
                label=decided,
                before=label,
                reason="review",
                at=datetime.now(UTC).isoformat(),
            )
        )
    append_decisions(cache_folder(data), decisions)


def agreed(_: int, label: str) -> tuple[Action, str | None]:
    return "label", label


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., tuple[Gate, Audit]]:
    """Audit a dataset at the least size, and give the gate of the label accuracy."""

    def call(data: Path, *, sample: int | None = None) -> tuple[Gate, Audit]:
        config = AuditConfig(folds=2, data=DataConfig(size=16), duplicates=DuplicatesConfig(near=False))
        found = audit(data, config=config, out=tmp_path / "out", review_sample=sample).audit
        return next(gate for gate in found.gates if gate.name == "label_accuracy"), found

    return call


class TestLabelAccuracy:
    def test_a_sample_of_300_without_an_error_passes(
        self, tmp_path: Path, check: Callable[..., tuple[Gate, Audit]]
    ) -> None:
        data = write_many(tmp_path / "data", images=320)
        gate, found = check(data)
        assert (gate.passed, gate.value) == (None, None)
        assert "no sample was reviewed: holotype audit --review-sample 300" in gate.advice

        gate, found = check(data, sample=300)
        assert gate.passed is None
        assert "0 of 300 reviewed" in gate.advice
        assert found.label_accuracy.sample == 300

        decide(data, agreed, count=299)
        gate, found = check(data)
        assert gate.passed is None
        assert "299 of 300 reviewed" in gate.advice

        decide(data, agreed, count=300)
        gate, found = check(data)
        assert gate.passed is True
        assert gate.value == found.label_accuracy.low == pytest.approx(0.05 ** (1 / 300))
        assert gate.value == pytest.approx(0.99006, abs=5e-6)
        assert found.label_accuracy.high == 1.0
        assert found.label_accuracy.model_dump(include={"sample", "reviewed", "wrong", "skipped"}) == {
            "sample": 300, "reviewed": 300, "wrong": 0, "skipped": 0
        }  # fmt: skip

        # The last word counts: the seventh was wrong after all.
        decide(data, lambda place, label: ("label", "other" if place == 6 else label), count=7)
        gate, found = check(data)
        assert gate.passed is False
        assert gate.value == pytest.approx(beta.ppf(0.05, 299, 2))
        assert found.label_accuracy.high == pytest.approx(beta.ppf(0.95, 300, 1))
        assert "the sample is too small to show it" in gate.advice

    def test_what_was_left_open_is_not_taken_for_right(
        self, tmp_path: Path, check: Callable[..., tuple[Gate, Audit]]
    ) -> None:
        data = write_many(tmp_path / "data", images=310)
        check(data, sample=300)
        decide(data, lambda place, label: ("skip", None) if place < 2 else ("label", label), count=300)
        gate, found = check(data)
        assert (found.label_accuracy.reviewed, found.label_accuracy.skipped) == (298, 2)
        assert gate.passed is False
        assert gate.value == pytest.approx(beta.ppf(0.05, 298, 3))
        assert found.label_accuracy.high == 1.0

    def test_many_errors_ask_for_new_labels(
        self, tmp_path: Path, check: Callable[..., tuple[Gate, Audit]]
    ) -> None:
        data = write_many(tmp_path / "data", images=310)
        check(data, sample=300)
        decide(data, lambda place, label: ("drop", None) if place < 20 else ("label", label), count=300)
        gate, found = check(data)
        assert found.label_accuracy.wrong == 20
        assert gate.passed is False
        assert gate.value == pytest.approx(beta.ppf(0.05, 280, 21))
        assert found.label_accuracy.high == pytest.approx(beta.ppf(0.95, 281, 20))
        assert "wrong too often" in gate.advice

    def test_a_small_set_that_was_seen_whole_needs_no_bound(
        self, tmp_path: Path, check: Callable[..., tuple[Gate, Audit]]
    ) -> None:
        data = write_many(tmp_path / "data", images=40)
        gate, found = check(data, sample=300)
        assert found.label_accuracy.sample == 40
        decide(data, agreed, count=40)
        gate, _ = check(data)
        assert (gate.passed, gate.value) == (True, 1.0)
        decide(data, lambda place, label: ("label", "other"), count=1)
        gate, _ = check(data)
        assert (gate.passed, gate.value) == (False, pytest.approx(39 / 40))

    def test_a_part_of_a_small_set_is_too_small_a_sample(
        self, tmp_path: Path, check: Callable[..., tuple[Gate, Audit]]
    ) -> None:
        data = write_many(tmp_path / "data", images=40)
        check(data, sample=20)
        decide(data, agreed, count=20)
        assert check(data)[0].passed is None

    def test_it_counts_for_these_labels_alone_but_outlives_a_new_split(
        self, tmp_path: Path, check: Callable[..., tuple[Gate, Audit]]
    ) -> None:
        data = write_many(tmp_path / "data", images=40)
        check(data, sample=300)
        decide(data, agreed, count=40)
        folder = cache_folder(data)
        write_revision(folder, source="fix-split", changes=[Change(path="digit/000.png", split="test")])
        assert check(data)[0].passed is True
        write_revision(folder, source="relabel", changes=[Change(path="digit/000.png", label="other")])
        gate, found = check(data)
        assert gate.passed is None
        assert (found.label_accuracy.sample, found.label_accuracy.low) == (0, None)

    def test_the_command_line_says_what_to_do_next(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        data = write_many(tmp_path / "data", images=5)
        code = run(
            ["audit", str(data), "--out", str(tmp_path / "out"), "--set", "data.size=16", "--json",
             "--set", "duplicates.near=false", "--review-sample", "3"]
        )  # fmt: skip
        out, err = capfd.readouterr()
        assert code == 4  # there is one class
        assert json.loads(out)["label_accuracy"]["sample"] == 3
        assert f"drew 3 random images; now run: holotype agree adjudicate {data}" in err

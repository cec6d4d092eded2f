from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import numpy.typing as npt
import pytest
import scipy.stats
import sklearn.metrics

from holotype import metrics
from holotype.metrics import (
    Predictions,
    binomial_bounds,
    confusion_matrix,
    evaluate_predictions,
    expected_calibration_error,
    log_loss,
    macro_f1,
    most_confused,
    per_class,
    reliability_bins,
)


def make(labels: list[int], probabilities: list[list[float]]) -> Predictions:
    classes = tuple("abcdefgh"[: len(probabilities[0])])
    paths = tuple(f"{i}.jpg" for i in range(len(labels)))
    return Predictions(classes, paths, np.array(labels), np.array(probabilities))


def draw(
    seed: int, *, images: int, classes: int, strength: float = 2.0, present: int | None = None
) -> Predictions:
    """Random predictions; labels come from the first `present` classes only."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, present or classes, images)
    logits = rng.normal(size=(images, classes))
    logits[np.arange(images), labels] += strength
    odds = np.exp(logits)
    names = tuple(f"class {i}" for i in range(classes))
    paths = tuple(f"{i}.jpg" for i in range(images))
    return Predictions(names, paths, labels, odds / odds.sum(axis=1, keepdims=True))


def coin(seed: int, *, images: int, accuracy: float) -> Predictions:
    """Two classes, each image right with probability `accuracy`."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, images)
    said = np.where(rng.random(images) < accuracy, labels, 1 - labels)
    probabilities = np.full((images, 2), 0.2)
    probabilities[np.arange(images), said] = 0.8
    return Predictions(("a", "b"), tuple(map(str, range(images))), labels, probabilities)


# true → predicted: a → a, a → a, a → b, b → b, c → a
HAND = make(
    [0, 0, 0, 1, 2],
    [[0.8, 0.1, 0.1], [0.6, 0.2, 0.2], [0.3, 0.5, 0.2], [0.0, 1.0, 0.0], [0.7, 0.2, 0.1]],
)
HAND_MATRIX = np.array([[2, 1, 0], [0, 1, 0], [1, 0, 0]])


class TestByHand:
    def test_predicted_is_the_most_probable_class(self) -> None:
        assert HAND.predicted.tolist() == [0, 0, 1, 1, 0]
        assert HAND.predicted.dtype == np.int64

    def test_rows_of_the_confusion_matrix_are_true_classes(self) -> None:
        matrix = confusion_matrix(HAND.labels, HAND.predicted, classes=3)
        assert matrix.tolist() == HAND_MATRIX.tolist()
        assert matrix.dtype == np.int64

    def test_per_class(self) -> None:
        a, b, c = per_class(HAND_MATRIX)
        assert dataclasses.astuple(a) == pytest.approx((2 / 3, 2 / 3, 2 / 3, 3))
        assert dataclasses.astuple(b) == pytest.approx((1 / 2, 1, 2 / 3, 1))
        assert dataclasses.astuple(c) == (0, 0, 0, 1)

    def test_a_class_that_never_occurs_scores_zero_without_a_warning(self) -> None:
        scores = per_class(np.array([[3, 0], [0, 0]]))
        assert dataclasses.astuple(scores[1]) == (0, 0, 0, 0)

    def test_log_loss(self) -> None:
        expected = -np.log([0.8, 0.6, 0.3, 1.0, 0.1]).mean()
        assert log_loss(HAND.labels, HAND.probabilities) == pytest.approx(expected)

    def test_log_loss_of_an_impossible_answer_is_finite(self) -> None:
        assert log_loss(np.array([1]), np.array([[1.0, 0.0]])) == pytest.approx(-np.log(1e-12))

    def test_expected_calibration_error(self) -> None:
        # Bins of width 1/15: 0.8 | 0.6 | 0.5 | 1.0 | 0.7 are all alone, so each counts its own gap.
        gaps = [1 - 0.8, 1 - 0.6, 0.5, 0.0, 0.7]
        assert expected_calibration_error(HAND.labels, HAND.probabilities) == pytest.approx(np.mean(gaps))

    def test_calibration_gaps_inside_a_bin_cancel(self) -> None:
        # Four answers at 0.75, three right: the bin's accuracy equals its confidence.
        probabilities = np.tile([0.75, 0.25], (4, 1))
        assert expected_calibration_error(np.array([0, 0, 0, 1]), probabilities) == pytest.approx(0)

    def test_metrics_of_the_example(self) -> None:
        found = {name: interval.value for name, interval in evaluate_predictions(HAND).items()}
        assert found["accuracy"] == pytest.approx(3 / 5)
        assert found["balanced_accuracy"] == pytest.approx((2 / 3 + 1 + 0) / 3)
        assert found["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
        assert found["weighted_f1"] == pytest.approx((3 * 2 / 3 + 2 / 3 + 0) / 5)
        assert found["log_loss"] == pytest.approx(log_loss(HAND.labels, HAND.probabilities))
        assert found["ece"] == pytest.approx(expected_calibration_error(HAND.labels, HAND.probabilities))

    def test_macro_f1_takes_a_stack_of_matrices(self) -> None:
        perfect = np.diag([4, 1, 0])
        assert macro_f1(np.stack([HAND_MATRIX, perfect])) == pytest.approx([4 / 9, 1.0])

    def test_most_confused_is_sorted_and_skips_the_diagonal_and_zeros(self) -> None:
        matrix = np.array([[9, 1, 3], [0, 9, 5], [1, 0, 9]])
        assert most_confused(matrix, limit=10) == [(1, 2, 5), (0, 2, 3), (0, 1, 1), (2, 0, 1)]
        assert most_confused(matrix, limit=2) == [(1, 2, 5), (0, 2, 3)]
        assert most_confused(np.diag([3, 4]), limit=5) == []
        assert matrix[0, 0] == 9, "the matrix given is left alone"


class TestReliabilityBins:
    def test_means_and_counts_by_bin(self) -> None:
        bins = reliability_bins(np.array([0, 1, 0]), np.array([[0.81, 0.19], [0.83, 0.17], [0.0, 1.0]]))
        assert bins.count.tolist() == [0] * 12 + [2, 0, 1]
        assert bins.confidence[12] == pytest.approx(0.82)
        assert bins.accuracy[12] == pytest.approx(0.5)
        assert bins.accuracy[14] == 0
        assert np.isnan(bins.accuracy[:12]).all()

    @pytest.mark.parametrize("seed", range(5))
    def test_the_calibration_error_is_their_mean_gap(self, seed: int) -> None:
        sample = draw(seed, images=400, classes=4)
        bins = reliability_bins(sample.labels, sample.probabilities)
        gaps = np.nan_to_num(np.abs(bins.accuracy - bins.confidence))
        expected = (gaps * bins.count).sum() / bins.count.sum()
        assert expected_calibration_error(sample.labels, sample.probabilities) == pytest.approx(expected)


class TestAgreementWithScikitLearn:
    @pytest.mark.parametrize(
        ("images", "classes", "present"),
        [(500, 2, None), (500, 10, None), (60, 30, None), (200, 12, 7), (40, 5, 1), (3, 8, 2)],
        ids=["binary", "ten", "few per class", "five classes without images", "one class", "tiny"],
    )
    @pytest.mark.parametrize("seed", range(3))
    def test_on_random_predictions(self, images: int, classes: int, present: int | None, seed: int) -> None:
        sample = draw(seed, images=images, classes=classes, present=present)
        found = {name: interval.value for name, interval in evaluate_predictions(sample).items()}
        true, said = sample.labels, sample.predicted
        with warnings.catch_warnings():
            # scikit-learn warns of predicted classes without images, which is what is tested here.
            warnings.simplefilter("ignore")
            expected = {
                "accuracy": sklearn.metrics.accuracy_score(true, said),
                "balanced_accuracy": sklearn.metrics.balanced_accuracy_score(true, said),
                "macro_f1": sklearn.metrics.f1_score(true, said, average="macro"),
                "weighted_f1": sklearn.metrics.f1_score(true, said, average="weighted"),
                "log_loss": sklearn.metrics.log_loss(true, sample.probabilities, labels=range(classes)),
            }
        assert {name: found[name] for name in expected} == pytest.approx(expected)

    def test_per_class_scores(self) -> None:
        sample = draw(0, images=300, classes=9, present=6, strength=1.0)
        matrix = confusion_matrix(sample.labels, sample.predicted, classes=9)
        assert (
            matrix.tolist()
            == sklearn.metrics.confusion_matrix(sample.labels, sample.predicted, labels=range(9)).tolist()
        )
        expected = sklearn.metrics.precision_recall_fscore_support(
            sample.labels, sample.predicted, labels=range(9), zero_division=0
        )
        found = np.array([dataclasses.astuple(score) for score in per_class(matrix)]).T
        np.testing.assert_allclose(found, np.array(expected, dtype=float))


class TestIntervals:
    @pytest.mark.parametrize("seed", range(8))
    def test_contain_their_value(self, seed: int) -> None:
        for images, classes in ((8, 5), (120, 10)):
            for name, interval in evaluate_predictions(draw(seed, images=images, classes=classes)).items():
                assert interval.low <= interval.value <= interval.high, (name, images)

    def test_contain_the_calibration_error_of_a_calibrated_model(self) -> None:
        # Resampling biases this error upwards: of 40 such models some have even the lower quantile above it.
        for seed in range(40):
            rng = np.random.default_rng(seed)
            odds = np.exp(3 * rng.normal(size=(200, 10)))
            shares = odds / odds.sum(axis=1, keepdims=True)
            labels = (shares.cumsum(axis=1) > rng.random((200, 1))).argmax(axis=1)
            sample = Predictions(tuple("abcdefghij"), ("",) * 200, labels, shares)
            interval = evaluate_predictions(sample)["ece"]
            assert interval.low <= interval.value <= interval.high

    def test_shrink_with_the_square_root_of_the_images(self) -> None:
        few = evaluate_predictions(draw(0, images=200, classes=5))
        many = evaluate_predictions(draw(0, images=200 * 16, classes=5))
        for name in ("accuracy", "balanced_accuracy", "macro_f1", "weighted_f1", "log_loss"):
            ratio = (few[name].high - few[name].low) / (many[name].high - many[name].low)
            assert 2.8 < ratio < 5.7, name

    def test_cover_the_true_accuracy_about_19_times_in_20(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(metrics, "_RESAMPLES", 400)
        trials = 300
        held = 0
        for seed in range(trials):
            interval = evaluate_predictions(coin(seed, images=200, accuracy=0.85), seed=seed)["accuracy"]
            held += interval.low <= 0.85 <= interval.high
        assert 0.90 <= held / trials <= 0.985

    def test_have_the_width_of_the_normal_approximation(self) -> None:
        interval = evaluate_predictions(coin(1, images=2000, accuracy=0.85))["accuracy"]
        expected = 2 * 1.96 * np.sqrt(interval.value * (1 - interval.value) / 2000)
        assert interval.high - interval.low == pytest.approx(expected, rel=0.1)

    def test_of_a_perfect_classifier_have_no_width(self) -> None:
        labels = np.arange(30) % 3
        sample = Predictions(("a", "b", "c"), ("",) * 30, labels, np.eye(3)[labels])
        found = evaluate_predictions(sample)
        for name in ("accuracy", "balanced_accuracy", "macro_f1", "weighted_f1"):
            assert dataclasses.astuple(found[name]) == (1, 1, 1)
        for name in ("log_loss", "ece"):
            assert dataclasses.astuple(found[name]) == (0, 0, 0)

    def test_are_the_same_for_the_same_seed(self) -> None:
        sample = draw(3, images=150, classes=6)
        assert evaluate_predictions(sample, seed=1) == evaluate_predictions(sample, seed=1)
        assert evaluate_predictions(sample, seed=1) != evaluate_predictions(sample, seed=2)

    def test_match_resampling_the_images_themselves(self) -> None:
        sample = draw(5, images=150, classes=4, strength=1.5)
        rng = np.random.default_rng(0)
        draws = [macro_f1_of(sample, rng.integers(0, 150, 150)) for _ in range(2000)]
        low, high = np.quantile(draws, [0.025, 0.975])
        interval = evaluate_predictions(sample)["macro_f1"]
        assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.012)

    def test_a_thousand_classes_do_not_need_gigabytes(self) -> None:
        # 2,000 resampled matrices of a million cells would be 16 GB.
        found = evaluate_predictions(draw(0, images=3000, classes=1000, strength=4.0))
        assert found["accuracy"].low < found["accuracy"].value < found["accuracy"].high

    def test_resampling_in_blocks_leaves_no_seam(self) -> None:
        # Guesses over 60 classes occupy some 2,900 cells, too many for one block of 2,000 resamples.
        interval = evaluate_predictions(draw(0, images=6000, classes=60, strength=0.0))["accuracy"]
        expected = 2 * 1.96 * np.sqrt(interval.value * (1 - interval.value) / 6000)
        assert interval.high - interval.low == pytest.approx(expected, rel=0.1)


class TestBinomialBounds:
    def test_300_of_300_show_99_percent(self) -> None:
        low, high = binomial_bounds(300, 300)
        assert low == pytest.approx(0.05 ** (1 / 300))
        assert low == pytest.approx(0.99006, abs=5e-6)
        assert high == 1.0
        assert binomial_bounds(298, 298)[0] < 0.99 < binomial_bounds(299, 299)[0]

    @pytest.mark.parametrize(("successes", "trials"), [(1, 1), (3, 7), (0, 5), (299, 300), (9_950, 10_000)])
    @pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
    def test_they_are_quantiles_of_beta_distributions(
        self, successes: int, trials: int, confidence: float
    ) -> None:
        failures = trials - successes
        low, high = binomial_bounds(successes, trials, confidence=confidence)
        beta = scipy.stats.beta
        assert low == pytest.approx(beta.ppf(1 - confidence, successes, failures + 1) if successes else 0)
        assert high == pytest.approx(beta.ppf(confidence, successes + 1, failures) if failures else 1)

    def test_each_is_where_the_observation_has_the_chance_that_is_left(self) -> None:
        low, high = binomial_bounds(17, 20)
        assert scipy.stats.binom.sf(16, 20, low) == pytest.approx(0.05)
        assert scipy.stats.binom.cdf(17, 20, high) == pytest.approx(0.05)

    def test_nothing_seen_says_nothing(self) -> None:
        assert binomial_bounds(0, 0) == (0.0, 1.0)


def macro_f1_of(sample: Predictions, rows: npt.NDArray[np.int64]) -> float:
    matrix = confusion_matrix(sample.labels[rows], sample.predicted[rows], classes=len(sample.classes))
    return float(macro_f1(matrix[None])[0])

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score
from sklearn.metrics import log_loss as reference_log_loss

from holotype.config import FitConfig
from holotype.errors import TrainingError
from holotype.head import (
    Features,
    HeadFit,
    Scores,
    better,
    fit_head,
    logistic_path,
    score_logits,
    validation_columns,
)
from holotype.runlog import RunLog


def clouds(*counts: int, seed: int = 0, width: int = 20) -> Features:
    """Normal clouds that overlap, one of so many points for each class."""
    generator = np.random.default_rng(seed)
    centres = 1.5 * np.random.default_rng(7).normal(size=(len(counts), width)) / np.sqrt(width) * 2
    labels = np.repeat(np.arange(len(counts)), counts)
    values = centres[labels] + generator.normal(size=(len(labels), width))
    return Features(values.astype(np.float32), labels)


TAIL, EVEN = clouds(600, 60, 12), clouds(100, 100, 100, seed=1)


def fitted(
    train: Features = TAIL,
    *,
    weights: np.ndarray | None = None,
    names: tuple[str, ...] = (),
    **settings: object,
) -> HeadFit:
    config = FitConfig.model_validate({"metric": "balanced_accuracy", **settings})
    return fit_head(train, EVEN, classes=3, config=config, log=RunLog(None), weights=weights, names=names)


def recall(head: HeadFit, features: Features, label: int) -> float:
    own = features.values[features.labels == label]
    return float(((own @ head.weight.numpy().T + head.bias.numpy()).argmax(axis=1) == label).mean())


class TestScores:
    def test_are_the_metrics_by_their_names(self) -> None:
        generator = np.random.default_rng(0)
        labels = np.repeat(np.arange(4), [50, 30, 15, 5])
        logits = generator.normal(size=(100, 4)).astype(np.float32)
        logits[np.arange(100), labels] += 1
        found = score_logits(logits, labels)
        chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        said = logits.argmax(axis=1)
        assert found.log_loss == pytest.approx(reference_log_loss(labels, chances), rel=1e-5)
        assert found.accuracy == pytest.approx((said == labels).mean())
        assert found.balanced_accuracy == pytest.approx(balanced_accuracy_score(labels, said))
        assert found.macro_f1 == pytest.approx(f1_score(labels, said, average="macro"))
        assert found.weighted_f1 == pytest.approx(f1_score(labels, said, average="weighted"))
        assert 0 < found.ece < 1

    def test_a_class_without_images_counts_for_nothing(self) -> None:
        logits = np.eye(3, dtype=np.float32)[[0, 1, 1, 0]]
        assert score_logits(logits, np.array([0, 1, 1, 1])).balanced_accuracy == pytest.approx(
            (1 + 2 / 3) / 2
        )

    def test_every_metric_of_the_settings_can_be_judged_by(self) -> None:
        scores = Scores(0.5, 0.8, 0.8, 0.8, 0.8, 0.05)
        for metric in ("accuracy", "balanced_accuracy", "macro_f1", "weighted_f1"):
            assert better(replace(scores, **{metric: 0.9}), scores, metric=metric)
            assert not better(replace(scores, **{metric: 0.7, "log_loss": 0.1}), scores, metric=metric)
        for metric in ("log_loss", "ece"):
            assert better(replace(scores, **{metric: 0.01}), scores, metric=metric)
            assert not better(replace(scores, **{metric: 0.9}), scores, metric=metric)
        assert better(scores, None, metric="ece")

    def test_a_tie_is_decided_by_the_log_loss(self) -> None:
        scores = Scores(0.5, 0.8, 0.8, 0.8, 0.8, 0.05)
        for metric in ("accuracy", "ece"):
            assert better(replace(scores, log_loss=0.4), scores, metric=metric)
            assert not better(replace(scores, log_loss=0.6), scores, metric=metric)
            assert not better(scores, scores, metric=metric)

    def test_all_of_them_are_written_down(self, tmp_path: Path) -> None:
        scores = Scores(0.5, 0.8, 0.7, 0.6, 0.65, 0.05)
        log = RunLog(tmp_path)
        log.add({"stage": "head", "epoch": 1, **validation_columns(scores)}, {"stage": "head", "epoch": 1})
        with (tmp_path / "metrics.csv").open() as stream:
            (row,) = csv.DictReader(stream)
        assert {name: row[f"validation_{name}"] for name in ("loss", "accuracy", "balanced_accuracy")} == {
            "loss": "0.5", "accuracy": "0.8", "balanced_accuracy": "0.7",
        }  # fmt: skip
        assert row["validation_macro_f1"] == "0.6"


class TestFitHead:
    def test_it_is_as_good_as_the_exact_regression(self) -> None:
        log = RunLog(None)
        config = FitConfig(label_smoothing=0.0)
        fit_head(EVEN, clouds(200, 200, 200, seed=2), classes=3, config=config, log=log)
        penalties = [float(row["l2"]) for row in log.metrics]
        exact = logistic_path(EVEN, EVEN.values, classes=3, penalties=penalties)
        for row, logits in zip(log.metrics, exact, strict=True):
            assert float(row["train_loss"]) == pytest.approx(
                score_logits(logits, EVEN.labels).log_loss, abs=0.01
            )

    def test_of_all_penalties_the_best_by_the_metric_is_kept(self) -> None:
        for metric, choose in (("balanced_accuracy", max), ("log_loss", min), ("ece", min)):
            log = RunLog(None)
            config = FitConfig.model_validate({"metric": metric})
            head = fit_head(TAIL, EVEN, classes=3, config=config, log=log)
            column = "validation_loss" if metric == "log_loss" else f"validation_{metric}"
            assert getattr(head.scores, metric) == choose(row[column] for row in log.metrics)

    def test_the_result_takes_features_as_they_come(self) -> None:
        head = fitted()
        logits = EVEN.values @ head.weight.numpy().T + head.bias.numpy()
        np.testing.assert_allclose(logits, head.logits, atol=1e-4)

    @pytest.mark.parametrize("imbalance", ["weights", "sampler", "logit-adjust", "auto"])
    def test_remedies_help_the_rare_class(self, imbalance: str) -> None:
        plain, remedied = fitted(), fitted(imbalance=imbalance)
        assert recall(remedied, EVEN, 2) > recall(plain, EVEN, 2) + 0.15
        assert remedied.scores.balanced_accuracy > plain.scores.balanced_accuracy + 0.05

    def test_focal_loss_takes_its_alpha_by_name(self) -> None:
        names = ("boot", "hat", "shirt")
        alpha = {"shirt": 30.0, "boot": 1.0, "hat": 1.0}
        plain, weighted = fitted(imbalance="focal"), fitted(imbalance="focal", focal_alpha=alpha, names=names)
        assert recall(weighted, EVEN, 2) > recall(plain, EVEN, 2) + 0.15

    def test_drawing_classes_equally_often_is_weighing_them_so(self) -> None:
        sampler, weights = fitted(imbalance="sampler"), fitted(imbalance="weights")
        np.testing.assert_allclose(sampler.weight, weights.weight, atol=1e-3)

    def test_a_weight_of_three_is_showing_an_image_three_times(self) -> None:
        often = np.where(np.arange(300) % 10 == 0, 3, 1)
        repeated = Features(np.repeat(EVEN.values, often, axis=0), np.repeat(EVEN.labels, often))
        # Standardisation sees the repetition too, which moves the penalty a little.
        weighted = fitted(EVEN, weights=often / often.mean())
        np.testing.assert_allclose(weighted.weight, fitted(repeated).weight, atol=0.02)
        assert np.abs(weighted.weight.numpy() - fitted(EVEN).weight.numpy()).max() > 0.04

    @pytest.mark.parametrize("remedy", ["weights", "logit-adjust", "focal"])
    def test_remedies_go_by_what_is_shown_of_each_class(self, remedy: str) -> None:
        often = np.where(EVEN.labels == 2, 3, 1)  # a focus on one class
        repeated = Features(np.repeat(EVEN.values, often, axis=0), np.repeat(EVEN.labels, often))
        settings = {"imbalance": remedy, "focal_alpha": "balanced"}
        weighted = fitted(EVEN, weights=often / often.mean(), **settings)
        same = fitted(repeated, **settings)
        np.testing.assert_allclose(weighted.bias, same.bias, atol=0.05)

    def test_mirrored_twins_have_the_weights_of_theirs(self) -> None:
        twice = Features(np.concatenate([TAIL.values] * 2), np.concatenate([TAIL.labels] * 2))
        weights = np.random.default_rng(0).uniform(0.5, 1.5, len(TAIL.labels))
        np.testing.assert_allclose(
            fitted(twice, weights=weights).weight, fitted(TAIL, weights=weights).weight, atol=5e-3
        )

    def test_features_that_are_no_numbers_are_refused(self) -> None:
        broken = Features(np.full_like(TAIL.values, np.nan), TAIL.labels)
        with pytest.raises(TrainingError, match=r"model\.weights"):
            fitted(broken)

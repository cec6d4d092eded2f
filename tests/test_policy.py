"""Logits become probabilities in one way, whatever their size."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from holotype.policy import (
    Policy,
    conformal_threshold,
    fit_temperature,
    judge,
    judge_probabilities,
    probabilities,
    score_thresholds,
)

LOGITS = np.array([[0.0, 1.0, 2.0], [3.0, 3.0, 3.0], [-1.0, 0.5, -2.0]], dtype=np.float32)


def test_probabilities_follow_the_softmax_formula():
    first = probabilities(LOGITS, policy=Policy())[0]
    assert first == pytest.approx([0.09003057, 0.24472847, 0.66524096], abs=1e-8)
    assert probabilities(LOGITS, policy=Policy())[1] == pytest.approx([1 / 3] * 3)


def test_temperature_divides_the_logits():
    warm = probabilities(LOGITS, policy=Policy(temperature=2.0))
    assert np.allclose(warm, probabilities(LOGITS / 2, policy=Policy()))


def test_temperature_never_changes_which_class_wins():
    logits = np.random.default_rng(0).normal(size=(200, 7)) * 5
    for temperature in (0.05, 0.5, 3.0, 20.0):
        chances = probabilities(logits, policy=Policy(temperature=temperature))
        assert np.array_equal(chances.argmax(axis=1), logits.argmax(axis=1))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4, 1e30])
def test_rows_sum_to_one_and_stay_finite_for_logits_of_any_size(scale):
    logits = (np.random.default_rng(1).normal(size=(50, 9)) * scale).astype(np.float32)
    chances = probabilities(logits, policy=Policy(temperature=0.1))
    assert np.isfinite(chances).all()
    assert chances.sum(axis=1) == pytest.approx(np.ones(50))


def test_probabilities_are_double_precision_and_leave_the_logits_alone():
    logits = LOGITS.astype(np.float64)
    before = logits.copy()
    assert probabilities(logits, policy=Policy()).dtype == np.float64
    assert np.array_equal(logits, before)


def test_a_single_class_is_certain():
    assert probabilities(np.array([[-3.0]]), policy=Policy()).tolist() == [[1.0]]


def test_nan_logits_stay_visible():
    assert np.isnan(probabilities(np.array([[np.nan, 1.0]]), policy=Policy())).all()


@pytest.mark.parametrize("temperature", [0, -1, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValidationError):
        Policy(temperature=temperature)


def test_an_unknown_setting_is_refused():
    with pytest.raises(ValidationError):
        Policy(threshold=0.5)


@pytest.mark.parametrize("true_temperature", [0.3, 1.0, 4.0])
def test_the_fitted_temperature_is_the_one_the_labels_were_drawn_with(true_temperature):
    dice = np.random.default_rng(2)
    logits = dice.normal(size=(20_000, 4)) * 3
    chances = probabilities(logits, policy=Policy(temperature=true_temperature))
    labels = (dice.random((len(logits), 1)) > chances.cumsum(axis=1)).sum(axis=1).clip(max=3)
    assert fit_temperature(logits, labels) == pytest.approx(true_temperature, rel=0.05)


def test_the_fitted_temperature_lowers_the_loss_of_an_overconfident_model():
    dice = np.random.default_rng(3)
    labels = dice.integers(0, 5, 2_000)
    logits = np.eye(5)[np.where(dice.random(2_000) < 0.7, labels, dice.integers(0, 5, 2_000))] * 12
    fitted = Policy(temperature=fit_temperature(logits, labels))

    def loss(policy: Policy) -> float:
        return float(-np.log(probabilities(logits, policy=policy)[np.arange(2_000), labels]).mean())

    assert loss(fitted) < 0.5 * loss(Policy())
    assert loss(fitted) <= min(loss(Policy(temperature=t)) for t in (0.1, 0.5, 2, 4, 6, 10, 20)) + 1e-6


@pytest.mark.parametrize("images", [3, 30, 300])
def test_a_model_that_was_always_right_is_as_sure_as_that_many_images_allow(images):
    always_right = np.eye(3)[np.arange(images) % 3] * 10
    fitted = Policy(temperature=fit_temperature(always_right, np.arange(images) % 3))
    confidence = probabilities(always_right, policy=fitted).max(axis=1)
    assert confidence == pytest.approx(1 - 1 / (images + 2), abs=1e-3)


def test_a_temperature_that_would_run_away_stops_at_the_end_of_its_range():
    always_wrong = np.roll(np.eye(3) * 10, 1, axis=1)
    assert 15 < fit_temperature(always_wrong, np.arange(3)) < 30


def test_conformal_sets_hold_the_label_as_often_as_they_say():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 4000)
    logits = rng.normal(size=(4000, 4)) + 1.5 * np.eye(4)[labels]
    chances = probabilities(logits, policy=Policy())
    limit = conformal_threshold(chances[:2000], labels[:2000], coverage=0.9)
    held = (chances[2000:] >= limit)[np.arange(2000), labels[2000:]].mean()
    assert held == pytest.approx(0.9, abs=0.03)


@pytest.mark.parametrize("levels", [4, 256, 2**40])
def test_conformal_sets_hold_the_images_they_were_fitted_on(levels):
    for seed in range(100):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 3, 19)
        rounded = np.round(rng.normal(size=(19, 3)) * levels / 8) * 8 / levels
        chances = probabilities(rounded, policy=Policy())
        limit = conformal_threshold(chances, labels, coverage=0.9)
        own = chances[np.arange(19), labels]
        assert (own >= limit).sum() >= 18  # ceil((19 + 1) 0.9)
        assert (own > limit).sum() < 18  # and no larger threshold does
        judged = judge_probabilities(
            chances, policy=Policy(abstain="conformal", open_above=limit), classes=("a", "b", "c")
        )
        held = [label in (one.left_open or ()) for label, one in zip(labels.tolist(), judged, strict=True)]
        assert sum(held) >= 18


def test_few_images_leave_every_class_open():
    chances = np.array([[0.9, 0.1], [0.8, 0.2]])
    assert conformal_threshold(chances, np.array([0, 0]), coverage=0.95) == 0.0


def test_thresholds_give_the_precision_that_is_asked_for():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 3, 3000)
    chances = probabilities(rng.normal(size=(3000, 3)) + 1.2 * np.eye(3)[labels], policy=Policy())
    limits = score_thresholds(chances, labels, classes=("a", "b", "c"), precision=0.9)
    policy = Policy(abstain="score", thresholds=dict(limits))
    judged = judge_probabilities(chances, policy=policy, classes=("a", "b", "c"))
    sure = np.array([one.sure for one in judged])
    assert 0.2 < sure.mean() < 0.9
    assert (chances.argmax(axis=1) == labels)[sure].mean() == pytest.approx(0.9, abs=0.02)
    assert {one.doubts for one in judged} == {(), ("improbable",)}


@pytest.mark.parametrize("precision", [0.8, 0.85, 0.9, 0.95])
def test_equal_probabilities_are_sure_together_only_where_all_of_them_may_be(precision):
    rng = np.random.default_rng(0)
    best = rng.choice([0.6, 0.7, 0.8, 0.9], 200)
    chances, labels = np.stack([best, 1 - best], axis=1), (rng.random(200) > best).astype(np.int64)
    limits = score_thresholds(chances, labels, classes=("a", "b"), precision=precision)
    policy = Policy(abstain="score", thresholds=dict(limits))
    sure = np.array([one.sure for one in judge_probabilities(chances, policy=policy, classes=("a", "b"))])
    reached = [level for level in (0.6, 0.7, 0.8, 0.9) if (labels[best >= level] == 0).mean() >= precision]
    assert sure.tolist() == (best >= min(reached, default=2)).tolist()


def test_no_answer_is_sure_where_certain_ones_are_too_often_wrong():
    chances, labels = np.tile([1.0, 0.0], (20, 1)), np.array([0] * 8 + [1] * 12)
    limits = score_thresholds(chances, labels, classes=("a", "b"), precision=0.95)
    policy = Policy(abstain="score", thresholds=dict(limits))
    assert not any(one.sure for one in judge_probabilities(chances, policy=policy, classes=("a", "b")))


def test_an_unfamiliar_image_is_not_sure_whatever_its_probability():
    policy = Policy(familiar=2.0)
    logits = np.array([[9.0, 0.0], [9.0, 0.0], [9.0, 0.0]])
    judged = judge(logits, policy=policy, classes=("a", "b"), distances=np.array([1.0, 3.0, np.nan]))
    assert [one.doubts for one in judged] == [(), ("unfamiliar",), ("unfamiliar",)]

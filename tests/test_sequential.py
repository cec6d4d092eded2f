"""However often one looks: intervals that hold at all times, and tests that do not lie."""

from __future__ import annotations

import math

import numpy as np
import pytest

from holotype.sequential import (
    Arm,
    difference,
    happens_more,
    log_evidence,
    paired_difference,
    ratio_is_off,
    sequential_verdict,
)


def streams(rate: float, *, runs: int, answers: int, seed: int) -> np.ndarray:
    """Right answers so far, `int64[runs, answers]`."""
    rng = np.random.default_rng(seed)
    return np.cumsum(rng.random((runs, answers)) < rate, axis=1)


class TestDifference:
    def test_nothing_is_known_at_first(self) -> None:
        found = difference(Arm(0, 0), Arm(0, 0), alpha=0.05)
        assert (found.low, found.high) == (-1.0, 1.0)

    def test_it_narrows_around_what_was_seen(self) -> None:
        few = difference(Arm(45, 5), Arm(40, 10), alpha=0.05)
        many = difference(Arm(4500, 500), Arm(4000, 1000), alpha=0.05)
        assert few.value == many.value == pytest.approx(-0.1)
        assert few.low < many.low < -0.1 < many.high < few.high
        assert many.high < 0
        assert many.high - many.low < 0.08

    def test_arms_swapped_are_the_difference_negated(self) -> None:
        one = difference(Arm(90, 10), Arm(70, 30), alpha=0.05)
        other = difference(Arm(70, 30), Arm(90, 10), alpha=0.05)
        assert (one.low, one.high) == (pytest.approx(-other.high), pytest.approx(-other.low))

    def test_a_smaller_alpha_is_a_wider_interval(self) -> None:
        wide, narrow = (difference(Arm(80, 20), Arm(85, 15), alpha=alpha) for alpha in (0.01, 0.2))
        assert wide.low < narrow.low < narrow.high < wide.high

    @pytest.mark.parametrize(("right", "wrong"), [(0, 50), (50, 0)])
    def test_extremes(self, right: int, wrong: int) -> None:
        found = difference(Arm(right, wrong), Arm(right, wrong), alpha=0.05)
        assert -0.3 < found.low < 0 < found.high < 0.3

    def test_the_interval_holds_the_truth_at_all_times(self) -> None:
        looks = [10, 20, 50, 100, 200, 500, 1000, 2000]
        runs, missed = 200, 0
        one = streams(0.9, runs=runs, answers=2000, seed=1)
        other = streams(0.85, runs=runs, answers=2000, seed=2)
        for run in range(runs):
            for count in looks:
                a, b = int(one[run, count - 1]), int(other[run, count - 1])
                found = difference(Arm(a, count - a), Arm(b, count - b), alpha=0.1)
                if not found.low <= -0.05 <= found.high:
                    missed += 1
                    break
        assert missed <= 0.1 * runs


class TestEvidence:
    def test_it_agrees_with_the_interval(self) -> None:
        for a, b in [(80, 95), (80, 82), (50, 90)]:
            counts = [np.array([value]) for value in (a, 100 - a, b, 100 - b)]
            rejected = float(log_evidence(*counts)[0]) > math.log(1 / 0.05)
            found = difference(Arm(a, 100 - a), Arm(b, 100 - b), alpha=0.05)
            assert rejected == (not found.low <= 0 <= found.high)

    def test_equal_arms_are_seldom_told_apart(self) -> None:
        runs, answers = 500, 3000
        one = streams(0.92, runs=runs, answers=answers, seed=3)
        other = streams(0.92, runs=runs, answers=answers, seed=4)
        count = np.arange(1, answers + 1)
        evidence = log_evidence(one, count - one, other, count - other)
        ever = (evidence > math.log(1 / 0.05)).any(axis=1).mean()
        assert ever <= 0.05

    def test_unequal_ones_are(self) -> None:
        one = streams(0.90, runs=100, answers=3000, seed=5)
        other = streams(0.95, runs=100, answers=3000, seed=6)
        count = np.arange(1, 3001)
        evidence = log_evidence(one, count - one, other, count - other)
        assert (evidence > math.log(1 / 0.05)).any(axis=1).mean() > 0.95


class TestPaired:
    def test_pairs_tell_more_than_arms(self) -> None:
        paired = paired_difference(900, 5, 45, 50, alpha=0.05)
        apart = difference(Arm(905, 95), Arm(945, 55), alpha=0.05)
        assert paired.value == pytest.approx(0.04)
        assert 0 < paired.low < 0.04 < paired.high
        assert paired.high - paired.low < apart.high - apart.low

    def test_nothing_is_known_at_first(self) -> None:
        found = paired_difference(0, 0, 0, 0, alpha=0.05)
        assert (found.low, found.high) == (-1.0, 1.0)


class TestVerdict:
    @pytest.mark.parametrize(
        ("arms", "margin", "verdict"),
        [
            ((Arm(800, 200), Arm(950, 50)), 0.0, "better"),
            ((Arm(950, 50), Arm(800, 200)), 0.0, "worse"),
            ((Arm(90, 10), Arm(91, 9)), 0.0, "undecided"),
            ((Arm(9000, 1000), Arm(9000, 1000)), 0.03, "not worse"),
        ],
    )
    def test_it_says_what_the_interval_says(self, arms: tuple[Arm, Arm], margin: float, verdict: str) -> None:
        assert sequential_verdict(difference(*arms, alpha=0.05), margin=margin) == verdict


class TestRatio:
    def test_what_was_asked_for_is_not_off(self) -> None:
        assert not ratio_is_off(1013, 10_000, share=0.1)
        assert ratio_is_off(1300, 10_000, share=0.1)
        assert not ratio_is_off(0, 5, share=0.1)


class TestHappensMore:
    @pytest.mark.parametrize(
        ("challenger", "champion", "expected"), [(10, 0, True), (10, 8, False), (0, 10, False)]
    )
    def test_of_equal_shares(self, challenger: int, champion: int, expected: bool) -> None:
        assert happens_more(challenger, champion, share=0.5, alpha=0.05) is expected

    def test_a_small_share_has_few_of_them(self) -> None:
        assert not happens_more(10, 90, share=0.1, alpha=0.05)
        assert happens_more(30, 70, share=0.1, alpha=0.05)
        assert not happens_more(0, 0, share=0.1, alpha=0.05)

    def test_it_is_seldom_wrong_however_often_one_looks(self) -> None:
        runs = 300
        came = streams(0.1, runs=runs, answers=200, seed=3)
        wrong = sum(
            any(
                happens_more(int(came[run, n]), n + 1 - int(came[run, n]), share=0.1, alpha=0.05)
                for n in range(200)
            )
            for run in range(runs)
        )
        assert wrong <= 0.05 * runs

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import sklearn.metrics
from crowdkit.metrics.data import alpha_krippendorff
from statsmodels.stats.inter_rater import cohens_kappa
from statsmodels.stats.inter_rater import fleiss_kappa as statsmodels_fleiss

from holotype.agreement import (
    cohen_kappa,
    confusions,
    count_votes,
    disagreements,
    fleiss_kappa,
    gwet_ac1,
    krippendorff_alpha,
    leave_one_out_alpha,
    measure_agreement,
    observed_agreement,
    specific_agreement,
)

Table = npt.NDArray[np.int64]


def table(*annotators: str) -> Table:
    """Votes from one string per annotator: a digit per image, counted from 1, and a dot for no vote."""
    return np.array([[-1 if c == "." else int(c) - 1 for c in row.replace(" ", "")] for row in annotators]).T


# Krippendorff (2011): 4 coders, 12 units, 5 values; the last unit has one vote.
FOUR_CODERS = table(
    "1 2 3 3 2 1 4 1 2 . . .",
    "1 2 3 3 2 2 4 1 2 5 . 3",
    ". 3 3 3 2 3 4 2 2 5 1 .",
    "1 2 3 3 2 4 4 1 2 5 1 .",
)

# Fleiss' own layout: 10 images, 14 votes each, 5 classes.
FLEISS_COUNTS = np.array(
    [
        [0, 0, 0, 0, 14],
        [0, 2, 6, 4, 2],
        [0, 0, 3, 5, 6],
        [0, 3, 9, 2, 0],
        [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0],
        [3, 2, 6, 3, 0],
        [2, 5, 3, 2, 2],
        [6, 5, 2, 1, 0],
        [0, 2, 2, 3, 7],
    ]
)


def from_counts(counts: Table) -> Table:
    """Some table with these numbers of votes, where each row has equally many."""
    return np.array([np.repeat(np.arange(len(row)), row) for row in counts])


def draw(
    seed: int,
    *,
    images: int = 60,
    annotators: int = 4,
    classes: int = 3,
    missing: float = 0.0,
    skill: float = 0.6,
) -> Table:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, (images, 1))
    noise = rng.integers(0, classes, (images, annotators))
    votes = np.where(rng.random((images, annotators)) < skill, truth, noise)
    votes[rng.random(votes.shape) < missing] = -1
    return votes


def as_frame(votes: Table) -> pd.DataFrame:
    rows, columns = np.nonzero(votes >= 0)
    return pd.DataFrame({"task": rows, "worker": columns, "label": votes[rows, columns]})


def terms(votes: Table, *, classes: int) -> tuple[float, list[float]]:
    """The mean over images of the share of equal pairs, and of each class's share of the votes."""
    images = [[vote for vote in row if vote >= 0] for row in votes.tolist()]
    images = [image for image in images if len(image) >= 2]
    equal = [[a == b for a, b in itertools.combinations(image, 2)] for image in images]
    observed = sum(sum(pairs) / len(pairs) for pairs in equal) / len(images)
    return observed, [
        sum(image.count(k) / len(image) for image in images) / len(images) for k in range(classes)
    ]


class TestKrippendorff:
    def test_published_example_of_four_coders(self) -> None:
        assert krippendorff_alpha(FOUR_CODERS, classes=5) == pytest.approx(0.743, abs=5e-4)

    def test_two_annotators_by_hand(self) -> None:
        # 3 of 10 images differ; 15 of 20 votes are for class 1, 5 for class 2.
        votes = table("1111111122", "1111112212")
        assert krippendorff_alpha(votes, classes=2) == pytest.approx(1 - (3 / 10) / (2 * 15 * 5 / (20 * 19)))

    @pytest.mark.parametrize("seed", range(8))
    def test_equals_crowd_kit_with_missing_votes(self, seed: int) -> None:
        votes = draw(seed, missing=0.4)
        assert krippendorff_alpha(votes, classes=3) == pytest.approx(alpha_krippendorff(as_frame(votes)))

    def test_images_with_one_vote_change_nothing(self) -> None:
        votes = draw(0)
        lonely = np.full((30, 4), -1)
        lonely[:, 0] = 2
        assert krippendorff_alpha(np.vstack([votes, lonely]), classes=3) == krippendorff_alpha(
            votes, classes=3
        )

    def test_alpha_of_a_class_is_that_of_the_table_collapsed_to_it_and_the_rest(self) -> None:
        votes = draw(1, missing=0.3)
        found = measure_agreement(votes, classes=3, samples=100)
        for k in range(3):
            collapsed = np.where(votes >= 0, (votes == k).astype(np.int64), -1)
            assert found.class_alpha[k].value == pytest.approx(krippendorff_alpha(collapsed, classes=2))

    def test_leaving_one_out_is_alpha_of_the_other_columns(self) -> None:
        votes = draw(2, missing=0.3)
        expected = [krippendorff_alpha(np.delete(votes, r, axis=1), classes=3) for r in range(4)]
        np.testing.assert_allclose(leave_one_out_alpha(votes, classes=3), expected)

    def test_leaving_the_odd_one_out_raises_alpha(self) -> None:
        votes = draw(3, skill=0.95)
        votes[:, 2] = np.random.default_rng(0).integers(0, 3, len(votes))
        without = leave_one_out_alpha(votes, classes=3)
        assert without.argmax() == 2
        assert without[2] > krippendorff_alpha(votes, classes=3) + 0.2


class TestFleiss:
    def test_worked_example(self) -> None:
        assert fleiss_kappa(from_counts(FLEISS_COUNTS), classes=5) == pytest.approx(0.210, abs=5e-4)

    @pytest.mark.parametrize("seed", range(5))
    def test_equals_statsmodels_where_votes_are_complete(self, seed: int) -> None:
        votes = draw(seed)
        expected = statsmodels_fleiss(count_votes(votes, classes=3))
        assert fleiss_kappa(votes, classes=3) == pytest.approx(expected)

    @pytest.mark.parametrize("seed", range(3))
    def test_unequal_numbers_of_votes_term_by_term(self, seed: int) -> None:
        votes = draw(seed, missing=0.4)
        observed, shares = terms(votes, classes=3)
        chance = sum(share**2 for share in shares)
        assert fleiss_kappa(votes, classes=3) == pytest.approx((observed - chance) / (1 - chance))


class TestGwet:
    def test_published_figure_of_four_coders(self) -> None:
        assert gwet_ac1(FOUR_CODERS, classes=5) == pytest.approx(0.775, abs=5e-4)

    @pytest.mark.parametrize("seed", range(3))
    def test_missing_votes_term_by_term(self, seed: int) -> None:
        votes = draw(seed, missing=0.4)
        observed, shares = terms(votes, classes=3)
        chance = sum(share * (1 - share) for share in shares) / 2
        assert gwet_ac1(votes, classes=3) == pytest.approx((observed - chance) / (1 - chance))

    def test_two_annotators_by_hand(self) -> None:
        # Of 100 images 90 are 1-1, 5 are 1-2 and 5 are 2-1: π = 0.95 and 0.05, P_e = 2·0.95·0.05.
        votes = np.array([[0, 0]] * 90 + [[0, 1]] * 5 + [[1, 0]] * 5)
        assert gwet_ac1(votes, classes=2) == pytest.approx((0.9 - 0.095) / (1 - 0.095))
        # The paradox that AC1 answers: kappa says that agreement is worse than chance.
        assert cohen_kappa(votes, classes=2)[0, 1] < 0

    def test_classes_that_nobody_used_count_among_the_choices(self) -> None:
        votes = draw(0)
        shares = count_votes(votes, classes=5).sum(axis=0) / votes.size
        chance = (shares * (1 - shares)).sum() / 4
        observed = observed_agreement(votes, classes=5)
        assert gwet_ac1(votes, classes=5) == pytest.approx((observed - chance) / (1 - chance))


class TestCohen:
    def test_by_hand(self) -> None:
        # 20 both yes, 15 both no, 5 and 10 differ: p_o = 0.7, p_e = 0.5·0.6 + 0.5·0.4 = 0.5.
        votes = np.array([[0, 0]] * 20 + [[0, 1]] * 5 + [[1, 0]] * 10 + [[1, 1]] * 15)
        assert cohen_kappa(votes, classes=2)[0, 1] == pytest.approx(0.4)

    @pytest.mark.parametrize("seed", range(4))
    def test_equals_scikit_learn_and_statsmodels_on_shared_images(self, seed: int) -> None:
        votes = draw(seed, missing=0.3)
        kappas = cohen_kappa(votes, classes=3)
        for a, b in itertools.combinations(range(4), 2):
            both = (votes[:, a] >= 0) & (votes[:, b] >= 0)
            first, second = votes[both, a], votes[both, b]
            assert kappas[a, b] == pytest.approx(sklearn.metrics.cohen_kappa_score(first, second))
            crossed = sklearn.metrics.confusion_matrix(first, second, labels=[0, 1, 2])
            assert kappas[b, a] == pytest.approx(cohens_kappa(crossed, return_results=False))

    def test_mean_is_over_the_pairs_for_which_it_is_defined(self) -> None:
        votes = draw(0, annotators=3)
        votes[:30, 2], votes[30:, :2] = -1, -1  # the third shares no image with the others
        found = measure_agreement(votes, classes=3, samples=100)
        assert [pair.images for pair in found.pairs] == [30, 0, 0]
        assert found.cohen.value == found.pairs[0].kappa.value
        assert math.isnan(found.pairs[1].kappa.value)
        assert math.isnan(found.pairs[1].agreement)


class TestRawAgreement:
    def test_of_pairs_by_hand(self) -> None:
        # Equal pairs: 3 of 3, 1 of 3, 0 of 1; one vote alone is no pair.
        votes = table("1111", "122.", "12..")
        assert observed_agreement(votes, classes=2) == pytest.approx((3 + 1 + 0) / (3 + 3 + 1))

    def test_specific_agreement_of_two_annotators_is_a_dice_coefficient(self) -> None:
        votes = np.array([[0, 0]] * 20 + [[0, 1]] * 5 + [[1, 0]] * 10 + [[1, 1]] * 15)
        expected = [2 * 20 / (2 * 20 + 15), 2 * 15 / (2 * 15 + 15)]
        np.testing.assert_allclose(specific_agreement(votes, classes=2), expected)

    def test_with_others_by_hand(self) -> None:
        votes = table("112", "121", "12.")
        found = measure_agreement(votes, classes=2, samples=100)
        assert [interval.value for interval in found.with_others] == pytest.approx([2 / 5, 3 / 5, 3 / 4])

    def test_disagreements_count_unordered_pairs_of_votes(self) -> None:
        # 1-1-2 differs in two pairs of votes, 1-2-3 in three, 2-3 in one.
        votes = table("112", "123", "23.")
        assert disagreements(votes, classes=3).tolist() == [[0, 3, 1], [3, 0, 2], [1, 2, 0]]

    def test_confusions_leave_out_what_has_no_vote_or_no_reference(self) -> None:
        votes = table("112.2", "12221")
        reference = np.array([0, 0, 1, 1, -1])
        matrices = confusions(votes, reference, classes=2)
        assert matrices.tolist() == [[[2, 0], [0, 1]], [[1, 1], [0, 2]]]


class TestDegenerate:
    def test_one_class_only_leaves_chance_corrected_coefficients_undefined(self) -> None:
        votes = np.zeros((20, 3), dtype=np.int64)
        found = measure_agreement(votes, classes=2, samples=100)
        for interval in (found.alpha, found.fleiss, found.cohen, *found.class_alpha, *found.alpha_without):
            assert math.isnan(interval.value)
            assert math.isnan(interval.low)
            assert math.isnan(interval.high)
        assert found.observed.value == found.ac1.value == found.class_observed[0].value == 1
        assert math.isnan(found.class_observed[1].value)

    def test_a_single_possible_class_leaves_ac1_undefined_too(self) -> None:
        assert math.isnan(gwet_ac1(np.zeros((5, 2), dtype=np.int64), classes=1))

    @pytest.mark.parametrize(
        "votes", [table("12..", "..12"), table("....", "...."), np.empty((0, 2), np.int64)]
    )
    def test_nothing_to_compare_is_undefined_and_no_crash(self, votes: Table) -> None:
        found = measure_agreement(votes, classes=2, samples=100)
        for interval in (found.observed, found.alpha, found.fleiss, found.ac1, found.cohen):
            assert math.isnan(interval.value)

    def test_an_annotator_without_overlap_changes_nothing_but_the_own_row(self) -> None:
        votes = draw(0, annotators=3)
        alone = np.full((70, 4), -1)
        alone[:60, :3], alone[60:, 3] = votes, 1
        with_alone = measure_agreement(alone, classes=3, samples=100)
        assert with_alone.alpha.value == krippendorff_alpha(votes, classes=3)
        assert math.isnan(with_alone.with_others[3].value)
        assert with_alone.alpha_without[3].value == with_alone.alpha.value

    def test_perfect_agreement_is_one_with_no_width(self) -> None:
        votes = np.repeat(np.arange(40)[:, None] % 4, 3, axis=1)
        found = measure_agreement(votes, classes=4, samples=200)
        for interval in (found.observed, found.alpha, found.fleiss, found.ac1, found.cohen):
            assert (interval.value, interval.low, interval.high) == (1, 1, 1)

    def test_order_of_images_annotators_and_classes_has_no_influence(self) -> None:
        votes = draw(4, missing=0.3)
        rng = np.random.default_rng(0)
        names = np.array([2, 0, 1, -1])
        other = names[votes[rng.permutation(len(votes))][:, rng.permutation(4)]]
        for coefficient in (krippendorff_alpha, fleiss_kappa, gwet_ac1, observed_agreement):
            assert coefficient(other, classes=3) == pytest.approx(coefficient(votes, classes=3))


class TestBootstrap:
    def test_is_that_of_resampling_images_one_by_one(self) -> None:
        votes = draw(5, images=80, missing=0.2)
        compared = votes[(votes >= 0).sum(axis=1) >= 2]
        found = measure_agreement(votes, classes=3, samples=4000, seed=1)
        rng = np.random.default_rng(2)
        draws = [
            krippendorff_alpha(compared[rng.integers(0, len(compared), len(compared))], classes=3)
            for _ in range(4000)
        ]
        np.testing.assert_allclose(
            [found.alpha.low, found.alpha.high], np.quantile(draws, [0.025, 0.975]), atol=0.012
        )

    def test_is_the_same_for_the_same_seed_only(self) -> None:
        votes = draw(6)
        first, again = (measure_agreement(votes, classes=3, samples=300, seed=7) for _ in range(2))
        assert first == again
        assert measure_agreement(votes, classes=3, samples=300, seed=8).alpha.low != first.alpha.low

    def test_covers_the_true_alpha_about_as_often_as_it_says(self) -> None:
        true = krippendorff_alpha(draw(99, images=200_000), classes=3)
        covered = 0
        for seed in range(100):
            alpha = measure_agreement(draw(seed, images=150), classes=3, samples=300).alpha
            covered += alpha.low <= true <= alpha.high
        assert covered >= 88  # 95 expected; 88 or fewer has a probability below 0.4 %

    def test_every_interval_holds_its_value(self) -> None:
        found = measure_agreement(FOUR_CODERS, classes=5, samples=500)
        kappas = [pair.kappa for pair in found.pairs]
        for interval in (found.alpha, found.cohen, *found.class_alpha, *found.class_observed, *kappas):
            assert interval.low <= interval.value <= interval.high

    def test_more_images_narrow_the_interval(self) -> None:
        widths = []
        for images in (50, 800):
            alpha = measure_agreement(draw(0, images=images), classes=3, samples=500).alpha
            widths.append(alpha.high - alpha.low)
        assert widths[1] < widths[0] / 2.5

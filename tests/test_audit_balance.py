from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from holotype.audit.balance import balance
from holotype.audit.contract import Balance
from holotype.audit.shift import split_shift
from holotype.dataset import Split


def of(train: dict[str, int], *, test: dict[str, int] | None = None, rule: float = 1.3) -> Balance:
    labels: list[str] = []
    splits: list[Split] = []
    for split, counts in (("train", train), ("test", test or {})):
        for name, count in counts.items():
            labels += [name] * count
            splits += [split] * count  # type: ignore[list-item]
    return balance(labels, splits, rule=rule)


class TestBalance:
    def test_counts_by_class_and_split(self) -> None:
        found = of({"dog": 6, "cat": 3}, test={"dog": 2})
        assert found.counts == {"cat": 3, "dog": 8}
        assert found.by_split == {"cat": {"train": 3, "test": 0}, "dog": {"train": 6, "test": 2}}
        assert found.max_min_ratio == pytest.approx(8 / 3)

    def test_entropy_is_one_where_all_are_equal(self) -> None:
        assert of({"a": 5, "b": 5, "c": 5}).entropy == pytest.approx(1.0)
        assert of({"a": 3, "b": 1}).entropy == pytest.approx(-0.75 * math.log2(0.75) + 0.25 * 2)
        assert of({"a": 7}).entropy == 1.0

    def test_effective_number(self) -> None:
        b = 1 - 1 / 12
        found = of({"a": 9, "b": 3}).effective
        assert found == pytest.approx({"a": (1 - b**9) / (1 - b), "b": (1 - b**3) / (1 - b)})
        assert of({"a": 1}).effective == {"a": 1.0}

    @pytest.mark.parametrize(
        ("large", "small", "lacking"), [(13, 10, 0), (13, 9, 1), (130, 99, 1), (131, 100, 1)]
    )
    def test_collect_brings_the_ratio_within_the_rule_and_no_further(
        self, large: int, small: int, lacking: int
    ) -> None:
        found = of({"a": large, "b": small})
        assert found.collect == ({"b": lacking} if lacking else {})
        assert large / (small + lacking) <= 1.3 + 1e-9
        if lacking:
            assert large / (small + lacking - 1) > 1.3

    def test_a_ratio_equal_to_the_rule_lacks_nothing(self) -> None:
        assert of({"a": 21, "b": 15}, rule=1.4).collect == {}  # 21 / 1.4 = 15.000000000000002 in floats

    @pytest.mark.parametrize(
        ("largest", "remedies"),
        [
            (13, ()),
            (14, ("fit.imbalance=logit-adjust",)),
            (200, ("fit.imbalance=logit-adjust",)),
            (201, ("fit.imbalance=logit-adjust", "fit.imbalance=sampler")),
        ],
    )
    def test_the_remedy_follows_the_ratio(self, largest: int, remedies: tuple[str, ...]) -> None:
        assert of({"a": largest, "b": 10}).remedies == remedies

    def test_remedies_look_at_what_is_trained_on(self) -> None:
        assert of({"a": 10, "b": 10}, test={"a": 500}).remedies == ()
        assert of({"a": 10}, test={"b": 90}).remedies == ()  # no setting trains b
        assert of({}, test={"a": 30, "b": 10}).remedies == ("fit.imbalance=logit-adjust",)

    def test_no_images(self) -> None:
        found = balance([], [], rule=1.3)
        assert found == Balance(
            counts={}, by_split={}, max_min_ratio=None, entropy=1.0, effective={}, remedies=(), collect={}
        )


def cloud(count: int, *, shift: float = 0.0, seed: int = 0, width: int = 12) -> np.ndarray:
    random = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    random[:, 0] += shift
    return random


class TestSplitShift:
    def test_splits_of_one_kind_cannot_be_told_apart(self) -> None:
        embeddings = cloud(900)
        is_train = np.arange(900) < 600
        found = split_shift(embeddings, is_train, groups=np.arange(900), seed=0, split="test")
        assert found is not None
        assert found.split == "test"
        assert found.low < 0.5 < found.high < 0.58

    def test_a_shift_is_measured_as_large_as_it_is(self) -> None:
        # Two normal distributions 1.5 apart: AUC = Phi(1.5 / sqrt 2) = 0.856.
        embeddings = np.concatenate([cloud(800), cloud(400, shift=1.5, seed=1)])
        is_train = np.arange(1200) < 800
        found = split_shift(embeddings, is_train, groups=np.arange(1200), seed=0, split="validation")
        assert found is not None
        assert found.low < 0.856 < found.high
        assert found.high - found.low < 0.06

    def test_copies_across_splits_are_not_learned_by_heart(self) -> None:
        # Each image is in both splits: with a copy on either side of a fold the answer would be the opposite.
        embeddings = np.repeat(cloud(150, width=100), 2, axis=0)
        is_train = np.arange(300) % 2 == 0
        found = split_shift(embeddings, is_train, groups=np.arange(300) // 2, seed=0, split="test")
        assert found is not None
        assert found.auc == pytest.approx(0.5)

    def test_interval_has_the_width_of_delong(self) -> None:
        rng = np.random.default_rng(3)
        scores = np.concatenate([rng.normal(1, 1, 4000), rng.normal(0, 1, 4000)])
        is_train = np.arange(8000) < 4000
        found = split_shift(
            scores[:, None].astype(np.float32), is_train, groups=np.arange(8000), seed=0, split="test"
        )
        assert found is not None
        # 2,000 of each side are drawn; Hanley and McNeil 1982 for the AUC of the raw score.
        auc = roc_auc_score(is_train, scores)
        q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
        error = ((auc * (1 - auc) + 1999 * (q1 - auc**2) + 1999 * (q2 - auc**2)) / 2000**2) ** 0.5
        assert (found.high - found.low) / (2 * 1.96) == pytest.approx(error, rel=0.15)
        assert found.low < auc < found.high

    def test_is_the_same_again(self) -> None:
        arguments = (cloud(5000), np.arange(5000) < 2500)
        first, second = (
            split_shift(*arguments, groups=np.arange(5000), seed=4, split="test") for _ in range(2)
        )
        assert first == second

    @pytest.mark.parametrize(
        ("embeddings", "others", "groups"),
        [
            (cloud(500), 49, np.arange(500)),
            (cloud(500), 500, np.arange(500)),
            (np.ones((500, 4), dtype=np.float32), 200, np.arange(500)),
            (cloud(500), 200, np.arange(500) // 125),
        ],
        ids=["few images", "no train", "all alike", "four groups"],
    )
    def test_nothing_is_measured_where_nothing_can_be(
        self, embeddings: np.ndarray, others: int, groups: np.ndarray
    ) -> None:
        is_train = np.arange(500) >= others
        assert split_shift(embeddings, is_train, groups=groups, seed=0, split="test") is None

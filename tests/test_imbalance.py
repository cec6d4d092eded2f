from __future__ import annotations

import numpy as np
import pytest

from holotype.audit.balance import balance
from holotype.config import GatesConfig
from holotype.imbalance import class_weights, remedies, settle


class TestClassWeights:
    def test_are_inverse_frequencies_of_mean_one(self) -> None:
        counts = np.array([60, 30, 10])
        np.testing.assert_allclose(class_weights(counts), [100 / 180, 100 / 90, 100 / 30])
        assert np.average(class_weights(counts), weights=counts) == pytest.approx(1)

    def test_of_equal_classes_are_one(self) -> None:
        assert class_weights(np.array([7, 7, 7])).tolist() == [1, 1, 1]


class TestRemedies:
    @pytest.mark.parametrize(
        ("largest", "wanted"),
        [
            (13, ()),
            (14, ("logit-adjust",)),
            (200, ("logit-adjust",)),
            (201, ("logit-adjust", "sampler")),
        ],
    )
    def test_follow_the_ratio(self, largest: int, wanted: tuple[str, ...]) -> None:
        assert remedies(np.array([10, largest, 12]), rule=1.3) == wanted

    def test_the_rule_is_what_counts_as_equal(self) -> None:
        assert remedies(np.array([10, 30]), rule=3.0) == ()
        assert remedies(np.array([15, 21]), rule=1.4) == ()  # 1.4 * 15 is a little below 21 in floats

    @pytest.mark.parametrize("counts", [[0, 90], [0, 0], []])
    def test_a_class_without_images_has_none(self, counts: list[int]) -> None:
        assert remedies(np.array(counts, dtype=np.int64), rule=1.3) == ()


class TestSettle:
    def test_what_is_asked_for_stays(self) -> None:
        for remedy in ("none", "weights", "sampler", "focal", "logit-adjust"):
            assert settle(remedy, np.array([1, 1000])) == remedy

    @pytest.mark.parametrize(
        ("largest", "wanted"), [(12, "none"), (20, "logit-adjust"), (900, "logit-adjust")]
    )
    def test_auto_is_what_an_audit_advises(self, largest: int, wanted: str) -> None:
        assert settle("auto", np.array([10, largest])) == wanted
        advised = balance(
            ["a"] * largest + ["b"] * 10, ["train"] * (largest + 10), rule=GatesConfig().balance
        ).remedies
        assert advised[:1] == (() if wanted == "none" else (f"fit.imbalance={wanted}",))

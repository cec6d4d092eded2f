from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from digits import write_digits
from holotype.audit import audit
from holotype.audit.balance import balance
from holotype.config import AuditConfig, GatesConfig, TrainConfig, resolve_config
from holotype.fit import open_session
from holotype.imbalance import class_weights, read_rule, remedies, settle, write_rule


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


class TestRule:
    def test_is_that_of_exactly_this_dataset(self, tmp_path: Path) -> None:
        assert read_rule(tmp_path, "a" * 64) is None
        write_rule(tmp_path, "a" * 64, 5.0)
        assert read_rule(tmp_path, "a" * 64) == 5.0
        assert read_rule(tmp_path, "b" * 64) is None
        for torn in ("{", "[]", "{}"):
            next(tmp_path.glob("balance-*")).write_text(torn)
            assert read_rule(tmp_path, "a" * 64) is None

    def test_training_follows_the_audit(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        data = write_digits(tmp_path / "digits", train=24)
        for file in sorted((data / "train" / "0").iterdir())[12:]:
            file.unlink()
        common = {"data": {"size": 32}, "model": {"name": "test_resnet", "weights": "none"}}
        config = resolve_config(TrainConfig, overrides={**common, "fit": {"epochs": 1}})

        def settled() -> str:
            return open_session(data, config, device="cpu").config.fit.imbalance

        assert settled() == "logit-adjust"
        audit_config = resolve_config(AuditConfig, overrides={**common, "gates": {"balance": 3.0}})
        audit(data, config=audit_config, out=tmp_path / "audit")
        assert settled() == "none"
        assert "fit.imbalance=auto: none, as the audit of this dataset advises" in capsys.readouterr().err
        next((data / "train" / "1").iterdir()).unlink()
        assert settled() == "logit-adjust"  # another dataset, which was not audited

    def test_a_focus_changes_the_prior_that_the_loss_knows(self, tmp_path: Path) -> None:
        data = write_digits(tmp_path / "digits", train=24)
        focus = tmp_path / "focus.csv"
        listed = sorted(file.relative_to(data).as_posix() for file in (data / "train" / "0").iterdir())
        focus.write_text("\n".join(["image_path", *listed]) + "\n")

        def losses(remedy: str) -> list[float]:
            """Of an image of each class, to a network that knows nothing."""
            fit = {
                "imbalance": remedy, "focus": str(focus), "focus_weight": 2.0, "label_smoothing": 0.0,
                "focal_alpha": "balanced",
            }  # fmt: skip
            config = resolve_config(
                TrainConfig,
                overrides={
                    "data": {"size": 32},
                    "model": {"name": "test_resnet", "weights": "none"},
                    "fit": fit,
                },
            )
            session = open_session(data, config, device="cpu")
            values: list[float] = session.criterion(torch.zeros(3, 3), torch.eye(3)).tolist()
            return values

        assert losses("logit-adjust") == pytest.approx(-np.log([1 / 2, 1 / 4, 1 / 4]), rel=1e-5)
        for remedy in ("weights", "focal"):
            first, *others = losses(remedy)
            assert others == pytest.approx([2 * first] * 2, rel=1e-5)
        assert losses("sampler") == pytest.approx([np.log(3)] * 3, rel=1e-5)


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

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from holotype.config import FitConfig
from holotype.errors import ConfigError
from holotype.fit.sampling import draw_weights, order_epoch, shards
from holotype.imbalance import Remedy

LABELS = np.array([0] * 80 + [1] * 15 + [2] * 5)
PATHS = tuple(f"train/{'abc'[label]}/{row}.jpg" for row, label in enumerate(LABELS))


def weights_of(imbalance: Remedy = "none", **settings: object) -> np.ndarray | None:
    config = FitConfig.model_validate(settings)
    return draw_weights(LABELS, PATHS, config=config, imbalance=imbalance, counts=np.bincount(LABELS))


def focus_on(folder: Path, *paths: str, header: str = "image_path,label") -> str:
    file = folder / "focus.csv"
    file.write_text("\n".join([header, *(f"{path},a" for path in paths)]) + "\n")
    return str(file)


class TestDrawWeights:
    def test_without_a_reason_all_are_drawn_once(self) -> None:
        for imbalance in ("none", "weights", "focal", "logit-adjust"):
            assert weights_of(imbalance) is None

    def test_the_sampler_draws_classes_equally_often(self) -> None:
        weights = weights_of("sampler")
        assert weights is not None
        assert weights.mean() == pytest.approx(1)
        np.testing.assert_allclose(np.bincount(LABELS, weights=weights), 100 / 3)

    def test_a_focus_is_drawn_as_often_as_asked(self, tmp_path: Path) -> None:
        file = focus_on(tmp_path, PATHS[3], PATHS[97], PATHS[3])
        weights = weights_of(focus=file, focus_weight=4.0)
        assert weights is not None
        others = np.setdiff1d(np.arange(100), [3, 97])
        np.testing.assert_allclose(weights[[3, 97]], 4 * weights[others[0]])
        assert np.ptp(weights[others]) == 0
        assert weights.mean() == pytest.approx(1)

    def test_with_the_sampler_a_focus_moves_shares_within_its_class_only(self, tmp_path: Path) -> None:
        listed = [*PATHS[:40], PATHS[99]]
        weights = weights_of("sampler", focus=focus_on(tmp_path, *listed), focus_weight=2.0)
        assert weights is not None
        assert weights[99] == pytest.approx(2 * weights[98])
        assert weights[0] == pytest.approx(2 * weights[79])
        np.testing.assert_allclose(np.bincount(LABELS, weights=weights), 100 / 3)

    def test_a_focus_of_weight_one_changes_nothing(self, tmp_path: Path) -> None:
        assert weights_of(focus=focus_on(tmp_path, PATHS[0]), focus_weight=1.0) is None

    def test_an_image_that_is_not_trained_on_is_named(self, tmp_path: Path) -> None:
        file = focus_on(tmp_path, PATHS[0], "test/a/1.jpg", "test/a/2.jpg")
        with pytest.raises(
            ConfigError, match=r"'test/a/1.jpg' is no training image.*train/a/0.jpg"
        ) as caught:
            weights_of(focus=file)
        assert caught.value.where == file

    def test_a_file_that_is_no_such_list_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"nowhere.csv: cannot be read"):
            weights_of(focus=str(tmp_path / "nowhere.csv"))
        with pytest.raises(ConfigError, match="no column image_path"):
            weights_of(focus=focus_on(tmp_path, PATHS[0], header="path,label"))
        with pytest.raises(ConfigError, match="lists no image"):
            weights_of(focus=focus_on(tmp_path))
        photo = tmp_path / "photo.csv"
        photo.write_bytes(b"\xff\xd8\xff\xe0\x00\x10JFIF")
        with pytest.raises(ConfigError, match="is not a CSV in UTF-8"):
            weights_of(focus=str(photo))


ROWS = 1000 + 3 * np.arange(100)


class TestOrderEpoch:
    def test_without_weights_it_is_a_permutation(self) -> None:
        found = order_epoch(ROWS, weights=None, seed=0, epoch=1)
        assert sorted(found.rows) == ROWS.tolist()
        assert found.rows.tolist() != ROWS.tolist()
        assert not found.turns.any()

    @pytest.mark.parametrize("weighted", [False, True])
    def test_is_a_function_of_seed_and_epoch(self, weighted: bool) -> None:
        weights = weights_of("sampler") if weighted else None
        orders = {
            (seed, epoch): order_epoch(ROWS, weights=weights, seed=seed, epoch=epoch).rows.tolist()
            for seed, epoch in [(0, 1), (0, 2), (1, 1)]
        }
        assert order_epoch(ROWS, weights=weights, seed=0, epoch=1).rows.tolist() == orders[0, 1]
        assert len({tuple(order) for order in orders.values()}) == 3

    def test_every_image_comes_as_often_as_its_weight_says_within_one(self) -> None:
        weights = np.random.default_rng(0).gamma(1.0, size=100)
        weights /= weights.mean()
        for epoch in range(50):
            shown = order_epoch(ROWS, weights=weights, seed=3, epoch=epoch)
            counts = np.bincount((shown.rows - 1000) // 3, minlength=100)
            assert counts.sum() == 100
            assert (np.floor(weights) <= counts).all()
            assert (counts <= np.ceil(weights)).all()

    def test_on_average_it_comes_exactly_so_often(self) -> None:
        weights = weights_of("sampler")
        assert weights is not None
        epochs = 2000
        totals = sum(
            np.bincount((order_epoch(ROWS, weights=weights, seed=0, epoch=e).rows - 1000) // 3, minlength=100)
            for e in range(epochs)
        )
        # Rounding to 0 or 1 has at most the variance 1/4.
        assert np.abs(totals / epochs - weights).max() < 5 * np.sqrt(0.25 / epochs)

    def test_classes_are_shown_equally_often_in_every_epoch(self) -> None:
        weights = weights_of("sampler")
        for epoch in range(50):
            shown = order_epoch(np.arange(100), weights=weights, seed=0, epoch=epoch)
            assert set(np.bincount(LABELS[shown.rows])) <= {33, 34}

    def test_so_are_classes_of_one_size(self) -> None:
        """Their images have one weight, and would be drawn from one pot."""
        labels = np.repeat([0, 1, 2], [150, 150, 300])
        counts = np.bincount(labels)
        config = FitConfig(imbalance="sampler")
        paths = [f"{row}.jpg" for row in range(600)]
        weights = draw_weights(labels, paths, config=config, imbalance="sampler", counts=counts)
        for epoch in range(20):
            shown = order_epoch(np.arange(600), labels=labels, weights=weights, seed=0, epoch=epoch)
            assert np.bincount(labels[shown.rows]).tolist() == [200, 200, 200]

    def test_epochs_draw_other_images_of_a_large_class(self) -> None:
        weights = weights_of("sampler")
        drawn = {
            frozenset(shown[shown < 80].tolist())
            for shown in (
                order_epoch(np.arange(100), weights=weights, seed=0, epoch=e).rows for e in range(20)
            )
        }
        assert len(drawn) == 20

    def test_classes_are_mixed_within_an_epoch(self) -> None:
        labels = LABELS[order_epoch(np.arange(100), weights=weights_of("sampler"), seed=0, epoch=1).rows]
        assert (np.diff(labels) != 0).sum() > 50  # of 99 neighbours 2 in 3 differ by chance; sorted, 2 would

    def test_turns_count_the_showings_before(self) -> None:
        shown = order_epoch(np.arange(100), weights=weights_of("sampler"), seed=0, epoch=1)
        seen: dict[int, int] = {}
        for row, turn in zip(shown.rows.tolist(), shown.turns.tolist(), strict=True):
            assert turn == seen.get(row, 0)
            seen[row] = turn + 1
        assert max(seen.values()) == 7  # 100 / 3 showings of five images


class TestShards:
    @pytest.mark.parametrize(
        ("images", "batch_size", "processes", "micro_batch"),
        [
            (100, 32, 1, 32),
            (100, 32, 1, 5),
            (97, 32, 2, 16),
            (97, 32, 3, 4),
            (65, 64, 4, 64),
            (5, 8, 4, 1),
            (1, 32, 2, 8),
        ],
    )
    def test_every_image_is_trained_on_once(
        self, images: int, batch_size: int, processes: int, micro_batch: int
    ) -> None:
        samples = order_epoch(ROWS[:images], weights=None, seed=0, epoch=1)
        of_rank = [
            shards(samples, batch_size=batch_size, processes=processes, rank=rank, micro_batch=micro_batch)
            for rank in range(processes)
        ]
        assert len({len(steps) for steps in of_rank}) == 1
        assert len(of_rank[0]) == -(-images // batch_size)
        seen: list[int] = []
        for steps in zip(*of_rank, strict=True):
            assert len({len(step.parts) for step in steps}) == 1
            parts = [part for step in steps for part in step.parts]
            real = [row for part in parts for row in part.samples.rows[part.weights > 0].tolist()]
            assert {step.images for step in steps} == {len(real)}
            assert len(real) <= batch_size
            assert all(1 <= len(part.samples) == len(part.weights) <= micro_batch for part in parts)
            assert all(part.weights.dtype == np.float32 for part in parts)
            seen += real
        assert seen == samples.rows.tolist()

    def test_processes_share_what_one_computes_in_parts(self) -> None:
        samples = order_epoch(ROWS[:96], weights=None, seed=0, epoch=1)
        alone = shards(samples, batch_size=32, processes=1, rank=0, micro_batch=4)
        shared = [shards(samples, batch_size=32, processes=2, rank=r, micro_batch=4) for r in (0, 1)]
        for step, first, second in zip(alone, *shared, strict=True):
            parts = [part.samples.rows.tolist() for part in (*first.parts, *second.parts)]
            assert parts == [part.samples.rows.tolist() for part in step.parts]

    def test_no_step_is_a_small_rest(self) -> None:
        samples = order_epoch(ROWS[:97], weights=None, seed=0, epoch=1)
        assert [s.images for s in shards(samples, batch_size=32, processes=1, rank=0, micro_batch=32)] == [
            25, 24, 24, 24,
        ]  # fmt: skip

    def test_a_process_without_an_image_repeats_one_at_weight_zero(self) -> None:
        samples = order_epoch(ROWS[:1], weights=None, seed=0, epoch=1)
        (step,) = shards(samples, batch_size=32, processes=2, rank=1, micro_batch=8)
        (part,) = step.parts
        assert part.samples.rows.tolist() == [1000]
        assert part.weights.tolist() == [0]
        assert step.images == 1

    def test_turns_stay_with_their_images(self) -> None:
        samples = order_epoch(np.arange(100), weights=weights_of("sampler"), seed=0, epoch=1)
        steps = shards(samples, batch_size=32, processes=1, rank=0, micro_batch=8)
        turns = np.concatenate([part.samples.turns for step in steps for part in step.parts])
        assert turns.tolist() == samples.turns.tolist()

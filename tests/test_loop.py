"""The levers of fine-tuning, each seen to do what it says in a real short run."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from digits import write_digits
from holotype.config import TrainConfig, merge, resolve_config
from holotype.errors import ConfigError, TrainingError
from holotype.fit import learn, open_session
from holotype.fit.batches import Batch
from holotype.fit.run import Best, Learned
from holotype.head import Scores
from holotype.models import save_weights, weights_of
from holotype.runlog import RunLog
from networks import small_network
from teachers import write_teacher

BASE: dict[str, Any] = {
    "data": {"size": 32},
    "model": {"name": "test_resnet", "weights": "none"},
    "augment": {"flip": 0.0},
    "fit": {"epochs": 2, "deterministic": True, "batch_size": 16, "scale": 1.0},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("loop") / "digits")


def trained(source: Path, /, *, folder: Path | None = None, **sections: Any) -> tuple[Learned, RunLog]:
    config = resolve_config(TrainConfig, overrides=merge(BASE, sections))
    log = RunLog(None)
    return learn(open_session(source, config, device="cpu", folder=folder), log=log), log


def weights(learned: Learned) -> Mapping[str, torch.Tensor]:
    return learned.best.state


def distance(one: Learned, other: Learned) -> float:
    """The largest difference of a weight, as a share of its tensor's largest."""
    apart = [
        float(
            (weights(one)[name].float() - value.float()).abs().max() / value.float().abs().max().clamp(1e-6)
        )
        for name, value in weights(other).items()
        if value.is_floating_point()
    ]
    return max(apart)


class TestMicroBatches:
    """What is computed at once is a matter of memory, not of the result."""

    @pytest.mark.parametrize("lever", [{"model": {"dropout": 0.3}}, {"augment": {"cutmix": 1.0}}])
    def test_the_step_stays_the_same(self, data: Path, lever: dict[str, Any]) -> None:
        # Batch norm that learns sees what is computed at once, so it is frozen here.
        frozen = merge(lever, {"fit": {"freeze_norm": True}})
        whole, _ = trained(data, **frozen)
        parts, _ = trained(data, **merge(frozen, {"fit": {"micro_batch": 3}}))
        assert distance(whole, parts) < 1e-3

    def test_few_of_them_are_in_memory_at_a_time(self, data: Path) -> None:
        fit = {"epochs": 1, "micro_batch": 2, "freeze_norm": True}
        config = resolve_config(TrainConfig, overrides=merge(BASE, {"fit": fit}))
        session = open_session(data, config, device="cpu")
        alive: list[int] = []

        def count(module: torch.nn.Module, _: object) -> None:
            if module.training:
                alive.append(sum(type(thing) is Batch for thing in gc.get_objects()))

        session.classifier.register_forward_pre_hook(count)
        learn(session)
        assert len(alive) == 8 + 8 + 7 + 7 + 7  # parts of five steps
        assert max(alive) <= 2

    def test_dropout_does_something(self, data: Path) -> None:
        with_it, _ = trained(data, model={"dropout": 0.3}, fit={"freeze_norm": True})
        without, _ = trained(data, model={"dropout": 0.0}, fit={"freeze_norm": True})
        assert distance(with_it, without) > 1e-3


def test_a_first_step_that_is_no_number_is_not_blamed_on_the_rate(data: Path) -> None:
    session = open_session(data, resolve_config(TrainConfig, overrides=BASE), device="cpu")
    with torch.no_grad():
        next(session.classifier.parameters()).fill_(torch.nan)
    with pytest.raises(TrainingError, match=r"loss nan.*batch of train/.*no matter of the rate") as caught:
        learn(session)
    assert caught.value.fix == "check model.weights and these images"


def test_batch_norm_cannot_learn_from_one_image(data: Path) -> None:
    with pytest.raises(TrainingError, match="needs more than one image at a time") as caught:
        trained(data, model={"name": "resnet18"}, fit={"micro_batch": 1, "freeze_norm": False})
    assert "fit.freeze_norm=true" in str(caught.value.fix)


class TestStopping:
    def test_no_better_for_as_long_as_patience_says(
        self, data: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        still = {"name": "adamw", "learning_rate": 1e-30}
        _, log = trained(data, fit={"epochs": 9, "patience": 2, "optimizer": still, "freeze_norm": True})
        assert len([row for row in log.metrics if row["stage"] == "fine-tune"]) == 3
        assert "stopped early" in capsys.readouterr().err

    @pytest.mark.parametrize("schedule", [{"name": "cosine"}, {"name": "plateau", "wait": 1}])
    def test_fine_tuning_that_gets_better_goes_on_however_good_the_head_was(
        self, data: Path, schedule: dict[str, Any]
    ) -> None:
        fit = {
            "epochs": 4, "patience": 1, "schedule": schedule, "warmup": 0.0, "metric": "log_loss",
            "optimizer": {"name": "sgd", "learning_rate": 0.003}, "freeze_norm": True,
        }  # fmt: skip
        config = resolve_config(TrainConfig, overrides=merge(BASE, {"fit": fit}))
        session, log = open_session(data, config, device="cpu"), RunLog(None)
        unmatched = Best(
            weights_of(session.classifier),
            Scores(0.0, 1.0, 1.0, 1.0, 1.0, 0.0),
            np.zeros((len(session.dataset.rows("validation")), 3), dtype=np.float32),
        )
        learned = learn(session, log=log, start=unmatched)
        losses = [float(row["validation_loss"]) for row in log.metrics]
        assert losses == sorted(losses, reverse=True), "each epoch is better than the one before"
        assert len(losses) == 4
        assert learned.best is unmatched, "what it began with is still the best"
        if schedule["name"] == "plateau":
            assert {float(row["learning_rate"]) for row in log.metrics} == {0.003}

    def test_plateau_lowers_the_rate_where_nothing_improves(self, data: Path) -> None:
        fit = {
            "epochs": 5, "patience": 9, "schedule": {"name": "plateau", "wait": 1}, "warmup": 0.0,
            "optimizer": {"name": "adamw", "learning_rate": 1e-30}, "freeze_norm": True, "metric": "accuracy",
        }  # fmt: skip
        _, log = trained(data, fit=fit)
        rates = [float(row["learning_rate"]) for row in log.metrics if row["stage"] == "fine-tune"]
        assert rates[0] == pytest.approx(1e-30, abs=0)
        assert rates[-1] < rates[0] / 5


class TestWeights:
    def test_l2_pulls_them_to_zero(self, data: Path) -> None:
        sgd = {
            "fit": {
                "optimizer": {"name": "sgd", "learning_rate": 0.05, "weight_decay": 0.0},
                "ema": None,
                "clip_norm": None,
            }
        }

        def size(learned: Learned) -> float:
            kernels = [value for value in weights(learned).values() if value.ndim == 4]
            return float(torch.stack([kernel.norm() for kernel in kernels]).norm())

        free, _ = trained(data, **sgd)
        pulled, _ = trained(data, **merge(sgd, {"fit": {"l2": 1.0}}))
        assert size(pulled) < 0.95 * size(free)

    def test_the_averaged_ones_are_judged_and_kept(self, data: Path) -> None:
        average, _ = trained(data, fit={"ema": 0.99})
        last, _ = trained(data, fit={"ema": None})
        assert distance(average, last) > 1e-3

    def test_a_step_is_no_longer_than_clip_norm_allows(self, data: Path) -> None:
        """One step of plain gradient descent: the weights move by the rate times the clipped norm."""
        fit = {
            "epochs": 1, "batch_size": 72, "warmup": 0.0, "ema": None, "freeze_norm": True,
            "optimizer": {"name": "sgd", "learning_rate": 0.1, "weight_decay": 0.0, "momentum": 0.0},
        }  # fmt: skip
        config = resolve_config(TrainConfig, overrides=merge(BASE, {"fit": fit}))
        before = weights_of(open_session(data, config, device="cpu").classifier)

        def moved(clip: float | None) -> float:
            after = weights(trained(data, fit={**fit, "clip_norm": clip})[0])
            apart = [(after[name] - value).float().norm() for name, value in before.items()]
            return float(torch.stack(apart).norm())

        assert moved(0.01) == pytest.approx(0.001, rel=1e-2)
        assert moved(None) > 0.01

    def test_a_teacher_is_learned_from(self, data: Path, tmp_path: Path) -> None:
        teacher = write_teacher(tmp_path, "test_resnet", side=32, classes=("0", "1", "2"))
        taught, _ = trained(data, distill={"teacher": str(teacher.path), "weight": 0.9})
        alone, _ = trained(data)
        assert distance(taught, alone) > 1e-2

    def test_gradual_unfreezing_opens_one_stage_after_the_other(
        self, data: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        fit = {"gradual": 1, "epochs": 3, "patience": 9, "unfreeze": "all", "ema": None}
        config = resolve_config(TrainConfig, overrides=merge(BASE, {"fit": fit}))
        session = open_session(data, config, device="cpu")
        before = weights_of(session.classifier)
        learned = learn(session)
        after = weights_of(session.classifier)  # the last ones, not the best
        still = {stage: f"{stage}.0.conv1.weight" for stage in ("layer1", "layer2", "layer3", "layer4")}
        moved = [stage for stage, name in still.items() if not torch.equal(after[name], before[name])]
        assert moved == ["layer2", "layer3", "layer4"]
        assert learned.steps is not None
        opened = [
            next(int(float(row["epoch"])) for row in learned.steps if f"gradient_norm/stage {number}" in row)
            for number in (4, 3, 2)
        ]
        assert opened == [1, 2, 3]
        said = capsys.readouterr().err
        assert "frozen: stem to stage 3 (of 5 stages)" in said
        assert "from epoch 2 on stage 3 is trained too; frozen: stem to stage 2 (of 5 stages)" in said
        assert "from epoch 3 on stage 2 is trained too; frozen: stem to stage 1 (of 5 stages)" in said

    def test_gradual_unfreezing_leaves_the_first_stages_alone(self, data: Path) -> None:
        config = resolve_config(TrainConfig, overrides=BASE)
        before = open_session(data, config, device="cpu").classifier.network.state_dict()
        learned, _ = trained(data, fit={"gradual": 1, "epochs": 1, "unfreeze": "all"})
        moved = {name for name, value in weights(learned).items() if not torch.equal(value, before[name])}
        kernels = [name for name in before if before[name].ndim == 4]
        assert kernels[0] not in moved
        assert any("fc" in name or "head" in name or "classifier" in name for name in moved)


class TestFresh:
    """What pretrained weights have nothing for is trained, however much of them is frozen."""

    def test_attention_in_frozen_blocks_learns(self, data: Path, tmp_path: Path) -> None:
        save_weights(small_network("test_efficientnet"), tmp_path / "w.safetensors")
        model = {"name": "test_efficientnet", "weights": str(tmp_path / "w.safetensors"), "attention": "cbam"}
        config = resolve_config(
            TrainConfig, overrides=merge(BASE, {"model": model, "fit": {"unfreeze": 1, "batch_size": 8}})
        )
        session = open_session(data, config, device="cpu")
        before = weights_of(session.classifier)
        learn(session)
        after = weights_of(session.classifier)  # the last ones: the fitted head may stay the best
        moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
        assert session.classifier.fresh
        assert session.classifier.fresh <= moved
        assert "conv_stem.weight" not in moved

    def test_behind_a_random_first_convolution_all_is_trained_and_no_head_is_fitted(
        self, data: Path, tmp_path: Path
    ) -> None:
        save_weights(small_network("resnet18"), tmp_path / "w.safetensors")
        model = {"name": "resnet18", "weights": str(tmp_path / "w.safetensors"), "stem": "small"}
        fit = {"epochs": 1, "scale": "auto"}
        config = resolve_config(TrainConfig, overrides=merge(BASE, {"model": model, "fit": fit}))
        session, log = open_session(data, config, device="cpu"), RunLog(None)
        settled = session.config.fit
        assert (settled.unfreeze, settled.freeze_norm, settled.scale) == ("all", False, 1.0)
        before = weights_of(session.classifier)
        after = weights(learn(session, log=log))
        assert [row["stage"] for row in log.metrics] == ["fine-tune"]
        for name in ("conv1.weight", "bn1.running_mean"):
            assert not torch.equal(after[name], before[name])
        with pytest.raises(ConfigError, match="a first convolution of random weights tells nothing"):
            trained(data, model=model, fit={"epochs": 0})


LEVERS: dict[str, dict[str, Any]] = {
    "attention": {"model": {"attention": "eca"}},
    "mixup": {"augment": {"mixup": 0.2}},
    "focal": {"fit": {"imbalance": "focal"}},
    "randaugment": {"augment": {"policy": "randaugment"}},
    "one-cycle": {"fit": {"schedule": {"name": "one-cycle"}}},
    "lamb": {"fit": {"optimizer": {"name": "lamb", "learning_rate": 2e-3}}},
    "layer decay": {"fit": {"layer_decay": 0.7}},
    "growing images": {"data": {"size": 64}, "fit": {"scale": 1.0, "scale_start": 0.5}},
}


@pytest.mark.slow
@pytest.mark.parametrize("lever", LEVERS)
def test_every_lever_changes_what_is_learned(data: Path, lever: str) -> None:
    setting = LEVERS[lever]
    plain = {"data": setting["data"]} if "data" in setting else {}
    one, log = trained(data, **setting)
    other, _ = trained(data, **plain)
    losses = [float(row["train_loss"]) for row in log.metrics if row["stage"] == "fine-tune"]
    assert np.isfinite(losses).all()
    if weights(one).keys() == weights(other).keys():
        assert distance(one, other) > 1e-4
    else:
        assert weights(one).keys() > weights(other).keys(), "attention adds modules"


def test_what_the_network_is_fed_can_be_looked_at(data: Path, tmp_path: Path) -> None:
    trained(data, folder=tmp_path, augment={"cutmix": 1.0})
    assert (tmp_path / "train_batch.jpg").stat().st_size > 5000
    steps = (tmp_path / "steps.csv").read_text().splitlines()
    assert steps[0].startswith("step,epoch,loss,accuracy,gradient_norm")
    assert len(steps) > 5


def test_time_spent_augmenting_is_told_from_waiting(data: Path) -> None:
    _, log = trained(data, augment={"policy": "randaugment", "noise": [0.01, 0.05]})
    rows = [row for row in log.timings if row["stage"] == "fine-tune"]
    assert len(rows) == 2
    for row in rows:
        assert 0 < float(row["augment_seconds"]) < float(row["seconds"])
        assert float(row["augment_seconds"]) + float(row["data_wait_seconds"]) < float(row["seconds"])

"""Freezing: what is trained in which epoch, what stays as it is, and what is said about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from holotype.config import FitConfig, TrainConfig, resolve_config
from holotype.errors import ConfigError
from holotype.fit.freeze import FreezePlan, apply_freezing, training_mode
from holotype.models import Classifier, head_of, pretrained, save_weights, stages
from networks import small_network


def network(name: str = "test_resnet") -> Classifier:
    torch.manual_seed(0)
    return small_network(name)


def configure(**settings: Any) -> FitConfig:
    return FitConfig(**{"unfreeze": "all", **settings})


def trained(classifier: Classifier) -> list[str]:
    return [n for n, parameter in classifier.network.named_parameters() if parameter.requires_grad]


def norms(module: nn.Module) -> list[nn.BatchNorm2d]:
    return [child for child in module.modules() if isinstance(child, nn.BatchNorm2d)]


def images(count: int = 4) -> torch.Tensor:
    return torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8)


class TestFreeze:
    def test_the_first_stages_stay_and_the_line_says_so(self) -> None:
        classifier = network()
        plan = apply_freezing(classifier, configure(freeze=3), epoch=1)
        assert plan.frozen == ("stem", "stage 1", "stage 2")
        assert plan.partly == ()
        own = stages(classifier)
        for at, stage in enumerate(own):
            assert all(parameter.requires_grad == (at >= 3) for parameter in stage.parameters)
        assert all(parameter.requires_grad for parameter in head_of(classifier).layer.parameters())
        assert plan.trained == sum(p.numel() for p in classifier.parameters() if p.requires_grad)
        assert plan.summary == (
            f"frozen: stem to stage 2 (of 5 stages); training {plan.trained:,} of {plan.total:,} parameters"
        )

    @pytest.mark.parametrize(("count", "frozen"), [(0, 0), (5, 5)])
    def test_none_or_all_of_them(self, count: int, frozen: int) -> None:
        classifier = network()
        plan = apply_freezing(classifier, configure(freeze=count), epoch=1)
        assert len(plan.frozen) == frozen
        assert trained(classifier) == (
            ["fc.weight", "fc.bias"] if frozen else [n for n, _ in classifier.network.named_parameters()]
        )
        assert ("frozen: nothing (of 5" in plan.summary) == (not frozen)

    def test_more_than_there_are_is_an_error_that_names_them(self) -> None:
        with pytest.raises(
            ConfigError, match=r"fit.freeze: .* 5 stages \(stem, stage 1, .*stage 4\), 6 were"
        ):
            apply_freezing(network(), configure(freeze=6), epoch=1)

    @pytest.mark.parametrize("unfreeze", [2, "most"])
    def test_with_unfreeze_is_an_error(self, unfreeze: int | str) -> None:
        with pytest.raises(ConfigError, match="give one of them"):
            apply_freezing(network(), configure(freeze=1, unfreeze=unfreeze), epoch=1)

    def test_goes_with_every_preset(self) -> None:
        for preset in ("fast", "balanced", "thorough"):
            config = resolve_config(TrainConfig, overrides={"preset": preset, "fit": {"freeze": 2}})
            plan = apply_freezing(network(), config.fit, epoch=1)
            assert plan.frozen == ("stem", "stage 1")

    def test_no_graph_is_recorded_below(self) -> None:
        classifier = network()
        apply_freezing(classifier, configure(freeze=4), epoch=1)
        recorded: dict[str, bool] = {}
        for name in ("conv1", "layer3", "layer4"):
            classifier.network.get_submodule(name).register_forward_hook(
                lambda _, __, output, name=name: recorded.update({name: output.requires_grad})
            )
        classifier(images())
        assert recorded == {"conv1": False, "layer3": False, "layer4": True}


class TestUnfreeze:
    @pytest.mark.parametrize(("unfreeze", "expected"), [(0, 0), (2, 2), ("most", 3), ("all", 5)])
    def test_the_last_blocks_are_trained(self, unfreeze: int | str, expected: int) -> None:
        classifier = network()  # five blocks: the stem, and one in each stage
        plan = apply_freezing(classifier, configure(unfreeze=unfreeze), epoch=1)
        assert len(plan.frozen) == 5 - expected

    def test_a_stage_of_which_a_part_is_trained(self) -> None:
        plan = apply_freezing(network("tf_efficientnet_lite0"), configure(unfreeze="most"), epoch=1)
        assert plan.frozen == ("stem", "stage 1", "stage 2", "stage 3")[: len(plan.frozen)]
        assert plan.summary.startswith("frozen: stem to stage ")
        assert " of 3.38 M parameters" in plan.summary or " of 3.37 M parameters" in plan.summary

    def test_more_than_there_are_is_an_error(self) -> None:
        with pytest.raises(ConfigError, match=r"fit.unfreeze: the backbone has 5 blocks, 9 were asked for"):
            apply_freezing(network(), configure(unfreeze=9), epoch=1)


class TestGradual:
    def plans(self, classifier: Classifier, **settings: Any) -> list[FreezePlan]:
        return [apply_freezing(classifier, configure(**settings), epoch=epoch) for epoch in range(1, 13)]

    def test_one_more_stage_for_every_k_epochs(self) -> None:
        plans = self.plans(network(), gradual=2)
        assert [len(plan.frozen) for plan in plans] == [4, 4, 3, 3, 2, 2, 1, 1, 0, 0, 0, 0]
        assert plans[0].frozen == ("stem", "stage 1", "stage 2", "stage 3")

    def test_goes_no_further_than_freeze_or_unfreeze_allow(self) -> None:
        assert [len(plan.frozen) for plan in self.plans(network(), gradual=3, freeze=2)][::3] == [4, 3, 2, 2]
        assert [len(plan.frozen) for plan in self.plans(network(), gradual=1, unfreeze=2)][:4] == [4, 3, 3, 3]

    def test_what_lies_before_the_head_goes_with_the_last_stage(self) -> None:
        first = self.plans(network("test_convnext"), gradual=1)[0]
        assert first.stages[-1] == "final"
        assert first.frozen == ("stem", "stage 1", "stage 2", "stage 3")

    def test_depends_on_the_epoch_alone(self) -> None:
        walked, jumped = network(), network()
        for epoch in range(1, 4):
            apply_freezing(walked, configure(gradual=1), epoch=epoch)
        apply_freezing(jumped, configure(gradual=1), epoch=3)
        assert trained(walked) == trained(jumped)
        apply_freezing(walked, configure(gradual=1), epoch=1)
        apply_freezing(jumped, configure(gradual=1), epoch=1)
        assert trained(walked) == trained(jumped)

    def test_a_gradient_from_before_does_not_stay(self) -> None:
        classifier = network()
        apply_freezing(classifier, configure(), epoch=1)
        classifier(images())[0].sum().backward()
        apply_freezing(classifier, configure(freeze=5), epoch=2)
        kept = [n for n, p in classifier.network.named_parameters() if p.grad is not None]
        assert kept == ["fc.weight", "fc.bias"]


class TestFresh:
    """What is random beside pretrained weights."""

    def pretrained(self, folder: Path, kind: str) -> Classifier:
        save_weights(network("test_efficientnet"), folder / "w.safetensors")
        own = network("test_efficientnet").architecture.model_copy(update={"attention": kind})
        classifier, _ = pretrained(own, weights=str(folder / "w.safetensors"))
        return classifier

    @pytest.mark.parametrize("kind", ["se", "eca", "cbam"])
    def test_is_trained_in_frozen_blocks_and_the_line_says_so(self, kind: str, tmp_path: Path) -> None:
        classifier = self.pretrained(tmp_path, kind)
        assert classifier.fresh
        plain = apply_freezing(network("test_efficientnet"), configure(unfreeze=1), epoch=1)
        plan = apply_freezing(classifier, configure(unfreeze=1), epoch=1)
        fresh = {name for name, _ in classifier.network.named_parameters() if name in classifier.fresh}
        assert fresh <= set(trained(classifier))
        assert (plan.frozen, plan.partly) == (plain.frozen, plain.partly)
        assert ", but for the fresh attention modules (of " in plan.summary
        assert "fresh" not in plain.summary
        whole = apply_freezing(classifier, configure(unfreeze="all"), epoch=1)
        assert whole.summary.startswith("frozen: nothing (of ")

    def test_norms_of_its_own_learn_their_statistics_whatever_is_frozen(self, tmp_path: Path) -> None:
        classifier = self.pretrained(tmp_path, "cbam")
        apply_freezing(classifier, configure(unfreeze=1), epoch=1)
        training_mode(classifier, freeze_norm=True)
        learning = {
            f"{name}.running_mean"
            for name, module in classifier.network.named_modules()
            if isinstance(module, nn.BatchNorm2d) and module.training
        }
        assert learning
        assert learning == {name for name in classifier.fresh if name.endswith("running_mean")}

    def test_nothing_is_where_all_is_random_or_all_was_loaded(self, tmp_path: Path) -> None:
        own = network("test_efficientnet").architecture.model_copy(update={"attention": "se"})
        classifier, _ = pretrained(own, weights="none")
        assert classifier.fresh == frozenset()
        save_weights(classifier, tmp_path / "w.safetensors")
        assert pretrained(own, weights=str(tmp_path / "w.safetensors"))[0].fresh == frozenset()


class TestTrainingMode:
    def test_statistics_of_frozen_stages_stay(self) -> None:
        classifier = network()
        apply_freezing(classifier, configure(freeze=3), epoch=1)
        training_mode(classifier, freeze_norm=False)
        classifier(images())
        moved = [bool(norm.running_mean.any()) for norm in norms(classifier)]
        frozen = [not norm.weight.requires_grad for norm in norms(classifier)]
        assert any(frozen)
        assert moved == [not still for still in frozen]

    def test_all_statistics_stay_with_freeze_norm_and_dropout_is_on(self) -> None:
        classifier = network()
        apply_freezing(classifier, configure(), epoch=1)
        training_mode(classifier, freeze_norm=True)
        classifier(images())
        assert not any(norm.running_mean.any() for norm in norms(classifier))
        assert classifier.training
        training_mode(classifier, freeze_norm=False)
        assert all(norm.training for norm in norms(classifier))

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from holotype.config import TrainConfig, resolve_config
from holotype.dataset import Shape
from holotype.errors import ConfigError
from holotype.fit.processes import join_processes
from holotype.fit.settings import fit_shape, fit_shapes, idle_settings, settle_measured, settle_untold
from holotype.imbalance import Remedy
from holotype.models import Architecture, create, input_spec


def configured(**sections: Any) -> TrainConfig:
    return resolve_config(TrainConfig, overrides=sections)


def idle(config: TrainConfig, *, imbalance: Remedy, images: int = 100_000) -> tuple[str, ...]:
    return idle_settings(config, imbalance=imbalance, images=images)


class TestIdle:
    def test_a_decay_of_the_average_that_the_run_is_too_short_for(self) -> None:
        def told(decay: float | None, *, steps: int) -> tuple[str, ...]:
            config = configured(fit={"epochs": 2, "batch_size": 10, "ema": decay})
            return idle(config, imbalance="none", images=5 * steps)

        (line,) = told(0.999, steps=31_620)
        assert line == (
            "fit.ema=0.999 is never reached: the decay warms up to it in 31,623 steps, the run has 31,620"
        )
        assert told(0.999, steps=31_624) == ()
        assert told(None, steps=100) == ()
        assert told(0.99, steps=100) == (), "the default, which nobody asked for"

    def test_nobody_is_told_about_what_a_preset_set(self) -> None:
        for preset in ("probe", "fast", "balanced", "thorough"):
            config = configured(preset=preset, fit={"epochs": 0})
            assert idle(config, imbalance="none") == ()
            config = configured(preset=preset, fit={"epochs": 0, "batch_size": 8})
            (line,) = idle(config, imbalance="none")
            assert line.startswith("fit.batch_size has no effect")
        for preset in ("none", "light", "standard", "strong"):
            assert idle(configured(augment={"preset": preset}), imbalance="none") == ()

    def test_nor_about_what_auto_came_to_in_the_run_whose_recipe_it_is(self) -> None:
        settled = {
            "unfreeze": "most",
            "scale": 0.8,
            "freeze_norm": True,
            "precision": "fp32",
            "compile": False,
        }
        config = configured(preset="probe", fit={**settled, "micro_batch": 32})
        assert idle(config, imbalance="none") == ()

    @pytest.mark.parametrize(
        ("sections", "cure", "key"),
        [
            ({"fit": {"schedule": {"name": "one-cycle"}, "warmup": 0.3}}, {}, "fit.warmup"),
            ({"fit": {"focus_weight": 5.0}}, {"fit": {"focus": "list.csv"}}, "fit.focus_weight"),
            ({"distill": {"weight": 0.9}}, {"distill": {"teacher": "runs/x"}}, "distill.weight"),
            ({"augment": {"crop": 1.0, "aspect": 2.0}}, {"augment": {"crop": 0.9}}, "augment.aspect"),
            ({"augment": {"magnitude": 5}}, {"augment": {"policy": "randaugment"}}, "augment.magnitude"),
            ({"augment": {"mixed": 0.5}}, {"augment": {"cutmix": 1.0}}, "augment.mixed"),
        ],
    )
    def test_each_is_named_with_what_it_needs(
        self, sections: dict[str, Any], cure: dict[str, Any], key: str
    ) -> None:
        from holotype.config import merge

        (line,) = idle(configured(**sections), imbalance="none")
        assert line.startswith(f"{key} has no effect without ")
        if cure:
            assert idle(configured(**merge(sections, cure)), imbalance="none") == ()

    @pytest.mark.parametrize(
        ("fit", "needs"),
        [
            ({"focal_gamma": 1.0}, "focal"),
            ({"focal_alpha": "balanced"}, "focal"),
            ({"logit_tau": 2.0}, "logit-adjust"),
        ],
    )
    def test_settings_of_a_remedy_need_that_remedy(self, fit: dict[str, Any], needs: Remedy) -> None:
        (line,) = idle(configured(fit=fit), imbalance="none")
        assert line.endswith(f"fit.imbalance={needs}")
        assert idle(configured(fit=fit), imbalance=needs) == ()


class TestPresets:
    def test_a_preset_does_not_lend_its_rate_to_another_optimizer(self) -> None:
        assert configured(preset="balanced").fit.optimizer.learning_rate == 6e-4
        sgd = configured(preset="balanced", fit={"optimizer": {"name": "sgd"}}).fit.optimizer
        assert (sgd.name, sgd.learning_rate) == ("sgd", 0.1)
        slower = configured(preset="balanced", fit={"optimizer": {"weight_decay": 0.1}}).fit.optimizer
        assert (slower.learning_rate, slower.weight_decay) == (6e-4, 0.1)

    @pytest.mark.parametrize(
        ("overrides", "said"),
        [
            (
                {"preset": "fast"},
                r"^preset=fast: the recipe \(of preset=thorough\) sets fit.epochs and \d+ more",
            ),
            (
                {"augment": {"preset": "strong"}},
                r"^augment.preset=strong: .* sets augment.rotation and \d+ more",
            ),
            (
                {"fit": {"optimizer": {"name": "lamb"}}},
                r"^fit.optimizer.name=lamb: .*fit.optimizer.learning_rate",
            ),
        ],
    )
    def test_a_choice_that_a_whole_recipe_would_undo_is_refused(
        self, overrides: dict[str, Any], said: str
    ) -> None:
        recipe = configured(preset="thorough").model_dump(mode="json")  # as config.yaml and best.yaml are
        with pytest.raises(ConfigError, match=said) as caught:
            resolve_config(TrainConfig, recipe=recipe, overrides=overrides)
        assert "\n" not in str(caught.value)
        assert "delete" in (caught.value.fix or "")

    def test_what_a_whole_recipe_says_already_may_be_said_again(self) -> None:
        config = configured(preset="thorough")
        again = {
            "preset": "thorough",
            "augment": {"preset": "light"},
            "fit": {"optimizer": {"name": "adamw"}},
        }
        recipe = config.model_dump(mode="json")
        assert resolve_config(TrainConfig, recipe=recipe, overrides=again) == config

    def test_another_optimizer_with_its_own_rate_may_replace_that_of_a_recipe(self) -> None:
        recipe = configured(preset="thorough").model_dump(mode="json")
        lamb = {"fit": {"optimizer": {"name": "lamb", "learning_rate": 0.005}}}
        optimizer = resolve_config(TrainConfig, recipe=recipe, overrides=lamb).fit.optimizer
        assert (optimizer.name, optimizer.learning_rate) == ("lamb", 0.005)

    def test_a_rate_without_the_optimizer_it_is_for_is_that_of_adamw(self) -> None:
        recipe = {"fit": {"optimizer": {"learning_rate": 1e-3}}}
        with pytest.raises(ConfigError, match=r"fit\.optimizer\.learning_rate"):
            resolve_config(TrainConfig, recipe=recipe, overrides={"fit": {"optimizer": {"name": "sgd"}}})

    @pytest.mark.parametrize(
        "recipe",
        [
            {"data": {"size": 64}, "fit": {"batch_size": 8}},
            {"preset": "fast", "data": {"size": 64}},
            {"fit": {"epochs": 5}},  # over any preset, as ever
        ],
    )
    def test_a_short_recipe_leaves_the_preset_to_the_command_line(self, recipe: dict[str, Any]) -> None:
        config = resolve_config(TrainConfig, recipe=recipe, overrides={"preset": "thorough"})
        assert (config.preset, config.fit.patience) == ("thorough", 8)
        assert config.fit.epochs == recipe.get("fit", {}).get("epochs", 24)


class TestSizes:
    def test_they_grow_over_the_first_half(self) -> None:
        config = configured(fit={"epochs": 8, "scale": 1.0, "scale_start": 0.5}, data={"size": 128})
        spec = input_spec(config.model, config.data)
        sides = [fit_shape(config, spec, epoch=epoch).height for epoch in range(1, 9)]
        assert sides[0] == 64
        assert sides == sorted(sides)
        assert sides[4:] == [128] * 4
        assert fit_shapes(config, spec) == {Shape(side, side) for side in sides}

    def test_a_network_of_one_size_refuses_others(self) -> None:
        model = {"name": "vit_tiny_patch16_224", "weights": "none"}
        for fit in ({"scale": 0.5}, {"scale_start": 0.5}):
            with pytest.raises(ConfigError, match="images of one size only"):
                settle_untold(configured(model=model, fit=fit))
        settled = settle_untold(configured(model=model))
        assert settled.fit.scale == 1


class TestRefusals:
    @pytest.mark.parametrize(
        "sections",
        [
            {"augment": {"noise": [0.05, 0.01]}},
            {"augment": {"noise": [-1, 2]}},
            {"augment": {"noise": [0.01, math.nan]}},
            {"augment": {"mixup": math.inf}},
            {"augment": {"cutmix": math.nan}},
            {"fit": {"scale_start": math.inf}},
            {"fit": {"scale_start": 5.0}},
            {"fit": {"l2": math.inf}},
            {"fit": {"logit_tau": math.nan}},
            {"fit": {"focal_alpha": {"boot": 0.0}}},
            {"fit": {"focal_alpha": {"boot": math.nan}}},
            {"fit": {"focus_weight": math.inf}},
            {"fit": {"optimizer": {"learning_rate": math.inf}}},
            {"fit": {"optimizer": {"name": "sgd", "weight_decay": math.inf}}},
            {"fit": {"optimizer": {"name": "lamb", "learning_rate": math.nan}}},
        ],
    )
    def test_numbers_that_are_none_or_out_of_order(self, sections: dict[str, Any]) -> None:
        (section, keys), *_ = sections.items()
        with pytest.raises(ConfigError, match=rf"{section}\.{next(iter(keys))}"):
            configured(**sections)

    def test_images_that_would_shrink(self) -> None:
        for fit, scale in (({"scale_start": 1.5, "scale": 1.0}, "1"), ({"scale_start": 0.9}, "0.8")):
            with pytest.raises(ConfigError, match=rf"fit.scale_start: .*to fit.scale={scale}, which is less"):
                settle_untold(configured(fit=fit))
        assert settle_untold(configured(fit={"scale_start": 0.8})).fit.scale == 0.8


@pytest.mark.parametrize("side", [64, 32], ids=["usual", "one value of an image"])
def test_measured_settings_are_numbers_that_a_resumed_run_repeats(side: int) -> None:
    config = settle_untold(configured(model={"name": "test_resnet", "weights": "none"}, data={"size": side}))
    spec = input_spec(config.model, config.data)
    network = Architecture(
        name="test_resnet", classes=3, height=side, width=side, mean=(0, 0, 0), std=(1, 1, 1)
    )
    device = torch.device("cpu")
    fit = settle_measured(
        config, create(network), spec=spec, device=device, processes=join_processes(cpu=True)
    )
    assert fit.micro_batch == fit.batch_size
    assert fit.precision in ("fp32", "bf16")
    assert fit.compile is False

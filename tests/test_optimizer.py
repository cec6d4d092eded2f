"""Optimizers: rates and decay of every parameter, timm's by name, frozen parameters, resuming."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.optim import list_optimizers
from torch import nn
from torch.nn import functional

from holotype.config import FitConfig
from holotype.errors import ConfigError
from holotype.fit.freeze import apply_freezing
from holotype.fit.optimizer import add_l2, build_optimizer
from holotype.models import Classifier, blocks, head_of
from networks import small_network

SIDE = 32


def network(name: str = "test_efficientnet") -> Classifier:
    torch.manual_seed(0)
    return small_network(name, side=160 if "vit" in name else SIDE, classes=4)


def configure(optimizer: dict[str, Any] | str, **settings: Any) -> FitConfig:
    chosen = {"name": optimizer} if isinstance(optimizer, str) else optimizer
    return FitConfig(optimizer=chosen, **{"unfreeze": "all", **settings})


def learn(classifier: Classifier, optimizer: torch.optim.Optimizer, *, steps: range) -> None:
    classifier.eval()
    for step in steps:
        dice = torch.Generator().manual_seed(step)
        images = torch.randint(0, 256, (8, SIDE, SIDE, 3), dtype=torch.uint8, generator=dice)
        labels = torch.randint(0, 4, (8,), generator=dice)
        optimizer.zero_grad()
        functional.cross_entropy(classifier(images)[0], labels).backward()
        optimizer.step()


def state_of(classifier: Classifier) -> dict[str, torch.Tensor]:
    return copy.deepcopy(classifier.network.state_dict())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


class TestGroups:
    @pytest.mark.parametrize("name", ["test_efficientnet", "test_vit", "test_convnext"])
    def test_hold_every_parameter_once_and_decay_only_weights(self, name: str) -> None:
        classifier = network(name)
        apply_freezing(classifier, configure("adamw", unfreeze=1), epoch=1)
        optimizer = build_optimizer(classifier, configure({"name": "adamw", "weight_decay": 0.3}))
        held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in classifier.parameters())
        decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        for label, parameter in classifier.network.named_parameters():
            spared = parameter.ndim == 1 or "pos_embed" in label or "cls_token" in label
            assert decay[id(parameter)] == (0.0 if spared else 0.3), label

    def test_rates_fall_from_the_head_to_the_input(self) -> None:
        classifier = network()
        config = configure({"name": "adamw", "learning_rate": 0.01}, layer_decay=0.5, backbone_rate=0.2)
        optimizer = build_optimizer(classifier, config)
        rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        groups = blocks(classifier)
        for parameter in head_of(classifier).layer.parameters():
            assert rate[id(parameter)] == pytest.approx(0.01)
        for distance, group in enumerate(reversed(groups)):
            for parameter in group:
                assert rate[id(parameter)] == pytest.approx(0.01 * 0.2 * 0.5**distance)

    def test_are_few_where_all_rates_are_equal(self) -> None:
        assert len(build_optimizer(network(), configure("adamw")).param_groups) == 2


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_fused_step_is_that_of_the_plain_loop(name: str) -> None:
    ours, theirs = network(), network()
    config = configure({"name": name, "learning_rate": 1e-2, "weight_decay": 0.1})
    optimizer = build_optimizer(ours, config)
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    reference = (
        torch.optim.AdamW(groups, lr=1e-2, foreach=False)
        if name == "adamw"
        else torch.optim.SGD(groups, lr=1e-2, momentum=0.9, nesterov=True, foreach=False)
    )
    # The same gradients for both: training would let AdamW blow differences in the last bit up.
    for step in range(3):
        dice = torch.Generator().manual_seed(step)
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            one.grad = torch.randn(one.shape, generator=dice)
            other.grad = one.grad.clone()
        optimizer.step()
        reference.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb", "lion", "lookahead_radam"])
def test_frozen_parameters_stay_as_they_are_until_they_are_unfrozen(name: str) -> None:
    classifier = network()
    config = configure({"name": name, "learning_rate": 1e-2, "weight_decay": 0.5}, unfreeze=2)
    optimizer = build_optimizer(classifier, config)
    apply_freezing(classifier, config, epoch=1)
    before = state_of(classifier)
    learn(classifier, optimizer, steps=range(7))
    held = {n for n, p in classifier.network.named_parameters() if not p.requires_grad}
    after = state_of(classifier)
    assert held
    assert same({n: before[n] for n in held}, after)
    apply_freezing(classifier, configure(name), epoch=2)
    learn(classifier, optimizer, steps=range(7, 8))
    assert not torch.equal(before["conv_stem.weight"], classifier.network.state_dict()["conv_stem.weight"])


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb", "muon", "nadamw", "adafactor", "lookahead_lion"])
def test_resumes_to_the_same_bits(name: str) -> None:
    whole = network()
    optimizer = build_optimizer(whole, configure(name))
    learn(whole, optimizer, steps=range(4))
    weights, state = state_of(whole), copy.deepcopy(optimizer.state_dict())
    learn(whole, optimizer, steps=range(4, 8))
    part = network()
    part.network.load_state_dict(weights)
    again = build_optimizer(part, configure(name))
    again.load_state_dict(state)
    learn(part, again, steps=range(4, 8))
    assert same(state_of(whole), state_of(part))


class TestTimm:
    def test_every_name_trains_or_is_refused_in_one_line(self) -> None:
        classifier = network()
        labels = torch.arange(4)
        images = torch.randint(0, 256, (4, SIDE, SIDE, 3), dtype=torch.uint8)
        functional.cross_entropy(classifier(images)[0], labels).backward()
        start, refused = state_of(classifier), []
        for name in list_optimizers():
            try:
                optimizer = build_optimizer(classifier, configure(name))
            except ConfigError as error:
                refused.append(str(error))
                continue
            for _ in range(2):  # some only look around in their first step
                optimizer.step()
            assert not torch.equal(start["classifier.weight"], head_of(classifier).layer.weight), name
            classifier.network.load_state_dict(start)
        families = ("adahessian", "kron", "adafactorbv", "cadafactorbv", "bnb", "fused")
        names = [line.removeprefix("fit.optimizer.name=").partition(": ")[0] for line in refused]
        assert all(name.startswith(families) for name in names)
        assert {"adahessian", "kron", "bnbadamw8bit", "fusedlamb"} <= set(names)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("adamm", r"timm has no such optimizer; did you mean .*adam"),
            ("lookahead_lyon", r"timm has no such optimizer; did you mean .*lion"),
            ("AdamW", r"timm has no such optimizer; did you mean .*adamw"),
            ("adahessian", "second derivatives"),
            ("kron", "draws at random within its steps"),
            ("fusedadam", "part of apex"),
        ],
    )
    def test_a_name_that_cannot_be_used(self, name: str, message: str) -> None:
        with pytest.raises(ConfigError, match=f"fit.optimizer.name={name}: .*{message}"):
            build_optimizer(network(), configure(name))

    def test_options_reach_it(self) -> None:
        chosen = {"name": "lion", "options": {"betas": [0.95, 0.98]}}
        assert list(build_optimizer(network(), configure(chosen)).param_groups[0]["betas"]) == [0.95, 0.98]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"beta": 0.9}, r"fit.optimizer.options.beta: lion has no such option; it has betas,"),
            ({"lr": 0.9}, r"fit.optimizer.options.lr: lion has no such option.*keys of their own"),
            ({"betas": [2.0, 0.9]}, "fit.optimizer.options: lion does not take these values .*beta"),
        ],
    )
    def test_options_it_does_not_take(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            build_optimizer(network(), configure({"name": "lion", "options": options}))


def test_l2_is_the_gradient_of_the_squared_weights() -> None:
    classifier = network()
    apply_freezing(classifier, configure("adamw", unfreeze=2), epoch=1)
    images = torch.randint(0, 256, (2, SIDE, SIDE, 3), dtype=torch.uint8)
    weights = [p for p in classifier.parameters() if p.ndim > 1 and p.requires_grad]

    def gradients(loss: torch.Tensor) -> list[torch.Tensor | None]:
        classifier.zero_grad()
        loss.backward()
        return [None if p.grad is None else p.grad.clone() for p in classifier.parameters()]

    loss = classifier.eval()(images)[0].square().sum()
    gradients(loss)
    add_l2(classifier, 0.1)
    found = [None if p.grad is None else p.grad.clone() for p in classifier.parameters()]
    penalty = sum((weight.square().sum() for weight in weights), torch.zeros(()))
    expected = gradients(classifier(images)[0].square().sum() + 0.1 / 2 * penalty)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, atol=1e-6)
    assert any(isinstance(module, nn.BatchNorm2d) for module in classifier.modules())

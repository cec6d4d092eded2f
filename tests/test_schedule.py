"""Schedules: each against torch's own, and as a pure function of the step."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from holotype.config import FitConfig
from holotype.errors import TrainingError
from holotype.fit.optimizer import build_optimizer
from holotype.fit.schedule import Schedule, build_schedule
from holotype.models import Classifier
from networks import small_network

EPOCHS, STEPS = 5, 8
TOTAL = EPOCHS * STEPS


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return small_network()


def configure(name: str, **settings: Any) -> FitConfig:
    schedule = settings.pop("schedule", {})
    return FitConfig(epochs=EPOCHS, schedule={"name": name, **schedule}, **settings)


def rates(schedule: Schedule, optimizer: torch.optim.Optimizer) -> list[float]:
    found = []
    for step in range(TOTAL):
        schedule.set_rates(optimizer, step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def plain(rate: float, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=rate, **settings)


def rates_of_torch(optimizer: torch.optim.Optimizer, *schedulers: Any) -> list[float]:
    found = []
    for _ in range(TOTAL):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    return found


def test_cosine_after_a_linear_warm_up(classifier: Classifier) -> None:
    config = configure("cosine", schedule={"floor": 0.05}, warmup=0.2)
    optimizer = build_optimizer(classifier, config)
    peak, warm = optimizer.param_groups[0]["initial_lr"], round(0.2 * TOTAL)
    reference = plain(peak)
    warming = lr_scheduler.LinearLR(reference, start_factor=0.01, total_iters=warm)
    falling = lr_scheduler.CosineAnnealingLR(reference, T_max=TOTAL - 1 - warm, eta_min=0.05 * peak)
    expected = rates_of_torch(reference, lr_scheduler.SequentialLR(reference, [warming, falling], [warm]))
    found = rates(build_schedule(config, steps_per_epoch=STEPS), optimizer)
    assert found == pytest.approx(expected)
    assert max(found) == found[warm] == peak
    assert found[-1] == pytest.approx(0.05 * peak)


@pytest.mark.parametrize("rise", [0.3, 0.99])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_one_cycle_with_momentum_against_the_rate(
    classifier: Classifier, optimizer: str, rise: float
) -> None:
    config = configure(
        "one-cycle", optimizer={"name": optimizer}, schedule={"rise": rise, "start": 0.04, "floor": 1e-4}
    )
    ours = build_optimizer(classifier, config)
    peak = ours.param_groups[0]["initial_lr"]
    parameter = [torch.nn.Parameter(torch.zeros(1))]
    theirs = (
        torch.optim.AdamW(parameter, lr=peak)
        if optimizer == "adamw"
        else torch.optim.SGD(parameter, lr=peak, momentum=0.9)
    )
    reference = lr_scheduler.OneCycleLR(
        theirs, max_lr=peak, total_steps=TOTAL, pct_start=rise, div_factor=25, final_div_factor=400
    )
    schedule = build_schedule(config, steps_per_epoch=STEPS)
    for step in range(TOTAL):
        schedule.set_rates(ours, step)
        mine, other = ours.param_groups[0], theirs.param_groups[0]
        assert mine["lr"] == pytest.approx(other["lr"])
        if optimizer == "adamw":
            assert mine["betas"] == pytest.approx(other["betas"])
        else:
            assert mine["momentum"] == pytest.approx(other["momentum"])
        theirs.step()
        if step < TOTAL - 1:
            reference.step()


def test_one_cycle_leaves_optimizers_without_momentum_alone(classifier: Classifier) -> None:
    for optimizer in ({"name": "sgd", "momentum": 0.0}, {"name": "adagrad"}):
        config = configure("one-cycle", optimizer=optimizer)
        built = build_optimizer(classifier, config)
        before = built.param_groups[0].get("momentum")
        rates(build_schedule(config, steps_per_epoch=STEPS), built)
        assert built.param_groups[0].get("momentum") == before


def test_step_falls_after_whole_epochs(classifier: Classifier) -> None:
    config = configure("step", schedule={"every": 2, "factor": 0.5}, warmup=0.1)
    optimizer = build_optimizer(classifier, config)
    reference = plain(optimizer.param_groups[0]["initial_lr"])
    warming = lr_scheduler.LinearLR(reference, start_factor=0.01, total_iters=round(0.1 * TOTAL))
    falling = lr_scheduler.StepLR(reference, step_size=2 * STEPS, gamma=0.5)
    found = rates(build_schedule(config, steps_per_epoch=STEPS), optimizer)
    assert found == pytest.approx(rates_of_torch(reference, warming, falling))


def test_plateau_falls_when_nothing_gets_better(classifier: Classifier) -> None:
    config = configure("plateau", schedule={"wait": 2, "factor": 0.3, "floor": 0.01}, warmup=0.0)
    optimizer = build_optimizer(classifier, config)
    peak = optimizer.param_groups[0]["initial_lr"]
    reference = plain(peak)
    falling = lr_scheduler.ReduceLROnPlateau(
        reference, mode="max", factor=0.3, patience=1, threshold=0, min_lr=0.01 * peak, eps=0
    )
    schedule = build_schedule(config, steps_per_epoch=STEPS)
    metrics = [0.1, 0.2, 0.2, 0.1, 0.3, 0.3, 0.3, *[0.0] * 10]
    for epoch, metric in enumerate(metrics):
        schedule.set_rates(optimizer, epoch * STEPS)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(reference.param_groups[0]["lr"])
        schedule.judge(metric > max(metrics[:epoch], default=-math.inf))
        falling.step(metric)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * peak)


@pytest.mark.parametrize("name", ["cosine", "one-cycle", "step", "plateau"])
def test_a_resumed_run_has_the_same_rates(classifier: Classifier, name: str) -> None:
    config = configure(name, schedule={"wait": 1} if name == "plateau" else {}, optimizer={"name": "sgd"})
    whole, optimizer = build_schedule(config, steps_per_epoch=STEPS), build_optimizer(classifier, config)
    for step in range(TOTAL // 2):
        whole.set_rates(optimizer, step)
        if step % STEPS == STEPS - 1:
            whole.judge(False)
    part = build_schedule(config, steps_per_epoch=STEPS)
    part.load(json.loads(json.dumps(whole.state())))
    again = build_optimizer(classifier, config)
    for step in range(TOTAL // 2, TOTAL):
        whole.set_rates(optimizer, step)
        part.set_rates(again, step)
        for one, other in zip(optimizer.param_groups, again.param_groups, strict=True):
            assert one["lr"] == other["lr"]
            assert one["momentum"] == other["momentum"]
    if name == "plateau":
        assert whole.state()["falls"] == 2


def test_every_group_keeps_its_share(classifier: Classifier) -> None:
    config = configure("cosine", backbone_rate=0.1, layer_decay=0.5)
    optimizer = build_optimizer(classifier, config)
    schedule = build_schedule(config, steps_per_epoch=STEPS)
    for step in (0, 3, 17, TOTAL - 1):
        schedule.set_rates(optimizer, step)
        rate = config.optimizer.learning_rate * schedule.factor(step)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(rate * group["lr_scale"])


@pytest.mark.parametrize("name", ["cosine", "one-cycle", "step", "plateau"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_shortest_runs_have_rates(name: str, steps: int) -> None:
    config = FitConfig(epochs=1, schedule={"name": name}, warmup=0.5)
    schedule = Schedule(config, steps_per_epoch=steps)
    factors = [schedule.factor(step) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)


def test_a_state_that_is_none_is_refused() -> None:
    with pytest.raises(TrainingError, match="not the state of a schedule"):
        build_schedule(configure("plateau"), steps_per_epoch=STEPS).load({"falls": None})

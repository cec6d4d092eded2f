"""Every rule on a run that was made to have its fault, and the other way round on runs that have none."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn

from digits import write_digits
from holotype import train
from holotype.audit import audit
from holotype.config import AuditConfig, TrainConfig, merge, parse_assignments, resolve_config
from holotype.dataset import cache_folder
from holotype.diagnosis import Evidence, diagnose, suspect_paths
from holotype.errors import TrainingError
from holotype.fit.evidence import evidence_of
from holotype.fit.session import learn, open_session
from holotype.models import Architecture, create, recipe_of
from holotype.report import Finding
from holotype.review import SuspectLabel, Suspects, write_suspects
from holotype.runlog import Row, RunLog

TINY: dict[str, Any] = {
    "data": {"size": 32},
    "model": {"name": "test_resnet", "weights": "none", "dropout": 0.0},
    "augment": {"preset": "none"},
    "fit": {
        "epochs": 3, "ema": None, "patience": 99, "precision": "fp32", "warmup": 0.0, "batch_size": 32,
        "micro_batch": 32, "unfreeze": "all", "freeze_norm": False, "optimizer": {"learning_rate": 3e-3},
    },
}  # fmt: skip
"""Overrides for a run of seconds: a tiny network on digits of 32 pixels, from random weights."""


def settings(**fit: Any) -> dict[str, Any]:
    return merge(TINY, {"fit": fit})


def run(data: Path, overrides: dict[str, Any]) -> tuple[Finding, ...]:
    """The diagnosis of a run, but for the time that its data took: other tests on the machine decide it."""
    return tuple(finding for finding in diagnosed(data, overrides) if finding.name != "input-bound")


def diagnosed(data: Path, overrides: dict[str, Any]) -> tuple[Finding, ...]:
    """The diagnosis of a run of `train`, without the export and the report that would follow it."""
    log = RunLog(None)
    session = open_session(data, resolve_config(TrainConfig, overrides=overrides), device="cpu")
    evidence = evidence_of(session, learn(session, log=log), log=log)
    assert evidence is not None
    return diagnose(evidence)


def weights(
    file: Path, change: Callable[[nn.Module], object] = lambda network: None, *, name: str = "test_resnet"
) -> dict[str, Any]:
    """Overrides that start from random weights, with statistics of digits, which `change` has spoilt."""
    torch.manual_seed(0)
    recipe = recipe_of(name)
    architecture = Architecture(name=name, classes=10, height=32, width=32, mean=recipe.mean, std=recipe.std)
    classifier = create(architecture).train()
    with torch.no_grad():
        for module in classifier.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        grey = np.kron(255 - load_digits().images[:200] * 255 / 16, np.ones((4, 4))).astype(np.uint8)
        classifier(torch.from_numpy(np.repeat(grey[..., None], 3, axis=3)))
        change(classifier.network)
    save_file(classifier.network.state_dict(), file)
    return {"model": {"name": name, "weights": str(file)}, "fit": {"freeze_norm": True}}


def check(
    finding: Finding, overrides: dict[str, Any] | None = None, *, name: str, severity: str = "warning"
) -> None:
    """It is what it should be, and each of its settings is one that changes the run."""
    assert (finding.name, finding.severity) == (name, severity), finding.evidence
    assert finding.settings
    before = resolve_config(TrainConfig, overrides=overrides)
    for setting in finding.settings:
        changed = merge(overrides or {}, parse_assignments([setting]))
        assert resolve_config(TrainConfig, overrides=changed) != before, setting


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 digits of each of 10 classes to train on; read-only."""
    folder = tmp_path_factory.mktemp("data") / "ten"
    return write_digits(folder, classes=10, train=20, validation=10, test=5)


def write_flipped(folder: Path) -> Path:
    """30 digits of each of 10 classes, every third of them under the name of another."""
    write_digits(folder, classes=10, train=30, validation=10)
    for label in range(10):
        for turn, file in enumerate(sorted((folder / "train" / str(label)).glob("[0-9]*.png"))[::3]):
            shutil.move(file, folder / "train" / str((label + 1 + turn % 9) % 10) / f"moved-{file.name}")
    return folder


class TestRuns:
    @pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
    def test_healthy(self, data: Path, name: str) -> None:
        overrides = merge(settings(epochs=6), {"model": {"name": name}})
        assert [f for f in run(data, overrides) if f.severity == "warning"] == []

    def test_overfitting(self, tmp_path: Path) -> None:
        few = write_digits(tmp_path / "few", classes=10, train=2, validation=10, test=5)
        overrides = settings(epochs=40, batch_size=10, label_smoothing=0.0)
        found = run(few, overrides)
        check(found[0], overrides, name="overfitting")
        assert found[0].settings[:2] == ("augment.crop=0.4", "model.dropout=0.2")

    def test_underfitting(self, data: Path) -> None:
        overrides = settings(optimizer={"name": "sgd", "learning_rate": 1e-3})
        found = run(data, overrides)
        check(found[0], overrides, name="underfitting")
        assert "fit.epochs=6" in found[0].settings

    def test_a_learning_rate_that_ends_the_run(self, data: Path) -> None:
        steep = settings(optimizer={"name": "sgd", "learning_rate": 1e3}, clip_norm=None)
        with pytest.raises(TrainingError, match=r"changed the weights") as caught:
            run(data, steep)
        assert "fit.optimizer.learning_rate=" in str(caught.value)

    def test_a_learning_rate_that_makes_it_worse(self, data: Path) -> None:
        overrides = settings(optimizer={"name": "sgd", "learning_rate": 10})
        (found,) = run(data, overrides)
        check(found, overrides, name="learning-rate-high")
        assert 0.001 < float(found.settings[0].partition("=")[2]) < 1

    def test_a_learning_rate_that_undoes_the_head(self, data: Path, tmp_path: Path) -> None:
        own = weights(tmp_path / "w.safetensors")
        overrides = merge(settings(), own)
        found = run(data, overrides)
        check(found[0], overrides, name="learning-rate-high")
        assert "The head on frozen features" in found[0].evidence

    def test_a_learning_rate_too_low(self, data: Path) -> None:
        overrides = settings(optimizer={"learning_rate": 1e-7})
        (found,) = run(data, overrides)
        check(found, overrides, name="learning-rate-low")
        assert float(found.settings[0].partition("=")[2]) > 1e-5

    def test_exploding_gradients(self, data: Path, tmp_path: Path) -> None:
        def swell(network: nn.Module) -> None:
            network.get_submodule("bn2").weight *= 1000  # type: ignore[operator]

        own = weights(tmp_path / "w.safetensors", swell, name="test_efficientnet")
        overrides = merge(settings(clip_norm=None, optimizer={"learning_rate": 3e-5}), own)
        found = run(data, overrides)
        check(found[0], overrides, name="exploding-gradients")
        assert "fit.clip_norm=1.0" in found[0].settings

    def test_vanishing_gradients(self, data: Path, tmp_path: Path) -> None:
        def shrink(network: nn.Module) -> None:
            for module in network.modules():
                if isinstance(module, nn.Conv2d):
                    module.weight *= 1e-3

        own = weights(tmp_path / "w.safetensors", shrink)
        gentle = settings(optimizer={"name": "sgd", "learning_rate": 0.05})
        overrides = merge(merge(gentle, own), {"fit": {"freeze_norm": False}})
        found = run(data, overrides)
        check(found[0], overrides, name="vanishing-gradients")

    def test_a_dead_layer(self, data: Path, tmp_path: Path) -> None:
        def kill(network: nn.Module) -> None:
            network.get_submodule("layer2.0.bn1").bias -= 1000  # type: ignore[operator]

        own = weights(tmp_path / "w.safetensors", kill)
        overrides = merge(settings(optimizer={"learning_rate": 1e-4}), own)
        found = run(data, overrides)
        check(found[0], overrides, name="dead-layer")
        assert "stage 2" in found[0].evidence

    def test_frozen_statistics_of_nothing(self, data: Path) -> None:
        overrides = settings(freeze_norm=True)
        found = run(data, overrides)
        check(found[0], overrides, name="norm-mismatch")
        assert found[0].settings[0] == "fit.freeze_norm=false"

    def test_waiting_for_data(self, tmp_path: Path) -> None:
        """Images a thousand times the size of what the network sees, and no cache for them."""
        small = write_digits(tmp_path / "large", classes=2, train=12, validation=4, test=4)
        for file in small.rglob("*.png"):
            Image.open(file).resize((1000, 1000), Image.Resampling.NEAREST).save(file)
        overrides = merge(settings(epochs=2), {"data": {"cache_limit_gb": 0}})
        (found,) = [finding for finding in diagnosed(small, overrides) if finding.name == "input-bound"]
        check(found, overrides, name="input-bound")


class TestLabelNoise:
    def test_without_an_audit_it_is_a_guess(self, tmp_path: Path) -> None:
        overrides = settings(epochs=6)
        found = run(write_flipped(tmp_path / "data"), overrides)
        (noise,) = [finding for finding in found if finding.name == "label-noise"]
        check(noise, overrides, name="label-noise", severity="note")
        assert "holotype audit" in noise.evidence

    def test_suspects_that_resist_are_a_warning(self, tmp_path: Path) -> None:
        folder, overrides = write_flipped(tmp_path / "data"), settings(epochs=6)
        paths = [str(file.relative_to(folder)) for file in folder.rglob("moved-*.png")]
        doubted = tuple(SuspectLabel(path=path, label="", suggested="", score=1.0) for path in paths)
        session = open_session(folder, resolve_config(TrainConfig, overrides=overrides), device="cpu")
        root_hash = session.dataset.root_hash
        write_suspects(cache_folder(folder), Suspects(root_hash=root_hash, items=doubted))
        assert suspect_paths(cache_folder(folder), root_hash) == set(paths)
        assert suspect_paths(cache_folder(folder), "another dataset") is None
        found = run(folder, overrides)
        check(found[0], overrides, name="label-noise")
        assert "agree adjudicate" in found[0].evidence

    def test_suspects_that_are_like_the_others_are_none(self, data: Path) -> None:
        session = open_session(data, resolve_config(TrainConfig, overrides=settings()), device="cpu")
        dataset = session.dataset
        doubted = tuple(
            SuspectLabel(path=path, label="", suggested="", score=1.0)
            for path in dataset.paths(dataset.rows("train")[::5])
        )
        write_suspects(cache_folder(data), Suspects(root_hash=dataset.root_hash, items=doubted))
        assert "label-noise" not in [finding.name for finding in run(data, settings())]

    @pytest.mark.slow
    def test_a_real_audit_finds_them(self, tmp_path: Path) -> None:
        folder, overrides = write_flipped(tmp_path / "data"), settings(epochs=6)
        config = resolve_config(AuditConfig, overrides={"data": TINY["data"], "model": TINY["model"]})
        audit(folder, config=config, out=tmp_path / "audit")
        check(run(folder, overrides)[0], overrides, name="label-noise")


class TestTrain:
    def test_the_report_of_a_run_carries_its_diagnosis(self, data: Path, tmp_path: Path) -> None:
        result = train(data, config=resolve_config(TrainConfig, overrides=settings(
            optimizer={"name": "sgd", "learning_rate": 10}
        )), runs=tmp_path, name="steep")  # fmt: skip
        assert [finding.name for finding in result.report.diagnosis] == ["learning-rate-high"]
        assert "Learning rate too high" in (result.folder / "report.html").read_text()
        assert (result.folder / "steps.csv").read_text().startswith("step,epoch,loss,")


def recorded(
    *, steps: list[Row] | None = None, epochs: list[Row] | None = None, **overrides: Any
) -> tuple[Finding, ...]:
    """The diagnosis of rows as a run might have left them."""
    rows = [{"stage": "fine-tune", "epoch": i + 1, **row} for i, row in enumerate(epochs or [])]
    counts = {str(label): {"train": 100, "validation": 20} for label in range(10)}
    config = resolve_config(TrainConfig, overrides=overrides)
    return diagnose(Evidence(config, metrics=rows, steps=steps or [], timings=[], counts=counts))


class TestRules:
    def test_no_evidence_no_finding(self) -> None:
        assert recorded() == ()
        assert recorded(steps=[{"step": 0, "epoch": 1, "loss": 1.0, "gradient_norm": 1.0}]) == ()

    def test_a_first_step_that_is_no_number_is_no_matter_of_the_rate(self) -> None:
        nothing: list[Row] = [{"step": 0, "epoch": 1, "loss": math.nan, "gradient_norm": math.nan}]
        (found,) = recorded(steps=nothing)
        assert (found.name, found.severity, found.settings) == ("exploding-gradients", "note", ())
        assert "in the first step" in found.evidence
        assert "weights, a teacher or the images" in found.meaning
        (half,) = recorded(steps=nothing, fit={"precision": "fp16"})
        check(half, {"fit": {"precision": "fp16"}}, name="exploding-gradients")
        assert half.settings == ("fit.precision=fp32",)

    def test_a_later_step_that_is_no_number_is(self) -> None:
        steps: list[Row] = [
            {"step": 0, "epoch": 1, "loss": 2.0, "gradient_norm": 9.0, "gradient_norm_max": 9.0},
            {"step": 1, "epoch": 1, "loss": math.nan, "gradient_norm": math.nan},
        ]
        (found,) = recorded(steps=steps)
        assert found.settings[0].startswith("fit.optimizer.learning_rate=")

    @pytest.mark.parametrize(
        ("norms", "name"),
        [
            ([1.0] * 4 + [2.0] * 4, None),
            ([1.0] * 4 + [50.0] * 4, "grew"),
            ([1.0] * 8 + [150.0] + [1.0] * 3, "A step"),
        ],
        ids=["doubles", "grows", "spikes"],
    )
    def test_gradient_norms(self, norms: list[float], name: str | None) -> None:
        steps: list[Row] = [
            {"step": i, "epoch": 1, "loss": 1.0 - i / 20, "accuracy": 0.5, "gradient_norm": min(norm, 60.0),
             "gradient_norm_max": norm, "update_ratio/head": 1e-3}
            for i, norm in enumerate(norms)
        ]  # fmt: skip
        found = recorded(steps=steps, fit={"clip_norm": None})
        assert [str(name) in finding.evidence for finding in found] == ([True] if name else [])
        clipped = recorded(steps=steps, fit={"clip_norm": 1.0})
        assert [finding.severity for finding in clipped] == (["note"] if name else [])

    def test_a_gap_alone_is_no_overfitting(self) -> None:
        epochs: list[Row] = [
            {"train_accuracy": 0.7 + i / 20, "validation_accuracy": 0.6 + i / 25, "train_loss": 1 - i / 10,
             "validation_loss": 1.2 - i / 8}
            for i in range(6)
        ]  # fmt: skip
        assert recorded(epochs=epochs) == ()
        rising = [{**row, "validation_loss": 1 + i / 10} for i, row in enumerate(epochs)]
        assert [finding.name for finding in recorded(epochs=rising)] == ["overfitting"]

    def test_a_gap_with_nothing_left_to_learn_is_a_note(self) -> None:
        epochs: list[Row] = [
            {"train_accuracy": 0.97 + i / 100, "validation_accuracy": 0.88, "train_loss": 0.6 - i / 20,
             "validation_loss": 0.48}
            for i in range(3)
        ]  # fmt: skip
        (found,) = recorded(epochs=epochs)
        check(found, name="overfitting", severity="note")
        (wide,) = recorded(epochs=[{**row, "validation_accuracy": 0.7} for row in epochs])
        check(wide, name="overfitting")

    def test_what_follows_from_another_fault_is_not_listed(self) -> None:
        still: list[Row] = [
            {"step": i, "epoch": 1, "loss": 2.3, "accuracy": 0.1, "gradient_norm": 1.0,
             "gradient_norm_max": 1.0, "update_ratio/stem": 1e-8, "update_ratio/head": 1e-8}
            for i in range(6)
        ]  # fmt: skip
        epochs: list[Row] = [{"train_accuracy": 0.1, "validation_accuracy": 0.1, "train_loss": 2.3,
                              "validation_loss": 2.3}] * 3  # fmt: skip
        assert [finding.name for finding in recorded(epochs=epochs)] == ["underfitting"]
        assert [f.name for f in recorded(epochs=epochs, steps=still)] == ["learning-rate-low"]

    @pytest.mark.parametrize(
        "overrides",
        [
            {},
            {"fit": {"freeze_norm": False, "unfreeze": "all", "scale": 1.0}},
            {"fit": {"freeze_norm": False, "unfreeze": "all", "layer_decay": 0.7}},
            {"model": {"name": "resnet18", "weights": "none"}, "fit": {"freeze_norm": False}},
            {"model": {"name": "test_vit", "weights": "none"}, "fit": {"optimizer": {"name": "sgd"}}},
        ],
    )
    def test_layers_that_pass_nothing_on_have_a_remedy(self, overrides: dict[str, Any]) -> None:
        weak: list[Row] = [
            {"step": i, "epoch": 1, "loss": 2.3, "accuracy": 0.1, "gradient_norm": 1.0,
             "gradient_norm_max": 1.0, "update_ratio/head": 1e-3, "gradient_norm/stem": 1e-7,
             "gradient_norm/head": 1.0}
            for i in range(6)
        ]  # fmt: skip
        (vanishing,) = recorded(steps=weak, **overrides)
        check(vanishing, overrides, name="vanishing-gradients")
        dead: list[Row] = [{**row, "gradient_norm/stem": 1.0, "dead/stem": 0.95} for row in weak]
        (found,) = recorded(steps=dead, **overrides)
        if found.severity == "warning" or found.settings:
            check(found, overrides, name="dead-layer")
        else:
            assert overrides["fit"]["unfreeze"] == "all"  # of the default network: nothing is left to change

    @pytest.mark.parametrize(
        ("seconds", "severity", "first"),
        [
            ((0.3, 0.0), "warning", "augment.crop=0.8"),
            ((0.0, 0.3), "warning", "augment.hue=0.0"),
            ((0.06, 0.06), "note", "augment.crop=0.8"),
            ((0.04, 0.04), None, ""),
        ],
    )
    def test_time_spent_on_images(
        self, seconds: tuple[float, float], severity: str | None, first: str
    ) -> None:
        waited, augmented = seconds
        timings: list[Row] = [
            {"stage": "fine-tune", "epoch": 1, "seconds": 9.0, "data_wait_seconds": 9.0},
            {"stage": "fine-tune", "epoch": 2, "seconds": 1.0, "data_wait_seconds": waited,
             "augment_seconds": augmented},
        ]  # fmt: skip
        overrides = {"augment": {"hue": 15.0}}
        config = resolve_config(TrainConfig, overrides=overrides)
        counts = {"a": {"train": 10, "validation": 10}}
        found = diagnose(Evidence(config, metrics=[], steps=[], timings=timings, counts=counts))
        assert [finding.severity for finding in found] == ([severity] if severity else [])
        for finding in found:
            check(finding, overrides, name="input-bound", severity=str(severity))
            assert finding.settings[0] == first
            assert f"{100 * augmented:.1f} % on augmenting them" in finding.evidence
            assert ("HOLOTYPE_CACHE" in finding.evidence) == (waited > 0)

    def test_warnings_come_first(self) -> None:
        timings = [
            {"stage": "fine-tune", "epoch": e, "seconds": 10.0, "data_wait_seconds": 4.0} for e in (1, 2)
        ]
        losses = np.full(100, 0.2, dtype=np.float32)
        losses[:10] = 5
        rows: list[Row] = [
            {"stage": "fine-tune", "epoch": e, "train_accuracy": 0.9, "validation_accuracy": 0.9,
             "train_loss": 0.4, "validation_loss": 0.4}
            for e in (1, 2, 3)
        ]  # fmt: skip
        counts = {str(label): {"train": 10, "validation": 10} for label in range(10)}
        config = resolve_config(TrainConfig)
        evidence = Evidence(
            config, metrics=rows, steps=[], timings=timings, counts=counts, sample_losses=losses
        )
        assert [(f.name, f.severity) for f in diagnose(evidence)] == [
            ("input-bound", "warning"),
            ("label-noise", "note"),
        ]

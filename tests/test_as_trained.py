"""What comes after training reads the data as training did, and says "not sure" by the same rule."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from digits import write_flat
from holotype import evaluate, export, train
from holotype.bundle import open_bundle
from holotype.compress import compress
from holotype.config import CompressConfig, DatasetConfig, EvaluateConfig, ExportConfig, resolve_config
from holotype.dataset import open_for
from holotype.train import TrainResult

SHARES = {"validation": 0.25, "test": 0.05}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """A run on digits without splits, with shares of its own, whose answers are always sure."""
    folder = tmp_path_factory.mktemp("flat")
    settings = {
        "data": {**SHARES, "size": 64},
        "policy": {"abstain": "none", "coverage": 0.8},
        "model": {"weights": "none", "name": "test_efficientnet"},
        "fit": {"epochs": 1},
        "augment": {"flip": 0.0},
    }
    return train(write_flat(folder / "digits", images=100), overrides=settings, runs=folder / "runs")


def images(run: TrainResult, split: str, config: DatasetConfig | None = None) -> set[str]:
    dataset = open_for(run.bundle, None, config=config or DatasetConfig())
    return set(dataset.table.filter(pl.col("split") == split)["path"])


def test_evaluate_judges_what_was_not_trained_on(run: TrainResult, tmp_path: Path) -> None:
    report = evaluate(run.folder, out=tmp_path, config=EvaluateConfig(split="test"))
    assert sum(one["test"] for one in report.dataset.counts.values()) == len(images(run, "test"))
    # By the default shares it would be 15 %, most of them images that were trained on.
    assert 0.01 < len(images(run, "test")) / 300 < 0.12


def test_what_is_asked_for_by_name_is_done(run: TrainResult) -> None:
    assert len(images(run, "test", DatasetConfig(test=0.5))) > 100


def test_other_data_is_read_as_it_lies_but_split_alike(run: TrainResult, tmp_path: Path) -> None:
    other = write_flat(tmp_path / "moved", images=100)
    dataset = open_for(run.bundle, other, config=DatasetConfig())
    assert set(dataset.table.filter(pl.col("split") == "test")["path"]) == images(run, "test")


def test_compress_judges_on_the_same_images_and_keeps_the_policy(run: TrainResult, tmp_path: Path) -> None:
    config = resolve_config(
        CompressConfig,
        overrides={
            "methods": ["int8"], "budget": {"drop": 100.0}, "rounds": 3, "search": "all",
            "int8": {"images": 32, "calibration": "min-max"},
        },
    )  # fmt: skip
    outcome = compress(run.folder, out=tmp_path / "small", config=config)
    assert outcome.test is not None
    assert outcome.test.images == len(images(run, "test"))
    assert sum(one.images for one in outcome.classes) == len(images(run, "validation"))
    manifest = open_bundle(outcome.candidates[-1].bundle).manifest
    assert (manifest.policy.abstain, manifest.policy.coverage) == ("none", 0.8)
    assert manifest.settings["policy"]["abstain"] == "none"


def test_an_export_in_another_arithmetic_keeps_the_policy(run: TrainResult, tmp_path: Path) -> None:
    config = ExportConfig(precision="bf16", measure=False)
    exported = export(run.folder, format="openvino", out=tmp_path / "half", config=config)
    assert exported.bundle.manifest.policy.abstain == "none"
    assert exported.bundle.manifest.policy.coverage == 0.8

"""Data without train, validation or test images: each verb has a result, or says what is lacking."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from digits import write_flat
from holotype import TrainResult, evaluate, export, train
from holotype.compare import compare
from holotype.compress import compress
from holotype.config import (
    CompareConfig,
    CompressConfig,
    DatasetConfig,
    EvaluateConfig,
    ExplainConfig,
    ExportConfig,
    HardSamplesConfig,
    resolve_config,
)
from holotype.errors import DatasetError
from holotype.explain import explain
from holotype.hard_samples import hard_samples
from holotype.tune import tune

UNSHARED: dict[str, Any] = {"validation": 0.001, "test": 0.0}
"""Shares by which the hashes put every image of a small dataset into train."""

NO_VALIDATION = (
    r"^[^\n]*: has no image in validation: 6 in train; add images, change data\.validation, or [^\n]*$"
)
NO_TRAIN = (
    r"^[^\n]*: has no image in train and validation: 120 in test; name images of every class as train[^\n]*$"
)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of three digits."""
    return write_flat(tmp_path_factory.mktemp("few") / "digits", classes=2, images=3)


@pytest.fixture(scope="module")
def tests(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All the digits as a CSV that names only the test split."""
    folder = tmp_path_factory.mktemp("tests") / "digits"
    shutil.copytree(digits, folder)
    files = sorted(folder.rglob("*.png"))
    rows = [f"{file.relative_to(folder).as_posix()},{file.parent.name},test" for file in files]
    (folder / "tests.csv").write_text("\n".join(["image_path,label,split", *rows]))
    return folder / "tests.csv"


@pytest.fixture(scope="module")
def untested(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits without their test split."""
    folder = tmp_path_factory.mktemp("untested") / "digits"
    shutil.copytree(digits, folder, ignore=lambda _, names: {"test"} & set(names))
    return folder


class TestTraining:
    def test_without_validation(self, few: Path, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match=NO_VALIDATION):
            train(few, overrides={"data": {**UNSHARED, "size": 64}}, runs=tmp_path / "runs")
        assert not (tmp_path / "runs").exists()

    def test_without_train(self, tests: Path, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match=NO_TRAIN):
            train(tests, overrides={"data": {"size": 64}}, runs=tmp_path / "runs")
        assert not (tmp_path / "runs").exists()

    def test_a_study(self, tests: Path, tmp_path: Path) -> None:
        settings = {
            "train": {"data": {"size": 64}, "model": {"name": "test_resnet", "weights": "none"}},
            "space": {"fit.optimizer.learning_rate": {"low": 1e-3, "high": 1e-2, "log": True}},
        }
        with pytest.raises(DatasetError, match=NO_TRAIN):
            tune(tests, overrides=settings, runs=tmp_path / "runs")


class TestOnlyTest:
    def test_is_what_is_judged(self, probe: TrainResult, tests: Path, tmp_path: Path) -> None:
        report = evaluate(probe.best, tests, out=tmp_path / "evaluated")
        assert report.split == "test"
        assert sum(one["test"] for one in report.dataset.counts.values()) == 120
        compared = compare(
            probe.best, probe.best, tests, out=tmp_path / "compared", config=CompareConfig(measure=False)
        )
        assert (compared.split, compared.images) == ("test", 120)
        explained = explain(probe.folder, data=tests, out=tmp_path / "explained")
        assert (explained.split, explained.images) == ("test", 120)

    def test_has_no_neighbours(self, probe: TrainResult, tests: Path, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match="has no train split to find neighbours in"):
            hard_samples(probe.best, tests, out=tmp_path / "a.csv", config=HardSamplesConfig(split="test"))
        with pytest.raises(DatasetError, match="has no validation split; it has test"):
            hard_samples(probe.best, tests, out=tmp_path / "b.csv")

    def test_proves_an_export_but_fits_no_policy(
        self, probe: TrainResult, tests: Path, tmp_path: Path
    ) -> None:
        config = ExportConfig(measure=False)
        exported = export(probe.best, format="openvino", data=tests, out=tmp_path / "whole", config=config)
        assert exported.parity.images == 120
        config = ExportConfig(measure=False, precision="bf16")
        with pytest.raises(DatasetError, match=NO_TRAIN):
            export(probe.best, format="openvino", data=tests, out=tmp_path / "half", config=config)
        assert not (tmp_path / "half").exists()

    def test_compresses_nothing(self, probe: TrainResult, tests: Path, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match=NO_TRAIN):
            compress(probe.best, tests, out=tmp_path / "small")
        assert not (tmp_path / "small").exists()


class TestNoTest:
    def test_validation_is_judged(self, probe: TrainResult, untested: Path, tmp_path: Path) -> None:
        assert evaluate(probe.best, untested, out=tmp_path / "evaluated").split == "validation"
        hard = hard_samples(probe.best, untested, out=tmp_path / "hard.csv")
        assert (hard.split, hard.images) == ("validation", 24)

    def test_what_is_not_there_cannot_be_judged(
        self, probe: TrainResult, untested: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(DatasetError, match="has no test split; it has train, validation"):
            evaluate(probe.best, untested, out=tmp_path, config=EvaluateConfig(split="test"))


class TestOnlyTrain:
    def test_is_judged_where_it_is_named(self, probe: TrainResult, few: Path, tmp_path: Path) -> None:
        config = EvaluateConfig(split="train", data=DatasetConfig(**UNSHARED))
        report = evaluate(probe.best, few, out=tmp_path, config=config)
        assert sum(one["train"] for one in report.dataset.counts.values()) == 6

    def test_is_not_what_auto_means(self, probe: TrainResult, few: Path, tmp_path: Path) -> None:
        data = DatasetConfig(**UNSHARED)
        lacking = r"has neither a test nor a validation split; name what it has: train$"
        with pytest.raises(DatasetError, match=lacking):
            evaluate(probe.best, few, out=tmp_path, config=EvaluateConfig(data=data))
        with pytest.raises(DatasetError, match=lacking):
            explain(probe.best, data=few, out=tmp_path, config=ExplainConfig(data=data))
        with pytest.raises(DatasetError, match="has no validation split; it has train"):
            hard_samples(probe.best, few, out=tmp_path / "hard.csv", config=HardSamplesConfig(data=data))
        with pytest.raises(DatasetError, match=lacking):
            compare(probe.best, probe.best, few, out=tmp_path, config=CompareConfig(data=data, measure=False))
        with pytest.raises(DatasetError, match=NO_VALIDATION):
            compress(
                probe.best,
                few,
                out=tmp_path / "small",
                config=resolve_config(CompressConfig, overrides={"data": UNSHARED}),
            )

from __future__ import annotations

import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from conftest import SMALL
from digits import write_digits
from holotype import TrainResult, evaluate, load, train
from holotype.bundle import open_bundle
from holotype.config import EvaluateConfig, TrainConfig, merge
from holotype.dataset import open_dataset
from holotype.errors import (
    ConfigError,
    HolotypeError,
    MissingExtraError,
    ModelError,
    ParityError,
    TrainingError,
)
from holotype.scoring import score


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open() as stream:
        return list(csv.DictReader(stream))


class TestRun:
    def test_folder_holds_what_is_promised(self, tuned: TrainResult) -> None:
        names = {path.name for path in tuned.folder.iterdir()}
        assert names >= {
            "best", "config.yaml", "metrics.csv", "timings.csv", "tensorboard", "report.html", "report.json",
            "confusion_matrix.png",
        }  # fmt: skip
        assert not [name for name in names if name.startswith(".")]

    def test_tensorboard_has_curves_of_steps_epochs_and_head(
        self, tuned: TrainResult, probe: TrainResult
    ) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        def curves(run: TrainResult) -> dict[str, list[tuple[int, float]]]:
            found = EventAccumulator(str(run.folder / "tensorboard")).Reload()
            tags = found.Tags()["scalars"]
            return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in tags}

        seen = curves(tuned)
        assert {"step/gradient_norm/head", "epoch/images_per_second", "head/l2"} <= seen.keys()
        for name in ("macro_f1", "images_per_second", "data_wait_seconds", "augment_seconds", "memory_mb"):
            assert len(seen[f"step/{name}"]) == len(seen["step/loss"])
            assert all(value >= 0 for _, value in seen[f"step/{name}"])
        assert {"epoch/data_wait_seconds", "epoch/augment_seconds", "epoch/memory_mb"} <= seen.keys()
        assert all(0 <= value <= 1 for _, value in seen["step/macro_f1"])
        assert seen["step/memory_mb"][0][1] > 50
        rows = [row for row in rows_of(tuned.folder / "metrics.csv") if row["stage"] == "fine-tune"]
        assert [value for _, value in seen["epoch/validation_loss"]] == pytest.approx(
            [float(row["validation_loss"]) for row in rows], rel=1e-5
        )
        steps = rows_of(tuned.folder / "steps.csv")
        assert [step for step, _ in seen["step/loss"]] == [int(float(row["step"])) for row in steps]
        assert len(curves(probe)["head/validation_accuracy"]) == 6

    def test_report_is_the_contract(self, probe: TrainResult) -> None:
        report = json.loads((probe.folder / "report.json").read_text())
        for name in ("accuracy", "balanced_accuracy", "macro_f1", "weighted_f1", "log_loss", "ece"):
            assert (
                report["metrics"][name]["low"]
                <= report["metrics"][name]["value"]
                <= report["metrics"][name]["high"]
            )
        assert set(report["per_class"]["0"]) == {"precision", "recall", "f1", "support"}
        assert report["confusion"]["classes"] == ["0", "1", "2"]
        assert report["split"] == "test"
        assert report["bundle"]["hash"] == probe.bundle.hash
        assert report["dataset"]["root_hash"] == probe.bundle.manifest.lineage.dataset_root_hash
        assert report["seconds"] > 0

    def test_it_learns(self, probe: TrainResult, tuned: TrainResult) -> None:
        assert probe.report.metrics.accuracy.value >= 0.85
        assert tuned.report.metrics.accuracy.value >= 0.85

    def test_metrics_of_both_stages_are_logged(self, tuned: TrainResult) -> None:
        rows = rows_of(tuned.folder / "metrics.csv")
        assert [row["stage"] for row in rows] == ["head"] * 6 + ["fine-tune"] * 2
        assert all(float(row["validation_loss"]) > 0 for row in rows)
        assert all(float(row["gradient_norm"]) > 0 for row in rows[6:])
        assert "seconds" not in rows[0]
        timings = rows_of(tuned.folder / "timings.csv")
        assert {row["stage"] for row in timings} == {"read", "export", "features", "head", "fine-tune"}
        assert all(float(row["seconds"]) > 0 for row in timings)
        assert [float(row["images_per_second"]) > 0 for row in timings if row["stage"] == "fine-tune"] == [
            True
        ] * 2

    def test_resolved_config_is_a_recipe_for_the_same_run(self, tuned: TrainResult) -> None:
        resolved = yaml.safe_load((tuned.folder / "config.yaml").read_text())
        assert resolved["fit"]["precision"] == "fp32"
        assert TrainConfig.model_validate(resolved).fit.epochs == 2

    def test_taken_names_get_a_number(self, digits: Path, tmp_path: Path) -> None:
        from holotype.runlog import create_run

        assert [create_run(tmp_path, "a").name for _ in range(3)] == ["a", "a-2", "a-3"]
        with pytest.raises(ConfigError, match="not a name"):
            create_run(tmp_path, "../a")

    def test_same_seed_gives_the_same_numbers(self, digits: Path, tuned: TrainResult, tmp_path: Path) -> None:
        overrides = {**SMALL, "fit": {"epochs": 2, "deterministic": True}}
        again = train(digits, name="again", overrides=overrides, runs=tmp_path)
        for name in ("metrics.csv", "config.yaml"):
            assert (again.folder / name).read_bytes() == (tuned.folder / name).read_bytes()
        weights = [run.bundle.manifest.payloads["weights"].sha256 for run in (again, tuned)]
        assert weights[0] == weights[1]


class TestBundle:
    def test_lineage_and_versions(self, probe: TrainResult, digits: Path) -> None:
        manifest = open_bundle(probe.folder).manifest
        assert manifest.classes == ("0", "1", "2")
        assert manifest.lineage.dataset == str(digits.resolve())
        assert manifest.versions.keys() >= {"holotype", "torch", "timm", "onnxruntime", "Pillow"}
        assert manifest.payloads.keys() == {"weights", "architecture", "onnx", "golden", "baseline"}
        assert manifest.policy.temperature != 1.0

    def test_every_runtime_gives_every_image_the_same_label(self, tuned: TrainResult, digits: Path) -> None:
        spec = tuned.bundle.manifest.preprocess
        dataset = open_dataset(digits, spec=spec, config=TrainConfig().data)
        answers = [
            score(load(tuned.best, runtime=name), dataset, split="test")
            for name in ("torch", "onnxruntime", "openvino")
        ]
        for other in answers[1:]:
            assert np.array_equal(answers[0].predicted, other.predicted)
            assert np.abs(answers[0].probabilities - other.probabilities).max() < 1e-4

    def test_onnx_carries_classes_and_preprocess(self, probe: TrainResult) -> None:
        import onnx

        model = onnx.load(probe.best / "model.onnx")
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        assert json.loads(metadata["classes"]) == ["0", "1", "2"]
        assert json.loads(metadata["preprocess"])["height"] == 64
        (images,) = model.graph.input
        assert images.name == "images"
        assert [entry.name for entry in model.graph.output] == ["logits", "embedding"]
        assert images.type.tensor_type.shape.dim[0].dim_param

    def test_golden_inputs_are_checked_at_load(self, probe: TrainResult) -> None:
        assert load(probe.folder).predict((probe.best / ".." / "confusion_matrix.png").read_bytes()).label


class TestEvaluate:
    def test_same_numbers_as_the_run(self, probe: TrainResult, tmp_path: Path) -> None:
        report = evaluate(probe.folder, out=tmp_path)
        assert report.metrics == probe.report.metrics
        assert (tmp_path / "report.html").is_file()

    def test_other_split_and_runtime(self, probe: TrainResult) -> None:
        report = evaluate(probe.folder, config=EvaluateConfig(split="validation", runtime="torch"))
        assert (report.split, report.runtime) == ("validation", "torch")
        assert (probe.folder / "evaluate-digits-validation" / "report.json").is_file()

    def test_class_the_bundle_does_not_know(self, probe: TrainResult, tmp_path: Path) -> None:
        other = write_digits(tmp_path / "four", classes=4)
        with pytest.raises(Exception, match="does not know: '3'"):
            evaluate(probe.folder, other, out=tmp_path)


class TestRefusals:
    @pytest.mark.skipif(importlib.util.find_spec("mlflow") is not None, reason="mlflow is installed")
    def test_a_tracker_that_is_not_installed(self, digits: Path, tmp_path: Path) -> None:
        overrides = {**SMALL, "monitor": {"trackers": ["mlflow"]}}
        with pytest.raises(MissingExtraError, match="pip install mlflow"):
            train(digits, overrides=overrides, runs=tmp_path)
        assert not any(tmp_path.iterdir())

    def test_too_few_images_for_the_gate(self, tmp_path: Path) -> None:
        few = write_digits(tmp_path / "few", classes=2, train=10, validation=4, test=4)
        with pytest.raises(ParityError, match="needs 64 real images, the dataset has 36"):
            train(few, preset="probe", overrides=SMALL, runs=tmp_path)
        assert not list(tmp_path.glob("few-*"))

    def test_unknown_architecture_names_the_nearest(self, digits: Path, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"did you mean .*resnet18"):
            train(digits, overrides={"model": {"name": "resnt18"}}, runs=tmp_path)

    def test_unknown_key_names_the_nearest(self, digits: Path) -> None:
        with pytest.raises(ConfigError, match=r"fit\.epoch: unknown setting; did you mean fit\.epochs"):
            train(digits, overrides={"fit": {"epoch": 3}})

    def test_too_many_blocks(self, digits: Path, tmp_path: Path) -> None:
        overrides = {**SMALL, "fit": {"epochs": 1, "unfreeze": 99}}
        with pytest.raises(ConfigError, match=r"the backbone has \d+ blocks, 99 were asked for"):
            train(digits, overrides=overrides, runs=tmp_path)

    @pytest.mark.parametrize(
        ("batch_size", "rate", "said"),
        [(8, 1e12, r"in epoch 1, batch of train/\d/\d+\.png"), (72, 1e38, "no numbers after epoch 1")],
    )
    def test_a_diverging_run_stops_and_says_where(
        self, digits: Path, tmp_path: Path, batch_size: int, rate: float, said: str
    ) -> None:
        fit = {
            "epochs": 2,
            "batch_size": batch_size,
            "optimizer": {"name": "sgd", "learning_rate": rate},
            "clip_norm": None,
            "warmup": 0.0,
        }
        with pytest.raises(TrainingError, match=said) as caught:
            train(digits, name="wild", overrides={**SMALL, "fit": fit}, runs=tmp_path)
        assert "learning_rate" in str(caught.value)

    @pytest.mark.parametrize(
        ("overrides", "where"),
        [
            ({"fit": {"freeze": 99}}, "fit.freeze"),
            ({"fit": {"optimizer": {"name": "adamm"}}}, "adamm"),
            ({"fit": {"imbalance": "focal", "focal_alpha": {"7": 1.0}}}, "focal_alpha"),
            ({"distill": {"teacher": "nowhere"}}, "nowhere"),
            (
                {"model": {"name": "vit_tiny_patch16_224", "weights": "none"}, "fit": {"scale": 0.5}},
                "fit.scale",
            ),
        ],
    )
    def test_what_cannot_be_is_refused_before_anything_is_computed(
        self, digits: Path, tmp_path: Path, overrides: dict[str, Any], where: str
    ) -> None:
        with pytest.raises(HolotypeError, match=where):
            train(digits, overrides=merge(SMALL, overrides), runs=tmp_path)
        assert not any(tmp_path.iterdir())

    def test_missing_device(self, digits: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="--device cuda"):
            train(digits, runs=tmp_path, device="cuda")


@pytest.mark.slow
def test_ctrl_c_keeps_the_best_so_far_and_finishes_the_bundle(digits: Path, tmp_path: Path) -> None:
    arguments = ["train", str(digits), "--name", "long", "--runs", str(tmp_path), "--json"]
    settings = ["data.size=64", "augment.flip=0", "fit.epochs=500", "fit.patience=500"]
    command = [sys.executable, "-m", "holotype", *arguments, *(f"--set={setting}" for setting in settings)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    metrics = tmp_path / "long" / "metrics.csv"
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and not (metrics.exists() and "fine-tune" in metrics.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 130, err
    result = json.loads(out)
    assert result["interrupted"] is True
    assert "interrupted" in err
    assert load(tmp_path / "long").classes == ("0", "1", "2")
    assert result["report"]["metrics"]["accuracy"]["value"] > 0.8

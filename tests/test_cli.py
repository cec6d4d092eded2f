from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from PIL import Image

from digits import write_digits, write_flat
from holotype import TrainResult, load
from holotype.cli import run


class Outcome:
    """Exit code, stdout and stderr of a command line."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def error(self) -> str:
        """The one line on stderr; fails where there is not exactly one."""
        lines = self.err.strip().splitlines()
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        assert self.code != 0
        return lines[0]


@pytest.fixture
def holotype(capfd: pytest.CaptureFixture[str]):
    def call(*arguments: object) -> Outcome:
        capfd.readouterr()
        code = run([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return Outcome(code, out, err)

    return call


SMALL_FLAGS = ("--set", "data.size=64", "--set", "augment.flip=0")


class TestErrors:
    def test_misspelt_flag(self, holotype) -> None:
        assert "No such option: --presset" in holotype("train", "x", "--presset", "probe").error

    def test_misspelt_verb(self, holotype) -> None:
        assert "trian" in holotype("trian", "x").error

    def test_missing_argument(self, holotype) -> None:
        assert "TARGET" in holotype("evaluate").error
        assert "name one, or --resume" in holotype("train").error

    def test_bad_value(self, holotype) -> None:
        assert "Invalid value for '--cache-limit'" in holotype("train", "x", "--cache-limit", "abc").error

    def test_missing_folder(self, holotype, tmp_path: Path) -> None:
        assert "no such dataset; give a folder" in holotype("train", tmp_path / "nothing").error

    def test_class_with_one_image(self, holotype, tmp_path: Path) -> None:
        data = write_flat(tmp_path / "data")
        (data / "rare").mkdir()
        next((data / "0").glob("*.png")).rename(data / "rare" / "a.png")
        outcome = holotype("train", data, "--preset", "probe", "--runs", tmp_path, *SMALL_FLAGS)
        assert "class 'rare' has no image in" in outcome.error
        assert "add images of it" in outcome.error

    def test_csv_with_a_wrong_column(self, holotype, tmp_path: Path) -> None:
        file = tmp_path / "labels.csv"
        file.write_text("image_path,lable\na.png,x\n")
        assert "line 1: unknown column 'lable'; did you mean label?" in holotype("train", file).error

    def test_corrupt_files(self, holotype, tmp_path: Path) -> None:
        data = write_digits(tmp_path / "data")
        for file in list((data / "train" / "1").glob("*.png"))[:3]:
            file.write_bytes(file.read_bytes()[:50])
        outcome = holotype("train", data, "--preset", "probe", "--runs", tmp_path, *SMALL_FLAGS)
        assert "3 of 120 files are unreadable, first train/1/" in outcome.error

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ("fit.epoch=3", "fit.epoch: unknown setting; did you mean fit.epochs?"),
            ("fit.epochs=many", "fit.epochs: "),
            ("epochs=3", "epochs: unknown setting; did you mean fit.epochs?"),
            ("preset=[1]", "preset: Input should be"),
            ("augment.preset=[1]", "augment.preset: Input should be"),
            ("fit.epochs", "--set fit.epochs: not of the form section.key=value"),
        ],
    )
    def test_settings(self, holotype, setting: str, message: str) -> None:
        outcome = holotype("train", "x", "--set", setting)
        assert message in outcome.error
        assert outcome.code == 2

    @pytest.mark.parametrize(
        "arguments", [("evaluate", "x"), ("compare", "x", "y"), ("convert", "x", "y.csv")]
    )
    def test_what_only_a_new_model_can_have(self, holotype, arguments: tuple[str, ...]) -> None:
        error = holotype(*arguments, "--set", "data.size=64").error
        assert error.startswith("holotype: data.size: is set when a model is trained")

    def test_none_is_written_null(self, holotype) -> None:
        assert "write null for none" in holotype("train", "x", "--set", "data.size=None").error

    def test_recipe_that_is_not_there(self, holotype, tmp_path: Path) -> None:
        assert "check --recipe" in holotype("train", "x", "--recipe", tmp_path / "none.yaml").error

    def test_recipe_that_is_no_text(self, holotype, tmp_path: Path) -> None:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_bytes(b"name: caf\xe9")
        assert "recipe.yaml: not YAML" in holotype("train", "x", "--recipe", recipe).error

    def test_target_that_is_no_bundle(self, holotype, tmp_path: Path) -> None:
        assert "neither a bundle nor a run folder" in holotype("predict", tmp_path, "a.jpg").error
        assert "no such bundle" in holotype("evaluate", tmp_path / "none").error

    def test_debug_shows_the_traceback(self, holotype, tmp_path: Path) -> None:
        from holotype.errors import DatasetError

        with pytest.raises(DatasetError):
            holotype("train", tmp_path / "nothing", "--debug")

    def test_weights_that_cannot_be_found(self, holotype, digits: Path, tmp_path: Path) -> None:
        outcome = holotype(
            "train", digits, "--weights", tmp_path / "w.pth", "--runs", tmp_path, "--quiet", *SMALL_FLAGS
        )
        assert "no such weights file" in outcome.error

    def test_architecture_without_reachable_weights(
        self, holotype, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        outcome = holotype(
            "train", digits, "--model", "resnet18", "--runs", tmp_path, "--quiet", *SMALL_FLAGS
        )
        assert (
            "use --weights FILE or none, or an architecture with packaged weights (tf_efficientnet_lite0"
            in outcome.error
        )


class TestTrain:
    def test_json_is_one_object_on_stdout(self, holotype, digits: Path, tmp_path: Path) -> None:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            "preset: probe\ndata: {size: 64}\naugment: {flip: 0.0}\nmodel: {name: tf_efficientnet_lite1}\n"
        )
        outcome = holotype(
            "train", digits, "--name", "run", "--runs", tmp_path, "--recipe", recipe,
            "--model", "tf_efficientnet_lite0", "--json",
        )  # fmt: skip
        result = json.loads(outcome.out)
        assert outcome.code == 0
        assert result["report"]["split"] == "test"
        assert result["bundle"]["path"] == str(tmp_path / "run" / "best")
        assert "tf_efficientnet_lite0" in outcome.err
        config = (tmp_path / "run" / "config.yaml").read_text()
        assert "tf_efficientnet_lite0" in config
        assert "epochs: 0" in config


class TestPredict:
    @pytest.fixture
    def photos(self, digits: Path, tmp_path: Path) -> Path:
        folder = tmp_path / "photos"
        folder.mkdir()
        for number, file in enumerate(sorted(digits.glob("test/*/*.png"))[:10]):
            (folder / f"{number}.png").write_bytes(file.read_bytes())
        return folder

    def test_lines_for_people(self, holotype, probe: TrainResult, digits: Path) -> None:
        file = next(digits.glob("test/0/*.png"))
        outcome = holotype("predict", probe.folder, file)
        assert outcome.code == 0
        assert outcome.out.startswith(f"{load(probe.folder).predict(file).label}  ")
        assert str(file) in outcome.out

    def test_jsonl_and_csv_say_what_the_predictor_says(
        self, holotype, probe: TrainResult, photos: Path
    ) -> None:
        predictor = load(probe.folder)
        wanted = {str(file): predictor.predict(file) for file in photos.iterdir()}
        lines = [
            json.loads(line)
            for line in holotype("predict", probe.best, photos, "--format", "jsonl").out.splitlines()
        ]
        rows = list(
            csv.DictReader(io.StringIO(holotype("predict", probe.best, photos, "--format", "csv").out))
        )
        assert [line["path"] for line in lines] == sorted(wanted)
        for line, row in zip(lines, rows, strict=True):
            answer = wanted[line["path"]]
            assert (line["label"], row["label"]) == (answer.label, answer.label)
            assert line["probability"] == pytest.approx(answer.probability, abs=1e-6)
            assert float(row["probability"]) == line["probability"]
            assert json.loads(row["top"]) == line["top"]
            assert sum(choice["probability"] for choice in line["top"]) == pytest.approx(1)

    def test_broken_files_become_rows_and_the_exit_code_says_so(
        self, holotype, probe: TrainResult, photos: Path
    ) -> None:
        (photos / "3.png").write_bytes(b"no image")
        outcome = holotype("predict", probe.best, photos, photos / "missing.png", "--json")
        rows = {Path(row["path"]).name: row for row in json.loads(outcome.out)["results"]}
        assert outcome.code == 1
        assert rows["3.png"]["error"]["status"] == 415
        assert rows["missing.png"]["error"]["status"] == 404
        assert rows["3.png"]["label"] is None
        assert sum(row["label"] is not None for row in rows.values()) == 9
        assert "2 of 11 files could not be read" in outcome.err

    def test_a_list_of_names_that_are_not_a_line_each(
        self, holotype, probe: TrainResult, photos: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        good = photos / "3.png"
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{good}\n{good}\0{good}\n"))  # as of find -print0
        outcome = holotype("predict", probe.best, "-", "--json")
        (first, second) = json.loads(outcome.out)["results"]
        assert outcome.code == 1
        assert first["label"] is not None
        assert second["error"] == {"status": 404, "message": "cannot be read (no file can be called so)"}

    def test_globs_stdin_and_top(
        self, holotype, probe: TrainResult, photos: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        globbed = json.loads(
            holotype("predict", probe.best, photos / "[0-4].png", "--json", "--top", "2").out
        )
        assert len(globbed["results"]) == 5
        assert len(globbed["results"][0]["top"]) == 2
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(str(file) for file in photos.iterdir())))
        assert len(json.loads(holotype("predict", probe.best, "-", "--json").out)["results"]) == 10

    def test_show_input_writes_what_the_model_sees(
        self, holotype, probe: TrainResult, photos: Path, tmp_path: Path
    ) -> None:
        import numpy as np

        holotype("predict", probe.best, photos / "0.png", "--show-input", tmp_path / "seen")
        (written,) = (tmp_path / "seen").iterdir()
        assert np.array_equal(np.asarray(Image.open(written)), load(probe.best).read(photos / "0.png"))

    def test_device_that_has_no_effect_or_is_not_there(
        self, holotype, probe: TrainResult, photos: Path
    ) -> None:
        assert "add --runtime torch" in holotype("predict", probe.best, photos, "--device", "cuda").error
        outcome = holotype("predict", probe.best, photos, "--device", "cuda", "--runtime", "torch")
        assert "--device cuda: this machine has none" in outcome.error

    def test_nothing_to_predict(self, holotype, probe: TrainResult, tmp_path: Path) -> None:
        assert "no images found" in holotype("predict", probe.best, tmp_path).error


class TestExport:
    def test_openvino_bundle_answers_the_same(
        self, holotype, probe: TrainResult, digits: Path, tmp_path: Path
    ) -> None:
        outcome = holotype("export", probe.folder, "--format", "openvino", "--out", tmp_path / "ov", "--json")
        result = json.loads(outcome.out)
        assert result["parity"]["images"] >= 64
        bundle = load(tmp_path / "ov").bundle
        assert bundle.manifest.lineage.parent == probe.bundle.hash
        assert bundle.manifest.classes == probe.bundle.manifest.classes
        assert bundle.manifest.payloads.keys() == {"openvino", "openvino_weights", "golden", "baseline"}
        for file in list(digits.glob("test/*/*.png"))[:6]:
            assert load(tmp_path / "ov").predict(file).label == load(probe.best).predict(file).label

    def test_onnx_again_from_the_weights(self, holotype, tuned: TrainResult, tmp_path: Path) -> None:
        outcome = holotype("export", tuned.best, "--format", "onnx", "--out", tmp_path / "onnx")
        assert outcome.code == 0
        assert "agrees with torch on" in outcome.out
        assert "onnx" in load(tmp_path / "onnx").bundle.manifest.payloads

    def test_refusals(self, holotype, probe: TrainResult, tmp_path: Path) -> None:
        assert "unknown format" in holotype("export", probe.best, "--format", "tflite").error
        assert "exists already" in holotype("export", probe.best, "--format", "onnx", "--out", tmp_path).error


class TestOthers:
    def test_config_prints_every_key(self, holotype) -> None:
        settings = json.loads(holotype("config", "train", "--json").out)["settings"]
        keys = {setting["key"]: setting for setting in settings}
        assert keys["fit.optimizer.learning_rate"]["meaning"]
        assert keys["fit.patience"]["default"] == "5"
        rates = {row["kind"]: row["default"] for row in settings if row["key"].endswith("learning_rate")}
        assert rates["adamw"] == "0.0006", "what train does, not its parts"
        assert rates["sgd"] == "0.1"
        thorough = json.loads(holotype("config", "train", "--set", "preset=thorough", "--json").out)
        epochs = {row["key"]: row["default"] for row in thorough["settings"]}["fit.epochs"]
        assert epochs != keys["fit.epochs"]["default"]
        assert keys["data.resize"]["type"] == "auto|squash|letterbox|crop"
        assert keys["fit.scale"]["type"] == "float|auto"
        assert all(setting["meaning"] for setting in settings)
        assert "fit.patience" in holotype("config", "train").out
        assert "queue" in holotype("config", "serve").out
        assert "use one of train" in holotype("config", "nothing").error

    def test_models_lists_the_reference_table(self, holotype) -> None:
        rows = {row["name"]: row for row in json.loads(holotype("models", "--json").out)["models"]}
        assert rows.keys() >= {
            "resnet18", "resnet50", "efficientnet_b4", "vit_base_patch16_224", "mobilenetv3_large_100",
            "tf_efficientnet_lite0",
        }  # fmt: skip
        assert rows["resnet18"]["parameters"] == 11_689_512
        assert rows["vit_base_patch16_224"]["top1"] == pytest.approx(85.1, abs=0.05)
        assert all(row["use"] and row["height"] >= 224 for row in rows.values())
        assert "74.8" in holotype("models").out

    def test_models_by_pattern(self, holotype) -> None:
        names = [
            row["name"]
            for row in json.loads(holotype("models", "mobilenetv3_small*", "--json").out)["models"]
        ]
        assert "mobilenetv3_small_050" in names
        assert "no architecture matches" in holotype("models", "nonesuch").error
        assert "more specific" in holotype("models", "resnet").error

    def test_measured_latency_is_remembered(self, holotype) -> None:
        first = json.loads(holotype("models", "test_efficientnet", "--measure", "--json").out)["models"]
        again = json.loads(holotype("models", "test_efficientnet", "--json").out)["models"]
        measured = [row["milliseconds"] for row in first]
        assert all(value > 0 for value in measured)
        assert [row["milliseconds"] for row in again] == measured


def python(code: str, *, blocked: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    block = f"import sys; sys.modules.update(dict.fromkeys({blocked!r}));"
    return subprocess.run(
        [sys.executable, "-c", block + code],
        check=False,
        capture_output=True,
        text=True,
        env=dict(os.environ),
    )


class TestWithoutTorch:
    BLOCKED = ("torch", "torchvision", "timm", "polars", "sklearn", "accelerate", "matplotlib")

    def test_predict(self, probe: TrainResult, digits: Path) -> None:
        file = next(digits.glob("test/0/*.png"))
        arguments = ["predict", str(probe.best), str(file), "--json"]
        code = f"from holotype.cli import run; sys.exit(run({arguments!r}))"
        done = python(code, blocked=self.BLOCKED)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["results"][0]["label"] == load(probe.best).predict(file).label

    def test_training_names_the_extra(self) -> None:
        done = python("from holotype.cli import run; sys.exit(run(['train', 'x']))", blocked=self.BLOCKED)
        assert done.returncode == 1
        assert "pip install 'holotype[train]'" in done.stderr
        assert "Traceback" not in done.stderr

    def test_exporting_names_it_too(self) -> None:
        arguments = ["export", "x", "--format", "openvino"]
        done = python(f"from holotype.cli import run; sys.exit(run({arguments!r}))", blocked=self.BLOCKED)
        assert done.returncode == 1
        assert "pip install 'holotype[train]'" in done.stderr
        assert "Traceback" not in done.stderr

    def test_a_benchmark_needs_none_of_it(
        self, probe: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # What it finds is remembered, and would decide how other tests run this bundle.
        monkeypatch.setenv("HOLOTYPE_CACHE", str(tmp_path))
        arguments = ["benchmark", str(probe.best), "--json", "--set", "rounds=3", "--set", "seconds=0.01"]
        done = python(f"from holotype.cli import run; sys.exit(run({arguments!r}))", blocked=self.BLOCKED)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["for_latency"]["bundle"] == str(probe.best)

    def test_version(self, holotype) -> None:
        from holotype import __version__

        assert holotype("--version").out == f"holotype {__version__}\n"

    def test_help_imports_nothing_heavy(self) -> None:
        heavy = ("numpy", "torch", "PIL", "pydantic", "onnx")
        code = f"import holotype.cli; print([m for m in {heavy} if m in sys.modules])"
        assert python(code).stdout.strip() == "[]"


def test_package_names_are_functions_whatever_is_imported_first() -> None:
    names = (
        "audit", "benchmark", "compare", "compress", "convert", "evaluate", "explain", "export",
        "hard_samples", "train", "tune",
    )  # fmt: skip
    code = (
        f"import {', '.join(f'holotype.{name}' for name in names)};"
        f"from holotype import {', '.join(names)};"
        f"print({', '.join(f'callable({name})' for name in names)})"
    )
    assert python(code).stdout.strip() == " ".join(["True"] * len(names))


def test_every_extra_that_an_error_names_can_be_installed() -> None:
    home = Path(__file__).parents[1]
    offered = set(tomllib.loads((home / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    named = {
        name
        for file in (home / "src").rglob("*.py")
        for pair in re.findall(r'extra="(\w+)", purpose|holotype\[(\w+)\]', file.read_text())
        for name in pair
        if name
    }
    assert {"train", "openvino", "tensorrt"} <= named
    assert named <= offered

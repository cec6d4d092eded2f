"""`holotype demo`: the whole way on scikit-learn's 1,797 handwritten digits, without a network."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from holotype.bundle import PayloadName
from holotype.config import Preset, TrainConfig, resolve_config
from holotype.dataset import Dataset, open_dataset
from holotype.errors import require
from holotype.export import export
from holotype.metrics import Interval, evaluate_predictions
from holotype.predictor import Prediction, Predictor, load
from holotype.scoring import choose_split, score
from holotype.timing import measure_latency
from holotype.train import TrainResult, train

__all__ = ["Demo", "RuntimeRow", "run_demo", "write_digits"]

_FILES: dict[str, tuple[PayloadName, ...]] = {
    "torch": ("weights",),
    "onnxruntime": ("onnx",),
    "openvino": ("openvino", "openvino_weights"),
}


@dataclass(frozen=True)
class RuntimeRow:
    """The same classifier in one runtime: its accuracy on the test split, median times, size."""

    runtime: str
    accuracy: Interval
    one_ms: float
    eight_ms: float
    megabytes: float


@dataclass(frozen=True)
class Demo:
    """What the demo made and measured."""

    data: Path
    result: TrainResult
    rows: tuple[RuntimeRow, ...]
    examples: tuple[Prediction, ...]
    openvino: Path
    seconds: float


def run_demo(
    *,
    data: Path | str = "digits",
    runs: Path | str = "runs",
    name: str = "demo",
    preset: Preset = "probe",
    config: TrainConfig | None = None,
    device: str = "auto",
) -> Demo:
    """Write the digits, train, evaluate, export to ONNX and OpenVINO, pass the gates, predict, compare."""
    started = time.perf_counter()
    require("openvino", extra="openvino", purpose="the demo's comparison of runtimes")
    # A mirrored digit is a wrong label.
    config = config or resolve_config(TrainConfig, overrides={"preset": preset, "augment": {"flip": 0.0}})
    folder = write_digits(Path(data))
    result = train(folder, name=name, config=config, runs=runs, device=device)
    exported = export(result.best, format="openvino", data=folder).bundle.path
    dataset = open_dataset(folder, spec=result.bundle.manifest.preprocess, config=config.data)
    predictors = {
        "torch": load(result.best, runtime="torch", device=device),
        "onnxruntime": load(result.best, runtime="onnxruntime"),
        "openvino": load(exported, runtime="openvino"),
    }
    rows = _compare(predictors, dataset)
    files = sorted((folder / "test").glob("*/*.png"))
    examples = tuple(
        predictors["onnxruntime"].predict_many([str(file) for file in files[:: len(files) // 5][:5]])
    )
    return Demo(folder, result, rows, examples, exported, time.perf_counter() - started)


def write_digits(folder: Path) -> Path:
    """scikit-learn's handwritten digits (8 x 8, 1,797 of them, real) as PNG in train, validation and test.

    The set has no writer names and comes in blocks of writers, so consecutive blocks of it, not single
    images, go to the splits. Existing files are left as they are.
    """
    if (folder / "test" / "9").is_dir():
        return folder
    load_digits = require("sklearn.datasets", extra="train", purpose="the demo's data").load_digits
    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        block = number // 45 % 10
        split = "test" if block in (3, 7) else "validation" if block == 5 else "train"
        target = folder / split / str(label) / f"{number:04d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        grey = (255 - image * 255 / 16).round().astype(np.uint8)
        Image.fromarray(grey).save(target)
    return folder


def _compare(predictors: dict[str, Predictor], dataset: Dataset) -> tuple[RuntimeRow, ...]:
    split = choose_split(dataset)
    images = next(dataset.pixels([dataset.rows(split)[:8]]))
    runtimes = {name: predictor.runtime for name, predictor in predictors.items()}
    one = measure_latency(runtimes, images[:1])
    eight = measure_latency(runtimes, images)
    rows = []
    for name, predictor in predictors.items():
        accuracy = evaluate_predictions(score(predictor, dataset, split=split))["accuracy"]
        payloads = predictor.bundle.manifest.payloads
        size = sum(payloads[payload].bytes for payload in _FILES[name]) / 1e6
        rows.append(RuntimeRow(name, accuracy, one[name], eight[name], size))
    return tuple(rows)

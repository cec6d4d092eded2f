"""`holotype train`: from a dataset to a run folder with a measured, exported, parity-checked bundle."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from holotype.bundle import (
    Bundle,
    Lineage,
    Manifest,
    PayloadName,
    library_versions,
    write_bundle,
    write_golden,
    write_text,
)
from holotype.config import Preset, TrainConfig, resolve_config, to_yaml
from holotype.dataset import Dataset, Shape, dataset_name, margin_shape, open_dataset
from holotype.errors import ConfigError
from holotype.fit import FineTuned, Plan, choose_precision, fine_tune
from holotype.head import HeadFit, batches_of, extract_features, fit_head
from holotype.models import (
    Architecture,
    Classifier,
    choose_device,
    head_of,
    input_spec,
    load_weights,
    pretrained,
    recipe_of,
    save_weights,
    set_head,
)
from holotype.onnx_export import export_onnx, replace_head
from holotype.parity import Parity, check_enough, check_parity, choose_golden, sample_rows
from holotype.policy import Policy, fit_temperature
from holotype.predictor import load
from holotype.preprocess import Preprocess
from holotype.progress import note
from holotype.report import Report
from holotype.runlog import Row, RunLog, create_run
from holotype.runtime import Runtime, available_cores, load_onnx, torch_runtime
from holotype.scoring import choose_split, evaluate_split

__all__ = ["TrainResult", "train"]

_PARITY_IMAGES = 128
_FEATURE_BATCH = 8  # on CPUs as fast as larger ones, in less memory


@dataclass(frozen=True)
class TrainResult:
    """Where a run ended up: its folder, its bundle and its report."""

    folder: Path
    bundle: Bundle
    report: Report
    parity: Parity
    interrupted: bool

    @property
    def best(self) -> Path:
        """The bundle's folder."""
        return self.bundle.path


@dataclass(frozen=True)
class _Setup:
    """What is settled before the first image is learned from."""

    config: TrainConfig
    folder: Path
    dataset: Dataset
    architecture: Architecture
    classifier: Classifier
    device: torch.device
    log: RunLog


def train(
    data: Path | str,
    *,
    name: str | None = None,
    preset: Preset | None = None,
    config: TrainConfig | None = None,
    overrides: Mapping[str, Any] | None = None,
    runs: Path | str = "runs",
    device: str = "auto",
) -> TrainResult:
    """Train on a class folder or CSV, and end with `runs/name/best` (a bundle) and `runs/name/report.json`.

    Settings are `config`, or else the preset with `overrides` such as `{"fit": {"epochs": 3}}`; `name`
    defaults to that of the data and gets a number where it is taken. Ctrl-C while fine-tuning keeps the best
    weights so far and finishes the bundle. Raises a `HolotypeError` that says what, where and the fix.
    """
    begun = time.perf_counter()
    config = _settings(config, preset, overrides)
    setup = _prepare(
        Path(data), config, name=name or dataset_name(Path(data)), runs=Path(runs), device=device
    )
    with tempfile.TemporaryDirectory(dir=setup.folder, prefix=".work-") as scratch:
        model_file = Path(scratch) / "model.onnx"
        head, exported = _fit_head(setup, model_file)
        tuned = FineTuned(_state(setup.classifier), head.scores, head.logits, interrupted=False)
        if config.fit.epochs:
            tuned = _fine_tune(setup, tuned)
            load_weights(setup.classifier, tuned.state)
            exported = False
        bundle, parity = _write_bundle(setup, tuned, Path(scratch), exported=exported)
    split = choose_split(setup.dataset)
    report = evaluate_split(
        load(bundle.path),
        setup.dataset,
        split=split,
        folder=setup.folder,
        history=setup.log.metrics,
        started=begun,
    )
    return TrainResult(setup.folder, bundle, report, parity, tuned.interrupted)


def _settings(
    config: TrainConfig | None, preset: Preset | None, overrides: Mapping[str, Any] | None
) -> TrainConfig:
    if config is not None and (preset is not None or overrides):
        raise ConfigError("give either config, or preset and overrides", where="train")
    if config is not None:
        return config
    chosen = {**(overrides or {}), **({"preset": preset} if preset else {})}
    return resolve_config(TrainConfig, overrides=chosen)


def _prepare(data: Path, config: TrainConfig, *, name: str, runs: Path, device: str) -> _Setup:
    _keep_freed_memory()
    chosen = choose_device(device)
    _seed(config)
    spec = input_spec(config.model, config.data)
    start = time.perf_counter()
    dataset = open_dataset(data, spec=spec, config=config.data, shapes=_views(config, spec))
    read: Row = {"stage": "read", "seconds": time.perf_counter() - start}
    _tell_dataset(dataset)
    check_enough(len(dataset.table))
    recipe = recipe_of(config.model.name)
    architecture = Architecture(
        name=config.model.name,
        classes=len(dataset.classes),
        height=spec.height,
        width=spec.width,
        mean=recipe.mean,
        std=recipe.std,
        dropout=config.model.dropout,
    )
    classifier, origin = pretrained(architecture, weights=config.model.weights)
    precision = choose_precision(classifier, config.fit, device=chosen) if config.fit.epochs else "fp32"
    config = config.model_copy(update={"fit": config.fit.model_copy(update={"precision": precision})})
    folder = create_run(runs, name)
    write_text(folder / "config.yaml", to_yaml(config))
    note(f"{architecture.name} ({origin} weights), {spec}, {precision} on {chosen} → {folder}")
    log = RunLog(folder)
    log.add_timing(read)
    return _Setup(config, folder, dataset, architecture, classifier, chosen, log)


def _fit_size(config: TrainConfig, spec: Preprocess) -> Shape:
    """The size of images while fine-tuning: a multiple of 16, or the input's own."""
    scale = config.fit.scale
    if scale == "auto":
        scale = 1.0 if recipe_of(config.model.name).fixed_size else 0.8
    if scale == 1:
        return Shape(spec.height, spec.width)
    return Shape(*(max(16 * round(side * scale / 16), 16) for side in (spec.height, spec.width)))


def _views(config: TrainConfig, spec: Preprocess) -> tuple[Shape, ...]:
    """The view that training crops are taken from; none where nothing is fine-tuned."""
    return (margin_shape(_fit_size(config, spec), crop=config.augment.crop),) if config.fit.epochs else ()


def _keep_freed_memory() -> None:
    """Let glibc keep freed memory instead of giving it back and faulting it in again at every step.

    Activations of tens of megabytes are freed and allocated hundreds of times a second; by default each is
    a fresh map of zeroed pages. Measured: a training step takes 0.6 of the time.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # another C library, which has no such habit
    trim_threshold, mmap_threshold = -1, -3
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, (1 << 31) - 1)


def _seed(config: TrainConfig) -> None:
    torch.manual_seed(config.fit.seed)
    torch.use_deterministic_algorithms(config.fit.deterministic)


def _tell_dataset(dataset: Dataset) -> None:
    sizes = ", ".join(f"{len(dataset.rows(split)):,} {split}" for split in dataset.splits)
    note(f"{len(dataset.table):,} images in {len(dataset.classes)} classes: {sizes}")
    if dataset.deviation:
        label, gap = max(dataset.deviation.items(), key=lambda item: item[1])
        note(f"automatic split; the class furthest from the wanted shares is {label}, by {gap:.1%}")
    if dataset.ignored:
        note(f"passed over {len(dataset.ignored)} files not named like images, first {dataset.ignored[0]}")


def _timed(setup: _Setup, stage: str, start: float, *, images: int | None = None) -> None:
    """Write down how long a step took since `start`."""
    seconds = time.perf_counter() - start
    row: dict[str, float | int | str] = {"stage": stage, "seconds": seconds}
    setup.log.add_timing(row if images is None else {**row, "images_per_second": images / seconds})


def _fit_head(setup: _Setup, model_file: Path) -> tuple[HeadFit, bool]:
    """Stage 1. Also says whether `model_file` now holds the classifier with the fitted head."""
    dataset, config = setup.dataset, setup.config
    runtime = _feature_runtime(setup, model_file)
    rows = {split: dataset.rows(split) for split in ("train", "validation")}
    start = time.perf_counter()
    features = {
        split: extract_features(
            runtime,
            dataset.pixels(list(batches_of(rows[split], size=_FEATURE_BATCH))),
            dataset.labels(rows[split]),
            mirror=split == "train" and config.augment.flip > 0,
            label=f"features of {split}",
        )
        for split in ("train", "validation")
    }
    count = sum(len(part.labels) for part in features.values())
    _timed(setup, "features", start, images=count)
    note(f"{count:,} features by {runtime.name}, {count / (time.perf_counter() - start):.0f} images/s")
    head = fit_head(
        features["train"],
        features["validation"],
        classes=setup.architecture.classes,
        config=config.fit,
        log=setup.log,
    )
    set_head(setup.classifier, head.weight, head.bias)
    note(f"head on frozen features: {head.scores.accuracy:.1%} accuracy on validation")
    return head, model_file.exists() and replace_head(model_file, setup.classifier)


def _feature_runtime(setup: _Setup, model_file: Path) -> Runtime:
    """On a CPU onnxruntime is twice as fast as eager torch, and the export is needed anyway."""
    if setup.device.type != "cpu":
        return torch_runtime(setup.classifier.eval(), device=str(setup.device))
    # The exporter leaves a bias of zeros out, and with it the place where the fitted one goes.
    head = head_of(setup.classifier).layer
    set_head(setup.classifier, head.weight, torch.ones_like(head.bias))
    _export(setup, model_file)
    return load_onnx(model_file, threads=available_cores())


def _export(setup: _Setup, file: Path) -> None:
    start = time.perf_counter()
    export_onnx(setup.classifier, file, classes=setup.dataset.classes, preprocess=setup.dataset.spec)
    _timed(setup, "export", start)


def _fine_tune(setup: _Setup, start: FineTuned) -> FineTuned:
    config = setup.config
    precision = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}[config.fit.precision]
    AcceleratorState._reset_state()  # a second run in this process may use another precision
    accelerator = Accelerator(
        mixed_precision=precision,
        cpu=setup.device.type == "cpu",
        log_with="tensorboard",
        project_dir=setup.folder,
    )
    accelerator.init_trackers("tensorboard")
    setup.classifier.to(setup.device).to(memory_format=torch.channels_last)
    spec = setup.dataset.spec
    (view,) = _views(config, spec)
    plan = Plan(setup.dataset, view, _fit_size(config, spec), config.augment, config.fit)
    try:
        return fine_tune(setup.classifier, plan, accelerator=accelerator, start=start, log=setup.log)
    finally:
        accelerator.end_training()
        accelerator.unwrap_model(setup.classifier, keep_fp32_wrapper=False)
        gc.collect()


def _state(classifier: Classifier) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in classifier.network.state_dict().items()}


def _write_bundle(setup: _Setup, tuned: FineTuned, scratch: Path, *, exported: bool) -> tuple[Bundle, Parity]:
    """Export, pass the parity gate on real images, and write `best` with what proves it."""
    dataset, classifier = setup.dataset, setup.classifier.cpu().eval()
    model_file = scratch / "model.onnx"
    if not exported:
        _export(setup, model_file)
    onnx = load_onnx(model_file, threads=available_cores())
    validation = dataset.labels(dataset.rows("validation"))
    policy = Policy(temperature=fit_temperature(tuned.logits, validation))
    rows = sample_rows(dataset, count=_PARITY_IMAGES)
    images = np.concatenate(list(dataset.pixels([rows])))
    parity = check_parity(
        torch_runtime(classifier, device="cpu"),
        onnx,
        images=images,
        paths=dataset.paths(rows),
        classes=dataset.classes,
        policy=policy,
    )
    note(
        f"parity gate: {parity.images} images, probabilities within {parity.largest_difference:.1g}, no flips"
    )
    save_weights(classifier, scratch / "weights.safetensors")
    write_text(scratch / "architecture.json", setup.architecture.model_dump_json(indent=1))
    write_golden(scratch / "golden.npz", choose_golden(onnx, images))
    files: dict[PayloadName, Path] = {
        "weights": scratch / "weights.safetensors",
        "architecture": scratch / "architecture.json",
        "onnx": model_file,
        "golden": scratch / "golden.npz",
    }
    return write_bundle(setup.folder / "best", _manifest(setup, tuned, policy), files=files), parity


def _manifest(setup: _Setup, tuned: FineTuned, policy: Policy) -> Manifest:
    dataset = setup.dataset
    return Manifest(
        classes=dataset.classes,
        preprocess=dataset.spec,
        policy=policy,
        metrics={"validation": {"accuracy": tuned.scores.accuracy, "macro_f1": tuned.scores.macro_f1}},
        lineage=Lineage(
            dataset=str(dataset.source.resolve()),
            dataset_root_hash=dataset.root_hash,
            config_sha256=hashlib.sha256(to_yaml(setup.config).encode()).hexdigest(),
        ),
        versions=library_versions(),
    )

"""`holotype export`: the same classifier for another runtime, accepted only after the parity gate."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx

from holotype.baseline import write_baseline
from holotype.bundle import (
    Bundle,
    Golden,
    PayloadName,
    Precision,
    library_versions,
    open_bundle,
    read_golden,
    write_bundle,
    write_golden,
)
from holotype.calibrate import fit_policy, rule_of
from holotype.config import ExportConfig, PolicyConfig
from holotype.dataset import Dataset, open_for
from holotype.errors import BundleError, ConfigError, require
from holotype.machine import available_cores
from holotype.parity import LIMITS, Parity, check_parity, parity_record, sample_rows
from holotype.quantize import calibration_rows, observe, quantize
from holotype.runtime import (
    Choice,
    Runtime,
    RuntimeName,
    load_onnx,
    load_openvino,
    load_tensorrt,
    open_runtime,
)
from holotype.timing import find_fastest

__all__ = ["FORMATS", "ExportFormat", "Exported", "export"]

ExportFormat = Literal["onnx", "openvino", "tensorrt"]
FORMATS: dict[str, ExportFormat] = {"onnx": "onnx", "openvino": "openvino", "tensorrt": "tensorrt"}


@dataclass(frozen=True)
class Exported:
    """The new bundle, its parity, and what runs it fastest here; None: not measured."""

    bundle: Bundle
    parity: Parity
    fastest: Choice | None


@dataclass(frozen=True)
class _Converted:
    files: dict[PayloadName, Path]
    runtime: Runtime
    precision: Precision


def export(
    target: Path | str,
    *,
    format: ExportFormat,  # noqa: A002  (the name of the flag)
    data: Path | str | None = None,
    out: Path | str | None = None,
    config: ExportConfig | None = None,
) -> Exported:
    """Write a new bundle, by default `NAME-FORMAT` beside the old one, with `parent` set to it.

    At least 64 real images of `data` (default: the dataset the bundle was trained on) go through both
    models; `ParityError` lists the flips and nothing is written. In fp32 labels must be the same and
    probabilities within 1e-4; in less, `parity.LIMITS` says. What the gate found is in the bundle's metrics.
    """
    config = config or ExportConfig()
    source = open_bundle(target)
    folder = Path(out) if out is not None else source.path.with_name(f"{source.path.name}-{format}")
    if folder.exists():
        raise ConfigError("exists already", where=folder, fix="remove it, or choose another --out")
    dataset = open_for(source, data, config=config.data)
    rows = sample_rows(dataset, count=config.images)
    images = np.concatenate(list(dataset.pixels([rows])))
    with tempfile.TemporaryDirectory() as scratch:
        converted = _CONVERTERS[format](source, dataset, Path(scratch), config)
        parity = check_parity(
            _reference(source),
            converted.runtime,
            images=images,
            paths=dataset.paths(rows),
            classes=source.manifest.classes,
            policy=source.manifest.policy,
            limits=LIMITS[converted.precision],
        )
        bundle = _write(
            source,
            converted,
            dataset,
            folder,
            scratch=Path(scratch),
            config=rule_of(source, config.policy),
            parity=parity,
        )
    return Exported(bundle, parity, find_fastest(bundle) if config.measure else None)


def _reference(source: Bundle) -> Runtime:
    """What the new model must agree with: the torch network where the bundle has it."""
    names: dict[RuntimeName, PayloadName] = {
        "torch": "weights",
        "onnxruntime": "onnx",
        "openvino": "openvino",
    }
    name = next((name for name, payload in names.items() if payload in source.manifest.payloads), None)
    if name is None:
        raise BundleError("has nothing to export from", where=source.path, fix="give what train wrote")
    return open_runtime(source, name=name, device="cpu")


def _write(
    source: Bundle,
    converted: _Converted,
    dataset: Dataset,
    folder: Path,
    *,
    scratch: Path,
    config: PolicyConfig,
    parity: Parity,
) -> Bundle:
    """The new bundle; in another arithmetic its policy and baseline are fitted anew."""
    golden = read_golden(source).images
    files = {**converted.files, "golden": scratch / "golden.npz"}
    write_golden(files["golden"], Golden(golden, converted.runtime.run(golden).logits))
    policy, baseline = source.manifest.policy, source.payload("baseline")
    if converted.precision != source.manifest.precision:
        fitted = fit_policy(converted.runtime, dataset, classes=source.manifest.classes, config=config)
        policy, baseline = fitted.policy, scratch / "baseline.npz"
        write_baseline(baseline, fitted.baseline)
    if baseline is not None:
        files["baseline"] = baseline
    manifest = source.manifest.model_copy(
        update={
            "precision": converted.precision,
            "policy": policy,
            "metrics": {**source.manifest.metrics, "parity": parity_record(parity)},
            "lineage": source.manifest.lineage.model_copy(update={"parent": source.hash}),
            "versions": library_versions(),
        }
    )
    return write_bundle(folder, manifest, files=files)


def _to_onnx(source: Bundle, _: Dataset, scratch: Path, config: ExportConfig) -> _Converted:
    require("torch", extra="train", purpose="export to ONNX")
    _only(config, "auto", "fp32", kind="onnx")
    files = source.network_files(purpose=" to export", fix="give the bundle that holotype train wrote")
    from holotype.models import open_network
    from holotype.onnx_export import export_onnx

    manifest, file = source.manifest, scratch / "model.onnx"
    export_onnx(open_network(*files), file, classes=manifest.classes, preprocess=manifest.preprocess)
    kept: dict[PayloadName, Path] = {
        name: source.path / payload.path
        for name, payload in manifest.payloads.items()
        if name in ("weights", "architecture")
    }
    return _Converted({**kept, "onnx": file}, load_onnx(file, threads=available_cores()), "fp32")


def _to_openvino(source: Bundle, _: Dataset, scratch: Path, config: ExportConfig) -> _Converted:
    from holotype.onnx_export import convert_openvino

    require("openvino", extra="openvino", purpose="export to OpenVINO")
    _only(config, "auto", "fp32", "bf16", kind="openvino")
    model = _onnx_of(source)
    half = config.precision == "bf16"
    xml, weights = convert_openvino(model, scratch, half=half)
    runtime = load_openvino(xml, threads=available_cores(), half=half)
    precision: Precision = "bf16" if half else source.manifest.precision
    return _Converted({"openvino": xml, "openvino_weights": weights}, runtime, precision)


def _to_tensorrt(source: Bundle, dataset: Dataset, scratch: Path, config: ExportConfig) -> _Converted:
    """A graph that TensorRT reads: in fp32, in fp16, or rounded to int8 by ranges of training images."""
    from holotype.onnx_export import prepare_tensorrt

    require("tensorrt", extra="tensorrt", purpose="export to TensorRT")
    _only(config, "auto", "fp32", "fp16", "int8", kind="tensorrt")
    precision: Precision = "fp16" if config.precision == "auto" else config.precision
    if source.manifest.precision != "fp32":
        raise BundleError("is not in fp32", where=source.path, fix="export what it was made of")
    model = onnx.load(_onnx_of(source))
    if precision == "int8":
        rows = calibration_rows(dataset, count=config.calibration_images, seed=0)
        ranges = observe(model, np.concatenate(list(dataset.pixels([rows]))), threads=available_cores())
        model = quantize(model, ranges, calibration="entropy", symmetric=True)
    file = scratch / "tensorrt.onnx"
    onnx.save(prepare_tensorrt(model, half=precision == "fp16", max_batch=config.max_batch), file)
    return _Converted({"tensorrt": file}, load_tensorrt(file), precision)


def _onnx_of(source: Bundle) -> Path:
    model = source.payload("onnx")
    if model is None:
        raise BundleError("has no ONNX model to convert", where=source.path, fix="export to onnx first")
    return model


def _only(config: ExportConfig, *allowed: str, kind: str) -> None:
    if config.precision not in allowed:
        raise ConfigError(
            f"{kind} is not exported in {config.precision}",
            where="precision",
            fix=f"use {' or '.join(allowed)}",
        )


_CONVERTERS: dict[ExportFormat, Callable[[Bundle, Dataset, Path, ExportConfig], _Converted]] = {
    "onnx": _to_onnx,
    "openvino": _to_openvino,
    "tensorrt": _to_tensorrt,
}

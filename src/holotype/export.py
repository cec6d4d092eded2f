"""`holotype export`: the same classifier for another runtime, accepted only after the parity gate."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from holotype.bundle import (
    Bundle,
    Golden,
    PayloadName,
    library_versions,
    open_bundle,
    read_golden,
    write_bundle,
    write_golden,
)
from holotype.config import ExportConfig
from holotype.dataset import open_dataset, recorded_source
from holotype.errors import BundleError, ConfigError, require
from holotype.parity import Parity, check_parity, sample_rows
from holotype.runtime import Runtime, available_cores, load_onnx, open_openvino, open_runtime

__all__ = ["FORMATS", "ExportFormat", "Exported", "export"]

ExportFormat = Literal["onnx", "openvino"]
FORMATS: dict[str, ExportFormat] = {"onnx": "onnx", "openvino": "openvino"}


@dataclass(frozen=True)
class Exported:
    """The new bundle and the parity that it was accepted with."""

    bundle: Bundle
    parity: Parity


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
    models; `ParityError` lists the flips and nothing is written.
    """
    config = config or ExportConfig()
    source = open_bundle(target)
    folder = Path(out) if out is not None else source.path.with_name(f"{source.path.name}-{format}")
    if folder.exists():
        raise ConfigError("exists already", where=folder, fix="remove it, or choose another --out")
    dataset = open_dataset(
        Path(data) if data is not None else recorded_source(source),
        spec=source.manifest.preprocess,
        config=config.data,
    )
    rows = sample_rows(dataset, count=config.images)
    images = np.concatenate(list(dataset.pixels([rows])))
    reference = open_runtime(
        source, name="torch" if "weights" in source.manifest.payloads else "auto", device="cpu"
    )
    with tempfile.TemporaryDirectory() as scratch:
        files, candidate = _convert(source, format, Path(scratch))
        parity = check_parity(
            reference,
            candidate,
            images=images,
            paths=dataset.paths(rows),
            classes=source.manifest.classes,
            policy=source.manifest.policy,
        )
        golden = read_golden(source).images
        write_golden(Path(scratch) / "golden.npz", Golden(golden, candidate.run(golden).logits))
        files["golden"] = Path(scratch) / "golden.npz"
        manifest = source.manifest.model_copy(
            update={
                "lineage": source.manifest.lineage.model_copy(update={"parent": source.hash}),
                "versions": library_versions(),
            }
        )
        bundle = write_bundle(folder, manifest, files=files)
    return Exported(bundle, parity)


def _convert(source: Bundle, kind: ExportFormat, scratch: Path) -> tuple[dict[PayloadName, Path], Runtime]:
    """The payloads of the new bundle, and a runtime on the converted model."""
    if kind == "onnx":
        file = _export_from_weights(source, scratch / "model.onnx")
        kept: dict[PayloadName, Path] = {
            name: source.path / payload.path
            for name, payload in source.manifest.payloads.items()
            if name in ("weights", "architecture")
        }
        return {**kept, "onnx": file}, load_onnx(file, threads=available_cores())
    from holotype.onnx_export import convert_openvino

    require("openvino", extra="openvino", purpose="export to OpenVINO")
    model = source.payload("onnx")
    if model is None:
        raise BundleError("has no ONNX model to convert", where=source.path, fix="export to onnx first")
    xml, weights = convert_openvino(model, scratch)
    return {"openvino": xml, "openvino_weights": weights}, open_openvino(xml, threads=available_cores())


def _export_from_weights(source: Bundle, file: Path) -> Path:
    require("torch", extra="train", purpose="export to ONNX")
    files = source.network_files(purpose=" to export", fix="give the bundle that holotype train wrote")
    from holotype.models import open_network
    from holotype.onnx_export import export_onnx

    manifest = source.manifest
    export_onnx(open_network(*files), file, classes=manifest.classes, preprocess=manifest.preprocess)
    return file

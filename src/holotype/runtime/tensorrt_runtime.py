"""TensorRT on an NVIDIA GPU: engines are built here, for this device, from an ONNX graph of the bundle.

An engine is machine code: it is loaded only where its hash and the fingerprint of device, libraries and graph
are those recorded when it was built on this machine, and is built again otherwise.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from holotype.bundle import Bundle, hash_file, write_bytes, write_text
from holotype.errors import BundleError, ConfigError, require
from holotype.machine import cache_root
from holotype.preprocess import Pixels
from holotype.progress import note
from holotype.runtime.contract import Outputs, Runtime
from holotype.runtime.onnx_runtime import refuse_external_data

__all__ = ["has_tensorrt", "load_tensorrt", "open_tensorrt"]

_WORKSPACE = 2**31  # bytes the builder may try kernels with
_USUAL_BATCH = 8


@dataclass(frozen=True)
class _Fingerprint:
    """What an engine was built for."""

    graph: str
    device: str
    capability: str
    cuda: str
    tensorrt: str


@dataclass(frozen=True)
class _TensorRtRuntime:
    context: Any
    device: str
    classes: int
    features: int
    largest: int
    name: str = "tensorrt"

    def run(self, images: Pixels, /) -> Outputs:
        parts = [self._run(images[at : at + self.largest]) for at in range(0, len(images), self.largest)]
        return Outputs(
            np.concatenate([p.logits for p in parts]), np.concatenate([p.embedding for p in parts])
        )

    def _run(self, images: Pixels) -> Outputs:
        import torch

        with torch.cuda.device(self.device):
            pixels = torch.from_numpy(np.ascontiguousarray(images)).to(self.device)
            logits = torch.empty((len(images), self.classes), device=self.device)
            embedding = torch.empty((len(images), self.features), device=self.device)
            self.context.set_input_shape("images", tuple(pixels.shape))
            for name, tensor in (("images", pixels), ("logits", logits), ("embedding", embedding)):
                self.context.set_tensor_address(name, tensor.data_ptr())
            stream = torch.cuda.current_stream(self.device)
            self.context.execute_async_v3(stream.cuda_stream)
            stream.synchronize()
            return Outputs(logits.cpu().numpy(), embedding.cpu().numpy())


def has_tensorrt() -> bool:
    """Whether TensorRT is installed and this machine has a GPU for it; asking for it by name says why not."""
    if any(importlib.util.find_spec(module) is None for module in ("tensorrt", "torch")):
        return False
    import torch

    return bool(torch.cuda.is_available())


def open_tensorrt(bundle: Bundle, *, device: str = "auto") -> Runtime:
    """The TensorRT graph of a bundle; `BundleError` where it has none, `ConfigError` without a GPU."""
    file = bundle.payload("tensorrt")
    if file is None:
        raise BundleError(
            "has no TensorRT graph", where=bundle.path, fix="run: holotype export BUNDLE --format tensorrt"
        )
    return load_tensorrt(file, device=device)


def load_tensorrt(file: Path, *, device: str = "auto") -> Runtime:
    """A graph that `export --format tensorrt` made, as an engine of this machine."""
    trt = require("tensorrt", extra="tensorrt", purpose="the TensorRT runtime")
    torch = require("torch", extra="train", purpose="the TensorRT runtime")
    if device == "cpu" or not torch.cuda.is_available():
        raise ConfigError("TensorRT needs an NVIDIA GPU", where="tensorrt", fix="use --runtime onnxruntime")
    place = "cuda" if device == "auto" else device
    settings = _settings(file)
    logger = trt.Logger(trt.Logger.ERROR)
    # TensorRT builds for, and loads onto, whatever device is current, and takes no other by name.
    with torch.cuda.device(place):
        plan = _engine(file, settings, place, trt, logger).read_bytes()
        engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
        context = None if engine is None else engine.create_execution_context()
    if engine is None:
        raise BundleError("TensorRT cannot load the engine it built", where=file, fix="export it again")
    return _TensorRtRuntime(
        context=context,
        device=place,
        classes=int(engine.get_tensor_shape("logits")[1]),
        features=int(engine.get_tensor_shape("embedding")[1]),
        largest=int(settings["max_batch"]),
    )


def _settings(file: Path) -> Mapping[str, Any]:
    """What the exporter wrote into the graph beside its nodes."""
    import onnx

    refuse_external_data(file)
    model = onnx.load(file)
    found = {entry.key: entry.value for entry in model.metadata_props}
    shape = [dimension.dim_value for dimension in model.graph.input[0].type.tensor_type.shape.dim]
    return {"max_batch": int(found.get("max_batch", 1)), "height": shape[1], "width": shape[2]}


def _engine(file: Path, settings: Mapping[str, Any], device: str, trt: Any, logger: Any) -> Path:
    """The engine's file in the user's cache: as it was built here before, or built now."""
    fingerprint = _fingerprint(file, device, trt)
    token = hashlib.sha256(json.dumps(asdict(fingerprint), sort_keys=True).encode()).hexdigest()[:16]
    engine = cache_root() / "engines" / f"{token}.engine"
    if _is_ours(engine, fingerprint):
        return engine
    note(f"building a TensorRT engine for {fingerprint.device}: minutes, once on this machine")
    engine.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(engine, _build(file, settings, trt, logger))
    record = {"fingerprint": asdict(fingerprint), "sha256": hash_file(engine)}
    write_text(engine.with_suffix(".json"), json.dumps(record, indent=1))
    return engine


def _fingerprint(file: Path, device: str, trt: Any) -> _Fingerprint:
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    return _Fingerprint(
        graph=hash_file(file),
        device=torch.cuda.get_device_name(device),
        capability=f"{major}.{minor}",
        cuda=str(torch.version.cuda),
        tensorrt=str(trt.__version__),
    )


def _is_ours(engine: Path, fingerprint: _Fingerprint) -> bool:
    try:
        record = json.loads(engine.with_suffix(".json").read_text())
        return bool(record == {"fingerprint": asdict(fingerprint), "sha256": hash_file(engine)})
    except (OSError, ValueError):
        return False


def _build(file: Path, settings: Mapping[str, Any], trt: Any, logger: Any) -> bytes:
    """A serialized engine for batches of 1 to the largest; `BundleError` with what the parser said."""
    builder = trt.Builder(logger)
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(file.read_bytes()):
        told = "; ".join(str(parser.get_error(place)) for place in range(parser.num_errors))
        raise BundleError(f"TensorRT cannot read it ({told})", where=file)
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, _WORKSPACE)
    profile = builder.create_optimization_profile()
    largest, image = settings["max_batch"], (settings["height"], settings["width"], 3)
    profile.set_shape("images", (1, *image), (min(_USUAL_BATCH, largest), *image), (largest, *image))
    config.add_optimization_profile(profile)
    built = builder.build_serialized_network(network, config)
    if built is None:
        raise BundleError("TensorRT cannot build an engine of it", where=file, fix="see --debug")
    return bytes(built)

"""Runtimes: the same bundle through torch, onnxruntime or OpenVINO behind one protocol."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from holotype.bundle import Bundle, read_golden
from holotype.errors import BundleError, require
from holotype.policy import probabilities
from holotype.preprocess import Pixels

__all__ = [
    "NAMES",
    "Outputs",
    "Runtime",
    "RuntimeName",
    "available_cores",
    "load_onnx",
    "open_openvino",
    "open_runtime",
    "refuse_external_data",
    "torch_runtime",
    "verify_golden",
]

RuntimeName = Literal["auto", "torch", "onnxruntime", "openvino"]
NAMES: tuple[RuntimeName, ...] = ("auto", "torch", "onnxruntime", "openvino")

# Golden outputs come from another machine's kernels; fp32 sums in other orders differ by about 1e-5.
_GOLDEN_TOLERANCE = 1e-3


class Outputs(NamedTuple):
    """Logits `float32[N, C]` and embedding `float32[N, D]`."""

    logits: npt.NDArray[np.float32]
    embedding: npt.NDArray[np.float32]


class Runtime(Protocol):
    """Anything that maps `uint8[N, H, W, 3]` to `Outputs`, for any N >= 1."""

    @property
    def name(self) -> str: ...

    def run(self, images: Pixels, /) -> Outputs: ...


def available_cores() -> int:
    """Cores this process may use (affinity and container masks included where the system tells)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def open_runtime(
    bundle: Bundle, *, name: RuntimeName = "auto", device: str = "auto", threads: int | None = None
) -> Runtime:
    """Open `bundle` in a runtime; "auto" takes onnxruntime, then OpenVINO, then torch, by what it contains.

    `device` concerns torch only. `threads` defaults to every core this process may use.
    """
    if name == "auto":
        name = _first_choice(bundle)
    count = threads or available_cores()
    open_one: dict[str, Callable[[], Runtime]] = {
        "onnxruntime": lambda: _open_onnxruntime(bundle, threads=count),
        "openvino": lambda: _open_openvino(bundle, threads=count),
        "torch": lambda: _open_torch(bundle, device=device),
    }
    return open_one[name]()


def verify_golden(runtime: Runtime, bundle: Bundle) -> None:
    """Run the golden inputs; `BundleError` when the probabilities differ from the stored ones by > 1e-3."""
    golden = read_golden(bundle)
    policy = bundle.manifest.policy
    logits = runtime.run(golden.images).logits
    if logits.shape[1] != len(bundle.manifest.classes):
        raise BundleError(
            f"the model has {logits.shape[1]} outputs, the manifest {len(bundle.manifest.classes)} classes",
            where=bundle.path,
        )
    got, wanted = probabilities(logits, policy=policy), probabilities(golden.logits, policy=policy)
    gap = float(np.abs(got - wanted).max())
    if not gap <= _GOLDEN_TOLERANCE:  # also true for NaN
        raise BundleError(
            f"golden outputs differ by {gap:.2g} in probability under {runtime.name}",
            where=bundle.path,
            fix="export the bundle again on this machine",
        )


def refuse_external_data(file: Path) -> None:
    """`BundleError` where an ONNX file keeps tensors in other files: they could be any file here."""
    import onnx
    from onnx.external_data_helper import _get_all_tensors, uses_external_data

    try:
        model = onnx.load(file, load_external_data=False)
    except Exception as error:
        raise BundleError(f"not a readable ONNX model ({type(error).__name__})", where=file) from error
    for tensor in _get_all_tensors(model):
        if uses_external_data(tensor):
            raise BundleError(
                f"tensor {tensor.name!r} points to data outside the model file",
                where=file,
                fix="save the model with its weights inside",
            )


def load_onnx(file: Path, *, threads: int) -> Runtime:
    """An ONNX file of ours in onnxruntime, on the CPU."""
    import onnxruntime

    refuse_external_data(file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise BundleError(f"onnxruntime cannot load it ({error})", where=file) from error
    return _OnnxRuntime(session=session)


def _first_choice(bundle: Bundle) -> RuntimeName:
    payloads = bundle.manifest.payloads
    if "onnx" in payloads:
        return "onnxruntime"
    return "openvino" if "openvino" in payloads else "torch"


@dataclass(frozen=True)
class _OnnxRuntime:
    session: Any
    name: str = "onnxruntime"

    def run(self, images: Pixels, /) -> Outputs:
        logits, embedding = self.session.run(["logits", "embedding"], {"images": images})
        return Outputs(logits, embedding)


def _open_onnxruntime(bundle: Bundle, *, threads: int) -> Runtime:
    file = bundle.payload("onnx")
    if file is None:
        raise BundleError(
            "has no ONNX model", where=bundle.path, fix="run: holotype export BUNDLE --format onnx"
        )
    return load_onnx(file, threads=threads)


@dataclass(frozen=True)
class _OpenVinoRuntime:
    request: Any
    name: str = "openvino"

    def run(self, images: Pixels, /) -> Outputs:
        result = self.request.infer({"images": images})
        return Outputs(np.array(result["logits"]), np.array(result["embedding"]))


def _open_openvino(bundle: Bundle, *, threads: int) -> Runtime:
    file = bundle.payload("openvino") or bundle.payload("onnx")
    if file is None:
        raise BundleError(
            "has neither an OpenVINO nor an ONNX model",
            where=bundle.path,
            fix="run: holotype export BUNDLE --format openvino",
        )
    return open_openvino(file, threads=threads)


def open_openvino(file: Path, *, threads: int) -> Runtime:
    """An OpenVINO IR or ONNX file of ours in OpenVINO, on the CPU, in fp32."""
    openvino = require("openvino", extra="openvino", purpose="the OpenVINO runtime")
    if file.suffix == ".onnx":
        refuse_external_data(file)
    # Left alone, OpenVINO picks bf16 where the CPU has it, which moves probabilities beyond the parity gate.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(str(file), "CPU", settings)
    return _OpenVinoRuntime(request=compiled.create_infer_request())


@dataclass(frozen=True)
class _TorchRuntime:
    classifier: Any
    device: str
    name: str = "torch"

    def run(self, images: Pixels, /) -> Outputs:
        import torch

        with torch.inference_mode():
            batch = torch.from_numpy(np.ascontiguousarray(images)).to(self.device)
            logits, embedding = self.classifier(batch)
        return Outputs(logits.float().cpu().numpy(), embedding.float().cpu().numpy())


def _open_torch(bundle: Bundle, *, device: str) -> Runtime:
    torch = require("torch", extra="train", purpose="the torch runtime")
    architecture, weights = bundle.payload("architecture"), bundle.payload("weights")
    if architecture is None or weights is None:
        raise BundleError("has no torch weights", where=bundle.path, fix="use --runtime onnxruntime")
    from holotype.models import Architecture, build

    chosen = device if device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    classifier = build(Architecture.model_validate_json(architecture.read_text()), weights)
    return torch_runtime(classifier, device=chosen)


def torch_runtime(classifier: Any, *, device: str) -> Runtime:
    """A `models.Classifier` as a runtime; it is moved to `device` and put into evaluation mode."""
    import torch

    placed = classifier.eval().to(torch.device(device)).to(memory_format=torch.channels_last)
    return _TorchRuntime(classifier=placed, device=device)

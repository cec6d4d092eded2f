"""Runtimes: the same bundle through torch, onnxruntime or OpenVINO behind one protocol."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from holotype.bundle import Bundle, Golden, read_golden
from holotype.errors import BundleError, ConfigError, require
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

    `device` concerns torch only: any other than "auto" and "cpu" is a `ConfigError` for the others, which run
    on the CPU. `threads` defaults to every core this process may use.
    """
    if name == "auto":
        name = _first_choice(bundle)
    count = threads or available_cores()
    open_one: dict[str, Callable[[], Runtime]] = {
        "onnxruntime": lambda: _open_onnxruntime(bundle, threads=count),
        "openvino": lambda: _open_openvino(bundle, threads=count),
        "torch": lambda: _open_torch(bundle, device=device),
    }
    if name not in open_one:
        raise ConfigError(f"unknown runtime {name!r}", fix=f"choose one of: {', '.join(NAMES)}")
    if name != "torch" and device not in ("auto", "cpu"):
        raise ConfigError(
            f"{name} runs on the CPU here", where=f"--device {device}", fix="add --runtime torch"
        )
    return open_one[name]()


def verify_golden(runtime: Runtime, bundle: Bundle) -> None:
    """Run the golden inputs; `BundleError` when the probabilities differ from the stored ones by > 1e-3."""
    golden = _golden_that_fits(bundle)
    try:
        logits = runtime.run(golden.images).logits
    except Exception as error:
        raise BundleError(
            f"the model fails on its golden inputs under {runtime.name} ({error})", where=bundle.path
        ) from error
    if logits.shape != golden.logits.shape:
        raise BundleError(
            f"the model gives logits {logits.shape}, the manifest and golden outputs {golden.logits.shape}",
            where=bundle.path,
        )
    policy = bundle.manifest.policy
    with np.errstate(invalid="ignore"):  # infinite logits become NaN, which is refused below
        got, wanted = probabilities(logits, policy=policy), probabilities(golden.logits, policy=policy)
    gap = float(np.abs(got - wanted).max())
    if not gap <= _GOLDEN_TOLERANCE:  # also true for NaN
        raise BundleError(
            f"golden outputs differ by {gap:.2g} in probability under {runtime.name}",
            where=bundle.path,
            fix="export the bundle again on this machine",
        )


def _golden_that_fits(bundle: Bundle) -> Golden:
    golden = read_golden(bundle)
    count, spec = len(golden.images), bundle.manifest.preprocess
    images, logits = (count, spec.height, spec.width, 3), (count, len(bundle.manifest.classes))
    if count == 0 or golden.images.shape != images or golden.logits.shape != logits:
        raise BundleError(
            f"golden arrays {golden.images.shape} and {golden.logits.shape} should be {images} and {logits} "
            "by the manifest",
            where=bundle.path,
        )
    return golden


def refuse_external_data(file: Path) -> None:
    """`BundleError` where an ONNX file keeps tensors in other files: they could be any file here."""
    import onnx

    try:
        model = onnx.load(file, format="protobuf", load_external_data=False)
    except Exception as error:
        raise BundleError(f"not a readable ONNX model ({type(error).__name__})", where=file) from error
    for message in _messages(model):
        if not isinstance(message, onnx.TensorProto):
            continue
        if message.data_location == onnx.TensorProto.EXTERNAL or message.external_data:
            raise BundleError(
                f"tensor {message.name!r} points to data outside the model file",
                where=file,
                fix="save the model with its weights inside",
            )


def _messages(message: Any) -> Iterator[Any]:
    """A protobuf message and all inside it: subgraphs, functions, attributes, sparse tensors hold tensors."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in (value,) if hasattr(value, "ListFields") else value:
                yield from _messages(part)


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


def open_openvino(file: Path, *, threads: int, weights: Path | None = None) -> Runtime:
    """An OpenVINO or ONNX model of ours, on the CPU; an OpenVINO one takes the .bin beside it by default."""
    openvino = require("openvino", extra="openvino", purpose="the OpenVINO runtime")
    if file.suffix == ".onnx":
        refuse_external_data(file)
    # Left alone, OpenVINO picks bf16 where the CPU has it, which moves probabilities beyond the parity gate.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    core = openvino.Core()
    try:
        model = core.read_model(str(file)) if weights is None else core.read_model(str(file), str(weights))
        compiled = core.compile_model(model, "CPU", settings)
    except RuntimeError as error:
        raise BundleError(f"OpenVINO cannot load it ({error})", where=file) from error
    return _OpenVinoRuntime(request=compiled.create_infer_request())


def _open_openvino(bundle: Bundle, *, threads: int) -> Runtime:
    model, weights, onnx = (bundle.payload(name) for name in ("openvino", "openvino_weights", "onnx"))
    if model is not None:
        if weights is None:  # OpenVINO would take any file beside the model, whose hash nobody checked
            raise BundleError("has an OpenVINO model without its weights", where=bundle.path)
        return open_openvino(model, threads=threads, weights=weights)
    if onnx is not None:
        return open_openvino(onnx, threads=threads)
    raise BundleError(
        "has neither an OpenVINO nor an ONNX model",
        where=bundle.path,
        fix="run: holotype export BUNDLE --format openvino",
    )


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
    files = bundle.network_files(fix="use --runtime onnxruntime")
    require("torch", extra="train", purpose="the torch runtime")
    from holotype.models import choose_device, open_network

    chosen = str(choose_device(device))
    return torch_runtime(open_network(*files), device=chosen)


def torch_runtime(classifier: Any, *, device: str) -> Runtime:
    """A `models.Classifier` as a runtime; it is moved to `device` and put into evaluation mode."""
    import torch

    placed = classifier.eval().to(torch.device(device)).to(memory_format=torch.channels_last)
    return _TorchRuntime(classifier=placed, device=device)

"""ONNX models of ours in onnxruntime, on the CPU; and what is refused before any runtime opens them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holotype.bundle import Bundle
from holotype.errors import BundleError
from holotype.preprocess import Pixels
from holotype.runtime.contract import Outputs, Runtime

__all__ = ["load_onnx", "load_onnx_model", "open_onnx", "refuse_external_data"]


def load_onnx(file: Path, *, threads: int) -> Runtime:
    """An ONNX file of ours in onnxruntime, on the CPU."""
    refuse_external_data(file)
    return _load(str(file), where=file, threads=threads)


def load_onnx_model(model: Any, *, threads: int, as_written: bool = False) -> Runtime:
    """An `onnx.ModelProto` that we have just made, in onnxruntime, on the CPU.

    `as_written`: operation by operation, where onnxruntime would put several into one, such as a convolution
    and the roundings around it.
    """
    return _load(model.SerializeToString(), where=None, threads=threads, as_written=as_written)


def _load(source: str | bytes, *, where: Path | None, threads: int, as_written: bool = False) -> Runtime:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Threads wait awake for the next operation; after a run there is none, and others need the cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise BundleError(f"onnxruntime cannot load it ({error})", where=where) from error
    return _OnnxRuntime(session=session)


@dataclass(frozen=True)
class _OnnxRuntime:
    session: Any
    name: str = "onnxruntime"

    def run(self, images: Pixels, /) -> Outputs:
        logits, embedding = self.session.run(["logits", "embedding"], {"images": images})
        return Outputs(logits, embedding)


def open_onnx(bundle: Bundle, *, threads: int) -> Runtime:
    file = bundle.payload("onnx")
    if file is None:
        raise BundleError(
            "has no ONNX model", where=bundle.path, fix="run: holotype export BUNDLE --format onnx"
        )
    return load_onnx(file, threads=threads)


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

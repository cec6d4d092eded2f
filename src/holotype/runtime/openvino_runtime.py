"""OpenVINO and ONNX models of ours in OpenVINO, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from holotype.bundle import Bundle
from holotype.errors import BundleError, require
from holotype.preprocess import Pixels
from holotype.runtime.contract import Outputs, Runtime
from holotype.runtime.onnx_runtime import refuse_external_data

__all__ = ["load_openvino", "open_openvino"]

# A graph compiled for one batch size runs a tenth faster than one for any; each costs memory once more.
_COMPILED_SIZES = 4


@dataclass(frozen=True)
class _OpenVinoRuntime:
    """`compile_for` gives an infer request for a batch size, None: for any."""

    compile_for: Callable[[int | None], Any]
    requests: dict[int | None, Any] = field(default_factory=dict)
    name: str = "openvino"

    def run(self, images: Pixels, /) -> Outputs:
        import openvino

        request = self._request(len(images))
        pixels = np.ascontiguousarray(images)
        request.set_input_tensor(openvino.Tensor(pixels, shared_memory=True))
        # Half the cost of `infer`, which sorts its arguments out anew at every call.
        request.start_async()
        request.wait()
        logits, embedding = (request.get_tensor(name).data for name in ("logits", "embedding"))
        return Outputs(np.array(logits), np.array(embedding))

    def _request(self, count: int) -> Any:
        own = count in self.requests or len(self.requests) < _COMPILED_SIZES
        size = count if own else None
        if size not in self.requests:
            self.requests[size] = self.compile_for(size)
        return self.requests[size]


def load_openvino(file: Path, *, threads: int, half: bool = False, weights: Path | None = None) -> Runtime:
    """An OpenVINO or ONNX model of ours, on the CPU; an OpenVINO one takes the .bin beside it by default.

    `half` computes in bf16 what is not in integers.
    """
    openvino = require("openvino", extra="openvino", purpose="the OpenVINO runtime")
    if not _is_xml(file):
        refuse_external_data(file)
    # Left alone, OpenVINO picks bf16 where the CPU has it, which moves probabilities beyond the parity gate.
    settings = {"INFERENCE_PRECISION_HINT": "bf16" if half else "f32", "INFERENCE_NUM_THREADS": threads}
    core = openvino.Core()
    try:
        model = core.read_model(str(file)) if weights is None else core.read_model(str(file), str(weights))
    except RuntimeError as error:
        raise BundleError(f"OpenVINO cannot load it ({error})", where=file) from error

    def compile_for(size: int | None) -> Any:
        fixed = model
        try:
            if size is not None:
                fixed = model.clone()
                image = [side.get_length() for side in list(model.input("images").partial_shape)[1:]]
                fixed.reshape({"images": [size, *image]})
            return core.compile_model(fixed, "CPU", settings).create_infer_request()
        except RuntimeError as error:
            raise BundleError(f"OpenVINO cannot load it ({error})", where=file) from error

    # Whatever is wrong with it shows now, not at the first image.
    return _OpenVinoRuntime(compile_for, {1: compile_for(1)})


def _is_xml(file: Path) -> bool:
    """Whether it is a model of OpenVINO's own. OpenVINO goes by content, whatever a file is called, so we do.

    No ONNX file begins with this byte: as protobuf it would end a group that was never begun.
    """
    try:
        with file.open("rb") as stream:
            return stream.read(1) == b"<"
    except OSError as error:
        raise BundleError(f"cannot be read ({error.strerror})", where=file) from error


def open_openvino(bundle: Bundle, *, threads: int, half: bool = False) -> Runtime:
    """The OpenVINO model of a bundle, or else its ONNX model; `BundleError` where it has neither."""
    model, weights, onnx = (bundle.payload(name) for name in ("openvino", "openvino_weights", "onnx"))
    if model is not None:
        if weights is None:  # OpenVINO would take any file beside the model, whose hash nobody checked
            raise BundleError("has an OpenVINO model without its weights", where=bundle.path)
        return load_openvino(model, threads=threads, half=half, weights=weights)
    if onnx is not None:
        return load_openvino(onnx, threads=threads, half=half)
    raise BundleError(
        "has neither an OpenVINO nor an ONNX model",
        where=bundle.path,
        fix="run: holotype export BUNDLE --format openvino",
    )

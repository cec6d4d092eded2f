"""What a runtime is, whatever library computes."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from holotype.preprocess import Pixels

__all__ = ["NAMES", "PRECISIONS", "Outputs", "Precision", "Runtime", "RuntimeName"]

RuntimeName = Literal["auto", "torch", "onnxruntime", "openvino", "tensorrt"]
NAMES: tuple[RuntimeName, ...] = ("auto", "torch", "onnxruntime", "openvino", "tensorrt")

Precision = Literal["auto", "fp32", "bf16"]
"""Of what a model does not compute in integers; "auto": as the bundle was accepted."""
PRECISIONS: tuple[Precision, ...] = ("auto", "fp32", "bf16")


class Outputs(NamedTuple):
    """Logits `float32[N, C]` and embedding `float32[N, D]`."""

    logits: npt.NDArray[np.float32]
    embedding: npt.NDArray[np.float32]


class Runtime(Protocol):
    """Anything that maps `uint8[N, H, W, 3]` to `Outputs`, for any N >= 1."""

    @property
    def name(self) -> str: ...

    def run(self, images: Pixels, /) -> Outputs: ...

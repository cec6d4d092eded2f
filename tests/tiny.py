"""A real bundle of a few hundred bytes, made in milliseconds without torch.

The model averages each colour channel; its classes are the colours.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from holotype.bundle import Bundle, Golden, Manifest, write_bundle, write_golden
from holotype.preprocess import Preprocess
from holotype.runtime import load_onnx

CLASSES = ("red", "green", "blue")
SIZE = 32


def tiny_model(*, classes: int = len(CLASSES)) -> onnx.ModelProto:
    """images: uint8[N, 32, 32, 3] → logits: float32[N, classes], embedding: float32[N, 3]."""
    weights = np.resize(np.eye(3, dtype=np.float32) * 8 / 255, (3, classes))
    constants = {
        "axes": np.array([1, 2], dtype=np.int64),
        "weight": weights,
        "bias": np.zeros(classes, dtype=np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats", "axes"], ["embedding"], keepdims=0),
        helper.make_node("Gemm", ["embedding", "weight", "bias"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", SIZE, SIZE, 3])],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", classes]),
            helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", 3]),
        ],
        initializer=[numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def golden_images() -> np.ndarray:
    """`uint8[4, 32, 32, 3]`: one image of each colour and one of noise."""
    pure = np.zeros((3, SIZE, SIZE, 3), dtype=np.uint8)
    for channel in range(3):
        pure[channel, ..., channel] = 250
    noise = np.random.default_rng(0).integers(0, 256, (1, SIZE, SIZE, 3), dtype=np.uint8)
    return np.concatenate([pure, noise])


def write_tiny_bundle(target: Path, *, model: onnx.ModelProto | None = None) -> Bundle:
    """Write the tiny bundle to `target`; `model` replaces the network, golden outputs stay the true ones."""
    scratch = target.with_name(f"{target.name}-parts")
    scratch.mkdir(parents=True)
    true, served, golden = scratch / "true.onnx", scratch / "model.onnx", scratch / "golden.npz"
    true.write_bytes(tiny_model().SerializeToString())
    served.write_bytes((model or tiny_model()).SerializeToString())
    images = golden_images()
    write_golden(golden, Golden(images=images, logits=load_onnx(true, threads=1).run(images).logits))
    manifest = Manifest(classes=CLASSES, preprocess=Preprocess(height=SIZE, width=SIZE))
    return write_bundle(target, manifest, files={"onnx": served, "golden": golden})


def picture(colour: str = "red", *, size: tuple[int, int] = (48, 40), kind: str = "PNG") -> bytes:
    """The bytes of an image of one colour, lime being pure green."""
    stream = io.BytesIO()
    Image.new("RGB", size, {"green": "lime"}.get(colour, colour)).save(stream, kind)
    return stream.getvalue()

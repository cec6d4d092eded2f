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

from holotype.baseline import Baseline, make_baseline, write_baseline
from holotype.bundle import Bundle, Golden, Manifest, PayloadName, write_bundle, write_golden
from holotype.policy import Policy, probabilities
from holotype.preprocess import Preprocess
from holotype.runtime import load_onnx

CLASSES = ("red", "green", "blue")
SIZE = 32


def tiny_model(*, classes: int = len(CLASSES), size: int = SIZE) -> onnx.ModelProto:
    """images: uint8[N, size, size, 3] → logits: float32[N, classes], embedding: float32[N, 3]."""
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
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", size, size, 3])],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", classes]),
            helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", 3]),
        ],
        initializer=[numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def poisoned_model() -> onnx.ModelProto:
    """The tiny model, whose logits of a white image are no numbers: 0 / 0 is added to them."""
    model = tiny_model()
    graph = model.graph
    graph.initializer.extend(
        [
            numpy_helper.from_array(np.array([1], dtype=np.int64), "channels"),
            numpy_helper.from_array(np.array(765, dtype=np.float32), "white"),
            numpy_helper.from_array(np.array(0, dtype=np.float32), "zero"),
        ]
    )
    graph.node[-1].output[0] = "clean"
    graph.node.extend(
        [
            helper.make_node("ReduceSum", ["embedding", "channels"], ["light"], keepdims=1),
            helper.make_node("Sub", ["white", "light"], ["dark"]),
            helper.make_node("Mul", ["dark", "zero"], ["nothing"]),
            helper.make_node("Div", ["nothing", "dark"], ["poison"]),
            helper.make_node("Add", ["clean", "poison"], ["logits"]),
        ]
    )
    return model


def golden_images(*, size: int = SIZE) -> np.ndarray:
    """`uint8[4, size, size, 3]`: one image of each colour and one of noise."""
    pure = np.zeros((3, size, size, 3), dtype=np.uint8)
    for channel in range(3):
        pure[channel, ..., channel] = 250
    noise = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), dtype=np.uint8)
    return np.concatenate([pure, noise])


def write_tiny_bundle(
    target: Path,
    *,
    model: onnx.ModelProto | None = None,
    policy: Policy | None = None,
    baseline: Baseline | None = None,
    classes: tuple[str, ...] = CLASSES,
    golden: Path | None = None,
    size: int = SIZE,
) -> Bundle:
    """Write the tiny bundle to `target`; `model` replaces the network, golden outputs stay the true ones.

    `golden` is a file of others.
    """
    scratch = target.with_name(f"{target.name}-parts")
    scratch.mkdir(parents=True)
    true, served = scratch / "true.onnx", scratch / "model.onnx"
    true.write_bytes(tiny_model(size=size).SerializeToString())
    served.write_bytes((model or tiny_model(size=size)).SerializeToString())
    images = golden_images(size=size)
    if golden is None:
        golden = scratch / "golden.npz"
        write_golden(golden, Golden(images=images, logits=load_onnx(true, threads=1).run(images).logits))
    files: dict[PayloadName, Path] = {"onnx": served, "golden": golden}
    if baseline is not None:
        files["baseline"] = scratch / "baseline.npz"
        write_baseline(files["baseline"], baseline)
    manifest = Manifest(
        classes=classes, preprocess=Preprocess(height=size, width=size), policy=policy or Policy()
    )
    return write_bundle(target, manifest, files=files)


def tiny_baseline(*, images: int = 300) -> Baseline:
    """Of bright images of one colour each, with a little noise."""
    rng = np.random.default_rng(0)
    labels = np.arange(images) % 3
    embedding = (np.eye(3, dtype=np.float32)[labels] * 230 + rng.normal(0, 6, (images, 3))).astype(np.float32)
    logits = embedding @ (np.eye(3, dtype=np.float32) * 8 / 255)
    return make_baseline(
        train=(embedding, labels),
        embedding=embedding,
        chances=probabilities(logits, policy=Policy()),
        brightness=(embedding.sum(axis=1) / 3 / 255).astype(np.float32),
    )


def picture(colour: str = "red", *, size: tuple[int, int] = (48, 40), kind: str = "PNG") -> bytes:
    """The bytes of an image of one colour, lime being pure green."""
    stream = io.BytesIO()
    Image.new("RGB", size, {"green": "lime"}.get(colour, colour)).save(stream, kind)
    return stream.getvalue()

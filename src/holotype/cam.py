"""Class activation maps from an exported graph, without gradients (Zhou et al. 2016).

Where the embedding is the mean of the last features over all places, and the logits are linear in it, the
evidence for a class at a place is its row of the head's weights times the features there: what Grad-CAM
gives for such networks. The graph of the bundle is read once more, with the features as an output.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from holotype.bundle import Bundle
from holotype.errors import ModelError
from holotype.preprocess import Pixels
from holotype.runtime import refuse_external_data

__all__ = ["open_cam"]

Floats = npt.NDArray[np.float32]

_PASSING = ("Flatten", "Reshape", "Squeeze", "Identity", "QuantizeLinear", "DequantizeLinear")


def open_cam(bundle: Bundle) -> Callable[[Pixels, int], Floats]:
    """A function of `uint8[H, W, 3]` and a class's place that gives `float32[h, w]` in [0, 1].

    `ModelError` where the bundle has no ONNX graph, or one whose embedding is not a mean of features. The
    session is opened at the first call.
    """
    file = bundle.payload("onnx")
    if file is None:
        raise ModelError("class activation maps need an ONNX graph")
    refuse_external_data(file)
    model = onnx.load(file)
    (features, channels), weights = _last_features(model), _head(model)
    if weights.ndim != 2 or len(weights) != len(bundle.manifest.classes):
        raise ModelError("this architecture's head has other classes than the bundle")
    sessions: list[object] = []

    def draw(pixels: Pixels, label: int) -> Floats:
        if not sessions:
            sessions.append(_session(model, features))
        (values,) = sessions[0].run([features], {"images": pixels[None]})  # type: ignore[attr-defined]
        heat = np.maximum(np.tensordot(weights[label], np.moveaxis(values[0], channels, 0), axes=1), 0)
        strongest = heat.max()
        return np.asarray(heat / strongest if strongest > 0 else heat, dtype=np.float32)

    return draw


def _session(model: onnx.ModelProto, features: str) -> object:
    import onnxruntime

    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    watched.graph.output.append(helper.make_tensor_value_info(features, onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        watched.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _last_features(model: onnx.ModelProto) -> tuple[str, int]:
    """The features whose mean over places is the embedding, and their axis of channels in an image."""
    producers = {name: node for node in model.graph.node for name in node.output}
    tensor = "embedding"
    while (node := producers.get(tensor)) is not None and node.op_type in _PASSING:
        tensor = node.input[0]
    axes = None if node is None else _mean_axes(node, model)
    if node is None or axes not in ([2, 3], [1, 2]):
        raise ModelError("this architecture's embedding is not a mean of features with a place")
    return str(node.input[0]), 0 if axes == [2, 3] else 2


def _mean_axes(node: onnx.NodeProto, model: onnx.ModelProto) -> list[int] | None:
    """Which axes of four are averaged; None where the node is no mean."""
    if node.op_type == "GlobalAveragePool":
        return [2, 3]
    if node.op_type != "ReduceMean":
        return None
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    axes = [list(one.ints) for one in node.attribute if one.name == "axes"]
    if len(node.input) > 1 and node.input[1] in constants:
        axes.append(numpy_helper.to_array(constants[node.input[1]]).tolist())
    return sorted(axis % 4 for axis in axes[0]) if axes else None


def _head(model: onnx.ModelProto) -> Floats:
    """The weights `[C, D]` of the layer between embedding and logits."""
    producers = {name: node for node in model.graph.node for name in node.output}
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    tensor = "logits"
    while (node := producers.get(tensor)) is not None and node.op_type in (*_PASSING, "Add"):
        tensor = next((name for name in node.input if name in producers), "")
    if node is None or node.op_type not in ("Gemm", "MatMul"):
        raise ModelError("this architecture's logits are not linear in its embedding")
    source, weights = node.input[0], _values(node.input[1], producers, constants)
    while (
        source != "embedding" and (above := producers.get(source)) is not None and above.op_type in _PASSING
    ):
        source = above.input[0]
    if source != "embedding" and not _same_source(source, "embedding", producers):
        raise ModelError("this architecture's logits are not linear in its embedding")
    transposed = node.op_type == "Gemm" and any(one.name == "transB" and one.i for one in node.attribute)
    return np.asarray(weights if transposed else weights.T, dtype=np.float32)


def _same_source(one: str, other: str, producers: dict[str, onnx.NodeProto]) -> bool:
    """Whether two tensors are one value: the embedding may be rounded once more on its way out."""

    def origin(tensor: str) -> str:
        while (node := producers.get(tensor)) is not None and node.op_type in _PASSING:
            tensor = node.input[0]
        return tensor

    return origin(one) == origin(other)


def _values(
    name: str, producers: dict[str, onnx.NodeProto], constants: dict[str, npt.NDArray[np.generic]]
) -> Floats:
    """A constant, or one that is stored as integers or rounded on its way."""
    if name in constants:
        return np.asarray(constants[name], dtype=np.float32)
    node = producers.get(name)
    kind = None if node is None else node.op_type
    if node is not None and kind == "Transpose":
        axes = next((list(one.ints) for one in node.attribute if one.name == "perm"), None)
        return np.transpose(_values(node.input[0], producers, constants), axes)
    if node is not None and kind in ("Identity", "Cast", "QuantizeLinear"):
        return _values(node.input[0], producers, constants)  # rounding them changes no map that one sees
    if node is not None and kind == "Constant":
        value = next((one.t for one in node.attribute if one.name == "value"), None)
        if value is not None:
            return np.asarray(numpy_helper.to_array(value), dtype=np.float32)
    if node is None or kind != "DequantizeLinear":
        raise ModelError("this architecture's head has no constant weights")
    if node.input[0] not in constants:
        return _values(node.input[0], producers, constants)
    stored, scale = (_values(one, producers, constants) for one in node.input[:2])
    zero = _values(node.input[2], producers, constants) if len(node.input) > 2 else np.zeros_like(scale)
    if scale.size > 1:
        axis = next((one.i for one in node.attribute if one.name == "axis"), 1) % stored.ndim
        shape = [-1 if place == axis else 1 for place in range(stored.ndim)]
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    return np.asarray((stored - zero) * scale, dtype=np.float32)

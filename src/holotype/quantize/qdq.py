"""INT8 after training: ranges from real images through the deployment pixel path, then a QDQ graph.

Activations are uint8 with one scale per tensor, weights int8 with one scale per output channel. All other
constants stay float: biases, which runtimes round to int32 by the product of both scales as they load the
file, and what is added, multiplied or joined to activations (biases of matrix products, scales, positions).
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from holotype.quantize.graph import check_graph
from holotype.quantize.prefix import read_pixels_directly
from holotype.quantize.ranges import Calibration, Ranges

__all__ = ["dynamic_int8", "is_transformer", "prefix_of", "quantizable", "quantize"]

# What both onnxruntime and OpenVINO compute in integers, and what passes integers on as they are.
_OPERATIONS = (
    "Add", "AveragePool", "Clip", "Concat", "Conv", "Flatten", "Gemm", "GlobalAveragePool", "MatMul",
    "MaxPool", "Mul", "Relu", "Reshape", "Sigmoid", "Squeeze", "Transpose", "Unsqueeze",
)  # fmt: skip

_BESIDE_CONSTANTS = ("Add", "Concat", "Mul")


def quantize(
    model: onnx.ModelProto,
    ranges: Ranges,
    *,
    calibration: Calibration,
    floats: Collection[str] = (),
    only: Collection[str] = (),
    symmetric: bool = False,
) -> onnx.ModelProto:
    """The QDQ graph of a float model: all nodes but its prefix and `floats`, or `only` some.

    `symmetric` rounds activations to int8 with zero point 0, which TensorRT asks for.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    known = {
        name: (np.float32(low), np.float32(high)) for name, (low, high) in ranges.tensors[calibration].items()
    }

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    with _silence():
        quantizer = QDQQuantizer(
            copy,
            per_channel=True,
            reduce_range=False,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QInt8 if symmetric else QuantType.QUInt8,
            tensors_range=TensorsData(CalibrationMethod.MinMax, known),
            nodes_to_quantize=list(only),
            nodes_to_exclude=[*prefix_of(copy), *_with_constants(copy), *floats],
            op_types_to_quantize=_OPERATIONS,
            extra_options={
                "QuantizeBias": False,
                "ActivationSymmetric": symmetric,
                # What follows takes integers where it wants them; a bias, a softmax and a GELU want floats.
                "OpTypesToExcludeOutputQuantization": ["MatMul"],
            },
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
    return check_graph(_slim(read_pixels_directly(quantizer.model.model)))


def dynamic_int8(model: Path) -> onnx.ModelProto:
    """Matrix products with int8 weights and activations rounded as they come: for transformers."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as scratch, _silence():
        file = Path(scratch) / "dynamic.onnx"
        quantize_dynamic(
            model,
            file,
            weight_type=QuantType.QInt8,
            per_channel=True,
            op_types_to_quantize=["MatMul", "Gemm"],
        )
        return check_graph(onnx.load(file))


def is_transformer(model: onnx.ModelProto) -> bool:
    """Whether most of its weights are in matrix products: those gain from dynamic quantization."""
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in model.graph.initializer}
    weights = {"Conv": 0, "MatMul": 0}
    for node in model.graph.node:
        if node.op_type in weights:
            weights[node.op_type] += sum(sizes.get(name, 0) for name in node.input)
    return weights["MatMul"] > weights["Conv"]


def prefix_of(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes that turn pixels into what the network is fed: all before its first weights."""
    names: list[str] = []
    for node in model.graph.node:
        if node.op_type in ("Conv", "MatMul", "Gemm"):
            break
        names.append(node.name)
    return names


def quantizable(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes with weights, in the order of the graph: what can be kept in float one by one."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return [
        node.name
        for node in model.graph.node
        if node.op_type in ("Conv", "MatMul", "Gemm") and any(name in constants for name in node.input[:2])
    ]


def _with_constants(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes that take a float constant which is no weight: eight bits were too few for some."""
    constants = {
        tensor.name for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT
    }
    return [
        node.name
        for node in model.graph.node
        if node.op_type in _BESIDE_CONSTANTS and not constants.isdisjoint(node.input)
    ]


def _slim(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without what no runtime reads: zero points of weights, which are 0, and the shapes of tensors.

    A Gemm keeps its zero point: onnxruntime computes it in integers only so.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    matrices = {
        name for node in model.graph.node if node.op_type in ("Gemm", "MatMul") for name in node.input
    }
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or len(node.input) < 3 or node.output[0] in matrices:
            continue
        if node.input[0] in constants and not numpy_helper.to_array(constants[node.input[2]]).any():
            del node.input[2]
    used = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    del model.graph.value_info[:]
    return model


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """onnxruntime's tools print and log what they do; nobody asked."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)

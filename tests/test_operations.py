"""Every ONNX operation that training knows computes what onnxruntime computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from holotype.compress.operations import OPERATIONS

RNG = np.random.default_rng(0)
IMAGE = RNG.standard_normal((2, 4, 9, 9)).astype(np.float32)
ROWS = RNG.standard_normal((2, 6, 8)).astype(np.float32)
MATRIX = RNG.standard_normal((2, 8)).astype(np.float32)


def numbers(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def weights(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


CASES: list[tuple[str, list[Any], dict[str, Any]]] = [
    ("Add", [ROWS, weights(8)], {}),
    ("AveragePool", [IMAGE], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    ("AveragePool", [IMAGE], {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1], "count_include_pad": 1}),
    ("AveragePool", [IMAGE], {"kernel_shape": [3, 3]}),
    ("Cast", [IMAGE], {"to": TensorProto.INT64}),
    ("Clip", [IMAGE, np.float32(0), np.float32(1)], {}),
    ("Clip", [IMAGE, None, np.float32(1)], {}),
    ("Concat", [ROWS, ROWS], {"axis": 1}),
    ("Conv", [IMAGE, weights(6, 4, 3, 3)], {"strides": [2, 2], "pads": [0, 0, 1, 1]}),
    ("Conv", [IMAGE, weights(4, 1, 3, 3), weights(4)], {"group": 4, "pads": [1, 1, 1, 1]}),
    ("Conv", [IMAGE, weights(6, 4, 3, 3), weights(6)], {"dilations": [2, 2], "pads": [2, 2, 2, 2]}),
    ("Div", [ROWS, np.float32(3)], {}),
    ("Expand", [weights(1, 1, 8), numbers(2, 3, 1)], {}),
    ("Flatten", [IMAGE], {"axis": 2}),
    ("Gather", [ROWS, numbers(0, -1)], {"axis": 1}),
    ("Gather", [ROWS, np.array(2, dtype=np.int64)], {"axis": 1}),
    ("Gelu", [ROWS], {}),
    ("Gelu", [ROWS], {"approximate": "tanh"}),
    ("Gemm", [MATRIX, weights(5, 8), weights(5)], {"transB": 1}),
    ("Gemm", [MATRIX, weights(8, 5)], {"alpha": 0.5}),
    ("GlobalAveragePool", [IMAGE], {}),
    ("HardSigmoid", [ROWS], {"alpha": 1 / 6, "beta": 0.5}),
    ("HardSwish", [ROWS], {}),
    ("Identity", [ROWS], {}),
    ("LayerNormalization", [ROWS, weights(8), weights(8)], {"axis": -1, "epsilon": 1e-6}),
    ("MatMul", [ROWS, weights(8, 3)], {}),
    ("MaxPool", [IMAGE], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    ("Mul", [ROWS, ROWS], {}),
    ("Pad", [IMAGE, numbers(0, 0, 1, 2, 0, 0, 0, 1), np.float32(0.5)], {}),
    (
        "Pad",
        [(20 * IMAGE).astype(np.uint8), numbers(0, 0, 1, 1, 0, 0, 1, 1), np.array(128, dtype=np.uint8)],
        {},
    ),
    ("ReduceMean", [IMAGE, numbers(2, 3)], {"keepdims": 0}),
    ("ReduceMean", [IMAGE], {}),
    ("Relu", [IMAGE], {}),
    ("Reshape", [ROWS, numbers(0, -1)], {}),
    ("Shape", [IMAGE], {"start": 1, "end": 3}),
    ("Sigmoid", [ROWS], {}),
    ("Slice", [IMAGE, numbers(1, 0), numbers(9, -1), numbers(2, 3), numbers(2, 1)], {}),
    ("Slice", [IMAGE, numbers(0), numbers(1)], {}),
    ("Slice", [IMAGE, numbers(-3), numbers(2**63 - 1), numbers(2)], {}),
    ("Softmax", [ROWS], {"axis": 1}),
    ("Sqrt", [np.abs(ROWS)], {}),
    ("Squeeze", [ROWS[:1], numbers(0)], {}),
    ("Squeeze", [ROWS[:1]], {}),
    ("Sub", [ROWS, weights(8)], {}),
    ("Tanh", [ROWS], {}),
    ("Transpose", [IMAGE], {"perm": [0, 2, 3, 1]}),
    ("Unsqueeze", [ROWS, numbers(0, -1)], {}),
]


def by_onnxruntime(kind: str, given: list[Any], attributes: dict[str, Any]) -> np.ndarray:
    """The same node as a model of its own, its first input fed and the others constants."""
    names = [f"x{place}" if value is not None else "" for place, value in enumerate(given)]
    constants = [
        numpy_helper.from_array(np.asarray(value), name)
        for name, value in zip(names[1:], given[1:], strict=True)
        if value is not None
    ]
    fed = helper.make_tensor_value_info("x0", helper.np_dtype_to_tensor_dtype(given[0].dtype), given[0].shape)
    node = helper.make_node(kind, names, ["y"], **attributes)
    graph = helper.make_graph([node], "one", [fed], [onnx.ValueInfoProto(name="y")], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"x0": given[0]})
    return np.asarray(result)


@pytest.mark.parametrize(
    ("kind", "given", "attributes"), CASES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_it_computes_what_onnxruntime_computes(
    kind: str, given: list[Any], attributes: dict[str, Any]
) -> None:
    parsed = {
        one.name: helper.get_attribute_value(one)
        for one in helper.make_node(kind, [], [], **attributes).attribute
    }
    tensors = [None if value is None else torch.from_numpy(np.asarray(value)) for value in given]
    got = OPERATIONS[kind](tensors, parsed).numpy()
    wanted = by_onnxruntime(kind, given, attributes)
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_shapes_are_where_the_images_are() -> None:
    images = torch.zeros((2, 3, 8, 8), device="meta")
    assert OPERATIONS["Shape"]([images], {}).device == images.device


def test_every_operation_has_a_case() -> None:
    assert set(OPERATIONS) == {kind for kind, _, _ in CASES}

"""The ONNX operations that exported image classifiers consist of, in torch, on tensors `[N, ...]`.

Each takes the node's inputs (None where one is left out) and its attributes, and follows
https://onnx.ai/onnx/operators at `quantize.OPSET`, which the exporter writes. Shapes are int64 tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from holotype.errors import ModelError

__all__ = ["OPERATIONS", "Attributes"]

Tensor = torch.Tensor
Attributes = Mapping[str, Any]
Inputs = Sequence[Any]


def _conv(given: Inputs, attributes: Attributes) -> Tensor:
    images, weight, bias = (*given, None)[:3]
    pads = attributes.get("pads", [0, 0, 0, 0])
    half = len(pads) // 2
    begin, end = pads[:half], pads[half:]
    if begin != end:
        # torch lists the sides from the last dimension to the first
        sides = [side for pair in zip(reversed(begin), reversed(end), strict=True) for side in pair]
        images, begin = functional.pad(images, sides), [0] * half
    result: Tensor = functional.conv2d(
        images,
        weight,
        bias,
        stride=attributes.get("strides", [1] * half),
        padding=begin,
        dilation=attributes.get("dilations", [1] * half),
        groups=attributes.get("group", 1),
    )
    return result


def _gemm(given: Inputs, attributes: Attributes) -> Tensor:
    left, right, bias = (*given, None)[:3]
    left = left.T if attributes.get("transA", 0) else left
    right = right.T if attributes.get("transB", 0) else right
    result: Tensor = attributes.get("alpha", 1.0) * (left @ right)
    return result if bias is None else result + attributes.get("beta", 1.0) * bias


def _max_pool(given: Inputs, attributes: Attributes) -> Tensor:
    images, pads = given[0], attributes.get("pads", [0, 0, 0, 0])
    top, left, bottom, right = pads
    images = functional.pad(images, (left, right, top, bottom), value=-math.inf)
    result: Tensor = functional.max_pool2d(
        images,
        attributes["kernel_shape"],
        stride=attributes.get("strides", [1, 1]),
        dilation=attributes.get("dilations", [1, 1]),
        ceil_mode=bool(attributes.get("ceil_mode", 0)),
    )
    return result


def _average_pool(given: Inputs, attributes: Attributes) -> Tensor:
    top, left, bottom, right = attributes.get("pads", [0, 0, 0, 0])
    images = functional.pad(given[0], (left, right, top, bottom))
    sums = functional.avg_pool2d(
        images, attributes["kernel_shape"], stride=attributes.get("strides", [1, 1]), divisor_override=1
    )
    if attributes.get("count_include_pad", 0) or not any((top, left, bottom, right)):
        return sums / math.prod(attributes["kernel_shape"])
    ones = functional.pad(torch.ones_like(given[0][:1, :1]), (left, right, top, bottom))
    counts = functional.avg_pool2d(
        ones, attributes["kernel_shape"], stride=attributes.get("strides", [1, 1]), divisor_override=1
    )
    return sums / counts


def _mean(given: Inputs, attributes: Attributes) -> Tensor:
    axes = given[1].tolist() if len(given) > 1 and given[1] is not None else list(range(given[0].ndim))
    result: Tensor = given[0].mean(axes, keepdim=bool(attributes.get("keepdims", 1)))
    return result


def _flatten(given: Inputs, attributes: Attributes) -> Tensor:
    value, axis = given[0], attributes.get("axis", 1)
    result: Tensor = value.reshape(math.prod(value.shape[:axis]), -1)
    return result


def _reshape(given: Inputs, attributes: Attributes) -> Tensor:
    value, shape = given[0], given[1].tolist()
    if not attributes.get("allowzero", 0):
        shape = [value.shape[place] if side == 0 else side for place, side in enumerate(shape)]
    result: Tensor = value.reshape(shape)
    return result


def _slice(given: Inputs, attributes: Attributes) -> Tensor:  # noqa: ARG001
    value, starts, ends, axes, steps = (*given, None, None)[:5]
    places = range(len(starts)) if axes is None else axes.tolist()
    strides = [1] * len(starts) if steps is None else steps.tolist()
    cuts = [slice(None)] * value.ndim
    for place, start, end, stride in zip(places, starts.tolist(), ends.tolist(), strides, strict=True):
        # An end far beyond the last element, which means all of them, makes torch complain.
        cuts[place] = slice(*slice(start, end, stride).indices(value.shape[place]))
    result: Tensor = value[tuple(cuts)]
    return result


def _squeeze(given: Inputs, attributes: Attributes) -> Tensor:  # noqa: ARG001
    value, axes = (*given, None)[:2]
    result: Tensor = value.squeeze() if axes is None else value.squeeze(tuple(axes.tolist()))
    return result


def _unsqueeze(given: Inputs, attributes: Attributes) -> Tensor:  # noqa: ARG001
    value, axes = given
    rank = value.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes.tolist()):
        value = value.unsqueeze(axis)
    result: Tensor = value
    return result


def _gather(given: Inputs, attributes: Attributes) -> Tensor:
    value, places = given
    axis = attributes.get("axis", 0)
    places = torch.where(places < 0, places + value.shape[axis], places)
    chosen = value.index_select(axis, places.reshape(-1))
    shape = (*value.shape[:axis], *places.shape, *value.shape[axis + 1 :])
    result: Tensor = chosen.reshape(shape)
    return result


def _layer_norm(given: Inputs, attributes: Attributes) -> Tensor:
    value, weight, bias = (*given, None)[:3]
    axis = attributes.get("axis", -1) % value.ndim
    result: Tensor = functional.layer_norm(
        value, value.shape[axis:], weight, bias, attributes.get("epsilon", 1e-5)
    )
    return result


def _gelu(given: Inputs, attributes: Attributes) -> Tensor:
    kind = attributes.get("approximate", b"none").decode()
    result: Tensor = functional.gelu(given[0], approximate=kind)
    return result


def _clip(given: Inputs, attributes: Attributes) -> Tensor:  # noqa: ARG001
    value, low, high = (*given, None, None)[:3]
    result: Tensor = torch.clamp(value, low, high)
    return result


def _shape(given: Inputs, attributes: Attributes) -> Tensor:
    # Beside its image: what is made of it meets constants of the graph, which are there too.
    whole = torch.tensor(given[0].shape, dtype=torch.int64, device=given[0].device)
    return whole[attributes.get("start", 0) : attributes.get("end", len(whole))]


def _cast(given: Inputs, attributes: Attributes) -> Tensor:
    from onnx import helper

    kind = torch.from_numpy(np.empty(0, dtype=helper.tensor_dtype_to_np_dtype(attributes["to"]))).dtype
    result: Tensor = given[0].to(kind)
    return result


def _hard_sigmoid(given: Inputs, attributes: Attributes) -> Tensor:
    slope, shift = attributes.get("alpha", 0.2), attributes.get("beta", 0.5)
    return torch.clamp(slope * given[0] + shift, 0, 1)


def _pad(given: Inputs, attributes: Attributes) -> Tensor:
    value, pads, fill = (*given, None)[:3]
    mode = attributes.get("mode", b"constant").decode()
    if mode != "constant":
        raise ModelError(f"cannot be trained quantized: its graph pads by {mode}")
    amounts = pads.tolist()
    half = len(amounts) // 2
    sides = [side for pair in zip(amounts[:half][::-1], amounts[half:][::-1], strict=True) for side in pair]
    return functional.pad(value, sides, value=0.0 if fill is None else float(fill))


OPERATIONS: dict[str, Callable[[Inputs, Attributes], Tensor]] = {
    "Add": lambda given, _: given[0] + given[1],
    "AveragePool": _average_pool,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": lambda given, attributes: torch.cat(list(given), attributes["axis"]),
    "Conv": _conv,
    "Div": lambda given, _: given[0] / given[1],
    "Expand": lambda given, _: given[0] * given[0].new_ones(given[1].tolist()),
    "Flatten": _flatten,
    "Gather": _gather,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": lambda given, _: given[0].mean((2, 3), keepdim=True),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": lambda given, _: functional.hardswish(given[0]),
    "Identity": lambda given, _: given[0],
    "LayerNormalization": _layer_norm,
    "MatMul": lambda given, _: given[0] @ given[1],
    "MaxPool": _max_pool,
    "Mul": lambda given, _: given[0] * given[1],
    "Pad": _pad,
    "ReduceMean": _mean,
    "Relu": lambda given, _: functional.relu(given[0]),
    "Reshape": _reshape,
    "Shape": _shape,
    "Sigmoid": lambda given, _: torch.sigmoid(given[0]),
    "Slice": _slice,
    "Softmax": lambda given, attributes: torch.softmax(given[0], attributes.get("axis", -1)),
    "Sqrt": lambda given, _: torch.sqrt(given[0]),
    "Squeeze": _squeeze,
    "Sub": lambda given, _: given[0] - given[1],
    "Tanh": lambda given, _: torch.tanh(given[0]),
    "Transpose": lambda given, attributes: given[0].permute(attributes["perm"]),
    "Unsqueeze": _unsqueeze,
}
"""What a graph may consist of to be trained quantized, beside QuantizeLinear and DequantizeLinear."""

"""The way from pixels to the first convolution without a float in between.

An exported graph begins with transpose → cast → times scale → plus shift → convolution. Scale and shift are
folded into the convolution's weights and bias, so that it reads pixels 0 ... 255; and as those are integers
already, quantization needs no node to make them so.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

__all__ = ["float_pixels", "fold_normalisation", "read_pixels_directly"]

Floats = npt.NDArray[np.float32]

_PIXELS = 255.0


@dataclass(frozen=True)
class _Prefix:
    transpose: onnx.NodeProto
    cast: onnx.NodeProto
    times: onnx.NodeProto
    plus: onnx.NodeProto
    conv: onnx.NodeProto
    scale: Floats
    shift: Floats


def fold_normalisation(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose first convolution reads float pixels 0 ... 255; the same model where its start is another.

    Zero padding meant the mean colour, and is written out as such: a border of the nearest level, at most
    half a level from what it was where the channels have one mean.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    found = _find(copy)
    if found is None:
        return copy
    constants = {tensor.name: tensor for tensor in copy.graph.initializer}
    weight = numpy_helper.to_array(constants[found.conv.input[1]])
    bias = (
        numpy_helper.to_array(constants[found.conv.input[2]])
        if len(found.conv.input) > 2
        else np.zeros(len(weight), np.float32)
    )
    folded = weight * found.scale.reshape(1, -1, 1, 1)
    moved = bias + (weight * found.shift.reshape(1, -1, 1, 1)).sum(axis=(1, 2, 3))
    names = [f"{found.conv.name}.{kind}" for kind in ("weight", "bias")]
    for name, value in zip(names, (folded, moved), strict=True):
        copy.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
    source = _pad(copy, found)
    found.conv.input[:] = [source, *names]
    for node in (found.times, found.plus):
        copy.graph.node.remove(node)
    del copy.graph.value_info[:]
    return onnx.shape_inference.infer_shapes(copy)


def read_pixels_directly(model: onnx.ModelProto) -> onnx.ModelProto:
    """In place: drop cast and quantization of pixels, which are the levels 0 ... 255 of a scale of 1."""
    producers = {node.output[0]: node for node in model.graph.node}
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in list(model.graph.node):
        if node.op_type != "QuantizeLinear" or node.input[0] not in producers:
            continue
        cast = producers[node.input[0]]
        if (
            cast.op_type != "Cast"
            or float(constants[node.input[1]]) != 1.0
            or int(constants[node.input[2]]) != 0
        ):
            continue
        for other in model.graph.node:
            other.input[:] = [cast.input[0] if name == node.output[0] else name for name in other.input]
        model.graph.node.remove(node)
        if not any(cast.output[0] in other.input for other in model.graph.node):
            model.graph.node.remove(cast)
    return model


def float_pixels(model: onnx.ModelProto) -> str | None:
    """The tensor that is the pixels as floats 0 ... 255; None where a graph begins otherwise."""
    tensor = model.graph.input[0].name
    for node in model.graph.node:
        if tensor not in node.input or node.op_type == "Shape":
            continue
        if node.op_type == "Cast":
            return str(node.output[0])
        if node.op_type not in ("Transpose", "Pad"):
            return None
        tensor = node.output[0]
    return None


def _find(model: onnx.ModelProto) -> _Prefix | None:
    """The nodes of the prefix, where each feeds the next and nothing else."""
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    chain: list[onnx.NodeProto] = []
    tensor = model.graph.input[0].name
    for kind in ("Transpose", "Cast", "Mul", "Add", "Conv"):
        next_nodes = [node for node in users.get(tensor, []) if node.op_type != "Shape"]
        if len(next_nodes) != 1 or next_nodes[0].op_type != kind:
            return None
        chain.append(next_nodes[0])
        tensor = chain[-1].output[0]
    transpose, cast, times, plus, conv = chain
    if conv.input[1] not in constants:
        return None
    scale, shift = (constants.get(node.input[1]) for node in (times, plus))
    if scale is None or shift is None:
        return None
    channels = constants[conv.input[1]].shape[1]
    broadcast = [np.broadcast_to(value.reshape(-1), (channels,)) for value in (scale, shift)]
    return _Prefix(transpose, cast, times, plus, conv, *broadcast)


def _pad(model: onnx.ModelProto, found: _Prefix) -> str:
    """The name of the float pixels, with a border of the mean colour where there was one of zeros."""
    attribute = next((one for one in found.conv.attribute if one.name == "pads"), None)
    pads = list(attribute.ints) if attribute is not None else []
    if attribute is None or not any(pads):
        return str(found.cast.output[0])
    mean = float(np.mean(-found.shift / found.scale))
    half = len(pads) // 2
    sides = [0, 0, *pads[:half], 0, 0, *pads[half:]]
    name = f"{found.conv.name}.border"
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(np.array(sides, dtype=np.int64), f"{name}.sides"),
            numpy_helper.from_array(
                np.array(min(max(round(mean), 0), _PIXELS), dtype=np.uint8), f"{name}.colour"
            ),
        ]
    )
    pixels = found.transpose.output[0]
    node = helper.make_node(
        "Pad", [pixels, f"{name}.sides", f"{name}.colour"], [name], name=f"{name}.pad", mode="constant"
    )
    place = list(model.graph.node).index(found.cast)
    model.graph.node.insert(place, node)
    found.cast.input[0] = name
    attribute.ints[:] = [0] * len(pads)
    return str(found.cast.output[0])

"""A quantized ONNX graph as a torch module that trains: what is rounded in the file is rounded here.

The module is read from the file that is deployed, node by node, so placement, folded batch norms and the
order of operations are the file's by construction. `QuantizeLinear` becomes fake quantization with a learned
scale (LSQ, Esser et al. 2020): x → s (clamp(round(x / s) + z) - z), whose rounding lets gradients pass;
constants that are stored as integers are rounded by the file's scales, zero points and types.
`learned_model` writes what was learned back into the same graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import helper, numpy_helper
from torch import nn

from holotype.compress.operations import OPERATIONS
from holotype.compress.rounding import Levels, rounded
from holotype.errors import ModelError
from holotype.quantize import OPSET, opset_of

__all__ = ["TrainableGraph", "learned_model"]

Array = npt.NDArray[Any]

_INTEGERS = (np.int8, np.uint8, np.int16, np.uint16)  # that a constant may be stored in

# Inputs of these operations that are learned, where they are constants of the graph.
_LEARNED = {
    "Conv": (1, 2),
    "Gemm": (1, 2),
    "MatMul": (0, 1),
    "LayerNormalization": (1, 2),
    "Add": (0, 1),
    "Mul": (0, 1),
}


@dataclass(frozen=True)
class _Node:
    kind: str
    inputs: tuple[str, ...]
    output: str
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class _Weight:
    """A constant that is stored as integers `low` ... `high`, and its axis of channels.

    `stored`, `scale` and `zero` are names: of its values, its scales and the levels that mean 0.
    """

    stored: str
    scale: str
    zero: str
    axis: int | None
    low: int
    high: int


class TrainableGraph(nn.Module):
    """`uint8[N, H, W, 3]` → (logits `float32[N, C]`, embedding `float32[N, D]`), as the file computes them.

    Learned are weights, biases and the scale of each quantized activation. Weights start from `original`,
    the same graph before it was quantized, where they are found there by name. `ModelError` where the graph
    has an operation that `operations` does not know, or one of another opset.
    """

    def __init__(self, model: onnx.ModelProto, *, original: onnx.ModelProto) -> None:
        super().__init__()
        if opset_of(model) != OPSET:
            raise ModelError(
                f"cannot be trained quantized: its graph is of opset {opset_of(model)}, not {OPSET}",
                fix="export it again (holotype export BUNDLE --format onnx)",
            )
        self._nodes = tuple(_read_nodes(model))
        kinds = {node.kind for node in self._nodes} - {"QuantizeLinear", "DequantizeLinear"}
        unknown = sorted(kinds - set(OPERATIONS))
        if unknown:
            raise ModelError(f"cannot be trained quantized: its graph has {', '.join(unknown)}")
        self._keys: dict[str, str] = {}
        self._levels: dict[tuple[str, ...], tuple[int, int, int]] = {}
        self._quantized: dict[str, _Weight] = {}
        self._types: dict[str, np.dtype[Any]] = {}
        constants, floats = _constants(model), _constants(original)
        self._add_rounded(constants, floats)
        self._add_others(constants)
        self._idle = _idle_after(self._nodes, keep=[output.name for output in model.graph.output])

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values = {name: getattr(self, key) for name, key in self._keys.items()}
        values["images"] = images
        for node, idle in zip(self._nodes, self._idle, strict=True):
            values[node.output] = self._run(node, values)
            for name in idle:
                del values[name]
        return values["logits"], values["embedding"]

    def scales(self) -> Iterator[nn.Parameter]:
        """Of quantized activations: learned more gently than weights."""
        for name in dict.fromkeys(scale for scale, *_ in self._levels):
            yield getattr(self, self._keys[name])

    def weights(self) -> Iterator[nn.Parameter]:
        """Weights and biases."""
        scales = {id(scale) for scale in self.scales()}
        return (parameter for parameter in self.parameters() if id(parameter) not in scales)

    def learned(self) -> Iterator[tuple[str, Array]]:
        """Names in the graph and values as they are stored there."""
        stored = {weight.stored: weight for weight in self._quantized.values()}
        for name, key in self._keys.items():
            value = getattr(self, key)
            if not isinstance(value, nn.Parameter):
                continue
            weight = stored.get(name)
            yield name, value.detach().cpu().numpy() if weight is None else self._levels_of(weight)

    def _run(self, node: _Node, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if node.kind == "QuantizeLinear":
            return self._round(values[node.inputs[0]], node.inputs[1:])
        if node.kind == "DequantizeLinear":
            weight = self._quantized.get(node.output)
            return self._levels_to_values(node, values) if weight is None else self._round_weight(weight)
        given = [values[name] if name else None for name in node.inputs]
        return OPERATIONS[node.kind](given, node.attributes)

    def _levels_to_values(self, node: _Node, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What was rounded here is a float already; pixels are the only integers."""
        value = values[node.inputs[0]]
        if value.is_floating_point():
            return value
        zero = values[node.inputs[2]] if len(node.inputs) > 2 else 0
        return (value.float() - zero) * values[node.inputs[1]]

    def _round(self, value: torch.Tensor, grid: tuple[str, ...]) -> torch.Tensor:
        zero, low, high = self._levels[grid]
        scale = getattr(self, self._keys[grid[0]])
        # LSQ's balance between the gradient of one scale and those of all that it rounds
        share = 1 / math.sqrt(value[0].numel() * (high - low) / 2)
        return rounded(value, scale, Levels(low - zero, high - zero, share))

    def _round_weight(self, weight: _Weight) -> torch.Tensor:
        names = (weight.stored, weight.scale, weight.zero)
        value, scale, zero = (getattr(self, self._keys[name]) for name in names)
        if weight.axis is None:
            return torch.fake_quantize_per_tensor_affine(value, scale, zero, weight.low, weight.high)
        return torch.fake_quantize_per_channel_affine(
            value, scale, zero, weight.axis, weight.low, weight.high
        )

    def _levels_of(self, weight: _Weight) -> Array:
        """The integers whose values are those that `_round_weight` computes with."""
        with torch.no_grad():
            value = self._round_weight(weight).cpu().numpy()
        scale, zero = (
            _spread(getattr(self, self._keys[name]).cpu().numpy(), weight.axis, value.ndim)
            for name in (weight.scale, weight.zero)
        )
        return (np.rint(value / scale) + zero).astype(self._types[weight.stored])

    def _add_rounded(self, constants: dict[str, Array], floats: Mapping[str, Array]) -> None:
        """Scales of activations, and constants that are stored as integers; taken out of `constants`."""
        taken: set[str] = set()
        for node in self._nodes:
            if node.kind == "QuantizeLinear":
                self._add_grid(node, constants)
                taken.update(node.inputs[1:])
            elif node.kind == "DequantizeLinear" and node.inputs[0] in constants:
                self._add_weight(node, constants, floats)
                taken.update(node.inputs)
        for name in taken:
            constants.pop(name, None)

    def _add_grid(self, node: _Node, constants: Mapping[str, Array]) -> None:
        """The levels of one activation; without a zero point they are uint8 from 0, as ONNX says."""
        scale, *zeros = node.inputs[1:]
        zero = constants[zeros[0]] if zeros else np.zeros((), np.uint8)
        if constants[scale].size != 1:
            raise ModelError(f"cannot be trained quantized: {node.inputs[0]} is rounded by channel")
        kind = np.iinfo(zero.dtype)
        self._levels[node.inputs[1:]] = (int(zero.item()), kind.min, kind.max)
        self._learn(scale, constants[scale].reshape(1))

    def _add_weight(self, node: _Node, constants: Mapping[str, Array], floats: Mapping[str, Array]) -> None:
        stored, scale, *zeros = node.inputs
        levels, spread = constants[stored], constants[scale]
        if levels.dtype not in _INTEGERS or spread.ndim > 1:
            raise ModelError(
                f"cannot be trained quantized: {stored} is {levels.dtype} with scales of shape {spread.shape}"
            )
        axis = int(node.attributes.get("axis", 1)) % levels.ndim if spread.size > 1 else None
        zero = np.broadcast_to(constants[zeros[0]] if zeros else np.int32(0), spread.shape).astype(np.int32)
        value = floats.get(stored.removesuffix("_quantized"))
        if value is None or value.dtype != np.float32 or value.shape != levels.shape:
            value = (levels - _spread(zero, axis, levels.ndim)) * _spread(spread, axis, levels.ndim)
        self._learn(stored, value.astype(np.float32))
        # Not every graph names its zero points, and one may serve weights with different numbers of channels.
        places, shape = f"{stored}.zero", () if axis is None else (-1,)
        self._keep(scale, spread.reshape(shape))
        self._keep(places, zero.reshape(shape))
        self._types[stored] = levels.dtype
        self._quantized[node.output] = _Weight(stored, scale, places, axis, *_reach(levels, zero))

    def _add_others(self, constants: Mapping[str, Array]) -> None:
        learned = {
            node.inputs[place]
            for node in _after_prefix(self._nodes)
            for place in _LEARNED.get(node.kind, ())
            if place < len(node.inputs)
        }
        for name, value in constants.items():
            if name in learned and value.dtype == np.float32 and value.size > 1:
                self._learn(name, value)
            else:
                self._keep(name, value)

    def _learn(self, name: str, value: Array) -> None:
        if name not in self._keys:
            self.register_parameter(self._key(name), nn.Parameter(torch.from_numpy(value.copy())))

    def _keep(self, name: str, value: Array) -> None:
        if name not in self._keys:
            self.register_buffer(self._key(name), torch.from_numpy(np.array(value)), persistent=False)

    def _key(self, name: str) -> str:
        """A name that torch takes: it allows no dots."""
        key = f"{name.replace('.', '_')}_{len(self._keys)}"
        self._keys[name] = key
        return key


def learned_model(model: onnx.ModelProto, graph: TrainableGraph) -> onnx.ModelProto:
    """A copy of `model` with what `graph` has learned, in the same places and types."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    learned = dict(graph.learned())
    for tensor in copy.graph.initializer:
        if tensor.name in learned:
            # numpy's ascontiguousarray would make a list of one of a scalar, which some operations refuse.
            value = np.array(learned[tensor.name].reshape(tuple(tensor.dims)), order="C")
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return copy


def _read_nodes(model: onnx.ModelProto) -> Iterator[_Node]:
    for node in model.graph.node:
        attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        yield _Node(node.op_type, tuple(node.input), node.output[0], attributes)


def _constants(model: onnx.ModelProto) -> dict[str, Array]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def _after_prefix(nodes: Sequence[_Node]) -> Iterable[_Node]:
    """Without cast and normalisation, which belong to what the network is fed."""
    first = next((place for place, node in enumerate(nodes) if node.kind in ("Conv", "MatMul", "Gemm")), 0)
    return nodes[first:]


def _idle_after(nodes: Sequence[_Node], *, keep: Iterable[str]) -> list[tuple[str, ...]]:
    """After each node, the names that no later one asks for: their memory is given back."""
    seen = set(keep)
    made = {node.output for node in nodes}
    idle: list[tuple[str, ...]] = []
    for node in reversed(nodes):
        last = tuple(name for name in dict.fromkeys(node.inputs) if name in made and name not in seen)
        seen.update(node.inputs)
        idle.append(last)
    return idle[::-1]


def _reach(levels: Array, zero: Array) -> tuple[int, int]:
    """The least and largest level: of int8 around 0, -128 is left out, as onnxruntime quantizes weights."""
    kind = np.iinfo(levels.dtype)
    symmetric = kind.min < 0 and not zero.any() and levels.min() > kind.min
    return kind.min + symmetric, kind.max


def _spread(scale: Array, axis: int | None, rank: int) -> Array:
    """A scale per channel, in the shape that it is multiplied in."""
    if axis is None:
        return scale.reshape(())
    shape = [1] * rank
    shape[axis] = -1
    return scale.reshape(shape)

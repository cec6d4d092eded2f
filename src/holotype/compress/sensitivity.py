"""What rounding one layer alone costs: which layers to leave in float, and where accuracy goes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx

from holotype.compress.contract import Layer
from holotype.compress.judge import Logits
from holotype.machine import available_cores
from holotype.policy import Policy, probabilities, total_variation
from holotype.preprocess import Pixels
from holotype.progress import track
from holotype.quantize import Calibration, Ranges, quantizable, quantize
from holotype.runtime import load_onnx_model

__all__ = ["layer_costs", "most_sensitive"]


def layer_costs(
    model: onnx.ModelProto,
    ranges: Ranges,
    images: Pixels,
    labels: Sequence[int],
    *,
    calibration: Calibration,
    policy: Policy,
) -> tuple[Layer, ...]:
    """Quantize each layer with weights alone and compare the answers on `uint8[N, H, W, 3]`.

    `drop` is the loss of accuracy in points, `shift` the mean total variation distance of the probabilities,
    which tells layers apart where no label changes. In the order of the graph.
    """
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in model.graph.initializer}
    weights = {node.name: sum(sizes.get(name, 0) for name in node.input) for node in model.graph.node}
    names = quantizable(model)
    before = _answers(model, images)
    truth = np.asarray(labels)
    costs = []
    with track("sensitivity", total=len(names)) as progress:
        for name in names:
            after = _answers(quantize(model, ranges, calibration=calibration, only=(name,)), images)
            costs.append(_cost(before, after, truth, name=name, weights=weights[name], policy=policy))
            progress.advance(status=name)
    return tuple(costs)


def most_sensitive(layers: Sequence[Layer], *, count: int) -> list[str]:
    """The layers whose rounding shifts probabilities most, the worst first."""
    return [layer.name for layer in sorted(layers, key=lambda layer: -layer.shift)[:count]]


def _answers(model: onnx.ModelProto, images: Pixels) -> Logits:
    runtime = load_onnx_model(model, threads=available_cores())
    return np.concatenate(
        [runtime.run(images[start : start + 16]).logits for start in range(0, len(images), 16)]
    )


def _cost(
    before: Logits, after: Logits, truth: np.ndarray, *, name: str, weights: int, policy: Policy
) -> Layer:
    sure, shifted = probabilities(before, policy=policy), probabilities(after, policy=policy)
    right = (before.argmax(axis=1) == truth).mean(), (after.argmax(axis=1) == truth).mean()
    return Layer(
        name=name,
        weights=weights,
        drop=100 * float(right[0] - right[1]),
        shift=total_variation(sure, shifted),
    )

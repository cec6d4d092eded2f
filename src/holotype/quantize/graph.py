"""What every ONNX graph of ours is: valid by onnx's own checker, in operations of one version."""

from __future__ import annotations

import onnx

from holotype.errors import ModelError

__all__ = ["OPSET", "check_graph", "opset_of"]

OPSET = 20
"""Of the operations that are exported; `compress/operations.py` computes them as this version says."""


def check_graph(model: onnx.ModelProto, *, where: object = None) -> onnx.ModelProto:
    """The same model; `ModelError` where onnx's checker finds fault, shapes and types included."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ModelError(
            f"its graph is not valid ONNX ({error})",
            where=where,
            fix="report the architecture and library versions",
        ) from error
    return model


def opset_of(model: onnx.ModelProto) -> int:
    """The version of ONNX's own operations in a model."""
    return next(int(one.version) for one in model.opset_import if one.domain in ("", "ai.onnx"))

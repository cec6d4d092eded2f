"""From a `Classifier` to ONNX, and from ONNX to OpenVINO: one graph, pixels in, evidence out."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from holotype.errors import BundleError, ModelError, require
from holotype.models import Classifier, head_of
from holotype.preprocess import Preprocess
from holotype.quantize import OPSET, check_graph

__all__ = ["convert_openvino", "export_onnx", "prepare_tensorrt", "replace_head"]


def export_onnx(
    classifier: Classifier, file: Path, *, classes: tuple[str, ...], preprocess: Preprocess
) -> None:
    """Write `images: uint8[N, H, W, 3]` → `logits: float32[N, C]`, `embedding: float32[N, D]`, any N >= 1.

    Class names, the preprocess spec and the opset are in the model's metadata (`classes` and `preprocess` as
    JSON, `opset`). `ModelError` where torch cannot export the architecture, or onnx's checker finds fault.
    """
    program = _program(classifier)
    program.model.metadata_props["classes"] = json.dumps(classes)
    program.model.metadata_props["preprocess"] = preprocess.model_dump_json()
    program.model.metadata_props["opset"] = str(OPSET)
    model = _without_traces(program.model_proto)
    onnx.save(check_graph(model, where=classifier.architecture.name), file)


def _program(classifier: Classifier) -> torch.onnx.ONNXProgram:
    model = _exportable(classifier)
    size = classifier.architecture.height, classifier.architecture.width
    example = torch.zeros((2, *size, 3), dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1)
    try:
        with _silence():
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                dynamic_shapes=({0: batch},),
                input_names=["images"],
                output_names=["logits", "embedding"],
                opset_version=OPSET,
                verbose=False,
            )
    except Exception as error:
        raise ModelError(
            f"torch cannot export it to ONNX ({_root_of(error)})",
            where=classifier.architecture.name,
            fix="use another architecture (holotype models lists them)",
        ) from error
    if program is None:
        raise AssertionError("torch.onnx.export returned nothing")
    return program


def _root_of(error: BaseException) -> str:
    """The first line of what it began with: the exporter wraps a page of advice around it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _exportable(classifier: Classifier) -> nn.Module:
    """A copy in fp32 that computes the same in operations that every runtime knows well."""
    model = copy.deepcopy(classifier).float().cpu().eval()
    for module in model.modules():
        # In-place activations are decomposed into many symbolic operations: ten times the export time.
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]
        for name, child in module.named_children():
            if isinstance(child, nn.AdaptiveAvgPool2d) and child.output_size in (1, (1, 1)):
                setattr(module, name, _GlobalMean())
    return model


class _GlobalMean(nn.Module):
    """`AdaptiveAvgPool2d(1)`, which on channels-last images is exported with a gather by strides."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3), keepdim=True)


def _without_traces(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without what the exporter noted about its source: stack traces, a fiftieth of the file."""
    graph = model.graph
    for part in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
    return model


def replace_head(file: Path, classifier: Classifier) -> bool:
    """Put the head of `classifier` into an ONNX file that was exported with another head of its shape.

    False, and the file untouched, where the head's tensors cannot be found in the graph by name and shape.
    """
    head = head_of(classifier)
    weight = head.layer.weight.detach().cpu().numpy()
    bias = head.layer.bias.detach().cpu().numpy()
    model = onnx.load(file)
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    found = [(f"network.{head.name}.weight", weight), (f"network.{head.name}.bias", bias)]
    for name, values in found:
        if name not in initializers or tuple(initializers[name].dims) != values.shape:
            return False
    for name, values in found:
        initializers[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), name))
    onnx.save(model, file)
    return True


def convert_openvino(model: Path, folder: Path, *, half: bool = False) -> tuple[Path, Path]:
    """Convert an ONNX file to OpenVINO IR, `folder/model.xml` and `.bin`; with `half`, weights in fp16."""
    openvino = require("openvino", extra="openvino", purpose="export to OpenVINO")
    try:
        converted = openvino.convert_model(str(model))
    except Exception as error:
        raise BundleError(f"OpenVINO cannot convert it ({error})", where=model) from error
    openvino.save_model(converted, str(folder / "model.xml"), compress_to_fp16=half)
    return folder / "model.xml", folder / "model.bin"


def prepare_tensorrt(model: onnx.ModelProto, *, half: bool, max_batch: int) -> onnx.ModelProto:
    """A copy as TensorRT reads it: uint8 is cast before anything else, and `max_batch` is in its metadata.

    With `half`, weights and arithmetic are fp16, the outputs fp32.
    """
    copy = _cast_first(model)
    if half:
        from onnxruntime.transformers.float16 import convert_float_to_float16

        copy = convert_float_to_float16(copy, keep_io_types=True)
    entry = copy.metadata_props.add()
    entry.key, entry.value = "max_batch", str(max_batch)
    return check_graph(copy)


def _cast_first(model: onnx.ModelProto) -> onnx.ModelProto:
    """Transpose → cast in the other order: TensorRT takes uint8 only where the first node casts it."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    pixels = copy.graph.input[0].name
    transpose = next((node for node in copy.graph.node if node.op_type == "Transpose"), None)
    cast = next((node for node in copy.graph.node if node.op_type == "Cast"), None)
    if (
        transpose is None
        or cast is None
        or transpose.input[0] != pixels
        or cast.input[0] != transpose.output[0]
    ):
        return copy
    result, between = cast.output[0], f"{cast.output[0]}.nhwc"
    first = onnx.NodeProto()
    first.CopyFrom(cast)
    first.input[0], first.output[0] = pixels, between
    transpose.input[0], transpose.output[0] = between, result
    copy.graph.node.remove(cast)
    copy.graph.node.insert(0, first)
    del copy.graph.value_info[:]
    return onnx.shape_inference.infer_shapes(copy)


@contextlib.contextmanager
def _silence():  # type: ignore[no-untyped-def]
    """The exporter reports its progress and its own deprecations to whoever listens; nobody asked."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

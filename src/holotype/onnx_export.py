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

from holotype.errors import BundleError, require
from holotype.models import Classifier, head_of
from holotype.preprocess import Preprocess

__all__ = ["convert_openvino", "export_onnx", "replace_head"]


def export_onnx(
    classifier: Classifier, file: Path, *, classes: tuple[str, ...], preprocess: Preprocess
) -> None:
    """Write `images: uint8[N, H, W, 3]` → `logits: float32[N, C]`, `embedding: float32[N, D]`, any N >= 1.

    Class names and the preprocess spec are in the model's metadata (`classes`, `preprocess`, JSON).
    """
    model = _exportable(classifier)
    size = classifier.architecture.height, classifier.architecture.width
    example = torch.zeros((2, *size, 3), dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1)
    with _silence():
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            dynamic_shapes=({0: batch},),
            input_names=["images"],
            output_names=["logits", "embedding"],
            verbose=False,
        )
    if program is None:
        raise AssertionError("torch.onnx.export returned nothing")
    program.model.metadata_props["classes"] = json.dumps(classes)
    program.model.metadata_props["preprocess"] = preprocess.model_dump_json()
    onnx.save(_without_traces(program.model_proto), file)


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


def convert_openvino(model: Path, folder: Path) -> tuple[Path, Path]:
    """Convert an ONNX file to OpenVINO IR in fp32: `folder/model.xml` and `folder/model.bin`."""
    openvino = require("openvino", extra="openvino", purpose="export to OpenVINO")
    try:
        converted = openvino.convert_model(str(model))
    except Exception as error:
        raise BundleError(f"OpenVINO cannot convert it ({error})", where=model) from error
    openvino.save_model(converted, str(folder / "model.xml"), compress_to_fp16=False)
    return folder / "model.xml", folder / "model.bin"


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

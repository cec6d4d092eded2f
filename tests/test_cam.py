"""Heat maps from an exported graph are those that gradients give, where the graph allows them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from holotype import TrainResult
from holotype.bundle import open_bundle, read_golden, write_bundle
from holotype.cam import open_cam
from holotype.errors import ModelError
from holotype.models import open_network, save_weights
from holotype.onnx_export import export_onnx
from holotype.predictor import load
from holotype.quantize import fold_normalisation, observe, quantize
from holotype.saliency import heat_maps
from holotype.serve.heat import open_heat_maps
from networks import small_network
from tiny import golden_images, tiny_model, write_tiny_bundle


def upsampled(grid: np.ndarray, side: int) -> np.ndarray:
    """As `heat_maps` does it."""
    small = torch.from_numpy(grid)[None, None]
    return torch.nn.functional.interpolate(small, (side, side), mode="bilinear")[0, 0].numpy()


def test_it_is_grad_cam(tuned: TrainResult) -> None:
    images = read_golden(tuned.bundle).images
    network = open_network(*tuned.bundle.network_files(fix=""))
    cam = open_cam(tuned.bundle)
    for label in range(3):
        wanted = heat_maps(network, images, np.full(len(images), label))
        for image, heat in zip(images, wanted, strict=True):
            mine = upsampled(cam(image, label), image.shape[0])
            if heat.any():
                np.testing.assert_allclose(mine / max(mine.max(), 1e-9), heat / heat.max(), atol=0.02)


def test_a_quantized_graph_has_one_too(tuned: TrainResult, tmp_path: Path) -> None:
    images = read_golden(tuned.bundle).images
    folded = fold_normalisation(onnx.load(tuned.best / "model.onnx"))
    model = quantize(folded, observe(folded, images, threads=2), calibration="min-max")
    (tmp_path / "parts").mkdir()
    onnx.save(model, tmp_path / "parts" / "model.onnx")
    files = {name: tuned.best / payload.path for name, payload in tuned.bundle.manifest.payloads.items()}
    bundle = write_bundle(
        tmp_path / "int8", tuned.bundle.manifest, files={**files, "onnx": tmp_path / "parts" / "model.onnx"}
    )
    before, after = open_cam(tuned.bundle), open_cam(bundle)
    for image in images:
        one, other = before(image, 1), after(image, 1)
        assert one.shape == other.shape
        if one.any() and other.any():
            assert np.corrcoef(one.ravel(), other.ravel())[0, 1] > 0.8


def with_head(*nodes: onnx.NodeProto, **constants: np.ndarray) -> onnx.ModelProto:
    """The tiny model, the weights of whose head come out of `nodes` as `weight`; its own are `plain`."""
    model = tiny_model()
    graph = model.graph
    for tensor in graph.initializer:
        if tensor.name == "weight":
            tensor.name = "plain"
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    own = [*graph.node]
    del graph.node[:]
    graph.node.extend([*nodes, *own])
    return model


NODE = onnx.helper.make_node
EYE = np.eye(3, dtype=np.float32) * 8 / 255
HEADS = {
    "float → Q → DQ": with_head(
        NODE("QuantizeLinear", ["plain", "scale", "zero"], ["integers"], axis=1),
        NODE("DequantizeLinear", ["integers", "scale", "zero"], ["weight"], axis=1),
        scale=np.full(3, 8 / 255 / 100, dtype=np.float32),
        zero=np.zeros(3, dtype=np.int8),
    ),
    "integers with zero points": with_head(
        NODE("DequantizeLinear", ["integers", "scale", "zero"], ["weight"], axis=1),
        integers=(np.eye(3) * 100 + np.array([0, 5, -7])).astype(np.int8),
        scale=np.full(3, 8 / 255 / 100, dtype=np.float32),
        zero=np.array([0, 5, -7], dtype=np.int8),
    ),
    "a constant node": with_head(
        NODE(
            "Constant", [], ["weight"], value=numpy_helper.from_array(np.eye(3, dtype=np.float32) * 8 / 255)
        ),
    ),
    "turned twice": with_head(
        NODE("Transpose", ["plain"], ["turned"], perm=[1, 0]),
        NODE("Identity", ["turned"], ["same"]),
        NODE("Transpose", ["same"], ["weight"]),
    ),
}


@pytest.mark.parametrize("kind", HEADS)
def test_weights_are_read_however_they_are_stored(tmp_path: Path, kind: str) -> None:
    bundle = write_tiny_bundle(tmp_path / "odd", model=HEADS[kind])
    image = golden_images()[3]
    wanted = open_cam(write_tiny_bundle(tmp_path / "plain"))(image, 1)
    np.testing.assert_allclose(open_cam(bundle)(image, 1), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (
            with_head(NODE("Mul", ["plain", "two"], ["weight"]), two=np.array(2, np.float32)),
            "no constant weights",
        ),
        (
            with_head(
                NODE("QuantizeLinear", ["images", "scale"], ["integers"]),
                NODE("DequantizeLinear", ["integers", "scale"], ["weight"]),
                scale=np.array(1, np.float32),
            ),
            "no constant weights",
        ),
        (with_head(NODE("Add", ["plain", "plain"], ["logits"])), "not linear"),
    ],
)
def test_a_head_that_is_not_understood_is_said(tmp_path: Path, model: onnx.ModelProto, why: str) -> None:
    if why == "not linear":
        del model.graph.node[-1]
    with pytest.raises(ModelError, match=why):
        open_cam(write_tiny_bundle(tmp_path / "odd", model=model))


def test_no_graph_is_refused_for_its_heat_maps(tmp_path: Path) -> None:
    """What a reader of graphs has never seen: an initializer of a type that numpy does not have."""
    bundle = write_tiny_bundle(tmp_path / "odd")
    predictor = load(bundle.path)
    model = onnx.load(bundle.path / "model.onnx")
    model.graph.initializer[0].data_type = 999
    (bundle.path / "model.onnx").write_bytes(model.SerializeToString())
    found = open_heat_maps(predictor)
    assert found.method is None
    assert "not known here" in found.why_not


def test_an_architecture_without_places_is_said(tuned: TrainResult, tmp_path: Path) -> None:
    network = small_network("test_vit", side=64)
    (tmp_path / "parts").mkdir()
    save_weights(network, tmp_path / "parts" / "weights.safetensors")
    file = tmp_path / "parts" / "model.onnx"
    export_onnx(network, file, classes=("a", "b", "c"), preprocess=tuned.bundle.manifest.preprocess)
    files = {"onnx": file, "golden": tuned.best / "golden.npz"}
    bundle = write_bundle(tmp_path / "vit", tuned.bundle.manifest, files=files)
    with pytest.raises(ModelError, match=r"not a mean of features|not linear"):
        open_cam(bundle)
    with pytest.raises(ModelError, match="need an ONNX graph"):
        open_cam(write_bundle(tmp_path / "none", tuned.bundle.manifest, files={}))
    assert open_bundle(tmp_path / "vit").payload("onnx") is not None

"""TensorRT: the graphs its engines are built of, anywhere; the engines themselves where there is a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import holotype
from holotype.bundle import read_golden
from holotype.config import ExportConfig
from holotype.errors import HolotypeError
from holotype.machine import cache_root
from holotype.onnx_export import prepare_tensorrt
from holotype.quantize.qdq import quantize
from holotype.quantize.ranges import observe
from holotype.runtime import load_onnx
from holotype.runtime.contract import Runtime
from holotype.train import TrainResult


def pixels_of(result: TrainResult) -> np.ndarray:
    """The golden images of a bundle, `uint8[N, H, W, 3]`."""
    return read_golden(result.bundle).images


def graph_of(result: TrainResult) -> onnx.ModelProto:
    file = result.bundle.payload("onnx")
    assert file is not None
    return onnx.load(file)


def opened(model: onnx.ModelProto, folder: Path) -> Runtime:
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, folder / "tensorrt.onnx")
    return load_onnx(folder / "tensorrt.onnx", threads=1)


class TestGraph:
    """What is promised about the graph alone, opened in onnxruntime."""

    def test_pixels_are_cast_before_anything_else(self, probe: TrainResult, tmp_path: Path) -> None:
        prepared = prepare_tensorrt(graph_of(probe), half=False, max_batch=16)
        first = prepared.graph.node[0]
        assert (first.op_type, first.input[0]) == ("Cast", "images")
        assert {entry.key: entry.value for entry in prepared.metadata_props}["max_batch"] == "16"
        images = pixels_of(probe)
        before, after = opened(graph_of(probe), tmp_path).run(images), opened(prepared, tmp_path).run(images)
        np.testing.assert_allclose(after.logits, before.logits, atol=1e-4)
        np.testing.assert_allclose(after.embedding, before.embedding, atol=1e-4)

    def test_half_precision_has_outputs_in_single(self, probe: TrainResult, tmp_path: Path) -> None:
        prepared = prepare_tensorrt(graph_of(probe), half=True, max_batch=16)
        kinds = {tensor.data_type for tensor in prepared.graph.initializer}
        assert onnx.TensorProto.FLOAT16 in kinds
        images = pixels_of(probe)
        before, after = opened(graph_of(probe), tmp_path).run(images), opened(prepared, tmp_path).run(images)
        assert after.logits.dtype == np.float32
        assert (after.logits.argmax(1) == before.logits.argmax(1)).all()

    def test_int8_is_symmetric(self, probe: TrainResult, tmp_path: Path) -> None:
        """TensorRT knows neither uint8 nor zero points in its quantized layers."""
        model, images = graph_of(probe), pixels_of(probe)
        ranges = observe(model, images, threads=1)
        rounded = quantize(model, ranges, calibration="min-max", symmetric=True)
        prepared = prepare_tensorrt(rounded, half=False, max_batch=16)
        constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in prepared.graph.initializer}
        rounding = [n for n in prepared.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
        points = [constants[node.input[2]] for node in rounding if len(node.input) > 2]
        assert rounding
        assert all(not point.any() and point.dtype == np.int8 for point in points)
        before, after = opened(model, tmp_path).run(images), opened(prepared, tmp_path).run(images)
        assert (after.logits.argmax(1) == before.logits.argmax(1)).mean() >= 0.75


def test_without_it_the_error_says_so(probe: TrainResult, digits: Path) -> None:
    try:
        import tensorrt  # noqa: F401  # the real thing has its own tests
    except ImportError:
        with pytest.raises(HolotypeError, match="tensorrt"):
            holotype.export(probe.bundle.path, format="tensorrt", data=digits)
    else:
        pytest.skip("it is installed")


@pytest.mark.tensorrt
class TestEngine:
    """On an NVIDIA GPU."""

    @pytest.fixture(autouse=True)
    def _gpu(self) -> None:
        pytest.importorskip("tensorrt")
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("no NVIDIA GPU")

    @pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
    def test_it_answers_as_its_parent(
        self, probe: TrainResult, digits: Path, tmp_path: Path, precision: str
    ) -> None:
        made = holotype.export(
            probe.bundle.path,
            format="tensorrt",
            data=digits,
            out=tmp_path / "bundle",
            config=ExportConfig.model_validate({"precision": precision}),
        )
        images = pixels_of(probe)
        parent = holotype.load(probe.bundle.path, runtime="onnxruntime").runtime.run(images)
        engine = holotype.load(made.bundle.path, runtime="tensorrt").runtime.run(images)
        assert (engine.logits.argmax(1) == parent.logits.argmax(1)).mean() >= 0.75
        if precision == "fp32":
            np.testing.assert_allclose(engine.logits, parent.logits, atol=1e-2)

    def test_a_batch_beyond_the_largest_is_cut(
        self, probe: TrainResult, digits: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "bundle"
        made = holotype.export(
            probe.bundle.path, format="tensorrt", data=digits, out=out, config=ExportConfig(max_batch=2)
        )
        images = np.concatenate([pixels_of(probe)] * 3)
        whole = holotype.load(made.bundle.path, runtime="tensorrt").runtime.run(images)
        assert len(whole.logits) == len(images)

    def test_a_changed_engine_is_not_loaded_but_built_again(
        self, probe: TrainResult, digits: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "bundle"
        made = holotype.export(probe.bundle.path, format="tensorrt", data=digits, out=out)
        engines = sorted((cache_root() / "engines").glob("*.engine"), key=lambda file: file.stat().st_mtime)
        record = json.loads(engines[-1].with_suffix(".json").read_text())
        engines[-1].write_bytes(b"not an engine")
        assert holotype.load(made.bundle.path, runtime="tensorrt").runtime.run(pixels_of(probe)).logits.size
        again = json.loads(engines[-1].with_suffix(".json").read_text())
        assert again["fingerprint"] == record["fingerprint"]
        assert engines[-1].stat().st_size > 1000

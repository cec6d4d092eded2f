"""INT8 graphs of each kind of network: small, valid, near the float graph, trained as they are written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from holotype.compress.proof import Proof, prove
from holotype.compress.rounding import Levels, rounded
from holotype.compress.trainable import TrainableGraph, learned_model
from holotype.config import DatasetConfig
from holotype.dataset import Dataset, open_dataset
from holotype.errors import ModelError
from holotype.onnx_export import export_onnx
from holotype.preprocess import Pixels, Preprocess
from holotype.quantize import (
    OPSET,
    check_graph,
    dynamic_int8,
    fold_normalisation,
    is_transformer,
    observe,
    opset_of,
    quantize,
)
from holotype.runtime import load_onnx, load_onnx_model
from networks import small_network, taught_network

SPEC = Preprocess(height=32, width=32)
NETWORKS = ["test_resnet", "test_convnext", "test_vit"]


@dataclass(frozen=True)
class Case:
    """A network that knows the digits: its float file, the folded graph, and that in INT8."""

    file: Path
    folded: onnx.ModelProto
    rounded: onnx.ModelProto


@pytest.fixture(scope="module")
def dataset(digits: Path) -> Dataset:
    return open_dataset(digits, spec=SPEC, config=DatasetConfig())


@pytest.fixture(scope="module")
def unseen(dataset: Dataset) -> Pixels:
    return np.concatenate(list(dataset.pixels([dataset.rows("validation"), dataset.rows("test")])))


@pytest.fixture(scope="module", params=NETWORKS)
def case(request: pytest.FixtureRequest, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Case:
    rows = dataset.rows("train")
    images = np.concatenate(list(dataset.pixels([rows])))
    network = taught_network(request.param, images, dataset.labels(rows).tolist())
    file = tmp_path_factory.mktemp("float") / "model.onnx"
    export_onnx(network, file, classes=tuple(dataset.classes), preprocess=SPEC)
    folded = fold_normalisation(onnx.load(file))
    ranges = observe(folded, images, threads=2)
    return Case(file, folded, quantize(folded, ranges, calibration="min-max"))


def labels(model: onnx.ModelProto, images: Pixels) -> np.ndarray:
    return load_onnx_model(model, threads=2).run(images).logits.argmax(axis=1)


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def stored(model: onnx.ModelProto) -> int:
    return sum(value.nbytes for value in constants(model).values())


class TestInt8:
    def test_it_is_a_quarter_and_answers_alike(self, case: Case, unseen: Pixels) -> None:
        assert stored(case.rounded) < 0.3 * stored(case.folded)
        before = labels(case.folded, unseen)
        assert len(set(before.tolist())) == 3
        assert (labels(case.rounded, unseen) == before).mean() >= 0.95

    def test_only_weights_are_stored_as_integers(self, case: Case) -> None:
        values = constants(case.rounded)
        readers = {name: node for node in case.rounded.graph.node for name in node.input}
        read = {
            readers[node.output[0]].op_type
            for node in case.rounded.graph.node
            if node.op_type == "DequantizeLinear" and node.input[0] in values
        }
        assert read <= {"Conv", "Gemm", "MatMul"}

    def test_it_is_valid_and_of_the_pinned_opset(self, case: Case) -> None:
        onnx.checker.check_model(case.rounded, full_check=True)
        assert opset_of(onnx.load(case.file)) == opset_of(case.rounded) == OPSET == 20
        assert {one.key: one.value for one in onnx.load(case.file).metadata_props}["opset"] == "20"


def at_most_one_differs(proof: Proof) -> bool:
    """Of 96 images one is more than half a percent; the product lets one pass, too."""
    return round((1 - proof.agreement) * proof.images) <= 1


class TestRounding:
    @pytest.mark.parametrize("zero", [0, 3, 128])
    def test_it_is_what_torch_has_as_one_operation(self, zero: int) -> None:
        generator = torch.Generator().manual_seed(zero)
        value = torch.randn(2, 8, 5, 7, generator=generator).to(memory_format=torch.channels_last)
        gradient = torch.randn(2, 8, 5, 7, generator=generator)
        scale = torch.tensor([0.013])  # a part is clamped at either end
        found = self.answer(
            lambda x, s: rounded(x, s, Levels(-zero, 255 - zero, 0.1)), value, scale, gradient
        )
        wanted = self.answer(
            lambda x, s: torch._fake_quantize_learnable_per_tensor_affine(
                x, s, torch.full((1,), float(zero)), 0, 255, 0.1
            ),
            value,
            scale,
            gradient,
        )
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
        assert 0 < (found[1] == 0).sum() < value.numel()

    def answer(
        self,
        operation: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        value: torch.Tensor,
        scale: torch.Tensor,
        gradient: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """What comes out, and the gradients of both inputs."""
        given = value.clone().requires_grad_(), scale.clone().requires_grad_()
        out = operation(*given)
        return (out.detach(), *torch.autograd.grad(out, given, gradient))


class TestTraining:
    def test_what_is_trained_is_what_is_written(self, case: Case, dataset: Dataset) -> None:
        graph = TrainableGraph(case.rounded, original=case.folded)
        before = prove(graph, case.rounded, dataset)
        assert at_most_one_differs(before)
        assert before.images == len(dataset.rows("validation")) + len(dataset.rows("train"))
        assert before.shift < 0.1
        said, _ = graph(torch.from_numpy(next(iter(dataset.pixels([dataset.rows("train")[:16]])))))
        nn.functional.cross_entropy(
            said, torch.from_numpy(dataset.labels(dataset.rows("train")[:16]))
        ).backward()
        with torch.no_grad():
            for parameter in graph.weights():
                assert parameter.grad is not None
                parameter.sub_(2e-3 * parameter.grad.sign() * parameter.abs().mean())
        written = learned_model(case.rounded, graph)
        values, old = constants(written), constants(case.rounded)
        assert [value.dtype for value in values.values()] == [value.dtype for value in old.values()]
        assert [value.shape for value in values.values()] == [value.shape for value in old.values()]
        assert sum(not np.array_equal(values[name], old[name]) for name in values) > 10
        after = prove(graph, written, dataset)
        assert at_most_one_differs(after)
        assert after.shift < 0.1

    def test_a_file_that_answers_otherwise_is_refused(self, case: Case, dataset: Dataset) -> None:
        graph = TrainableGraph(case.rounded, original=case.folded)
        other = onnx.ModelProto()
        other.CopyFrom(case.rounded)
        names = {node.input[1] for node in other.graph.node if node.op_type == "DequantizeLinear"}
        tensor = next(
            one for one in reversed(other.graph.initializer) if one.name in names and len(one.dims) == 1
        )
        tensor.CopyFrom(numpy_helper.from_array(-3 * numpy_helper.to_array(tensor), tensor.name))
        with pytest.raises(ModelError, match=r"96 are equal \(limit 99.5%\).* it agrees on (9\d|100)\."):
            prove(graph, other, dataset)


def unusual_graph() -> onnx.ModelProto:
    """Weights in uint8 with a zero point for each channel, in int8 down to -128, and a bias in uint8."""
    rng = np.random.default_rng(0)
    values = {
        "axes": np.array([1, 2], dtype=np.int64),
        "step": np.float32(1.5),
        "middle": np.uint8(3),
        "left": rng.integers(0, 256, (3, 4)).astype(np.uint8),
        "left.scale": np.array([0.01, 0.02, 0.005, 0.01], dtype=np.float32),
        "left.zero": np.array([120, 0, 255, 7], dtype=np.uint8),
        "right": np.array([[-128, 5], [127, -3], [0, 1], [9, 9]], dtype=np.int8),
        "right.scale": np.float32(0.03),
        "bias": np.array([200, 90], dtype=np.uint8),
        "bias.scale": np.float32(0.1),
        "bias.zero": np.uint8(128),
    }
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats", "axes"], ["mean"], keepdims=0),
        helper.make_node("QuantizeLinear", ["mean", "step", "middle"], ["levels"]),
        helper.make_node("DequantizeLinear", ["levels", "step", "middle"], ["rounded"]),
        helper.make_node("DequantizeLinear", ["left", "left.scale", "left.zero"], ["w"], axis=1),
        helper.make_node("MatMul", ["rounded", "w"], ["embedding"]),
        helper.make_node("DequantizeLinear", ["right", "right.scale"], ["v"]),
        helper.make_node("MatMul", ["embedding", "v"], ["product"]),
        helper.make_node("DequantizeLinear", ["bias", "bias.scale", "bias.zero"], ["b"]),
        helper.make_node("Add", ["product", "b"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "unusual",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", 8, 8, 3])],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 2]),
            helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", 4]),
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


class TestWhatIsRead:
    def test_scales_zero_points_and_types_are_those_of_the_file(self) -> None:
        model = unusual_graph()
        images = np.random.default_rng(1).integers(0, 256, (16, 8, 8, 3)).astype(np.uint8)
        graph = TrainableGraph(model, original=model)
        with torch.no_grad():
            logits, embedding = graph(torch.from_numpy(images))
        # onnxruntime would also round what meets weights in 8 bits, which nobody asked for.
        wanted = ReferenceEvaluator(model).run(["logits", "embedding"], {"images": images})
        np.testing.assert_allclose(logits.numpy(), wanted[0], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(embedding.numpy(), wanted[1], rtol=1e-4, atol=1e-4)
        before, after = constants(model), constants(learned_model(model, graph))
        for name, value in before.items():
            np.testing.assert_array_equal(after[name], value, err_msg=name)
            assert (after[name].dtype, after[name].shape) == (value.dtype, value.shape)

    def test_another_opset_is_refused(self) -> None:
        model = unusual_graph()
        model.opset_import[0].version = 18
        with pytest.raises(ModelError, match="of opset 18, not 20"):
            TrainableGraph(model, original=model)


class TestDynamic:
    def test_matrix_products_of_a_transformer_become_integers(self, case: Case, unseen: Pixels) -> None:
        kinds = [node.op_type for node in case.folded.graph.node]
        assert is_transformer(case.folded) == ("MatMul" in kinds)
        if "Softmax" not in kinds:
            return
        model = dynamic_int8(case.file)
        after = [node.op_type for node in model.graph.node]
        assert after.count("MatMulInteger") > 12
        assert stored(model) < 0.5 * stored(onnx.load(case.file))
        same = labels(model, unseen) == load_onnx(case.file, threads=2).run(unseen).logits.argmax(axis=1)
        assert same.mean() >= 0.95


class TestGraphs:
    def test_one_that_is_not_valid_is_refused_in_one_line(self) -> None:
        model = unusual_graph()
        model.graph.node[5].input[1] = "nowhere"
        with pytest.raises(ModelError, match="not valid ONNX") as caught:
            check_graph(model)
        assert "\n" not in str(caught.value)

    def test_what_torch_cannot_export_is_said_in_one_line(self, tmp_path: Path) -> None:
        network = small_network()
        network.network.add_module("act1", Undecided())
        with pytest.raises(ModelError, match="test_resnet: torch cannot export it to ONNX") as caught:
            export_onnx(network, tmp_path / "model.onnx", classes=("a", "b", "c"), preprocess=SPEC)
        assert len(str(caught.value)) < 500
        assert not (tmp_path / "model.onnx").exists()


class Undecided(nn.Module):
    """What it computes depends on what it is given, so there is no graph of it."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values.relu() if float(values.sum()) > 0 else values

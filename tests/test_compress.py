from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from candidates import candidate
from holotype import TrainResult, load
from holotype.bundle import open_bundle, read_golden
from holotype.compress import compress
from holotype.compress.contract import Compressed
from holotype.compress.decision import decide
from holotype.compress.judge import compare, open_panel
from holotype.compress.magnitude import zero_small_weights, zeros_kept
from holotype.compress.search import Found, rejections
from holotype.compress.structured import remove_channels
from holotype.compress.trainable import TrainableGraph, learned_model
from holotype.compress.workshop import Measured
from holotype.config import BudgetConfig, CompressConfig, DatasetConfig, MagnitudeConfig, resolve_config
from holotype.dataset import Dataset, open_dataset
from holotype.errors import BundleError, ConfigError, ModelError
from holotype.models import build, save_weights
from holotype.preprocess import Pixels
from holotype.quantize import (
    CALIBRATIONS,
    Ranges,
    calibration_rows,
    fold_normalisation,
    observe,
    quantizable,
    quantize,
)
from holotype.runtime import choose, load_onnx_model, open_runtime
from networks import small_network


@pytest.fixture(scope="module")
def dataset(tuned: TrainResult) -> Dataset:
    spec = tuned.bundle.manifest.preprocess
    source = Path(tuned.report.dataset.path)
    return open_dataset(source, spec=spec, config=DatasetConfig())


@pytest.fixture(scope="module")
def images(dataset: Dataset) -> Pixels:
    return np.concatenate(list(dataset.pixels([calibration_rows(dataset, count=64, seed=0)])))


@pytest.fixture(scope="module")
def original(tuned: TrainResult) -> onnx.ModelProto:
    return onnx.load(tuned.best / "model.onnx")


@pytest.fixture(scope="module")
def folded(original: onnx.ModelProto) -> onnx.ModelProto:
    return fold_normalisation(original)


@pytest.fixture(scope="module")
def ranges(folded: onnx.ModelProto, images: Pixels) -> Ranges:
    return observe(folded, images, threads=2)


@pytest.fixture(scope="module")
def quantized(folded: onnx.ModelProto, ranges: Ranges) -> onnx.ModelProto:
    return quantize(folded, ranges, calibration="min-max")


def logits(model: onnx.ModelProto, images: Pixels) -> np.ndarray:
    return load_onnx_model(model, threads=2).run(images).logits


class TestRanges:
    def test_images_are_of_every_class_in_turn(self, dataset: Dataset) -> None:
        rows = calibration_rows(dataset, count=30, seed=1)
        assert set(rows) <= set(dataset.rows("train"))
        counts = np.bincount(dataset.labels(rows))
        assert counts.max() - counts.min() <= 1
        assert not np.array_equal(rows, calibration_rows(dataset, count=30, seed=2))
        everything = calibration_rows(dataset, count=10_000, seed=0)
        np.testing.assert_array_equal(everything, np.sort(dataset.rows("train")))

    def test_min_max_is_what_the_network_gives(
        self, folded: onnx.ModelProto, ranges: Ranges, images: Pixels
    ) -> None:
        said = logits(folded, images)
        low, high = ranges.tensors["min-max"]["logits"]
        assert low == pytest.approx(min(said.min(), 0.0))
        assert high == pytest.approx(max(said.max(), 0.0))

    def test_others_are_never_wider(self, ranges: Ranges) -> None:
        for name, (low, high) in ranges.tensors["min-max"].items():
            for other in CALIBRATIONS:
                inside = ranges.tensors[other][name]
                assert low - 1e-6 <= inside[0] <= 0 <= inside[1] <= high + 1e-6


class TestPrefix:
    def test_the_folded_graph_gives_the_same_answers(
        self, original: onnx.ModelProto, folded: onnx.ModelProto, images: Pixels
    ) -> None:
        assert [node.op_type for node in folded.graph.node][:3] == ["Transpose", "Pad", "Cast"]
        before, after = logits(original, images), logits(folded, images)
        assert (before.argmax(axis=1) == after.argmax(axis=1)).all()
        # The border is 128 instead of 127.5.
        np.testing.assert_allclose(before, after, atol=0.05)

    def test_pixels_reach_the_first_convolution_as_integers(self, quantized: onnx.ModelProto) -> None:
        kinds = [
            node.op_type for node in quantized.graph.node if "images" in node.input or "permute" in node.input
        ]
        assert "Cast" not in {node.op_type for node in quantized.graph.node}
        assert kinds[0] == "Transpose"


class TestInt8:
    def test_it_is_small_and_answers_alike(
        self, original: onnx.ModelProto, quantized: onnx.ModelProto, dataset: Dataset
    ) -> None:
        assert quantized.ByteSize() < 0.3 * original.ByteSize()
        everything = np.concatenate(list(dataset.pixels([dataset.rows("validation"), dataset.rows("test")])))
        before, after = logits(original, everything), logits(quantized, everything)
        assert (before.argmax(axis=1) == after.argmax(axis=1)).mean() >= 0.95

    def test_layers_stay_in_float_where_asked(self, folded: onnx.ModelProto, ranges: Ranges) -> None:
        first, *_ = names = quantizable(folded)
        mixed = quantize(folded, ranges, calibration="min-max", floats=[first])
        whole = quantize(folded, ranges, calibration="min-max")
        kept = {tensor.name for tensor in mixed.graph.initializer}
        node = next(node for node in folded.graph.node if node.name == first)
        assert node.input[1] in kept
        assert len(names) > 10
        assert mixed.ByteSize() > whole.ByteSize()

    def test_all_three_calibrations_work(
        self, folded: onnx.ModelProto, ranges: Ranges, images: Pixels
    ) -> None:
        wanted = logits(folded, images).argmax(axis=1)
        for calibration in CALIBRATIONS:
            said = logits(quantize(folded, ranges, calibration=calibration), images).argmax(axis=1)
            assert (said == wanted).mean() > 0.9, calibration


class TestTrainableGraph:
    def test_it_computes_what_the_file_computes(
        self, folded: onnx.ModelProto, quantized: onnx.ModelProto, images: Pixels
    ) -> None:
        graph = TrainableGraph(quantized, original=folded)
        with torch.no_grad():
            mine, embedding = graph(torch.from_numpy(images))
        theirs = load_onnx_model(quantized, threads=2).run(images)
        assert (mine.numpy().argmax(axis=1) == theirs.logits.argmax(axis=1)).mean() >= 0.98
        assert embedding.shape == theirs.embedding.shape

    def test_all_of_it_learns_and_gets_into_the_file(
        self, folded: onnx.ModelProto, quantized: onnx.ModelProto, images: Pixels
    ) -> None:
        graph = TrainableGraph(quantized, original=folded)
        optimizer = torch.optim.SGD(graph.parameters(), lr=1e-3)
        before = {name: value.copy() for name, value in graph.learned()}
        said, _ = graph(torch.from_numpy(images[:8]))
        said.square().sum().backward()
        assert all(parameter.grad is not None for parameter in graph.parameters())
        optimizer.step()
        after = dict(graph.learned())
        changed = [name for name, value in after.items() if not np.array_equal(value, before[name])]
        assert len(changed) > 0.9 * len(after)
        file = learned_model(quantized, graph)
        with torch.no_grad():
            mine = graph(torch.from_numpy(images))[0].numpy()
        assert (logits(file, images).argmax(axis=1) == mine.argmax(axis=1)).mean() >= 0.95


class TestStructured:
    @pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext"])
    def test_channels_are_gone_and_it_loads_again(self, name: str, tmp_path: Path) -> None:
        network = small_network(name, side=64)
        narrow = remove_channels(network, share=0.4, round_to=8)
        assert sum(p.numel() for p in narrow.parameters()) < 0.85 * sum(
            p.numel() for p in network.parameters()
        )
        assert narrow.architecture.widths
        save_weights(narrow, tmp_path / "weights.safetensors")
        again = build(narrow.architecture, tmp_path / "weights.safetensors")
        pixels = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
        with torch.no_grad():
            torch.testing.assert_close(again(pixels), narrow.eval()(pixels))
        assert again(pixels)[0].shape == (2, 3)

    def test_again_from_a_pruned_one(self) -> None:
        once = remove_channels(small_network("test_resnet", side=64), share=0.3, round_to=8)
        twice = remove_channels(once, share=0.3, round_to=8)
        assert sum(p.numel() for p in twice.parameters()) < sum(p.numel() for p in once.parameters())

    def test_what_cannot_be_traced_is_said(self) -> None:
        with pytest.raises(ModelError, match="cannot be pruned"):
            remove_channels(small_network("test_mambaout", side=64), share=0.4, round_to=8)


class TestMagnitude:
    def test_by_threshold(self) -> None:
        network = small_network()
        zeros = zero_small_weights(network, MagnitudeConfig(threshold=0.05))
        for name, module in network.network.named_modules():
            if name in zeros.masks:
                weight = module.weight.detach()
                assert ((weight == 0) | (weight.abs() >= 0.05)).all()
        assert 0 < zeros.share < 1

    @pytest.mark.parametrize(
        ("chosen", "why"),
        [
            ({"threshold": None}, "no weight would become 0"),
            ({"threshold": 0.01, "sparsity": 0.5}, "both given"),
            ({"threshold": 0.02, "scope": "layer"}, "scope is about a sparsity"),
            ({"scope": "layer"}, "scope is about a sparsity"),
            ({"threshold": 0.0}, "greater than 0"),
        ],
    )
    def test_nothing_chosen_or_twice_is_an_error(self, chosen: dict[str, Any], why: str) -> None:
        with pytest.raises(ConfigError, match=why):
            resolve_config(CompressConfig, overrides={"magnitude": chosen})

    def test_a_sparsity_takes_the_place_of_the_default_threshold(self) -> None:
        config = resolve_config(CompressConfig, overrides={"magnitude": {"sparsity": 0.5, "scope": "layer"}})
        assert config.magnitude.threshold is None
        assert CompressConfig.model_validate(config.model_dump()) == config

    @pytest.mark.parametrize("scope", ["global", "layer"])
    def test_by_sparsity(self, scope: Any) -> None:
        network = small_network()
        zeros = zero_small_weights(network, MagnitudeConfig(sparsity=0.6, scope=scope))
        assert zeros.share == pytest.approx(0.6, abs=0.02)
        if scope == "layer":
            shares = [1 - mask.float().mean() for mask in zeros.masks.values() if mask.numel() > 1000]
            assert all(share == pytest.approx(0.6, abs=0.02) for share in shares)
        with zeros_kept(network, zeros), torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(1.0)
        weights = [m.weight for n, m in network.network.named_modules() if n in zeros.masks]
        total = sum(weight.numel() for weight in weights)
        assert sum(int((weight == 0).sum()) for weight in weights) / total == pytest.approx(zeros.share)


def found(*others: Measured) -> Found:
    return Found([candidate("parent"), *others])


class TestDecision:
    def test_the_fastest_that_fits(self) -> None:
        among = found(
            candidate("int8", drop=0.5, size=3, latency=2), candidate("pruned", drop=3, size=1, latency=1)
        )
        decided = decide(among, BudgetConfig(drop=1.0))
        assert (decided.kind, decided.chosen and decided.chosen.made.method) == ("chosen", "int8")
        assert "2.0 times as fast" in decided.reason
        assert decided.candidates[1].rejected_because == ("loses 3.00 points, 2.00 too many",)

    def test_of_equally_fast_ones_the_smaller(self) -> None:
        among = found(candidate("large", size=5, latency=2), candidate("small", size=3, latency=2))
        decided = decide(among, BudgetConfig())
        assert decided.chosen is not None
        assert decided.chosen.made.method == "small"

    def test_what_is_not_faster_here_is_not_chosen(self) -> None:
        slow = candidate("int8", size=3, latency=5)
        decided = decide(found(slow), BudgetConfig(size=20_000_000))
        assert decided.kind == "keep-parent"
        assert "no faster here" in decided.candidates[0].rejected_because[0]

    def test_which_limit_binds_and_by_how_much(self) -> None:
        among = found(
            candidate("int8", drop=0.5, size=3, latency=2), candidate("pruned", drop=3, size=1, latency=1)
        )
        decided = decide(among, BudgetConfig(drop=1.0, size=2_000_000))
        assert (decided.kind, decided.chosen) == ("nothing-fits", None)
        assert "size binds: int8 keeps to everything else with 3.00 MB, 1.00 too many" in decided.reason
        assert "drop binds: pruned keeps to everything else with 3.00 points, 2.00 too many" in decided.reason

    def test_where_more_than_one_limit_is_out_of_reach(self) -> None:
        decided = decide(
            found(candidate("int8", drop=5, latency=2)), BudgetConfig(drop=1, size=1, latency=0.1)
        )
        assert decided.reason.startswith(
            "no candidate keeps to all limits but one; size 1e-06 MB: the best is"
        )
        assert "latency 0.1 ms: the best is 2.00" in decided.reason
        assert "drop" not in decided.reason  # the bundle as it is loses nothing

    def test_a_class_counts_too(self) -> None:
        one = candidate("int8", worst=8.0, latency=2)
        parent = candidate("parent").candidate
        (reason,) = rejections(one.candidate, parent, BudgetConfig(class_drop=5))
        assert reason == "shirt loses 8.0 points, 3.0 too many"

    def test_exactly_as_much_as_is_allowed_is_allowed(self) -> None:
        """One of twenty images: 100 * (1.0 - 0.95) is a little more than 5."""
        one = candidate("int8", worst=100 * (1.0 - 0.95), latency=2)
        assert not rejections(one.candidate, candidate("parent").candidate, BudgetConfig(class_drop=5))


class TestJudging:
    def test_no_flip_on_a_few_images_is_no_proof(self, dataset: Dataset) -> None:
        panel = open_panel(dataset, tuple(dataset.classes))
        logits = np.eye(len(panel.classes), dtype=np.float32)[panel.labels]
        drop = compare(logits, logits.copy(), panel).drop
        # Of n images none was lost: at most 1 - 0.025 ** (1 / n) of all are.
        most = 100 * (1 - 0.025 ** (1 / len(panel)))
        assert (drop.value, drop.high, drop.low) == pytest.approx((0.0, most, -most))

    def test_flips_and_classes_are_named(self, dataset: Dataset) -> None:
        panel = open_panel(dataset, tuple(dataset.classes))
        right = np.eye(len(panel.classes), dtype=np.float32)[panel.labels]
        wrong = right.copy()
        wrong[0] = np.roll(wrong[0], 1)
        verdict = compare(right, wrong, panel)
        assert verdict.drop.value == pytest.approx(100 / len(panel))
        assert verdict.drop.low <= verdict.drop.value <= verdict.drop.high
        (flip,) = verdict.flips
        assert flip.path == dataset.paths(panel.rows)[0]
        assert verdict.worst.name == flip.label
        assert verdict.worst.flipped == (flip.path,)


@pytest.fixture(scope="module")
def outcome(tuned: TrainResult, tmp_path_factory: pytest.TempPathFactory) -> Compressed:
    config = resolve_config(
        CompressConfig,
        overrides={
            "budget": {"drop": 10.0},
            "methods": ["bf16", "int8", "mixed"],
            "int8": {"images": 32},
            "rounds": 3,
        },
    )
    return compress(tuned.folder, out=tmp_path_factory.mktemp("out") / "small", config=config)


class TestCompress:
    def test_the_chosen_bundle_answers(self, outcome: Compressed, tuned: TrainResult, digits: Path) -> None:
        assert outcome.decision == "chosen"
        assert outcome.chosen is not None
        photo = next((digits / "test").glob("*/*.png"))
        assert load(outcome.chosen.bundle).predict(photo).label == load(tuned.best).predict(photo).label
        bundle = open_bundle(outcome.chosen.bundle)
        assert bundle.manifest.compression["method"] == outcome.chosen.method
        assert bundle.manifest.lineage.parent == tuned.bundle.hash

    def test_every_candidate_is_a_bundle_of_its_own(self, outcome: Compressed) -> None:
        methods = [row.method for row in outcome.candidates]
        assert methods[:3] == ["openvino", "bf16", "int8"]
        for row in outcome.candidates:
            assert open_bundle(row.bundle).manifest.lineage.parent
            assert row.latency_ms > 0
        assert outcome.not_tried.keys() == {"mixed"}

    def test_the_calibration_is_the_one_that_changes_answers_least(self, outcome: Compressed) -> None:
        told = next(row.settings for row in outcome.candidates if row.method == "int8")
        assert set(told["compared"]) == set(CALIBRATIONS)
        assert all({"accuracy", "agreement", "shift"} == set(one) for one in told["compared"].values())
        assert told["calibration"] == min(told["compared"], key=lambda name: told["compared"][name]["shift"])
        assert told["opset"] == 20

    def test_the_page_and_the_figures_are_there(self, outcome: Compressed) -> None:
        assert outcome.chosen is not None
        folder = Path(outcome.chosen.bundle).parent
        page = (folder / "compress.html").read_text()
        assert outcome.reason[1:] in page
        assert (folder / "pareto.png").read_bytes().startswith(b"\x89PNG")
        assert Compressed.model_validate_json((folder / "compress.json").read_text()).decision == "chosen"

    def test_the_keys_of_its_json_stay(self, outcome: Compressed) -> None:
        """Programs read them: a key that goes or changes its type is a break, a new one is none."""
        assert outcome.chosen is not None
        said = json.loads((Path(outcome.chosen.bundle).parent / "compress.json").read_text())
        assert said["decision"] == "chosen"
        assert said["schema_version"] == 1
        assert isinstance(said["reason"], str)
        for row in (said["chosen"], said["parent"], said["best_float"], *said["candidates"]):
            assert isinstance(row["bundle"], str)
            assert isinstance(row["method"], str)
            assert isinstance(row["bytes"], int)
            assert 0 < row["accuracy"] <= 1
            assert row["latency_ms"] > 0
            assert row["throughput"] > 0
            assert row["runtime"] in ("onnxruntime", "openvino")
            assert row["precision"] in ("fp32", "bf16")
        assert said["parent"]["runtime"] == "onnxruntime"
        for row in said["candidates"]:
            taken = row["method"] == said["chosen"]["method"]
            assert bool(row["rejected_because"]) is not taken
        assert 0 <= said["test"]["low"] <= said["test"]["accuracy"] <= said["test"]["high"] <= 1

    def test_every_candidate_is_served_as_it_was_judged(self, outcome: Compressed) -> None:
        for row in outcome.candidates:
            bundle = open_bundle(row.bundle)
            judged_in = {"runtime": row.runtime, "precision": row.precision}
            assert bundle.manifest.compression["judged_in"] == judged_in
            golden = read_golden(bundle)
            runtime = open_runtime(bundle, name=row.runtime, precision=row.precision)
            np.testing.assert_allclose(runtime.run(golden.images).logits, golden.logits, atol=1e-5)
        assert outcome.chosen is not None
        known = choose(open_bundle(outcome.chosen.bundle))
        assert (known.runtime, known.precision) == (outcome.chosen.runtime, outcome.chosen.precision)

    def test_the_test_split_is_read_for_what_was_chosen(self, outcome: Compressed, dataset: Dataset) -> None:
        assert outcome.test is not None
        assert outcome.test.images == len(dataset.rows("test"))
        assert outcome.test.low <= outcome.test.accuracy <= outcome.test.high

    def test_a_search_that_ended_is_not_written_over(self, outcome: Compressed, tuned: TrainResult) -> None:
        assert outcome.chosen is not None
        with pytest.raises(ConfigError, match="a search has ended here"):
            compress(tuned.folder, out=Path(outcome.chosen.bundle).parent)

    def test_a_compressed_bundle_is_not_compressed_again(self, outcome: Compressed, tmp_path: Path) -> None:
        int8 = next(row for row in outcome.candidates if row.method == "int8")
        with pytest.raises(BundleError, match="no float ONNX model"):
            compress(int8.bundle, out=tmp_path / "again")

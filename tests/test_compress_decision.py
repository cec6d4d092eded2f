"""What is chosen, why, and on which timings: the walk, the race that decides, and what is left out."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from candidates import candidate
from holotype import TrainResult
from holotype.bundle import open_bundle, read_golden
from holotype.compress import compress
from holotype.compress import measure as measuring
from holotype.compress import search as searching
from holotype.compress.decision import decide
from holotype.compress.folder import check_folder, open_folder
from holotype.compress.judge import answers, open_panel
from holotype.compress.measure import measure, measure_parent
from holotype.compress.methods import steps
from holotype.compress.search import Found, check_methods, search, settle, walk
from holotype.compress.workshop import Made, Measured, Workshop
from holotype.config import BudgetConfig, CompressConfig, DatasetConfig, resolve_config
from holotype.dataset import Dataset, open_dataset, open_for
from holotype.errors import ConfigError, DatasetError, ModelError
from holotype.policy import fit_temperature
from holotype.runtime import Choice, load_onnx, open_runtime, remember, remembered
from holotype.timing import Latency, Setup, Timing
from tiny import tiny_model, write_tiny_bundle


@pytest.fixture(scope="module")
def slow_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle, with milliseconds of work for nothing."""
    model = tiny_model()
    graph = model.graph
    constants = {
        "often": np.array([1, 1, 1, 400], np.int64),
        "all": np.array([1, 2, 3], np.int64),
        "nothing": np.array(0, np.float32),
        "one": np.array([1], np.int64),
    }
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    graph.node[-1].output[0] = "quick"
    graph.node.extend(
        [
            helper.make_node("Tile", ["floats", "often"], ["many"]),
            helper.make_node("Sin", ["many"], ["waves"]),
            helper.make_node("ReduceMean", ["waves", "all"], ["mean"], keepdims=0),
            helper.make_node("Unsqueeze", ["mean", "one"], ["column"]),
            helper.make_node("Mul", ["column", "nothing"], ["zero"]),
            helper.make_node("Add", ["quick", "zero"], ["logits"]),
        ]
    )
    return write_tiny_bundle(tmp_path_factory.mktemp("slow") / "bundle", model=model).path


class TestOneRace:
    def test_only_what_ran_in_it_is_chosen(self, tiny_bundle: Path) -> None:
        """An old timing looks better than any that a race can give, but was of another minute."""
        among = Found(
            [
                candidate("parent", tiny_bundle, latency=1e-6),
                candidate("old", tiny_bundle, latency=2e-6),
                candidate("int8", tiny_bundle, latency=5e-7),
            ]
        )
        settle(among, BudgetConfig(), rounds=3)
        parent, old, int8 = (one.candidate for one in among.measured)
        assert parent.latency_ms > 1e-4
        assert int8.latency_ms > 1e-4
        assert old.latency_ms == 2e-6
        decided = decide(among, BudgetConfig())
        assert decided.chosen is not None
        assert decided.chosen.made.method in ("int8", "parent")
        (reason,) = decided.candidates[0].rejected_because
        assert "no faster here than the parent's" in reason

    def test_what_is_faster_in_it_is_chosen(self, tiny_bundle: Path, slow_bundle: Path) -> None:
        among = Found(
            [candidate("parent", slow_bundle, latency=9.0), candidate("int8", tiny_bundle, latency=8.9)]
        )
        settle(among, BudgetConfig(), rounds=3)
        decided = decide(among, BudgetConfig())
        assert decided.kind == "chosen"
        assert "times as fast as the parent" in decided.reason


def fails(error: Exception) -> Callable[..., Iterator[Made]]:
    def method(shop: Workshop, before: Sequence[Measured]) -> Iterator[Made]:
        raise error
        yield

    return method


def walked(
    found: Found, config: CompressConfig, methods: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """Walk over `methods` without a workshop; returns what was kept of `done` each time."""
    monkeypatch.setattr(searching, "steps", lambda _: iter(methods.items()))
    kept: list[str] = []
    walk(SimpleNamespace(config=config), found, keep=lambda one: kept.append(",".join(one.done)))  # type: ignore[arg-type]
    return kept


class TestEnough:
    def test_it_goes_on_where_the_race_that_decides_says_no(
        self, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """At first int8 seems to be below a limit that nothing keeps to."""
        budget = BudgetConfig(latency=1e-5)
        config = CompressConfig(budget=budget, rounds=3)
        among = Found(
            [candidate("parent", tiny_bundle, latency=1.0), candidate("int8", tiny_bundle, latency=5e-6)],
            done=["int8"],
        )
        methods = {
            "int8": None,
            "qat": fails(ModelError("has no weights")),
            "student": fails(ModelError("no")),
        }
        walked(among, config, methods, monkeypatch)
        assert among.done == ["int8", "qat", "student"]
        assert among.not_tried == {"qat": "has no weights", "student": "no"}
        decided = decide(among, budget)
        assert decided.kind == "nothing-fits"
        assert decided.candidates[0].rejected_because

    def test_it_stops_where_the_race_says_yes(
        self, tiny_bundle: Path, slow_bundle: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = CompressConfig(rounds=3)
        among = Found(
            [candidate("parent", slow_bundle, latency=1.0), candidate("int8", tiny_bundle, latency=0.9)],
            done=["int8"],
        )
        walked(among, config, {"int8": None, "qat": fails(ModelError("never asked"))}, monkeypatch)
        assert among.done == ["int8"]
        assert among.not_tried == {"qat": "int8 fits the budget (--set search=all tries it)"}

    def test_what_is_nearly_fast_enough_is_timed_again_before_anything_is_trained(
        self, tiny_bundle: Path, slow_bundle: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It was timed in a slow minute, just above a limit that it keeps to by far."""
        budget = BudgetConfig(latency=1000.0)
        config = CompressConfig(budget=budget, rounds=3)
        among = Found(
            [
                candidate("parent", slow_bundle, latency=2000.0),
                candidate("int8", tiny_bundle, latency=1100.0),
            ],
            done=["int8"],
        )
        methods = {"int8": None, "qat": fails(ModelError("never asked"))}
        kept = walked(among, config, methods, monkeypatch)
        assert kept == ["int8", "int8"]
        assert among.not_tried == {"qat": "int8 fits the budget (--set search=all tries it)"}
        chosen = decide(among, budget).chosen
        assert chosen is not None
        assert chosen.made.method == "int8"

    @pytest.mark.parametrize("far", [{"latency": 1600.0}, {"latency": 1100.0, "drop": 3.0}])
    def test_what_is_far_from_it_is_not(
        self, tiny_bundle: Path, slow_bundle: Path, monkeypatch: pytest.MonkeyPatch, far: dict[str, float]
    ) -> None:
        budget = BudgetConfig(latency=1000.0, drop=1.0)
        among = Found(
            [candidate("parent", slow_bundle, latency=2000.0), candidate("int8", tiny_bundle, **far)],
            done=["int8"],
        )
        methods = {"int8": None, "qat": fails(ModelError("no"))}
        walked(among, CompressConfig(budget=budget, rounds=3), methods, monkeypatch)
        assert among.not_tried == {"qat": "no"}
        assert among.measured[1].candidate.latency_ms == far["latency"]
        assert among.measured[1].candidate.rejected_because

    @pytest.mark.parametrize(
        "error",
        [
            ModelError("this network cannot"),
            ConfigError("this device cannot"),
            DatasetError("these images cannot"),
            RuntimeError("this library\n cannot"),
        ],
    )
    def test_a_method_that_fails_is_left_out_with_its_reason(
        self, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        among = Found([candidate("parent", tiny_bundle, latency=1.0)])
        methods = {"qat": fails(error), "student": fails(ModelError("no"))}
        walked(among, CompressConfig(rounds=3), methods, monkeypatch)
        assert " ".join(among.not_tried["qat"].split()) == among.not_tried["qat"]
        assert "cannot" in among.not_tried["qat"]
        assert "student" in among.not_tried
        decided = decide(among, BudgetConfig())
        assert decided.kind == "keep-parent"
        assert decided.reason == "no candidate could be made, and the bundle as it is fits the budget"


class TestReasons:
    def test_what_fits_but_is_slower_is_what_is_said(self) -> None:
        among = Found([candidate("parent", latency=4.0, size=16), candidate("int8", latency=5.0, size=4)])
        decided = decide(among, BudgetConfig(drop=1.0, size=5_000_000))
        assert decided.kind == "nothing-fits"
        assert decided.reason == (
            "int8 keeps to every limit with 4.00 MB, but 5.00 ms, no faster here than the parent's 4.00"
        )

    def test_beside_it_what_is_faster_but_too_large(self) -> None:
        among = Found(
            [
                candidate("parent", latency=4.0, size=16),
                candidate("int8", latency=5.0, size=4),
                candidate("bf16", latency=3.0, size=8),
            ]
        )
        reason = decide(among, BudgetConfig(size=5_000_000)).reason
        assert reason.startswith("int8 keeps to every limit with 4.00 MB, but 5.00 ms, no faster here")
        assert "size binds: bf16 keeps to everything else with 8.00 MB, 3.00 too many" in reason
        assert "parent keeps" not in reason

    def test_where_nothing_was_made_the_bundle_itself_is_what_is_near(self) -> None:
        decided = decide(Found([candidate("parent", latency=4.0, size=16)]), BudgetConfig(size=5_000_000))
        assert decided.reason == "size binds: parent keeps to everything else with 16.00 MB, 11.00 too many"


# --------------------------------------------------------------------------- on a real run, with real models


@pytest.fixture(scope="module")
def dataset(tuned: TrainResult) -> Dataset:
    spec = tuned.bundle.manifest.preprocess
    source = Path(tuned.report.dataset.path)
    return open_dataset(source, spec=spec, config=DatasetConfig())


def opened_shop(result: TrainResult, dataset: Dataset, folder: Path, **settings: Any) -> Workshop:
    changes = {"rounds": 3, "int8": {"images": 32, "calibration": "min-max"}, **settings}
    config = resolve_config(CompressConfig, overrides=changes)
    panel = open_panel(dataset, result.bundle.manifest.classes)
    before = answers(load_onnx(result.best / "model.onnx", threads=2), panel)
    return Workshop(result.bundle, panel, before, config, folder, "cpu")


@pytest.fixture(scope="module")
def rounded(tuned: TrainResult, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Made:
    shop = opened_shop(tuned, dataset, tmp_path_factory.mktemp("rounded"))
    (made,) = dict(steps(shop.config))["int8"](shop, [])
    return made


class TestMeasure:
    @pytest.mark.parametrize("fastest", [("onnxruntime", "fp32"), ("openvino", "bf16")], ids=" ".join)
    def test_a_candidate_is_judged_in_the_way_that_serves_it(
        self,
        tuned: TrainResult,
        dataset: Dataset,
        rounded: Made,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        fastest: tuple[Any, Any],
    ) -> None:
        shop = opened_shop(tuned, dataset, tmp_path)

        def timed(setups: Sequence[Setup], **_: object) -> list[Timing]:
            """As if this one were the fastest here."""
            calls = [0.5 if (setup.runtime, setup.precision) == fastest else 1.0 for setup in setups]
            return [
                Timing(setup, {n: Latency(n * ms, ms, ms, 1, 1e3 / ms) for n in (1, 8)}, None, 0.0, 1.0)
                for setup, ms in zip(setups, calls, strict=True)
            ]

        monkeypatch.setattr(measuring, "race", timed)
        parent = measure_parent(shop)
        assert (parent.candidate.runtime, parent.candidate.precision) == ("onnxruntime", "fp32")
        found = measure(rounded, shop, parent=parent.candidate, started=0.0)
        assert (found.candidate.runtime, found.candidate.precision) == fastest
        bundle = open_bundle(found.candidate.bundle)
        assert bundle.hash == found.bundle.hash
        assert bundle.manifest.compression["judged_in"] == {"runtime": fastest[0], "precision": fastest[1]}

        runtime = open_runtime(bundle, name=fastest[0], precision=fastest[1])
        golden = read_golden(bundle)
        np.testing.assert_allclose(golden.logits, runtime.run(golden.images).logits, atol=1e-5)
        logits = answers(runtime, shop.panel)
        np.testing.assert_allclose(found.logits, logits, atol=1e-5)
        assert found.candidate.accuracy == float((logits.argmax(axis=1) == shop.panel.labels).mean())
        temperature = bundle.manifest.policy.temperature
        assert temperature == pytest.approx(fit_temperature(logits, shop.panel.labels), rel=1e-3)
        assert temperature != tuned.bundle.manifest.policy.temperature
        assert set(found.candidate.class_drops) == set(shop.panel.classes)
        assert max(found.candidate.class_drops.values()) == found.candidate.class_drop

    def test_what_keeps_its_answers_nowhere_is_left_out_unmeasured(
        self, tuned: TrainResult, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shop = opened_shop(tuned, dataset, tmp_path)
        broken = onnx.load(shop.original)
        bias = next(
            tensor
            for tensor in broken.graph.initializer
            if tensor.data_type == TensorProto.FLOAT and list(tensor.dims) == [len(dataset.classes)]
        )
        bias.CopyFrom(numpy_helper.from_array(np.full(len(dataset.classes), np.nan, np.float32), bias.name))
        shop.scratch("broken").mkdir()
        onnx.save(broken, shop.scratch("broken") / "model.onnx")

        def method(shop: Workshop, before: Sequence[Measured]) -> Iterator[Made]:
            yield Made("broken", {}, {"onnx": shop.scratch("broken") / "model.onnx"}, "int8")
            yield Made("of-it", {}, {"onnx": shop.original}, "int8", parent=before[-1])
            yield Made("sound", {}, {"onnx": shop.original}, "fp32")

        monkeypatch.setattr(searching, "steps", lambda _: iter({"broken": method}.items()))
        found = Found()
        search(shop, found, keep=lambda _: None)
        assert [one.made.method for one in found.measured] == ["parent", "sound"]
        assert found.not_tried.keys() == {"broken", "of-it"}
        assert "cannot be used in any runtime here" in found.not_tried["broken"]
        assert "golden outputs differ by nan" in found.not_tried["broken"]
        assert found.not_tried["of-it"] == "it is made of broken, which was left out"


class TestWithoutOpenVino:
    def test_the_default_methods_go_on_without(
        self, tuned: TrainResult, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "openvino", None)
        shop = opened_shop(tuned, dataset, tmp_path)
        check_methods(shop.source, shop.config)
        some = list(steps(shop.config))[:2]
        monkeypatch.setattr(searching, "steps", lambda _: iter(some))
        found = Found()
        search(shop, found, keep=lambda _: None)
        assert [one.made.method for one in found.measured] == ["parent", "int8"]
        assert "pip install 'holotype[openvino]'" in found.not_tried["bf16"]
        assert found.measured[1].candidate.runtime == "onnxruntime"

    def test_what_was_asked_for_by_name_is_an_error_before_anything(
        self, tuned: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "openvino", None)
        config = resolve_config(CompressConfig, overrides={"methods": ["int8", "bf16"]})
        with pytest.raises(ConfigError, match=r"bf16 cannot be tried: .*'openvino'; run: pip install"):
            compress(tuned.folder, out=tmp_path / "out", config=config)
        assert not (tmp_path / "out").exists()

    def test_weights_that_are_not_there_too(self, tiny_bundle: Path, tmp_path: Path) -> None:
        config = resolve_config(CompressConfig, overrides={"methods": ["int8", "qat"]})
        with pytest.raises(ConfigError, match="qat cannot be tried: has no torch weights to train"):
            compress(tiny_bundle, tmp_path, out=tmp_path / "out", config=config)
        assert not (tmp_path / "out").exists()


class TestFolder:
    def test_stopped_before_anything_was_measured_it_goes_on(
        self, tuned: TrainResult, tmp_path: Path, digits: Path
    ) -> None:
        dataset, config = open_for(tuned.bundle, digits, config=DatasetConfig()), CompressConfig()
        open_folder(tmp_path / "out", tuned.bundle, dataset, config)
        check_folder(tmp_path / "out")
        assert open_folder(tmp_path / "out", tuned.bundle, dataset, config).read().measured == []

    def test_a_search_does_not_go_on_with_other_images(
        self, tuned: TrainResult, digits: Path, tmp_path: Path
    ) -> None:
        data, config = tmp_path / "digits", CompressConfig()
        shutil.copytree(digits, data)
        spec = tuned.bundle.manifest.preprocess
        settings = DatasetConfig()
        first = open_dataset(data, spec=spec, config=settings)
        open_folder(tmp_path / "out", tuned.bundle, first, config).keep(Found())
        assert open_folder(tmp_path / "out", tuned.bundle, first, config).read().measured == []
        next((data / "validation").glob("*/*.png")).unlink()
        other = open_dataset(data, spec=spec, config=settings)
        with pytest.raises(ConfigError, match="another search was begun here: other bundle, images"):
            open_folder(tmp_path / "out", tuned.bundle, other, config)


class TestKeptParent:
    @pytest.fixture(autouse=True)
    def _nothing_to_try(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(searching, "steps", lambda _: iter(()))
        monkeypatch.setenv("HOLOTYPE_CACHE", str(tmp_path / "cache"))

    def test_what_was_measured_of_it_stays(self, tuned: TrainResult, tmp_path: Path) -> None:
        remember(tuned.bundle, Choice("openvino", "fp32", 1))
        outcome = compress(tuned.folder, out=tmp_path / "out", config=CompressConfig(rounds=3))
        assert outcome.decision == "keep-parent"
        assert remembered(tuned.bundle) == Choice("openvino", "fp32", 1)
        page = (tmp_path / "out" / "compress.html").read_text()
        assert "The bundle stays as it is" in page

    def test_what_nobody_measured_is_measured_in_every_way(
        self, tuned: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[str] = []
        original = sys.modules["holotype.timing"].race

        def raced(setups: Sequence[Setup], **settings: Any) -> list[Timing]:
            asked.extend(setup.runtime for setup in setups)
            return original(setups, **settings)

        monkeypatch.setattr(sys.modules["holotype.timing"], "race", raced)
        compress(tuned.folder, out=tmp_path / "out", config=CompressConfig(rounds=3))
        assert asked == ["onnxruntime", "openvino"]
        assert remembered(tuned.bundle) is not None

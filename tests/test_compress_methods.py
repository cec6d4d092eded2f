"""What single methods of compression promise, on a real run: proof, steps, another network as a student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from holotype import TrainResult, load
from holotype.bundle import open_bundle
from holotype.compress import compress
from holotype.compress.contract import Compressed
from holotype.config import CompressConfig, resolve_config
from holotype.models import open_network

pytestmark = pytest.mark.slow

QUICK: dict[str, Any] = {
    "search": "all",
    "rounds": 3,
    "budget": {"drop": 100.0},
    "int8": {"images": 32, "calibration": "min-max"},
}


def search(tuned: TrainResult, out: Path, **settings: Any) -> Compressed:
    return compress(
        tuned.folder, out=out, config=resolve_config(CompressConfig, overrides={**QUICK, **settings})
    )


def one(outcome: Compressed, method: str) -> Any:
    return next(row for row in outcome.candidates if row.method == method)


class TestMethods:
    def test_the_trained_graph_is_the_file(self, tuned: TrainResult, tmp_path: Path) -> None:
        outcome = search(tuned, tmp_path / "out", methods=["int8", "qat"], qat={"epochs": 1})
        proof = one(outcome, "qat").settings["parity"]
        assert proof["images"] == 96
        assert proof["agreement"] >= 0.995 or proof["agreement"] == pytest.approx(95 / 96)
        assert 0 <= proof["shift"] < 0.2
        assert open_bundle(one(outcome, "qat").bundle).manifest.compression["parity"] == proof

    def test_channels_go_in_several_steps(self, tuned: TrainResult, tmp_path: Path, digits: Path) -> None:
        settings = {"sparsities": [0.4], "steps": 2, "epochs": 1, "round_to": 8}
        outcome = search(tuned, tmp_path / "out", methods=["structured"], structured=settings)
        pruned = one(outcome, "pruned-40")
        assert pruned.settings["steps"] == 2
        # One of the two steps would leave 0.61 of it.
        assert pruned.bytes < 0.5 * outcome.parent.bytes
        kept = open_network(*open_bundle(pruned.bundle).network_files(fix="")).architecture.widths
        assert kept
        photo = next((digits / "test").glob("*/*.png"))
        for row in outcome.candidates:
            assert load(row.bundle).predict(photo).label in ("0", "1", "2")

    def test_a_student_may_be_another_network(self, tuned: TrainResult, tmp_path: Path, digits: Path) -> None:
        settings = {"name": "test_efficientnet", "weights": "none", "size": 32, "epochs": 1}
        outcome = search(tuned, tmp_path / "out", methods=["student"], student=settings)
        student = one(outcome, "student")
        assert student.settings["name"] == "test_efficientnet"
        assert student.bytes < 0.2 * outcome.parent.bytes
        bundle = open_bundle(student.bundle)
        assert bundle.manifest.preprocess.height == 32
        assert open_network(*bundle.network_files(fix="")).architecture.name == "test_efficientnet"
        # From random weights, what batch norm knows of its images is learned, not left as it begins.
        state = open_network(*bundle.network_files(fix="")).state_dict()
        assert any(bool((value != 0).any()) for name, value in state.items() if name.endswith("running_mean"))
        assert one(outcome, "student-int8").bytes < student.bytes
        assert load(student.bundle).predict(next((digits / "test").glob("*/*.png"))).label

    def test_where_its_own_network_is_too_large_a_student_has_to_be_named(
        self, tuned: TrainResult, tmp_path: Path
    ) -> None:
        outcome = search(
            tuned,
            tmp_path / "out",
            methods=["int8", "student"],
            search="enough",
            budget={"drop": 100.0, "size": 1_000_000},
        )
        assert outcome.decision == "nothing-fits"
        assert [row.method for row in outcome.candidates] == ["int8"]
        assert "student.name" in outcome.not_tried["student"]

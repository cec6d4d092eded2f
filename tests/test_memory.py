from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from holotype.config import FitConfig
from holotype.dataset import Shape
from holotype.errors import TrainingError
from holotype.fit.memory import (
    _cgroup_rooms,
    _halvings,
    _largest_by_trial,
    available_memory,
    naming_memory,
    out_of_memory,
    settle_micro_batch,
)
from holotype.models import Classifier
from networks import small_network

CPU = torch.device("cpu")
SIZE = Shape(128, 128)
CONFIG = FitConfig(unfreeze="all", freeze_norm=True, precision="fp32", epochs=1)


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return small_network("tf_efficientnet_lite0", side=SIZE.height)


def asking(**settings: object) -> FitConfig:
    return FitConfig.model_validate({**CONFIG.model_dump(), **settings})


def test_a_number_is_taken_as_it_is_up_to_the_images_of_a_step(
    classifier: Classifier, capsys: pytest.CaptureFixture[str]
) -> None:
    config = asking(micro_batch=8, batch_size=32)
    assert settle_micro_batch(classifier, config, size=SIZE, device=CPU) == 8
    assert not capsys.readouterr().err
    assert settle_micro_batch(classifier, config, size=SIZE, device=CPU, processes=8) == 4
    assert "fit.micro_batch=8" in capsys.readouterr().err


def test_ample_memory_takes_all_at_once_and_starts_no_process(
    classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    before = torch.get_rng_state()
    for processes, share in ((1, 32), (3, 11)):
        found = settle_micro_batch(
            classifier, CONFIG, size=SIZE, device=CPU, processes=processes, available=10**13
        )
        assert found == share
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in classifier.parameters())


STEPS = """
import json, sys
import psutil, torch
from holotype.config import FitConfig
from holotype.dataset import Shape
from holotype.fit.memory import _peak
from holotype.fit.optimizer import build_optimizer
from holotype.fit.rehearsal import example, rehearsal, step
from holotype.models import Architecture, create

task = json.load(sys.stdin)
config, cpu = FitConfig(**task["config"]), torch.device("cpu")
with rehearsal(create(Architecture(**task["architecture"])), config, device=cpu) as model:
    optimizer = build_optimizer(model, config)
    base = psutil.Process().memory_info().rss
    for count in task["counts"]:
        for _ in range(2):
            step(model, example(count, size=Shape(*task["size"]), device=cpu), precision="fp32")
            optimizer.step()
        print(_peak() - base)
"""


@pytest.mark.slow
def test_tight_memory_cuts_a_step_into_parts_that_really_fit(
    classifier: Classifier, capsys: pytest.CaptureFixture[str]
) -> None:
    available = 450_000_000
    count = settle_micro_batch(classifier, CONFIG, size=SIZE, device=CPU, available=available)
    assert count in (4, 8, 16)
    assert f"{count} images at once instead of 32" in capsys.readouterr().err
    task = {
        "architecture": classifier.architecture.model_dump(),
        "config": CONFIG.model_dump(),
        "size": [SIZE.height, SIZE.width],
        "counts": [count, 32],
    }
    command = [sys.executable, "-c", STEPS]
    done = subprocess.run(command, input=json.dumps(task), capture_output=True, text=True, check=True)
    chosen, whole = map(int, done.stdout.split())
    assert available / 8 < chosen < available < 1.1 * whole


def test_no_room_for_one_image_is_a_clear_error(classifier: Classifier) -> None:
    with pytest.raises(TrainingError, match=r"one image of 128x128 pixels does not fit .*; lower data\.size"):
        settle_micro_batch(classifier, CONFIG, size=SIZE, device=CPU, available=20_000_000)


def test_a_measurement_that_fails_says_why(classifier: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = classifier.architecture.model_copy(update={"name": "nonsense"})
    monkeypatch.setattr(classifier, "architecture", unknown)
    with pytest.raises(TrainingError, match=r"could not be measured \(.*nonsense: unknown architecture"):
        settle_micro_batch(classifier, CONFIG, size=SIZE, device=CPU, available=450_000_000)


@pytest.mark.parametrize("share", [1, 2, 7, 32, 33])
def test_halvings_end_at_one_image(share: int) -> None:
    counts = _halvings(share)
    assert counts[0] == share
    assert counts[-1] == 1
    assert all(-(-large // 2) == small for large, small in pairwise(counts))


def test_sizes_are_tried_until_a_step_raises_no_error(classifier: Classifier) -> None:
    assert _largest_by_trial(classifier, CONFIG, 2, size=Shape(64, 64), device=CPU) == 2
    with pytest.raises(TrainingError, match="does not fit into the memory of the GPU"):
        _largest_by_trial(classifier, CONFIG, 4, size=Shape(10**6, 10**6), device=CPU)


def write_group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_limits_of_control_groups_and_of_those_around_them_count(tmp_path: Path) -> None:
    own, mount = tmp_path / "own", tmp_path / "cgroup"
    own.write_text("0::/user/run\n")
    assert list(_cgroup_rooms(own, mount=mount)) == []
    write_group(mount)
    write_group(
        mount / "user", memory__max=1000, memory__current=900, memory__stat="anon 5\ninactive_file 200"
    )
    write_group(mount / "user/run", memory__max="max", memory__current=700, memory__stat="anon 5")
    assert list(_cgroup_rooms(own, mount=mount)) == [300]
    write_group(mount / "user/run", memory__max=650)
    assert list(_cgroup_rooms(own, mount=mount)) == [0, 300]


def test_control_groups_of_version_1_count_in_a_container_too(tmp_path: Path) -> None:
    own, mount = tmp_path / "own", tmp_path / "cgroup"
    own.write_text("12:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/system\n")
    write_group(
        mount / "memory",  # the container sees its own group as the root
        memory__limit_in_bytes=5000,
        memory__usage_in_bytes=3000,
        memory__stat="inactive_file 1\ntotal_inactive_file 400",
    )
    assert list(_cgroup_rooms(own, mount=mount)) == [2400]
    assert list(_cgroup_rooms(tmp_path / "none", mount=mount)) == []


def test_this_machine_has_memory() -> None:
    assert 0 < available_memory() <= psutil.virtual_memory().total


def test_errors_for_lack_of_memory_are_known_from_others() -> None:
    for attempt in (
        lambda: torch.empty(2**55, dtype=torch.uint8),
        lambda: np.empty(2**55, dtype=np.uint8),
        lambda: bytearray(2**60),
    ):
        with pytest.raises(TrainingError) as caught, naming_memory(micro_batch=16):
            attempt()
        line = "fit.micro_batch: out of memory with 16 images at once; try --set fit.micro_batch=8"
        assert str(caught.value) == line
    with pytest.raises(TrainingError, match=r"lower data\.size"), naming_memory(micro_batch=1):
        torch.empty(2**55, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="shapes"), naming_memory(micro_batch=16):
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert not out_of_memory(ValueError("out of memory"))

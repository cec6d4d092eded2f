"""Two processes on this machine that train one model, as torchrun starts them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from digits import write_digits
from holotype.runlog import read_rows

# 72 training images in batches of 15, 27 for validation: uneven shares of both.
SETTINGS = (
    "data.size=64",
    "augment.flip=0",
    "fit.epochs=2",
    "fit.batch_size=15",
    "fit.deterministic=true",
    "model.dropout=0.2",
    "fit.checkpoint_seconds=0.2",
)
TOLERANCE = 2e-3
"""Largest difference of a weight, as a share of its tensor's largest: sums are added in another order."""


def command(
    *arguments: str, processes: int, settings: tuple[str, ...] = (), accelerate: bool = False
) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    if accelerate:
        # Its way to several processes, on CPUs too; with --cpu it starts one, or needs MPI.
        launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
        launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    run = [*(launcher if processes > 1 else []), "-m", "holotype", "train", *arguments]
    return [sys.executable, *run, *(f"--set={setting}" for setting in settings)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("distributed") / "digits", validation=9)


@pytest.mark.slow
def test_two_processes_train_the_model_of_one(data: Path, tmp_path: Path) -> None:
    for processes in (1, 2):
        arguments = (str(data), "--name", f"of-{processes}", "--runs", str(tmp_path), "--json")
        result = subprocess.run(
            command(*arguments, processes=processes, settings=SETTINGS),
            capture_output=True, text=True, env=environment(), timeout=300, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert result.stdout.count('"bundle"') == 2, "one result: its own bundle and the report's"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["of-1", "of-2"]
    one, two = (load_file(tmp_path / f"of-{n}" / "best" / "weights.safetensors") for n in (1, 2))
    assert one.keys() == two.keys()
    for name, value in one.items():
        scale = max(float(np.abs(value).max()), 1e-6)
        assert float(np.abs(value - two[name]).max()) <= TOLERANCE * scale, name
    alone, together = (read_rows((tmp_path / f"of-{n}" / "metrics.csv").read_text()) for n in (1, 2))
    assert [row.keys() for row in alone] == [row.keys() for row in together]
    for mine, theirs in zip(alone, together, strict=True):
        numbers = {name: value for name, value in mine.items() if name != "stage"}
        assert {name: theirs[name] for name in numbers} == pytest.approx(numbers, rel=0.02, abs=2e-3), mine


def test_an_error_of_the_first_process_is_one_line_of_each(tmp_path: Path) -> None:
    result = subprocess.run(
        command(str(tmp_path / "nowhere"), "--runs", str(tmp_path), processes=2),
        capture_output=True, text=True, env=environment(), timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode != 0
    assert "no such dataset" in result.stderr
    assert "Connection closed" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["first", "last"])
def test_a_killed_process_stops_the_other_and_the_run_resumes(
    data: Path, tmp_path: Path, victim: str
) -> None:
    run = tmp_path / "run"
    longer = (*SETTINGS, "fit.epochs=40", "fit.patience=40")
    arguments = (str(data), "--name", "run", "--runs", str(tmp_path))
    with subprocess.Popen(
        command(*arguments, processes=2, settings=longer),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    ) as launcher:  # fmt: skip
        metrics = run / "metrics.csv"
        deadline = time.monotonic() + 180
        while not (metrics.is_file() and "fine-tune" in metrics.read_text()):
            assert time.monotonic() < deadline
            assert launcher.poll() is None, launcher.communicate()
            time.sleep(0.1)
        workers = subprocess.run(
            ["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True, check=True
        ).stdout.split()
        os.kill(int(workers[0 if victim == "first" else -1]), signal.SIGKILL)
        _, err = launcher.communicate(timeout=120)
    assert launcher.returncode != 0
    assert f"holotype train --resume {run}" in err
    result = subprocess.run(
        command("--resume", str(run), processes=2, accelerate=victim == "first"),
        capture_output=True, text=True, env=environment(), timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (run / "best" / "holotype.json").is_file()

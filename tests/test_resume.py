"""Runs that are killed, interrupted or hit by faults, through the command line."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from digits import write_digits
from holotype import load
from holotype.bundle import open_bundle
from holotype.locks import lone

SETTINGS = (
    "data.size=64",
    "augment.flip=0",
    "fit.epochs=6",
    "fit.patience=6",
    "fit.deterministic=true",
    "fit.batch_size=16",
    "model.dropout=0.2",
    "augment.cutmix=1.0",
    "fit.checkpoint_seconds=0.2",
    "monitor.every=2",
)


def start(*arguments: str, settings: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "holotype", "train", *arguments, *(f"--set={s}" for s in settings)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )


def finish(process: subprocess.Popen[str], *, code: int = 0) -> str:
    _, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    return err


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def tuned(run: Path) -> bool:
    """Whether an epoch of fine-tuning has been judged."""
    metrics = run / "metrics.csv"
    return metrics.is_file() and "fine-tune" in metrics.read_text()


def outcome(run: Path) -> tuple[str, bytes, bytes]:
    """What must be the same however often a run was interrupted."""
    weights = open_bundle(run).manifest.payloads["weights"].sha256
    return weights, (run / "metrics.csv").read_bytes(), (run / "steps.csv").read_bytes()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("resume") / "digits")


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupted."""
    runs = tmp_path_factory.mktemp("whole")
    finish(start(str(data), "--name", "run", "--runs", str(runs), settings=SETTINGS))
    return runs / "run"


def killed_often(data: Path, runs: Path, *, kills: int, seed: int) -> Path:
    """A run that is killed at random moments and resumed until it is through."""
    chance = random.Random(seed)
    run = runs / "run"
    process = start(str(data), "--name", "run", "--runs", str(runs), settings=SETTINGS)
    for _ in range(kills):
        wait_for((run / "last" / "run.json").is_file, process)
        try:
            process.wait(timeout=chance.uniform(0.0, 9.0))
            assert process.returncode == 0, process.communicate()
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        process = start("--resume", str(run))
    else:
        finish(process)
    return run


@pytest.mark.slow
def test_killed_and_resumed_run_ends_with_the_same_bits(data: Path, whole: Path, tmp_path: Path) -> None:
    assert outcome(killed_often(data, tmp_path, kills=3, seed=1)) == outcome(whole)


@pytest.mark.slow
def test_fifty_kills(data: Path, whole: Path, tmp_path: Path) -> None:
    seed = 0
    kills = 0
    while kills < 50:
        seed += 1
        assert outcome(killed_often(data, tmp_path / str(seed), kills=10, seed=seed)) == outcome(whole), seed
        kills += 10


@pytest.mark.slow
def test_interrupted_run_is_usable_and_resumes_to_the_same_bits(
    data: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start(str(data), "--name", "run", "--runs", str(tmp_path), settings=SETTINGS)
    wait_for(lambda: tuned(run), process)
    process.send_signal(signal.SIGINT)
    err = finish(process, code=130)
    assert f"holotype train --resume {run}" in err
    assert load(run).classes == ("0", "1", "2")
    finish(start("--resume", str(run)))
    assert outcome(run) == outcome(whole)
    assert "nothing to resume" in finish(start("--resume", str(run)), code=2)


@pytest.mark.slow
def test_damaged_checkpoint_costs_one_checkpoint(data: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(str(data), "--name", "run", "--runs", str(tmp_path), settings=SETTINGS)
    wait_for(lambda: tuned(run), process)
    process.kill()
    process.communicate()
    newest = max((run / "last").glob("*.safetensors"), key=lambda file: file.stat().st_mtime_ns)
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    # How often it is saved has no part in what it learns.
    err = finish(start("--resume", str(run), "--set", "fit.checkpoint_seconds=9"))
    assert newest.name in err
    assert outcome(run) == outcome(whole)


def test_resuming_refuses_other_data_and_other_settings(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    own = tmp_path / "digits"
    write_digits(own)
    process = start(str(own), "--name", "run", "--runs", str(tmp_path), settings=SETTINGS)
    wait_for((run / "last" / "run.json").is_file, process)
    process.kill()
    process.communicate()
    assert "keeps its settings" in finish(start("--resume", str(run), "--set", "fit.epochs=2"), code=2)
    with lone(run / "last"):
        assert "by another process" in finish(start("--resume", str(run)), code=2)
    next((own / "train" / "0").iterdir()).unlink()
    assert "have changed" in finish(start("--resume", str(run)), code=1)
    assert "cannot be resumed" not in finish(start("--resume", str(tmp_path / "none")), code=2)


def test_file_that_breaks_while_training_is_left_out(tmp_path: Path) -> None:
    data = write_digits(tmp_path / "digits")
    run = tmp_path / "run"
    fly = (*SETTINGS, "data.cache_limit_gb=0", "data.max_unreadable=0.05", "fit.epochs=4")
    process = start(str(data), "--name", "run", "--runs", str(tmp_path), settings=fly)
    wait_for((run / "last" / "run.json").is_file, process)
    broken = sorted((data / "train" / "1").iterdir())[3]
    broken.write_bytes(broken.read_bytes()[:40])
    err = finish(process)
    assert f"train/1/{broken.name} broke while training and is left out" in err
    assert json.loads((run / "report.json").read_text())["metrics"]["accuracy"]["value"] > 0.8


def test_validation_is_judged_by_no_other_image_than_its_own(tmp_path: Path) -> None:
    data = write_digits(tmp_path / "digits")
    run = tmp_path / "run"
    fly = (*SETTINGS, "data.cache_limit_gb=0", "data.max_unreadable=0.5", "fit.epochs=200")
    process = start(str(data), "--name", "run", "--runs", str(tmp_path), settings=fly)
    wait_for(lambda: tuned(run), process)
    broken = next((data / "validation" / "1").iterdir())
    broken.write_bytes(b"")
    err = finish(process, code=1)
    assert f"{broken.name}: was readable when the dataset was indexed and is no more" in err


def test_too_many_broken_files_stop_the_run(tmp_path: Path) -> None:
    data = write_digits(tmp_path / "digits")
    run = tmp_path / "run"
    fly = (*SETTINGS, "data.cache_limit_gb=0")
    process = start(str(data), "--name", "run", "--runs", str(tmp_path), settings=fly)
    wait_for((run / "last" / "run.json").is_file, process)
    for broken in (data / "train" / "1").iterdir():
        broken.write_bytes(b"")
    err = finish(process, code=1)
    assert "training images broke on the way" in err
    assert "max_unreadable" in err
    assert "Traceback" not in err

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
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from digits import write_digits
from holotype import load
from holotype.bundle import open_bundle
from holotype.config import TrainConfig, resolve_config
from holotype.errors import DatasetError
from holotype.fit import learn
from holotype.fit.folder import Run, begin_run, resume_run
from holotype.fit.run import Best
from holotype.head import Scores
from holotype.locks import lone
from holotype.models import weights_of

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


def decoders(process: subprocess.Popen[str]) -> list[int]:
    """Ids of the processes that decode for a run; not that of the tracker of their resources."""
    listed = ["pgrep", "-P", str(process.pid), "-f", "popen_loky_posix"]
    found = subprocess.run(listed, capture_output=True, text=True, check=False)
    return [int(number) for number in found.stdout.split()]


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


def killed_often(data: Path, runs: Path, *, kills: int, seed: int) -> tuple[Path, int]:
    """A run that is killed at random moments and resumed until it is through, and how often it was."""
    killed = 0
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
            killed += 1
        process = start("--resume", str(run))
    else:
        finish(process)
    return run, killed


@pytest.mark.slow
def test_killed_and_resumed_run_ends_with_the_same_bits(data: Path, whole: Path, tmp_path: Path) -> None:
    run, killed = killed_often(data, tmp_path, kills=3, seed=1)
    assert killed
    assert outcome(run) == outcome(whole)


@pytest.mark.slow
def test_five_runs_killed_at_up_to_ten_random_moments_each(data: Path, whole: Path, tmp_path: Path) -> None:
    def run(seed: int) -> int:
        folder, killed = killed_often(data, tmp_path / str(seed), kills=10, seed=seed)
        assert outcome(folder) == outcome(whole), seed
        return killed

    with ThreadPoolExecutor(2) as pool:
        # A run that is through before its ten moments have come is killed less often.
        assert sum(pool.map(run, range(1, 6))) >= 5


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


@pytest.mark.slow
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
    assert "is not a run that can be resumed" in finish(start("--resume", str(tmp_path / "none")), code=2)


@pytest.mark.slow
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
    report = json.loads((run / "report.json").read_text())
    assert report["metrics"]["accuracy"]["value"] > 0.8
    assert [file["path"] for file in report["dataset"]["unreadable"]] == [f"train/1/{broken.name}"]


@pytest.mark.slow
def test_a_run_that_left_a_file_out_resumes_after_a_kill(tmp_path: Path) -> None:
    data = write_digits(tmp_path / "digits")
    run = tmp_path / "run"
    small = (
        "model.name=test_resnet", "model.weights=none", "fit.epochs=10", "fit.patience=10",
        "fit.checkpoint_seconds=300",
    )  # fmt: skip
    fly = (*SETTINGS, "data.cache_limit_gb=0", "data.max_unreadable=0.05", *small)
    process = start(str(data), "--name", "run", "--runs", str(tmp_path), settings=fly)
    wait_for(lambda: tuned(run), process)
    broken = sorted((data / "train" / "1").iterdir())[3]
    broken.write_bytes(broken.read_bytes()[:40])
    judged = (run / "metrics.csv").read_text().count("\n")
    wait_for(lambda: (run / "metrics.csv").read_text().count("\n") >= judged + 2, process)
    process.kill()
    assert f"train/1/{broken.name} broke while training" in process.communicate()[1]
    err = finish(start("--resume", str(run)))
    assert f"train/1/{broken.name} broke since the run began and is left out" in err
    report = json.loads((run / "report.json").read_text())
    assert [file["path"] for file in report["dataset"]["unreadable"]] == [f"train/1/{broken.name}"]
    assert (run / "metrics.csv").read_text().count("fine-tune") == 10


def test_ctrl_c_before_there_is_a_model_says_how_to_go_on(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    slow = ("data.size=64", "model.weights=none", "fit.batch_size=2", "fit.precision=fp32", "fit.epochs=2")
    process = start(str(data), "--name", "run", "--runs", str(tmp_path), settings=slow)
    wait_for((run / "train_batch.jpg").is_file, process)
    process.send_signal(signal.SIGINT)
    err = finish(process, code=1)
    assert "there is no model yet" in err
    assert f"holotype train --resume {run}" in err


def test_words_for_weights_are_no_files(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "none").mkdir()
    monkeypatch.chdir(tmp_path)
    own = {"data": {"size": 32}, "model": {"name": "test_resnet", "weights": "none"}, "fit": {"epochs": 1}}
    config = resolve_config(TrainConfig, overrides=own)
    run = begin_run(data, config, name="run", runs=tmp_path, device="cpu")
    assert run.session.config.model.weights == "none"


@pytest.mark.parametrize("change", ["rewritten", "moved"])
def test_a_run_keeps_the_focus_that_it_began_with(data: Path, tmp_path: Path, change: str) -> None:
    first, second = sorted(file.relative_to(data).as_posix() for file in (data / "train" / "1").iterdir())[:2]
    focus = tmp_path / "focus.csv"
    focus.write_text(f"image_path\n{first}\n")
    own = {
        "data": {"size": 32},
        "model": {"name": "test_resnet", "weights": "none"},
        "fit": {"epochs": 1, "focus": str(focus)},
    }
    run = begin_run(data, resolve_config(TrainConfig, overrides=own), name="run", runs=tmp_path, device="cpu")
    if change == "rewritten":
        focus.write_text(f"image_path\n{second}\n")
    else:
        focus.rename(tmp_path / "elsewhere.csv")
    resumed = resume_run(run.folder, data=None, device=None, overrides={}).session
    assert resumed.draw_weights is not None
    assert run.session.draw_weights is not None
    assert resumed.draw_weights.tolist() == run.session.draw_weights.tolist()
    assert resumed.config == run.session.config


@pytest.mark.parametrize("older", [False, True], ids=["of this version", "that knows the best of all only"])
def test_patience_goes_on_counting_from_a_checkpoint(data: Path, tmp_path: Path, older: bool) -> None:
    still = {"name": "adamw", "learning_rate": 1e-30}
    fit = {"epochs": 9, "patience": 2, "optimizer": still, "freeze_norm": True, "deterministic": True}
    own = {"data": {"size": 32}, "model": {"name": "test_resnet", "weights": "none"}, "fit": fit}
    run = begin_run(data, resolve_config(TrainConfig, overrides=own), name="run", runs=tmp_path, device="cpu")
    good = Best(
        weights_of(run.session.classifier),
        Scores(0.0, 1.0, 1.0, 1.0, 1.0, 0.0),
        np.zeros((len(run.session.dataset.rows("validation")), 3), dtype=np.float32),
    )

    def die(epoch: int, _: Scores) -> bool:
        if epoch == 2:
            raise ConnectionError("the machine is gone")
        return False

    with pytest.raises(ConnectionError):
        learn(run.session, start=good, log=run.log, watch=die)
    resumed = resume_run(run.folder, data=None, device=None, overrides={})
    assert resumed.checkpoint is not None
    if older:
        del resumed.checkpoint.state["tuned"]
    learned = learn(resumed.session, checkpoint=resumed.checkpoint, log=resumed.log)
    assert [row["epoch"] for row in resumed.log.metrics] == [1, 2, 3]
    assert learned.scores == good.scores


class TestLostFiles:
    """Of a run that begins, and is resumed when files can no longer be read."""

    def begun(self, tmp_path: Path) -> tuple[Run, Path]:
        data = write_digits(tmp_path / "digits")
        config = resolve_config(
            TrainConfig,
            overrides={
                "data": {"size": 32, "max_unreadable": 0.05},
                "model": {"name": "test_resnet", "weights": "none"},
                "fit": {"epochs": 1, "deterministic": True},
            },
        )
        return begin_run(data, config, name="run", runs=tmp_path, device="cpu"), data

    def resumed(self, run: Run) -> Run:
        return resume_run(run.folder, data=None, device=None, overrides={})

    def test_they_keep_their_rows_and_are_never_shown(self, tmp_path: Path) -> None:
        run, data = self.begun(tmp_path)
        before = run.session.dataset
        torn, gone = sorted((data / "train" / "1").iterdir())[3:5]
        torn.write_bytes(torn.read_bytes()[:40])
        gone.unlink()
        session = self.resumed(run).session
        assert session.dataset.root_hash == before.root_hash
        assert session.dataset.table.equals(before.table)
        rows = [before.table["path"].to_list().index(f"train/1/{file.name}") for file in (torn, gone)]
        assert sorted(session.quarantine.errors) == rows
        assert learn(session).best is not None
        assert len(session.quarantine.left.unreadable) == 2

    def test_what_is_judged_must_be_whole(self, tmp_path: Path) -> None:
        run, data = self.begun(tmp_path)
        broken = next((data / "validation" / "1").iterdir())
        broken.write_bytes(broken.read_bytes()[:40])
        with pytest.raises(DatasetError, match=rf"have changed \(validation/1/{broken.name} cannot be read"):
            self.resumed(run)

    def test_others_in_their_place_are_refused(self, tmp_path: Path) -> None:
        run, data = self.begun(tmp_path)
        first, second = sorted((data / "train" / "1").iterdir())[3:5]
        first.write_bytes(second.read_bytes())
        with pytest.raises(DatasetError, match="have changed"):
            self.resumed(run)


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


@pytest.mark.slow
def test_a_dead_decoder_is_one_line_and_the_run_goes_on(tmp_path: Path) -> None:
    """As when the system is out of memory and takes the first process it finds."""
    data = write_digits(tmp_path / "digits")
    run = tmp_path / "run"
    fly = (*SETTINGS, "data.cache_limit_gb=0", "fit.epochs=60", "fit.patience=60")
    process = start(str(data), "--name", "run", "--runs", str(tmp_path), settings=fly)
    wait_for(lambda: tuned(run), process)
    # Decoders that have nothing to do are replaced without a word: they die until one is missed.
    while process.poll() is None:
        for decoder in decoders(process):
            with suppress(ProcessLookupError):
                os.kill(decoder, signal.SIGKILL)
        time.sleep(0.01)
    err = finish(process, code=1)
    assert "a decoding process was killed" in err
    assert "--resume" in err
    assert "Traceback" not in err
    judged = (run / "metrics.csv").read_text()
    process = start("--resume", str(run))
    wait_for(lambda: (run / "metrics.csv").read_text() not in judged, process)
    process.send_signal(signal.SIGINT)
    finish(process, code=130)
    assert (run / "best" / "holotype.json").is_file()

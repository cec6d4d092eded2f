from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.trial import TrialState

from holotype import locks, train
from holotype.cli import run
from holotype.config import TrainConfig, TuneConfig, merge, read_recipe, resolve_config, to_yaml
from holotype.errors import ConfigError, TrainingError
from holotype.locks import is_gone, working
from holotype.tune import TuneResult, tune
from holotype.tune.results import trial_rows
from holotype.tune.space import Choices, Range, read_space, trial_config
from holotype.tune.study import default_storage, give_back, open_study, places_left, reclaim, visible_url

TRAIN: dict[str, Any] = {
    "data": {"size": 64},
    "model": {"name": "test_resnet", "weights": "none"},
    "augment": {"preset": "none"},
    "fit": {"epochs": 2, "batch_size": 16, "deterministic": True, "ema": None, "metric": "log_loss"},
}
"""Settings that make a trial on the digits quick: the smallest of timm's networks, from scratch."""

SPACE: dict[str, Any] = {
    "fit.optimizer.learning_rate": {"low": 1e-3, "high": 3e-2, "log": True},
    "augment.noise": [None, [0.01, 0.05]],
}


def settings(**more: Any) -> TuneConfig:
    """A study of random trials in this space."""
    return resolve_config(TuneConfig, overrides={"sampler": "random", "space": SPACE, "train": TRAIN, **more})


def words(data: Path, runs: Path, *more: object, config: TuneConfig | None = None) -> list[str]:
    """The words of the command line for that study, or for another."""
    file = runs / "recipe.yaml"
    runs.mkdir(exist_ok=True)
    file.write_text(to_yaml(config or settings()))
    return ["tune", str(data), "--runs", str(runs), "--recipe", str(file), *map(str, more)]


def command(*arguments: Any, **more: Any) -> list[str]:
    """As `words`, for a process of its own."""
    return [sys.executable, "-m", "holotype", *words(*arguments, **more)]


def tried(result: TuneResult) -> list[dict[str, Any]]:
    """What was tried, in order, each once: settings that came to no end are those of a later trial."""
    return [row.params for row in sorted(result.trials, key=lambda row: row.number) if row.again is None]


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def study(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> TuneResult:
    """A study of four trials, its folder read-only."""
    return tune(digits, name="study", config=settings(trials=4), runs=tmp_path_factory.mktemp("runs"))


@pytest.fixture
def copied(study: TuneResult, tmp_path: Path) -> Path:
    """The folder `study` of that study, in `tmp_path`."""
    return shutil.copytree(study.folder, tmp_path / "study")


class TestSpace:
    def test_dotted_and_nested_keys_are_the_same(self) -> None:
        dotted = read_space({"fit.epochs": [1, 2], "fit.layer_decay": {"low": 0.5, "high": 1}}, train={})
        nested = read_space({"fit": {"layer_decay": {"low": 0.5, "high": 1}, "epochs": [1, 2]}}, train={})
        assert dotted == nested
        assert [axis.key for axis in dotted] == ["fit.epochs", "fit.layer_decay"]

    def test_the_setting_decides_what_is_a_whole_number(self) -> None:
        axes = read_space(
            {"fit.epochs": {"low": 1, "high": 9}, "augment.mixup": {"low": 0, "high": 1}}, train={}
        )
        assert {axis.key: axis.whole for axis in axes if isinstance(axis, Range)} == {
            "fit.epochs": True,
            "augment.mixup": False,
        }

    def test_numbers_as_yaml_misreads_them(self) -> None:
        (axis,) = read_space(
            {"fit.optimizer.learning_rate": yaml.safe_load("{low: 1e-4, high: 1e-2, log: true}")}, train={}
        )
        assert isinstance(axis, Range)
        assert (axis.low, axis.high, axis.log) == (1e-4, 1e-2, True)

    def test_a_choice_may_be_a_list_or_a_section(self) -> None:
        sections = [{"name": "sgd", "momentum": 0.8}, {"name": "adamw"}]
        (axis,) = read_space({"fit.optimizer": sections}, train={"fit": {"optimizer": {"name": "sgd"}}})
        assert isinstance(axis, Choices)
        assert [axis.value(label) for label in axis.labels] == sections
        assert all(isinstance(label, str) for label in axis.labels)

    def test_a_section_takes_the_whole_place_of_another(self) -> None:
        below = {"fit": {"epochs": 3, "optimizer": {"name": "sgd", "momentum": 0.5}}}
        config = trial_config(below, {"fit.optimizer": {"name": "adamw"}})
        assert config.fit.epochs == 3
        assert config.fit.optimizer == resolve_config(TrainConfig).fit.optimizer

    def test_a_preset_lies_beneath_what_is_searched(self) -> None:
        config = trial_config({}, {"preset": "fast", "augment.crop": 0.9})
        assert (config.fit.epochs, config.augment.crop) == (3, 0.9)

    @pytest.mark.parametrize(
        ("space", "message"),
        [
            ({}, "space: is empty"),
            ({"fit.layer_decay": []}, "space.fit.layer_decay: has no choices"),
            ({"fit.layer_decay": 0.5}, "space.fit.layer_decay: 0.5 is no axis; give a list"),
            ({"fit.layer_decay": [0.5, 0.5]}, "names a choice twice"),
            ({"fit.layer_dekay": [0.5]}, "unknown setting; did you mean fit.layer_decay?"),
            ({"fit.optimiser.learning_rate": [1]}, "space.fit.optimiser: unknown setting"),
            ({"fit.layer_decay": {"low": 0.5}}, "high: Field required"),
            ({"fit.layer_decay": {"low": 0.5, "high": 1, "steps": 2}}, "steps: Extra inputs"),
            ({"fit.layer_decay": {"low": 1, "high": 0.5}}, "low 1 is not below high 0.5"),
            ({"fit.layer_decay": {"low": 0.5, "high": 2}}, "less than or equal to 1 (got 2.0)"),
            ({"fit.layer_decay": {"low": 0.5, "high": 1, "step": 0.3}}, "no whole number of steps"),
            ({"fit.layer_decay": {"low": 0.5, "high": 1, "step": 0.1, "log": True}}, "exclude each other"),
            ({"model.dropout": {"low": 0, "high": 0.5, "log": True}}, "begins above 0"),
            ({"fit.epochs": {"low": 1, "high": 9, "step": 0.5}}, "whole numbers only"),
            ({"fit.metric": ["accuracy", "macro_f1"]}, "different measures; set it for all of them: train."),
            ({"data.validation": [0.1, 0.2]}, "different measures"),
            ({"monitor.every": [1, 2]}, "changes nothing"),
            ({"fit.optimizer": [{"name": "sgd"}], "fit.optimizer.name": ["sgd"]}, "another axis"),
            ({"fit.epochs": [1], "fit": {"epochs": [2]}}, "space.fit.epochs: is named twice"),
        ],
    )
    def test_what_is_wrong_is_named(self, space: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=r"^space") as caught:
            read_space(space, train={})
        assert message in str(caught.value)

    def test_values_that_do_not_go_together(self) -> None:
        space = {"fit.optimizer.name": ["sgd", "adamw"], "fit.optimizer.momentum": [0.8, 0.9]}
        with pytest.raises(ConfigError, match=r"'adamw' does not go with fit.optimizer.momentum: .*no such"):
            read_space(space, train={})


class TestStudy:
    def test_files(self, study: TuneResult) -> None:
        names = {path.name for path in study.folder.iterdir() if not path.name.startswith(".")}
        assert names == {"config.yaml", "study.db", "trials.csv", "tune.html", "best.yaml"}

    def test_the_best_comes_first(self, study: TuneResult) -> None:
        assert [row.state for row in study.trials] == ["complete"] * 4
        assert study.best == study.trials[0]
        values = [row.value for row in study.trials]
        assert values == sorted(values)
        assert len(set(values)) == 4
        assert values == [row.scores["log_loss"] for row in study.trials]

    def test_table(self, study: TuneResult) -> None:
        rows = rows_of(study.folder / "trials.csv")
        assert [int(row["number"]) for row in rows] == [row.number for row in study.trials]
        for cells, row in zip(rows, study.trials, strict=True):
            assert float(cells["value"]) == pytest.approx(row.value, rel=1e-5)
            assert float(cells["fit.optimizer.learning_rate"]) == pytest.approx(
                row.params["fit.optimizer.learning_rate"], rel=1e-5
            )
            assert cells["augment.noise"] == (row.params["augment.noise"] or "null")
            assert (cells["state"], cells["epochs"], cells["error"]) == ("complete", "2", "")

    def test_page_needs_nothing_else(self, study: TuneResult) -> None:
        page = (study.folder / "tune.html").read_text()
        assert "http://" not in page
        assert "https://" not in page
        assert page.count("data:image/png;base64,") == 6  # three figures, each light and dark
        assert "holotype train" in page
        assert "That takes 5 complete trials" in page

    def test_database_is_an_ordinary_study(self, study: TuneResult) -> None:
        opened = optuna.load_study(study_name="study", storage=f"sqlite:///{study.folder / 'study.db'}")
        assert opened.best_value == study.trials[0].value
        assert opened.direction.name == "MINIMIZE"
        assert opened.trials[0].params == next(row.params for row in study.trials if row.number == 0)

    def test_recipe_does_what_the_trial_did(self, study: TuneResult, digits: Path, tmp_path: Path) -> None:
        assert study.best is not None
        assert study.recipe is not None
        config = resolve_config(TrainConfig, recipe=read_recipe(study.recipe))
        assert config.fit.optimizer.learning_rate == study.best.params["fit.optimizer.learning_rate"]
        result = train(digits, name="best", config=config, runs=tmp_path)
        losses = [float(row["validation_loss"]) for row in rows_of(result.folder / "metrics.csv")]
        assert min(losses) == pytest.approx(study.best.value, abs=1e-5)
        accuracy = result.bundle.manifest.metrics["validation"]["accuracy"]
        assert accuracy == study.best.scores["accuracy"]
        assert study.next_command == f"holotype train {digits} --recipe {study.recipe}"

    @pytest.mark.slow
    def test_interrupted_and_gone_on_with_it_tries_the_same(
        self, study: TuneResult, digits: Path, tmp_path: Path
    ) -> None:
        long = settings(trials=2, train={**TRAIN, "fit": {**TRAIN["fit"], "epochs": 9, "patience": 9}})
        arguments = command(digits, tmp_path, "--name", "study", config=long)
        with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            lines = iter(process.stderr)
            assert any(line.startswith("trial 0") for line in lines)
            assert any(line.startswith("epoch 1/9") for line in lines)
            process.send_signal(signal.SIGINT)
            process.stderr.read()
        assert process.returncode == 130
        result = tune(digits, name="study", config=long, runs=tmp_path)
        wanted = [row.params for row in sorted(study.trials, key=lambda row: row.number)]
        assert tried(result) == wanted[:2]
        assert sorted(row.state for row in result.trials) == ["complete"] * 2 + ["interrupted"]
        again = next(row for row in result.trials if row.state == "interrupted")
        assert next(row for row in result.trials if row.number == again.again).params == again.params

    def test_nothing_is_left_to_do(self, study: TuneResult, copied: Path, digits: Path) -> None:
        result = tune(digits, name="study", config=settings(trials=4), runs=copied.parent)
        assert result.trials == study.trials

    def test_other_data(self, copied: Path, digits: Path, tmp_path: Path) -> None:
        fewer = shutil.copytree(digits, tmp_path / "fewer")
        next((fewer / "train" / "1").iterdir()).unlink()
        with pytest.raises(ConfigError, match="study study: was begun with data of root hash"):
            tune(fewer, name="study", config=settings(), runs=copied.parent)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"space": {"augment.noise": [None]}},
                r"space.augment.noise \[None, \[0.01, 0.05\]\], not \[None\]",
            ),
            ({"space": {"augment.crop": [0.5, 1]}}, r"space.augment.crop not there, not \[0.5, 1\]"),
            ({"train": {"fit": {"epochs": 3}}}, "train.fit.epochs 2, not 3"),
            ({"train": {"data": {"filter": "bilinear"}}}, "train.data.filter auto, not bilinear"),
        ],
    )
    def test_another_question(self, change: dict[str, Any], message: str, copied: Path, digits: Path) -> None:
        whole = {**change, "train": merge(TRAIN, change.get("train", {}))}
        whole["space"] = {**SPACE, **change.get("space", {})}
        with pytest.raises(ConfigError, match=f"was begun with {message}"):
            tune(digits, name="study", config=settings(**whole), runs=copied.parent)

    def test_grid_with_a_point_that_diverges(self, digits: Path, tmp_path: Path) -> None:
        space = {"fit.optimizer.learning_rate": [1e-3, 1e30], "fit.clip_norm": [None]}
        result = tune(digits, name="grid", config=settings(sampler="grid", space=space), runs=tmp_path)
        assert [row.state for row in result.trials] == ["complete", "failed"]
        assert "gradient norm" in str(result.trials[1].error)
        assert result.best is not None
        assert result.best.params["fit.optimizer.learning_rate"] == 1e-3
        assert rows_of(result.folder / "trials.csv")[1]["error"] == result.trials[1].error

    def test_hopeless_trials_are_stopped_early(self, digits: Path, tmp_path: Path) -> None:
        space = {"fit.optimizer.learning_rate": [3e-3, 1e-2, 10.0]}
        config = settings(
            sampler="grid",
            space=space,
            startup=1,
            seed=1,
            train={**TRAIN, "fit": {**TRAIN["fit"], "epochs": 3}},
        )
        result = tune(digits, name="pruned", config=config, runs=tmp_path)
        states = {row.params["fit.optimizer.learning_rate"]: (row.state, row.epochs) for row in result.trials}
        assert states[10.0] == ("pruned", 1)
        assert {states[3e-3], states[1e-2]} <= {("complete", 3), ("pruned", 1), ("pruned", 2)}


def test_no_point_of_a_grid_is_outside_its_range() -> None:
    (axis,) = read_space({"model.dropout": {"low": 0.1, "high": 0.7, "step": 0.1}}, train={})
    assert axis.points() == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


class TestCommand:
    @pytest.fixture
    def call(self, capfd: pytest.CaptureFixture[str]):
        def calling(*arguments: object) -> tuple[int, str, str]:
            capfd.readouterr()
            code = run([str(argument) for argument in arguments])
            return code, *capfd.readouterr()

        return calling

    def test_json(self, call, study: TuneResult, copied: Path, digits: Path) -> None:
        code, out, _ = call(*words(digits, copied.parent, "--name", "study", "--trials", 4, "--json"))
        content = json.loads(out)
        assert code == 0
        assert set(content) == {
            "study", "best", "trials", "storage", "recipe", "report", "next", "interrupted",
        }  # fmt: skip
        assert content["best"] == content["trials"][0]
        assert content["best"]["value"] == study.trials[0].value
        assert [row["number"] for row in content["trials"]] == [row.number for row in study.trials]
        assert content["recipe"] == str(copied / "best.yaml")
        assert content["storage"] == f"sqlite:///{copied / 'study.db'}"

    def test_table_for_people(self, call, study: TuneResult, copied: Path, digits: Path) -> None:
        code, out, _ = call(*words(digits, copied.parent, "--name", "study", "--trials", 4))
        assert code == 0
        lines = out.splitlines()
        assert lines[0].split()[:3] == ["trial", "log", "loss"]
        assert lines[1].split()[0] == str(study.trials[0].number)
        assert f"next     holotype train {digits} --recipe {copied / 'best.yaml'}" in out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--storage", "nonsense"), "--storage: is no database URL; such as postgresql://"),
            (("--storage", "oracle://me:secret@host/x"), "oracle://me:***@host/x: needs the Python package"),
            (("--name", "a/b"), "a/b: is not a name for a study"),
            (("--set", "train.fit.epoch=3"), "train.fit.epoch: unknown setting; did you mean fit.epochs?"),
            (("--set", "space.fit.layer_decay=[2]"), "space.fit.layer_decay: Input should be less"),
            (("--set", "sampler=grid"), "space.fit.optimizer.learning_rate: a grid needs a list of choices"),
        ],
    )
    def test_errors(
        self, arguments: tuple[str, ...], message: str, call, digits: Path, tmp_path: Path
    ) -> None:
        code, out, err = call(*words(digits, tmp_path, *arguments))
        assert (code, out) == (2, "")
        assert len(err.splitlines()) == 1
        assert message in err
        assert "secret" not in err

    def test_too_large_a_grid(self, call, digits: Path, tmp_path: Path) -> None:
        space = "{fit.epochs: {low: 1, high: 200}, fit.patience: {low: 1, high: 200}}"
        code, _, err = call(
            "tune", digits, "--runs", tmp_path, "--set", "sampler=grid", "--set", f"space={space}"
        )
        assert (code, "40,000 combinations" in err) == (2, True)

    def test_folder_of_a_training_run(self, call, digits: Path, tmp_path: Path) -> None:
        (tmp_path / "taken" / "last").mkdir(parents=True)
        code, _, err = call(*words(digits, tmp_path, "--name", "taken"))
        assert (code, "is the folder of a training run" in err) == (2, True)

    def test_database_that_is_none(self, call, digits: Path, tmp_path: Path) -> None:
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / "study.db").write_text("this is no database, however long it may be")
        code, _, err = call(*words(digits, tmp_path, "--name", "broken"), "--quiet")
        assert (code, len(err.splitlines())) == (2, 1)
        assert "study.db: cannot be opened" in err

    def test_launched_as_several_processes(
        self, call, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        code, _, err = call(*words(digits, tmp_path))
        assert (code, "run the same command once per process" in err) == (2, True)

    def test_nothing_that_can_be_trained(self, digits: Path, tmp_path: Path) -> None:
        space = {"fit.optimizer.learning_rate": [1e30], "fit.clip_norm": [None]}
        config = settings(space=space, trials=1)
        with pytest.raises(TrainingError, match=r"none of 1 trials came to an end, the first: .*gradient"):
            tune(digits, name="hopeless", config=config, runs=tmp_path)

    def test_a_first_choice_that_cannot_be_trained_is_refused_at_once(
        self, digits: Path, tmp_path: Path
    ) -> None:
        config = settings(space={"fit.unfreeze": [99, 1]}, trials=1)
        with pytest.raises(ConfigError, match="99 were asked for"):
            tune(digits, name="typo", config=config, runs=tmp_path)


WORKER = """
import runpy, sys, time
from pathlib import Path
working = runpy.run_path(sys.argv[2])["working"]
with working(Path(sys.argv[1])) as name:
    print(name, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Another process that works in `tmp_path`, and its name."""
    arguments = [sys.executable, "-c", WORKER, str(tmp_path), str(locks.__file__)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
        process.kill()


class TestLostTrials:
    def test_who_is_gone(self, worker: tuple[subprocess.Popen[str], str], tmp_path: Path) -> None:
        process, name = worker
        assert not is_gone(tmp_path, name)
        process.kill()
        process.wait()
        assert is_gone(tmp_path, name)
        assert not is_gone(tmp_path, "worked-elsewhere")
        with working(tmp_path) as own:
            assert not is_gone(tmp_path, own)

    def test_tried_again_once(self, worker: tuple[subprocess.Popen[str], str], tmp_path: Path) -> None:
        process, name = worker
        opened = optuna.create_study(storage=default_storage(tmp_path))
        for _ in range(2):
            trial = opened.ask()
            trial.set_user_attr("worker", name)
            trial.suggest_float("x", 0, 1)
        assert places_left(opened, 5) == 3
        reclaim(opened, tmp_path)
        assert [trial.state for trial in opened.trials] == [TrialState.RUNNING] * 2
        process.kill()
        process.wait()
        reclaim(opened, tmp_path)
        reclaim(opened, tmp_path)
        assert [trial.state for trial in opened.trials] == [TrialState.FAIL] * 2 + [TrialState.WAITING] * 2
        assert places_left(opened, 5) == 5
        rows = {row.number: row for row in trial_rows(opened.trials, metric="accuracy")}
        assert [(rows[number].state, rows[number].again) for number in (0, 1)] == [("lost", 2), ("lost", 3)]
        for _ in range(2):
            again = opened.ask()
            again.set_user_attr("worker", name)
            assert again.suggest_float("x", 0, 1) == rows[again.number - 2].params["x"]
        reclaim(opened, tmp_path)
        assert places_left(opened, 5) == 3
        assert [trial.state for trial in opened.trials] == [TrialState.FAIL] * 4

    def test_interrupted_is_no_fault(self, tmp_path: Path) -> None:
        opened = optuna.create_study(storage=default_storage(tmp_path))
        for number in range(3):
            opened.ask().suggest_float("x", 0, 1)
            give_back(opened, opened.trials[number], blameless=True)
            opened.tell(number, state=TrialState.FAIL)
        assert [trial.state.name for trial in opened.trials] == ["FAIL"] * 3 + ["WAITING"]

    def test_password_is_never_shown(self) -> None:
        assert visible_url("postgresql://me:secret@host/x") == "postgresql://me:***@host/x"

    def test_folder_with_an_awkward_name(self, tmp_path: Path) -> None:
        folder = tmp_path / "what? #1 100%20 äö"
        folder.mkdir()
        open_study(default_storage(folder), name="study", maximize=True, lost_after=60)
        assert [path.name for path in folder.iterdir()] == ["study.db"]


@pytest.mark.slow
class TestProcesses:
    def start(self, digits: Path, runs: Path, *more: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command(digits, runs, "--name", "study", "--json", *more),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def test_killed_and_gone_on_with(self, study: TuneResult, digits: Path, tmp_path: Path) -> None:
        """`kill -9` at different moments: every trial is there once, with what it would have tried."""
        for pause in (0.0, 0.5, 1.5):
            with self.start(digits, tmp_path, "--trials", 4) as process:
                wait_for_trial(tmp_path / "study")
                time.sleep(pause)
                process.kill()
        result = tune(digits, name="study", config=settings(trials=4), runs=tmp_path)
        done = [row for row in result.trials if row.state == "complete"]
        assert len(done) >= 3
        assert any(row.state == "lost" for row in result.trials)
        wanted = [row.params for row in sorted(study.trials, key=lambda row: row.number)]
        assert tried(result) == wanted
        values = {json.dumps(row.params): row.value for row in study.trials}
        assert all(row.value == values[json.dumps(row.params)] for row in done)

    def test_two_at_the_same_time(self, study: TuneResult, digits: Path, tmp_path: Path) -> None:
        processes = [self.start(digits, tmp_path, "--trials", 6) for _ in range(2)]
        contents = [json.loads(process.communicate()[0]) for process in processes]
        assert [process.returncode for process in processes] == [0, 0]
        last = max(contents, key=lambda content: sum(row["state"] == "complete" for row in content["trials"]))
        assert sorted(row["number"] for row in last["trials"]) == list(range(6))
        assert {row["state"] for row in last["trials"]} == {"complete"}
        by_number = {row["number"]: row["params"] for row in last["trials"]}
        assert all(by_number[row.number] == row.params for row in study.trials)


def wait_for_trial(folder: Path) -> None:
    """Until a trial is running, or a minute is over."""
    for _ in range(600):
        time.sleep(0.1)
        if not (folder / "config.yaml").exists():
            continue
        opened = optuna.load_study(study_name="study", storage=f"sqlite:///{folder / 'study.db'}")
        workers = [trial.state for trial in opened.trials if "worker" in trial.user_attrs]
        if TrialState.RUNNING in workers:
            return
    raise AssertionError("no trial began")

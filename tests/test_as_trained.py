"""What comes after training reads the data as training did, and says "not sure" by the same rule."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest

from digits import write_flat
from holotype import evaluate, export, train
from holotype.bundle import Bundle, open_bundle, write_bundle
from holotype.compare import compare
from holotype.compress import compress
from holotype.config import (
    CompareConfig,
    CompressConfig,
    DatasetConfig,
    EvaluateConfig,
    ExportConfig,
    resolve_config,
)
from holotype.dataset import Dataset, cache_folder, open_for, recorded_source
from holotype.dataset.revisions import Change, write_revision
from holotype.errors import DatasetError
from holotype.train import TrainResult

SHARES = {"validation": 0.25, "test": 0.05}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """A run on digits without splits, with shares of its own, whose answers are always sure."""
    folder = tmp_path_factory.mktemp("flat")
    settings = {
        "data": {**SHARES, "size": 64},
        "policy": {"abstain": "none", "coverage": 0.8},
        "model": {"weights": "none", "name": "test_efficientnet"},
        "fit": {"epochs": 1},
        "augment": {"flip": 0.0},
    }
    return train(write_flat(folder / "digits", images=100), overrides=settings, runs=folder / "runs")


def images(run: TrainResult, split: str, config: DatasetConfig | None = None) -> set[str]:
    dataset = open_for(run.bundle, None, config=config or DatasetConfig())
    return set(dataset.table.filter(pl.col("split") == split)["path"])


def told_of(dataset: Dataset) -> dict[str, tuple[str, str]]:
    """Label and split, by path."""
    table = dataset.table.select("path", "label", "split")
    return {path: (label, split) for path, label, split in table.iter_rows()}


@pytest.fixture
def moved(run: TrainResult) -> Iterator[set[str]]:
    """Ten training images that a revision after the training puts into test; three from there go to train.

    It names a split for every image, as that of `audit --fix-split` does.
    """
    folder = cache_folder(recorded_source(run.bundle))
    into = sorted(images(run, "train"))[::20][:10]
    splits = {path: split for split in ("train", "validation", "test") for path in images(run, split)}
    splits |= dict.fromkeys(sorted(images(run, "test"))[:3], "train") | dict.fromkeys(into, "test")
    changes = [Change.model_validate({"path": path, "split": split}) for path, split in splits.items()]
    write_revision(folder, source="fix-split", changes=changes)
    yield set(into)
    for file in folder.glob("revision-*.json"):
        file.unlink()


def trained_later(run: TrainResult, target: Path, *, revision: int) -> Bundle:
    """The bundle of `run`, as if it had been trained with another revision."""
    manifest = run.bundle.manifest
    data = manifest.settings["data"] | {"revision": revision}
    files = {name: run.best / payload.path for name, payload in manifest.payloads.items()}
    changed = manifest.model_copy(update={"settings": manifest.settings | {"data": data}})
    return write_bundle(target, changed, files=files)


def test_evaluate_judges_what_was_not_trained_on(run: TrainResult, tmp_path: Path) -> None:
    report = evaluate(run.folder, out=tmp_path, config=EvaluateConfig(split="test"))
    assert sum(one["test"] for one in report.dataset.counts.values()) == len(images(run, "test"))
    # By the default shares it would be 15 %, most of them images that were trained on.
    assert 0.01 < len(images(run, "test")) / 300 < 0.12


def test_what_is_asked_for_by_name_is_done(run: TrainResult) -> None:
    assert len(images(run, "test", DatasetConfig(test=0.5))) > 100


def test_other_data_is_read_as_it_lies_but_split_alike(run: TrainResult, tmp_path: Path) -> None:
    other = write_flat(tmp_path / "moved", images=100)
    dataset = open_for(run.bundle, other, config=DatasetConfig())
    assert set(dataset.table.filter(pl.col("split") == "test")["path"]) == images(run, "test")


def test_what_a_later_revision_moves_stays_where_it_was(
    run: TrainResult, moved: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = DatasetConfig(revision="latest")
    assert moved <= images(run, "test", newest)
    assert moved <= images(run, "train")
    before, after = (images(run, "test", DatasetConfig(revision=number)) for number in (0, 1))
    assert images(run, "test") == images(run, "test", DatasetConfig(split_revision=0)) == before != after
    capsys.readouterr()
    report = evaluate(run.folder, out=tmp_path, config=EvaluateConfig(split="test"))
    assert report.dataset.root_hash == open_for(run.bundle, None, config=DatasetConfig(revision=0)).root_hash
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("splits are")]
    assert line.startswith(f"splits are those that {run.best} was trained with: images have been moved")


def test_labels_are_the_newest_whatever_the_splits(run: TrainResult, moved: set[str]) -> None:
    told = sorted(images(run, "test"))[-1]
    other = "1" if told.startswith("0") else "0"
    folder = cache_folder(recorded_source(run.bundle))
    gone, kept = sorted(moved)[:2]
    changes = [Change(path=told, label=other), Change(path=gone, drop=True)]
    write_revision(folder, source="relabel", changes=changes)
    dataset = open_for(run.bundle, None, config=DatasetConfig())
    rows = {
        path: (label, split) for path, label, split in dataset.table["path", "label", "split"].iter_rows()
    }
    assert dataset.revision == 2
    assert rows[told] == (other, "test")
    assert rows[kept][1] == "train"
    assert gone not in rows
    only = open_for(run.bundle, None, config=DatasetConfig(revision=0, split_revision=2))
    rows = told_of(only)
    assert rows[told] == (told[0], "test")
    assert rows[gone] == (gone[0], "test")
    with pytest.raises(DatasetError, match=r"no revision 3 of its splits; choose one of 0 .* to 2"):
        open_for(run.bundle, None, config=DatasetConfig(split_revision=3))


def test_a_bundle_trained_after_a_revision_is_judged_by_it(
    run: TrainResult, moved: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    later = trained_later(run, tmp_path / "later", revision=1)
    dataset = open_for(later, None, config=DatasetConfig())
    assert moved <= set(dataset.paths(dataset.rows("test")))
    open_for(later, None, config=DatasetConfig(split_revision=0))
    assert "splits are those" not in capsys.readouterr().err
    config = CompareConfig(measure=False, split="test")
    kept = compare(run.best, later.path, config=config, out=tmp_path / "compared")
    assert kept.images == len(images(run, "test"))
    assert f"by those, 3 of the {kept.images} test images are for training" in capsys.readouterr().err
    turned = compare(later.path, run.best, config=config, out=tmp_path / "turned")
    assert turned.images == len(dataset.rows("test"))
    told = capsys.readouterr().err
    assert f"by those, 10 of the {turned.images} test images are for training" in told
    assert "splits are those" not in told


def test_bundles_that_a_revision_of_labels_lies_between_have_the_same_splits(
    run: TrainResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = cache_folder(recorded_source(run.bundle))
    path = sorted(images(run, "train"))[0]
    write_revision(folder, source="relabel", changes=[Change(path=path, label="1")])
    later = trained_later(run, tmp_path / "later", revision=1)
    compare(run.best, later.path, config=CompareConfig(measure=False), out=tmp_path / "compared")
    assert "splits" not in capsys.readouterr().err
    (folder / "revision-0001.json").unlink()
    open_for(later, None, config=DatasetConfig())
    assert "trained with revision 1 of labels and splits, which is not on this machine" in (
        capsys.readouterr().err
    )


def test_compress_judges_on_the_same_images_and_keeps_the_policy(
    run: TrainResult, moved: set[str], tmp_path: Path
) -> None:
    config = resolve_config(
        CompressConfig,
        overrides={
            "methods": ["int8"], "budget": {"drop": 100.0}, "rounds": 3, "search": "all",
            "int8": {"images": 32, "calibration": "min-max"},
        },
    )  # fmt: skip
    outcome = compress(run.folder, out=tmp_path / "small", config=config)
    assert outcome.test is not None
    then = DatasetConfig(revision=0)
    assert outcome.test.images == len(images(run, "test", then))
    assert sum(one.images for one in outcome.classes) == len(images(run, "validation", then))
    manifest = open_bundle(outcome.candidates[-1].bundle).manifest
    assert (manifest.policy.abstain, manifest.policy.coverage) == ("none", 0.8)
    assert manifest.settings["policy"]["abstain"] == "none"


def test_an_export_in_another_arithmetic_keeps_the_policy(digits: Path, tmp_path: Path) -> None:
    # Of a network that has learned something: where all classes are equally likely, bf16 chooses others.
    settings = {"data": {"size": 64}, "policy": {"abstain": "none", "coverage": 0.8}}
    run = train(digits, preset="probe", overrides=settings, runs=tmp_path / "runs")
    config = ExportConfig(precision="bf16", measure=False)
    exported = export(run.folder, format="openvino", out=tmp_path / "half", config=config)
    assert exported.bundle.manifest.policy.abstain == "none"
    assert exported.bundle.manifest.policy.coverage == 0.8

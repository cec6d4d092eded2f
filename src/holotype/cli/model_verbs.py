"""Verbs about models: thin, importing what they need when they are called."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from holotype.cli.options import (
    SECTIONS,
    Arithmetic,
    Common,
    Runs,
    RuntimeName,
    Split,
    Target,
    Threads,
    TrainedOn,
    given,
    need_training_libraries,
    verb,
)
from holotype.errors import ConfigError

if TYPE_CHECKING:
    from holotype.config import PredictConfig
    from holotype.predictor import Prediction

__all__ = ["app"]

app = typer.Typer()


@verb(app)
def demo(
    common: Common,
    *,
    data: Annotated[Path, typer.Option("--data", help="where the digits are written")] = Path("digits"),
    runs: Runs = Path("runs"),
) -> None:
    """Train, export, prove and compare a classifier of handwritten digits, in under two minutes."""
    from holotype import terminal

    need_training_libraries("the demo")
    from holotype.config import TrainConfig
    from holotype.demo import run_demo

    flags = {"preset": "probe", "augment": {"flip": 0.0}}
    config = common.resolve(TrainConfig, flags, weakest=True)
    result = run_demo(data=data, runs=runs, config=config, device=common.device)
    common.show(
        {
            "run": str(result.result.folder),
            "bundle": str(result.result.best),
            "openvino": str(result.openvino),
            "report": str(result.result.folder / "report.html"),
            "runtimes": [dataclasses.asdict(row) for row in result.rows],
            "seconds": result.seconds,
        },
        lambda: terminal.show_demo(result),
    )


@verb(app, without=("device",))
def train(
    common: Common,
    *,
    data: Annotated[
        Path | None,
        typer.Argument(metavar="[DATA]", help="a folder of classes or annotations, a CSV or JSON file"),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="name of the run; default: that of the data")
    ] = None,
    preset: Annotated[
        str | None, typer.Option("--preset", help="probe, fast, balanced (default) or thorough")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="a timm architecture")] = None,
    weights: Annotated[str | None, typer.Option("--weights", help="auto, none, or a file")] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="RUN", help="go on with an interrupted or killed run")
    ] = None,
    focus: Annotated[
        Path | None,
        typer.Option("--focus", metavar="FILE", help="images to draw more often, as of hard-samples"),
    ] = None,
    cache_limit: Annotated[
        float | None,
        typer.Option("--cache-limit", metavar="GB", help="pixel cache; default: a fifth of the free disk"),
    ] = None,
    runs: Runs = Path("runs"),
    device: Annotated[
        str | None, typer.Option("--device", metavar="DEVICE", help="auto (default), cpu, cuda or mps")
    ] = None,
) -> None:
    """Train a classifier on a folder of images, ending with runs/NAME/best and a report."""
    from holotype.config import TrainConfig, merge, parse_assignments

    flags = given(
        {
            "preset": preset,
            "model": {"name": model, "weights": weights},
            "fit": {"focus": None if focus is None else str(focus)},
            "data": {"cache_limit_gb": cache_limit},
        }
    )
    if resume is not None and (common.recipe or name):
        raise ConfigError(
            "a resumed run keeps its name and settings",
            where=f"--resume {resume}",
            fix="leave --name and --recipe out",
        )
    config, changes = None, None
    if resume is None:
        config = common.resolve(TrainConfig, flags)
    else:
        changes = merge(parse_assignments(common.settings), flags)
    need_training_libraries("training")
    from holotype import terminal
    from holotype.train import train as run

    result = run(data, name=name, config=config, overrides=changes, runs=runs, device=device, resume=resume)
    if result.first:
        common.show(
            {
                "run": str(result.folder),
                "bundle": {"path": str(result.best), "hash": result.bundle.hash},
                "interrupted": result.interrupted,
                "parity": dataclasses.asdict(result.parity),
                "report": result.report.model_dump(mode="json"),
            },
            lambda: terminal.show_report(result.report, result.folder),
        )
    if result.interrupted:
        raise typer.Exit(130)


@verb(app)
def evaluate(
    common: Common,
    target: Target,
    *,
    data: TrainedOn = None,
    split: Split = None,
    runtime: RuntimeName = None,
    threads: Threads = None,
    precision: Arithmetic = None,
    out: Annotated[Path | None, typer.Option("--out", help="folder for the report")] = None,
) -> None:
    """Measure a bundle on a dataset: metrics with intervals, confusion matrix, worst mistakes."""
    from holotype import terminal

    need_training_libraries("evaluation")
    from holotype.config import EvaluateConfig
    from holotype.evaluate import evaluate as run
    from holotype.evaluate import report_folder

    flags = {"split": split, "runtime": runtime, "threads": threads, "precision": precision}
    config = common.resolve(EvaluateConfig, flags)
    report = run(target, data, config=config, out=out, device=common.device)
    folder = out or report_folder(target, Path(report.dataset.path), report.split)
    common.show(report.model_dump(mode="json"), lambda: terminal.show_report(report, folder))


@verb(app)
def predict(
    common: Common,
    target: Target,
    *,
    paths: Annotated[
        list[str], typer.Argument(metavar="PATHS...", help="files, folders, globs; - reads names")
    ],
    style: Annotated[str, typer.Option("--format", metavar="FORMAT", help="table, csv or jsonl")] = "table",
    top: Annotated[int | None, typer.Option("--top", help="classes listed per image")] = None,
    runtime: RuntimeName = None,
    threads: Threads = None,
    precision: Arithmetic = None,
    show_input: Annotated[
        Path | None,
        typer.Option("--show-input", metavar="FOLDER", help="also write what the model sees, as PNG"),
    ] = None,
) -> None:
    """Classify images. A file that cannot be read becomes a row with its error, and the exit code is 1."""
    from holotype.config import PredictConfig

    if style not in ("table", "csv", "jsonl"):
        raise ConfigError("unknown format", where=f"--format {style}", fix="use table, csv or jsonl")
    flags = {"top": top, "runtime": runtime, "threads": threads, "precision": precision}
    config = common.resolve(PredictConfig, flags)
    broken = _predict(target, paths, config, style=style, show_input=show_input, common=common)
    if broken:
        raise typer.Exit(1)


@verb(app, without=("settings", "recipe", "device"))
def models(
    common: Common,
    pattern: Annotated[
        str | None, typer.Argument(metavar="[PATTERN]", help="a part of timm's names, or with *")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="measure latency on this machine; remembered")
    ] = False,
) -> None:
    """List architectures: size, published ImageNet top-1, latency here, and what each is good for."""
    need_training_libraries("the list of architectures")
    from holotype import terminal
    from holotype.catalogue import SOURCE, list_models

    entries = list_models(pattern, measure=measure)
    common.show(
        {"models": [dataclasses.asdict(entry) for entry in entries], "top1_source": SOURCE},
        lambda: terminal.show_models(entries, SOURCE),
    )


@verb(app, without=("quiet", "device"))
def config(
    common: Common,
    name: Annotated[str, typer.Argument(metavar="VERB", help=f"one of {', '.join(SECTIONS)}")],
) -> None:
    """Print every setting of a verb: key, type, value and meaning.

    The values are the defaults; with --set or --recipe those that the verb would have then, such as
    --set preset=thorough.
    """
    from holotype import terminal
    from holotype.config import settings_of

    if name not in SECTIONS:
        raise ConfigError("has no settings", where=name, fix=f"use one of {', '.join(SECTIONS)}")
    module, section = SECTIONS[name]
    settings = list(settings_of(common.resolve(getattr(importlib.import_module(module), section))))
    common.show(
        {"settings": [dataclasses.asdict(setting) for setting in settings]},
        lambda: terminal.show_settings(settings),
    )


def _predict(
    target: Path,
    paths: list[str],
    config: PredictConfig,
    *,
    style: str,
    show_input: Path | None,
    common: Common,
) -> int:
    """Print answers as they come; returns the number of files without one."""
    from holotype.predict import as_json, expand, save_inputs
    from holotype.predictor import load
    from holotype.preprocess import Limits
    from holotype.progress import note, track
    from holotype.terminal import prediction_lines

    files = expand(paths)
    predictor = load(
        target,
        runtime=config.runtime,
        precision=config.precision,
        threads=config.threads,
        device=common.device,
        limits=Limits(max_pixels=config.max_pixels),
    )
    if show_input is not None:
        count = len(list(save_inputs(predictor, files, show_input)))
        note(f"wrote what the model sees of {count} images to {show_input}")
    broken = 0
    rows = []
    with track("predicting", total=len(files)) as progress:

        def counted() -> Iterator[Prediction]:
            nonlocal broken
            for prediction in predictor.predict_many(files, top=config.top):
                broken += prediction.error is not None
                progress.advance()
                yield prediction

        if common.json:
            rows = [as_json(prediction) for prediction in counted()]
        else:
            for line in prediction_lines(counted(), style=style):
                typer.echo(line)
    if common.json:
        common.show({"bundle": predictor.bundle.hash, "results": rows}, lambda: None)
    if broken:
        note(f"{broken} of {len(files)} files could not be read")
    return broken

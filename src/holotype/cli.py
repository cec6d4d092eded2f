"""The command line: thin verbs that import what they need when they are called."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from holotype.errors import ConfigError, HolotypeError

if TYPE_CHECKING:
    from pydantic import BaseModel

    from holotype.config import PredictConfig
    from holotype.predictor import Prediction

__all__ = ["app", "main", "run"]

app = typer.Typer(
    name="holotype",
    help="From a folder of images to an image classifier in production, with proof at every step.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

# Global flags, offered by every verb.
Json = Annotated[bool, typer.Option("--json", help="print the result as one JSON object on stdout")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress and no notes on stderr")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="a setting, such as fit.epochs=3; repeatable"),
]
Recipe = Annotated[Path | None, typer.Option("--recipe", metavar="FILE", help="a YAML file of settings")]
Device = Annotated[str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda or mps")]

Data = Annotated[Path, typer.Argument(metavar="DATA", help="a class folder or a CSV file")]
Target = Annotated[
    Path, typer.Argument(metavar="TARGET", help="a bundle, or a run folder, which means its best")
]

Section = TypeVar("Section", bound="BaseModel")


@dataclass(frozen=True)
class _Output:
    """What the global flags ask of a verb's result."""

    json: bool

    def show(self, result: Any, text: Callable[[], None]) -> None:
        """Print the JSON object, or call what prints for people."""
        if self.json:
            print(json.dumps(result, allow_nan=False))  # noqa: T201
        else:
            text()


@app.command()
def demo(
    *,
    data: Annotated[Path, typer.Option("--data", help="where the digits are written")] = Path("digits"),
    runs: Annotated[Path, typer.Option("--runs", help="where run folders are made")] = Path("runs"),
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    settings: Set = None,
    recipe: Recipe = None,
    device: Device = "auto",
) -> None:
    """Train, export, prove and compare a classifier of handwritten digits, in under two minutes."""
    with _verb(as_json=as_json, quiet=quiet, debug=debug) as output:
        from holotype import terminal

        _need_training_libraries("the demo")
        from holotype.config import TrainConfig
        from holotype.demo import run_demo

        flags = {"preset": "probe", "augment": {"flip": 0.0}}
        config = _config(TrainConfig, recipe=recipe, settings=settings, flags=flags, weakest=True)
        result = run_demo(data=data, runs=runs, config=config, device=device)
        output.show(
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


@app.command()
def train(
    data: Data,
    *,
    name: Annotated[
        str | None, typer.Option("--name", help="name of the run; default: that of the data")
    ] = None,
    preset: Annotated[
        str | None, typer.Option("--preset", help="probe, fast, balanced (default) or thorough")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="a timm architecture")] = None,
    weights: Annotated[str | None, typer.Option("--weights", help="auto, none, or a file")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="seed of everything random")] = None,
    cache_limit: Annotated[
        float | None,
        typer.Option("--cache-limit", metavar="GB", help="pixel cache; default: a fifth of the free disk"),
    ] = None,
    runs: Annotated[Path, typer.Option("--runs", help="where run folders are made")] = Path("runs"),
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    settings: Set = None,
    recipe: Recipe = None,
    device: Device = "auto",
) -> None:
    """Train a classifier on a folder of images, ending with runs/NAME/best and a report."""
    with _verb(as_json=as_json, quiet=quiet, debug=debug) as output:
        from holotype.config import TrainConfig

        flags = _given(
            {
                "preset": preset,
                "model": {"name": model, "weights": weights},
                "fit": {"seed": seed},
                "data": {"cache_limit_gb": cache_limit},
            }
        )
        config = _config(TrainConfig, recipe=recipe, settings=settings, flags=flags)
        _need_training_libraries("training")
        from holotype import terminal
        from holotype.train import train as run

        result = run(data, name=name, config=config, runs=runs, device=device)
        output.show(
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


@app.command()
def evaluate(
    target: Target,
    *,
    data: Annotated[
        Path | None, typer.Argument(metavar="[DATA]", help="default: what the bundle was trained on")
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="auto, train, validation or test")] = None,
    runtime: Annotated[
        str | None, typer.Option("--runtime", help="auto, torch, onnxruntime or openvino")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="folder for the report")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    settings: Set = None,
    recipe: Recipe = None,
    device: Device = "auto",
) -> None:
    """Measure a bundle on a dataset: metrics with intervals, confusion matrix, worst mistakes."""
    with _verb(as_json=as_json, quiet=quiet, debug=debug) as output:
        from holotype import terminal

        _need_training_libraries("evaluation")
        from holotype.config import EvaluateConfig
        from holotype.evaluate import evaluate as run
        from holotype.evaluate import report_folder

        flags = _given({"split": split, "runtime": runtime})
        config = _config(EvaluateConfig, recipe=recipe, settings=settings, flags=flags)
        report = run(target, data, config=config, out=out, device=device)
        folder = out or report_folder(target, Path(report.dataset.path), report.split)
        output.show(report.model_dump(mode="json"), lambda: terminal.show_report(report, folder))


@app.command()
def predict(
    target: Target,
    *,
    paths: Annotated[
        list[str], typer.Argument(metavar="PATHS...", help="files, folders, globs; - reads names")
    ],
    style: Annotated[str, typer.Option("--format", metavar="FORMAT", help="table, csv or jsonl")] = "table",
    top: Annotated[int | None, typer.Option("--top", help="classes listed per image")] = None,
    runtime: Annotated[
        str | None, typer.Option("--runtime", help="auto, torch, onnxruntime or openvino")
    ] = None,
    show_input: Annotated[
        Path | None,
        typer.Option("--show-input", metavar="FOLDER", help="also write what the model sees, as PNG"),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    settings: Set = None,
    recipe: Recipe = None,
    device: Device = "auto",
) -> None:
    """Classify images. A file that cannot be read becomes a row with its error, and the exit code is 1."""
    with _verb(as_json=as_json, quiet=quiet, debug=debug) as output:
        from holotype.config import PredictConfig

        if style not in ("table", "csv", "jsonl"):
            raise ConfigError("unknown format", where=f"--format {style}", fix="use table, csv or jsonl")
        config = _config(
            PredictConfig, recipe=recipe, settings=settings, flags=_given({"top": top, "runtime": runtime})
        )
        broken = _predict(
            target, paths, config, style=style, show_input=show_input, output=output, device=device
        )
    if broken:
        raise typer.Exit(1)


@app.command()
def export(
    target: Target,
    *,
    kind: Annotated[str, typer.Option("--format", metavar="FORMAT", help="onnx or openvino")],
    data: Annotated[
        Path | None, typer.Option("--data", help="images for the parity gate; default: the training data")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="folder of the new bundle")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    settings: Set = None,
    recipe: Recipe = None,
) -> None:
    """Export a bundle for another runtime; accepted only if real images get the same answers."""
    with _verb(as_json=as_json, quiet=quiet, debug=debug) as output:
        from holotype.config import ExportConfig
        from holotype.export import FORMATS
        from holotype.export import export as run

        config = _config(ExportConfig, recipe=recipe, settings=settings, flags={})
        if kind not in FORMATS:
            raise ConfigError("unknown format", where=f"--format {kind}", fix=f"use {' or '.join(FORMATS)}")
        result = run(target, format=FORMATS[kind], data=data, out=out, config=config)
        parity = result.parity
        output.show(
            {
                "bundle": {"path": str(result.bundle.path), "hash": result.bundle.hash},
                "parity": dataclasses.asdict(parity),
            },
            lambda: typer.echo(
                f"{result.bundle.path}\n{parity.candidate} agrees with {parity.reference} on {parity.images}"
                f" images, probabilities within {parity.largest_difference:.1g}"
            ),
        )


@app.command()
def serve(
    target: Target,
    *,
    host: Annotated[str | None, typer.Option("--host", help="address; default 127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option("--port", help="default 8000; 0 takes a free one")] = None,
    workers: Annotated[int | None, typer.Option("--workers", help="inference processes; default 1")] = None,
    runtime: Annotated[
        str | None, typer.Option("--runtime", help="auto, torch, onnxruntime or openvino")
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
    settings: Set = None,
    recipe: Recipe = None,
) -> None:
    """Serve a bundle over HTTP: POST /predict, /livez, /readyz, /info, /docs."""
    with _verb(as_json=False, quiet=quiet, debug=debug):
        from holotype.serve import ServeSettings, run

        flags = _given({"host": host, "port": port, "workers": workers, "runtime": runtime})
        run(target, settings=_config(ServeSettings, recipe=recipe, settings=settings, flags=flags))


@app.command()
def models(
    pattern: Annotated[
        str | None, typer.Argument(metavar="[PATTERN]", help="a part of timm's names, or with *")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="measure latency on this machine; remembered")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """List architectures: size, published ImageNet top-1, latency here, and what each is good for."""
    with _verb(as_json=as_json, quiet=quiet, debug=debug) as output:
        _need_training_libraries("the list of architectures")
        from holotype import terminal
        from holotype.catalogue import SOURCE, list_models

        entries = list_models(pattern, measure=measure)
        output.show(
            {"models": [dataclasses.asdict(entry) for entry in entries], "top1_source": SOURCE},
            lambda: terminal.show_models(entries, SOURCE),
        )


@app.command()
def config(
    verb: Annotated[str, typer.Argument(metavar="VERB", help="train, evaluate, predict, export or serve")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Print every setting of a verb: key, type, default and meaning."""
    with _verb(as_json=as_json, quiet=False, debug=debug) as output:
        from holotype import terminal
        from holotype.config import settings_of

        sections = _sections()
        if verb not in sections:
            raise ConfigError("has no settings", where=verb, fix=f"use one of {', '.join(sections)}")
        settings = list(settings_of(sections[verb]()))
        output.show(
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
    output: _Output,
    device: str,
) -> int:
    """Print answers as they come; returns the number of files without one."""
    from holotype.predict import as_json, expand, save_inputs
    from holotype.predictor import load
    from holotype.preprocess import Limits
    from holotype.progress import note, track
    from holotype.terminal import prediction_lines

    files = expand(paths)
    predictor = load(
        target, runtime=config.runtime, device=device, limits=Limits(max_pixels=config.max_pixels)
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

        if output.json:
            rows = [as_json(prediction) for prediction in counted()]
        else:
            for line in prediction_lines(counted(), style=style):
                typer.echo(line)
    if output.json:
        output.show({"bundle": predictor.bundle.hash, "results": rows}, lambda: None)
    if broken:
        note(f"{broken} of {len(files)} files could not be read")
    return broken


def main() -> None:
    """Run the command line; every user-facing error is one line on stderr and a non-zero exit code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line; returns its exit code and prints errors as one line on stderr."""
    command = typer.main.get_command(app)
    try:
        code = command.main(args=arguments or ["--help"], prog_name="holotype", standalone_mode=False)
    except typer.Exit as stop:
        return stop.exit_code
    except typer.Abort:
        return 130
    except Exception as error:
        # A usage error of the parser: unknown verb or flag, missing argument, bad value.
        if not hasattr(error, "format_message"):
            raise
        message = " ".join(error.format_message().split())
        if message:
            typer.echo(f"holotype: {message.rstrip('.')}; see: {_help_line(error)}", err=True)
        return int(getattr(error, "exit_code", 2))
    return code if isinstance(code, int) else 0


def _help_line(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    return f"{context.command_path if context is not None else 'holotype'} --help"


@contextmanager
def _verb(*, as_json: bool, quiet: bool, debug: bool) -> Iterator[_Output]:
    """Apply the global flags, and turn errors into one line and an exit code."""
    from holotype.progress import quiet as quiet_flag

    quiet_flag.set(quiet)
    try:
        yield _Output(as_json)
    except HolotypeError as error:
        if debug:
            raise
        typer.echo(f"holotype: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        if debug:
            raise
        typer.echo("holotype: interrupted", err=True)
        raise typer.Exit(130) from None
    except BrokenPipeError:
        raise typer.Exit(141) from None
    except MemoryError:
        if debug:
            raise
        typer.echo(
            "holotype: out of memory; use a smaller batch (--set fit.batch_size=8) or image size", err=True
        )
        raise typer.Exit(1) from None
    except OSError as error:
        if debug:
            raise
        place = f"{error.filename}: " if error.filename else ""
        typer.echo(f"holotype: {place}{error.strerror or error}; check permissions and free disk", err=True)
        raise typer.Exit(1) from None


def _need_training_libraries(purpose: str) -> None:
    from holotype.errors import require

    for module in ("torch", "timm", "accelerate", "polars", "sklearn", "matplotlib"):
        require(module, extra="train", purpose=purpose)


def _config(
    model: type[Section],
    *,
    recipe: Path | None,
    settings: list[str] | None,
    flags: dict[str, Any],
    weakest: bool = False,
) -> Section:
    """Recipe, then --set, then flags; with `weakest`, the flags are defaults that a recipe overrides."""
    from holotype.config import merge, parse_assignments, read_recipe, resolve_config

    below = read_recipe(recipe) if recipe is not None else {}
    assigned = parse_assignments(settings or [])
    if weakest:
        return resolve_config(model, recipe=merge(flags, below), overrides=assigned)
    return resolve_config(model, recipe=below, overrides=merge(assigned, flags))


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    """Flags that were given: None means that a flag was not."""
    result: dict[str, Any] = {}
    for name, value in flags.items():
        inner = _given(value) if isinstance(value, dict) else value
        if inner not in (None, {}):
            result[name] = inner
    return result


def _sections() -> dict[str, Callable[[], type[BaseModel]]]:
    def of(module: str, name: str) -> Callable[[], type[BaseModel]]:
        import importlib

        return lambda: getattr(importlib.import_module(module), name)

    return {
        "train": of("holotype.config", "TrainConfig"),
        "evaluate": of("holotype.config", "EvaluateConfig"),
        "predict": of("holotype.config", "PredictConfig"),
        "export": of("holotype.config", "ExportConfig"),
        "serve": of("holotype.serve", "ServeSettings"),
    }

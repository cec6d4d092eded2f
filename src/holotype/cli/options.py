"""What every verb shares: the global flags, settings, output, and errors in one line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from holotype.errors import HolotypeError

if TYPE_CHECKING:
    from pydantic import BaseModel

__all__ = [
    "SECTIONS",
    "Data",
    "Debug",
    "Device",
    "Json",
    "Output",
    "Quiet",
    "Recipe",
    "Runs",
    "RuntimeName",
    "Set",
    "Split",
    "Target",
    "TrainedOn",
    "given",
    "need_training_libraries",
    "settings_from",
    "verb",
]

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

Data = Annotated[
    Path,
    typer.Argument(metavar="DATA", help="a folder of classes or annotations, a CSV or JSON file"),
]
Target = Annotated[
    Path, typer.Argument(metavar="TARGET", help="a bundle, or a run folder, which means its best")
]

TrainedOn = Annotated[
    Path | None,
    typer.Option("--data", metavar="DATA", help="the dataset; default: what the bundle was trained on"),
]
Split = Annotated[str | None, typer.Option("--split", help="auto, train, validation or test")]
RuntimeName = Annotated[str | None, typer.Option("--runtime", help="auto, torch, onnxruntime or openvino")]
Runs = Annotated[Path, typer.Option("--runs", help="where run folders are made")]

Section = TypeVar("Section", bound="BaseModel")


@dataclass(frozen=True)
class Output:
    """What the global flags ask of a verb's result."""

    json: bool

    def show(self, result: Any, text: Callable[[], None]) -> None:
        """Print the JSON object, or call what prints for people."""
        if self.json:
            print(json.dumps(result, allow_nan=False))  # noqa: T201
        else:
            text()


SECTIONS = {
    "train": ("holotype.config", "TrainConfig"),
    "tune": ("holotype.config", "TuneConfig"),
    "evaluate": ("holotype.config", "EvaluateConfig"),
    "predict": ("holotype.config", "PredictConfig"),
    "explain": ("holotype.config", "ExplainConfig"),
    "hard-samples": ("holotype.config", "HardSamplesConfig"),
    "export": ("holotype.config", "ExportConfig"),
    "serve": ("holotype.serve", "ServeSettings"),
    "audit": ("holotype.config", "AuditConfig"),
    "agree": ("holotype.config", "AgreeConfig"),
    "convert": ("holotype.config", "ConvertConfig"),
}
"""By verb: the module and name of its settings."""


@contextmanager
def verb(*, as_json: bool, quiet: bool, debug: bool) -> Iterator[Output]:
    """Apply the global flags, and turn errors into one line and an exit code."""
    from holotype.progress import quiet as quiet_flag

    before = quiet_flag.set(quiet)
    try:
        yield Output(as_json)
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
    finally:
        quiet_flag.reset(before)


def need_training_libraries(purpose: str) -> None:
    from holotype.errors import require

    for module in ("torch", "timm", "accelerate", "polars", "sklearn", "matplotlib"):
        require(module, extra="train", purpose=purpose)


def settings_from(
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


def given(flags: dict[str, Any]) -> dict[str, Any]:
    """Flags that were given: None means that a flag was not."""
    result: dict[str, Any] = {}
    for name, value in flags.items():
        inner = given(value) if isinstance(value, dict) else value
        if inner not in (None, {}):
            result[name] = inner
    return result

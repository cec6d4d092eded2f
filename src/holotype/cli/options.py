"""What every verb shares: the global flags, settings, output, and errors in one line."""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
    "Arithmetic",
    "Common",
    "Data",
    "Runs",
    "RuntimeName",
    "Split",
    "Target",
    "Threads",
    "TrainedOn",
    "given",
    "need_training_libraries",
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
RuntimeName = Annotated[
    str | None, typer.Option("--runtime", help="auto, torch, onnxruntime, openvino or tensorrt")
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="default: as measured, else all cores")]
Arithmetic = Annotated[str | None, typer.Option("--precision", help="auto, fp32 or bf16")]
Runs = Annotated[Path, typer.Option("--runs", help="where run folders are made")]

Section = TypeVar("Section", bound="BaseModel")

_PREFIX = "common_"  # so that no flag of a verb has the same name inside


@dataclass(frozen=True)
class Common:
    """What the global flags of a verb say."""

    json: bool = False
    quiet: bool = False
    debug: bool = False
    settings: Sequence[str] = ()
    recipe: Path | None = None
    device: str = "auto"

    def resolve(
        self, model: type[Section], flags: Mapping[str, Any] | None = None, *, weakest: bool = False
    ) -> Section:
        """Recipe, then --set, then the verb's own flags, where None means that a flag was not given.

        With `weakest`, the flags are defaults that a recipe overrides.
        """
        from holotype.config import merge, parse_assignments, read_recipe, resolve_config

        below = read_recipe(self.recipe) if self.recipe is not None else {}
        assigned, own = parse_assignments(self.settings), given(flags or {})
        if weakest:
            return resolve_config(model, recipe=merge(own, below), overrides=assigned)
        return resolve_config(model, recipe=below, overrides=merge(assigned, own))

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
    "compress": ("holotype.config", "CompressConfig"),
    "export": ("holotype.config", "ExportConfig"),
    "benchmark": ("holotype.config", "BenchmarkConfig"),
    "serve": ("holotype.serve", "ServeSettings"),
    "compare": ("holotype.config", "CompareConfig"),
    "audit": ("holotype.config", "AuditConfig"),
    "agree": ("holotype.config", "AgreeConfig"),
    "convert": ("holotype.config", "ConvertConfig"),
}
"""By verb: the module and name of its settings."""


_FLAGS: dict[str, tuple[Any, Any]] = {
    "json": (Json, False),
    "quiet": (Quiet, False),
    "debug": (Debug, False),
    "settings": (Set, None),
    "recipe": (Recipe, None),
    "device": (Device, "auto"),
}
"""The global flags: by field of `Common`, what typer reads and the default."""


def verb(
    app: typer.Typer, *, without: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a function to `app` as a verb: its first parameter is a `Common`, filled from the global flags.

    `without` are flags that this verb has no use for. Errors become one line and an exit code.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        hints = typing.get_type_hints(function, include_extras=True)
        _, *own = inspect.signature(function).parameters.values()
        flags = {name: flag for name, flag in _FLAGS.items() if name not in without}
        parameters = [parameter.replace(annotation=hints[parameter.name]) for parameter in own] + [
            inspect.Parameter(
                _PREFIX + name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind
            )
            for name, (kind, default) in flags.items()
        ]

        def called(**arguments: Any) -> None:
            said = {name: arguments.pop(_PREFIX + name) for name in flags}
            common = Common(**{name: value for name, value in said.items() if value is not None})
            with _errors_in_one_line(quiet=common.quiet, debug=common.debug):
                function(common, **arguments)

        called.__name__, called.__doc__ = function.__name__, function.__doc__
        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        app.command()(called)
        return function

    return register


@contextmanager
def _errors_in_one_line(*, quiet: bool, debug: bool) -> Iterator[None]:
    """Apply the global flags, and turn errors into one line and an exit code."""
    from holotype.progress import quiet as quiet_flag

    before = quiet_flag.set(quiet)
    try:
        yield
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
            "holotype: out of memory; free some, or use smaller images (--set data.size=128)", err=True
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


def given(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Flags that were given: None means that a flag was not."""
    result: dict[str, Any] = {}
    for name, value in flags.items():
        inner = given(value) if isinstance(value, dict) else value
        if inner not in (None, {}):
            result[name] = inner
    return result

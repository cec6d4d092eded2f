"""Verbs between a trained bundle and a server: thin, importing what they need when they are called."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from holotype.cli.options import Common, Target, TrainedOn, need_training_libraries, verb
from holotype.errors import ConfigError

__all__ = ["app"]

app = typer.Typer()


@verb(app)
def compress(
    common: Common,
    target: Target,
    *,
    data: TrainedOn = None,
    max_drop: Annotated[
        float | None,
        typer.Option("--max-drop", metavar="POINTS", help="of accuracy on validation; default 1.0"),
    ] = None,
    max_class_drop: Annotated[
        float | None, typer.Option("--max-class-drop", metavar="POINTS", help="of the recall of any class")
    ] = None,
    max_size: Annotated[
        str | None, typer.Option("--max-size", metavar="SIZE", help="of the file served, such as 5MB")
    ] = None,
    max_latency: Annotated[
        str | None,
        typer.Option("--max-latency", metavar="TIME", help="for one image on this machine, such as 3ms"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="folder; default: compressed in the run folder")
    ] = None,
) -> None:
    """Make a bundle smaller and faster inside a budget, or say which limit binds (exit code 3)."""
    need_training_libraries("compression")
    from holotype import terminal
    from holotype.compress import compress as run
    from holotype.config import CompressConfig

    budget = {
        "drop": max_drop,
        "class_drop": max_class_drop,
        "size": None if max_size is None else round(_number(max_size, _SIZES, flag="--max-size")),
        "latency": None if max_latency is None else _number(max_latency, _TIMES, flag="--max-latency"),
    }
    config = common.resolve(CompressConfig, {"budget": budget})
    outcome = run(target, data, out=out, config=config, device=common.device)
    common.show(outcome.model_dump(mode="json"), lambda: terminal.show_compressed(outcome))
    if outcome.chosen is None:
        raise typer.Exit(3)


@verb(app, without=("device",))
def benchmark(
    common: Common,
    *,
    targets: Annotated[list[Path], typer.Argument(metavar="TARGET...", help="bundles or run folders")],
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="DATA", help="also accuracy, and time from the bytes of its files"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.png", help="also draw the figures")
    ] = None,
) -> None:
    """Measure bundles across runtimes, precisions, batches and threads, in one interleaved run."""
    from holotype import terminal
    from holotype.benchmark import as_json
    from holotype.benchmark import benchmark as run
    from holotype.config import BenchmarkConfig

    result = run(targets, data=data, out=out, config=common.resolve(BenchmarkConfig))
    common.show(as_json(result), lambda: terminal.show_benchmark(result))


@verb(app, without=("device",))
def export(
    common: Common,
    target: Target,
    *,
    kind: Annotated[str, typer.Option("--format", metavar="FORMAT", help="onnx, openvino or tensorrt")],
    data: Annotated[
        Path | None, typer.Option("--data", help="images for the parity gate; default: the training data")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="folder of the new bundle")] = None,
) -> None:
    """Export a bundle for another runtime; accepted only if real images get the same answers."""
    need_training_libraries("export")
    from holotype import terminal
    from holotype.config import ExportConfig
    from holotype.export import FORMATS
    from holotype.export import export as run

    config = common.resolve(ExportConfig)
    if kind not in FORMATS:
        raise ConfigError("unknown format", where=f"--format {kind}", fix=f"use {' or '.join(FORMATS)}")
    result = run(target, format=FORMATS[kind], data=data, out=out, config=config)
    common.show(
        {
            "bundle": {"path": str(result.bundle.path), "hash": result.bundle.hash},
            "parity": dataclasses.asdict(result.parity),
            "fastest": None if result.fastest is None else dataclasses.asdict(result.fastest),
        },
        lambda: terminal.show_exported(result),
    )


_SIZES = {"b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30}
_TIMES = {"us": 1e-3, "ms": 1.0, "s": 1e3}


def _number(text: str, units: dict[str, float], *, flag: str) -> float:
    """A number with a unit: "5MB", "3 ms"."""
    compact = text.strip().lower().replace(" ", "")
    unit = next((unit for unit in sorted(units, key=len, reverse=True) if compact.endswith(unit)), None)
    try:
        return float(compact.removesuffix(unit or "")) * units[unit or ""]
    except (ValueError, KeyError):
        raise ConfigError(
            "not a number with a unit",
            where=f"{flag} {text}",
            fix=f"use one of {', '.join(units)}, as in 5{[*units][1]}",
        ) from None

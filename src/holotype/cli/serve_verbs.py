"""Verbs about what is in use: serve it, compare it with its successor, decide between them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from holotype.cli.options import Common, RuntimeName, Split, given, need_training_libraries, verb
from holotype.errors import ConfigError

__all__ = ["ab", "app"]

app = typer.Typer()
ab = typer.Typer(help="A/B tests of running servers.", no_args_is_help=True)

_CANNOT_TELL, _WORSE = 4, 3


@verb(app, without=("json", "device"))
def serve(
    common: Common,
    *,
    targets: Annotated[
        list[str], typer.Argument(metavar="TARGET...", help="bundles or run folders; NAME=PATH names one")
    ],
    host: Annotated[str | None, typer.Option("--host", help="address; default 127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option("--port", help="default 8000; 0 takes a free one")] = None,
    workers: Annotated[int | None, typer.Option("--workers", help="inference processes; default 1")] = None,
    runtime: RuntimeName = None,
    threads: Annotated[
        int | None,
        typer.Option("--threads", help="of each process; default: the cores, shared by the processes"),
    ] = None,
    precision: Annotated[str | None, typer.Option("--precision", help="auto, fp32 or bf16")] = None,
    challenger: Annotated[
        Path | None, typer.Option("--challenger", metavar="TARGET", help="begin an A/B test of the first one")
    ] = None,
    share: Annotated[
        str | None, typer.Option("--share", metavar="SHARE", help="of the challenger, such as 10%")
    ] = None,
    shadow: Annotated[
        bool, typer.Option("--shadow", help="the challenger answers beside the champion; nobody sees it")
    ] = False,
    auto: Annotated[
        str | None, typer.Option("--auto", help="on a verdict: promote, rollback or both; default none")
    ] = None,
) -> None:
    """Serve bundles over HTTP: a page at /, POST /predict, /v2, /metrics, /docs."""
    from holotype.serve import ServeSettings, run

    rule = given({"share": None if share is None else _share(share), "shadow": shadow or None, "auto": auto})
    if rule and challenger is None:
        raise ConfigError(
            "means nothing without a challenger", where=f"--{next(iter(rule))}", fix="add --challenger"
        )
    flags = {
        "host": host, "port": port, "workers": workers, "runtime": runtime, "threads": threads,
        "precision": precision, "experiment": rule or None,
    }  # fmt: skip
    run(targets, settings=common.resolve(ServeSettings, given(flags)), challenger=challenger)


@verb(app, without=("device",))
def compare(
    common: Common,
    a: Annotated[Path, typer.Argument(metavar="A", help="a bundle or run folder")],
    b: Annotated[Path, typer.Argument(metavar="B", help="its successor")],
    *,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="DATA", help="default: what A was trained on")
    ] = None,
    split: Split = None,
    margin: Annotated[
        float | None,
        typer.Option("--margin", metavar="POINTS", help="loss that is still not worse; default 1"),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="folder of the report")] = None,
) -> None:
    """Say whether B is better than A on the same images (exit code 3: worse, 4: cannot tell)."""
    need_training_libraries("a comparison")
    from holotype import terminal
    from holotype.compare import compare as run
    from holotype.config import CompareConfig

    config = common.resolve(CompareConfig, given({"split": split, "margin": margin}))
    found = run(a, b, data, config=config, out=out)
    common.show(found.model_dump(mode="json"), lambda: terminal.show_comparison(found))
    if found.verdict in ("worse", "can't tell"):
        raise typer.Exit(_WORSE if found.verdict == "worse" else _CANNOT_TELL)


@verb(ab, without=("settings", "recipe", "device"))
def status(
    common: Common,
    *,
    database: Annotated[
        str | None,
        typer.Option("--database", metavar="URL", help="default: the latest that a server here wrote"),
    ] = None,
    experiment: Annotated[str | None, typer.Option("--experiment", help="default: the latest")] = None,
) -> None:
    """How an A/B test stands: both arms, the difference however often one looks, and what to do."""
    from holotype import terminal
    from holotype.ab import pending as count_pending
    from holotype.ab import status as run
    from holotype.progress import note

    found = run(database=database, experiment=experiment)
    pending = count_pending(database=database)
    content = dataclasses.asdict(found) | {"rule": found.rule.model_dump(mode="json")}
    common.show(content | {"pending": pending}, lambda: terminal.show_experiment(found))
    if pending:
        note(f"{pending:,} answers and labels wait in a journal here and are not counted yet")


def _share(text: str) -> float:
    """ "10%" or "0.1"."""
    compact = text.strip()
    try:
        return float(compact[:-1]) / 100 if compact.endswith("%") else float(compact)
    except ValueError:
        raise ConfigError("is no share", where=f"--share {text}", fix="use 10% or 0.1") from None

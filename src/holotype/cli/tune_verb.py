"""The verb that searches settings: thin, importing what it needs when it is called."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from holotype.cli.options import (
    Common,
    Data,
    Runs,
    need_training_libraries,
    verb,
)
from holotype.errors import require

__all__ = ["app"]

app = typer.Typer()


@verb(app)
def tune(
    common: Common,
    data: Data,
    *,
    name: Annotated[
        str | None, typer.Option("--name", help="name of the study; default: that of the data, and -tune")
    ] = None,
    trials: Annotated[
        int | None, typer.Option("--trials", metavar="N", min=1, help="trials in all; default 20")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option("--minutes", metavar="M", help="no new trial after so many minutes")
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option("--storage", metavar="URL", help="a database for several machines; default: a file"),
    ] = None,
    runs: Runs = Path("runs"),
) -> None:
    """Search settings of training by validation, ending with a recipe; the same command goes on with it.

    The space is a setting: --set space.fit.layer_decay='{low: 0.7, high: 1}', or a list of choices. Settings
    of every trial begin with train: --set train.preset=fast.
    """
    from holotype.config import TuneConfig

    config = common.resolve(TuneConfig, {"trials": trials, "minutes": minutes})
    need_training_libraries("a search")
    require("optuna", extra="train", purpose="a search")
    from holotype import terminal
    from holotype.tune import tune as run

    result = run(data, name=name, config=config, runs=runs, storage=storage, device=common.device)
    common.show(
        {
            "study": str(result.folder),
            "best": None if result.best is None else dataclasses.asdict(result.best),
            "trials": [dataclasses.asdict(row) for row in result.trials],
            "storage": result.storage,
            "recipe": None if result.recipe is None else str(result.recipe),
            "report": None if result.report is None else str(result.report),
            "next": result.next_command,
            "interrupted": result.interrupted,
        },
        lambda: terminal.show_tune(result),
    )
    if result.interrupted:
        raise typer.Exit(130)

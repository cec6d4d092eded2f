"""Verbs about what a model finds hard: thin, importing what they need when they are called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from holotype.cli.options import (
    Common,
    RuntimeName,
    Split,
    Target,
    TrainedOn,
    given,
    need_training_libraries,
    verb,
)

__all__ = ["app"]

app = typer.Typer()


@verb(app)
def explain(
    common: Common,
    target: Target,
    *,
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="PATHS", help="images; default: those of the most confused classes"),
    ] = None,
    data: TrainedOn = None,
    split: Split = None,
    pairs: Annotated[int | None, typer.Option("--pairs", help="confused pairs shown; default 3")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="folder of the page and the picture")] = None,
) -> None:
    """Show where the network saw a class (Grad-CAM): in confused images, side by side, or in given ones."""
    need_training_libraries("explaining")
    from holotype import terminal
    from holotype.config import ExplainConfig
    from holotype.errors import ConfigError
    from holotype.explain import explain as run
    from holotype.predict import expand

    flags = given({"split": split, "pairs": pairs})
    if paths and (flags or data is not None):
        raise ConfigError(
            "given images have no split and no pairs",
            where="--data, --split, --pairs",
            fix="leave it out",
        )
    config = common.resolve(ExplainConfig, flags)
    result = run(
        target, expand(paths) if paths else (), data=data, config=config, out=out, device=common.device
    )
    common.show(result.model_dump(mode="json"), lambda: terminal.show_explanation(result))
    if result.unreadable:
        raise typer.Exit(1)


@verb(app)
def hard_samples(
    common: Common,
    target: Target,
    *,
    data: TrainedOn = None,
    split: Split = None,
    count: Annotated[int | None, typer.Option("--count", help="hardest images; default 50")] = None,
    neighbours: Annotated[
        int | None, typer.Option("--neighbours", help="nearest training images of each; default 3")
    ] = None,
    runtime: RuntimeName = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.csv", help="the list; a page goes beside it")
    ] = None,
) -> None:
    """List the images with the highest loss and the training images nearest to them, for train --focus."""
    need_training_libraries("finding hard samples")
    from holotype import terminal
    from holotype.config import HardSamplesConfig
    from holotype.hard_samples import hard_samples as run

    config = common.resolve(
        HardSamplesConfig, {"split": split, "count": count, "neighbours": neighbours, "runtime": runtime}
    )
    result = run(target, data, config=config, out=out, device=common.device)
    common.show(result.model_dump(mode="json"), lambda: terminal.show_hard_samples(result))

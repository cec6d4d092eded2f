"""Verbs about data: thin, importing what they need when they are called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from holotype.cli.options import (
    Common,
    Data,
    need_training_libraries,
    verb,
)
from holotype.errors import ConfigError

__all__ = ["agree", "app"]

app = typer.Typer()
agree = typer.Typer(
    no_args_is_help=True,
    help="Double-blind annotation: plan tasks, score agreement, adjudicate what is in doubt, apply it.",
)

NewClasses = Annotated[
    list[str] | None, typer.Option("--new-class", metavar="NAME", help="a class the data has not; repeatable")
]


@verb(app)
def audit(
    common: Common,
    data: Data,
    *,
    out: Annotated[
        Path | None, typer.Option("--out", help="folder of the report, default audits/NAME")
    ] = None,
    junit: Annotated[
        Path | None, typer.Option("--junit", metavar="FILE", help="also write the gates as JUnit XML")
    ] = None,
    fix_split: Annotated[
        bool, typer.Option("--fix-split", help="write a new revision of the split that keeps copies together")
    ] = False,
    review_sample: Annotated[
        int | None,
        typer.Option("--review-sample", metavar="N", min=1, help="draw N random images to judge labels by"),
    ] = None,
) -> None:
    """Judge a dataset before training on it: exit code 0 ready, 3 fix first, 4 unusable."""
    from holotype.config import AuditConfig

    config = common.resolve(AuditConfig)
    need_training_libraries("an audit")
    from holotype import terminal
    from holotype.audit import audit as run

    result = run(
        data,
        config=config,
        out=out,
        junit=junit,
        fix_split=fix_split,
        review_sample=review_sample,
        device=common.device,
    )
    common.show(result.audit.model_dump(mode="json"), lambda: terminal.show_audit(result))
    raise typer.Exit(result.exit_code)


@verb(app, without=("device",))
def convert(
    common: Common,
    data: Data,
    *,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="a folder, or a .csv or .parquet file")],
    kind: Annotated[
        str | None, typer.Option("--to", metavar="KIND", help="folders, csv or parquet; default: by OUT")
    ] = None,
    boxes: Annotated[
        str | None, typer.Option("--boxes", metavar="POLICY", help="crop, single or reject")
    ] = None,
    preview: Annotated[
        Path | None, typer.Option("--preview", metavar="FILE", help="also draw a contact sheet (.png, .jpg)")
    ] = None,
) -> None:
    """Write a dataset of any format as class folders, CSV or Parquet. Bad records are listed; exit code 1."""
    from pydantic_core import to_jsonable_python

    from holotype.config import ConvertConfig

    config = common.resolve(ConvertConfig, {"data": {"boxes": boxes}})
    need_training_libraries("converting")
    from holotype import terminal
    from holotype.convert import TARGETS
    from holotype.convert import convert as run

    if kind is not None and kind not in TARGETS:
        raise ConfigError("unknown kind", where=f"--to {kind}", fix=f"use {', '.join(TARGETS)}")
    target = None if kind is None else TARGETS[kind]
    result = run(data, out, to=target, config=config, preview=preview)
    common.show(to_jsonable_python(result), lambda: terminal.show_converted(result))
    if result.problems:
        raise typer.Exit(1)


@verb(agree, without=("device",))
def plan(
    common: Common,
    data: Data,
    *,
    annotators: Annotated[str, typer.Option("--annotators", metavar="A,B,...", help="two or more names")],
    overlap: Annotated[
        float, typer.Option("--overlap", min=0, max=1, help="share that all of them get; at least 200 images")
    ] = 0.1,
    classes: Annotated[
        str | None, typer.Option("--classes", metavar="A,B,...", help="default: those of the data")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="folder of the tasks")] = Path("annotation"),
) -> None:
    """Deal images to annotators: a task file each, in random order, nobody seeing another's label."""
    from holotype.config import AgreeConfig

    config = common.resolve(AgreeConfig)
    need_training_libraries("planning annotation")
    from holotype import terminal
    from holotype.agree.plan import plan as run

    result = run(
        data,
        annotators=_names(annotators),
        overlap=overlap,
        out=out,
        classes=_names(classes) if classes is not None else None,
        config=config,
    )
    common.show(result.model_dump(mode="json"), lambda: terminal.show_plan(result, out))


@verb(agree, without=("device",))
def score(
    common: Common,
    *,
    files: Annotated[
        list[Path], typer.Argument(metavar="FILES...", help="annotators' CSVs or Label Studio exports")
    ],
    plan_file: Annotated[
        Path | None, typer.Option("--plan", metavar="FILE", help="plan.json; default: that beside the files")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model", metavar="TARGET", help="a bundle, not trained on these images, to ask as well"
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="folder of the report and the consensus")] = None,
) -> None:
    """Measure how far annotators agree: exit code 0 accept, 3 tentative, 4 rewrite the guideline."""
    from holotype.config import AgreeConfig

    config = common.resolve(AgreeConfig)
    need_training_libraries("scoring agreement")
    from holotype import terminal
    from holotype.agree.score import score as run

    result = run(files, plan=plan_file, model=model, out=out, config=config)
    common.show(result.model_dump(mode="json"), lambda: terminal.show_agreement(result))
    raise typer.Exit(result.exit_code)


@verb(agree, without=("device",))
def adjudicate(
    common: Common,
    data: Data,
    *,
    votes: Annotated[
        list[Path] | None, typer.Option("--votes", metavar="FILE", help="an annotator's file; repeatable")
    ] = None,
    plan_file: Annotated[
        Path | None, typer.Option("--plan", metavar="FILE", help="plan.json; default: that beside the votes")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="also write the queue as CSV and for Label Studio")
    ] = None,
    port: Annotated[int, typer.Option("--port", help="of the page on 127.0.0.1; 0 takes a free one")] = 8001,
    page: Annotated[bool, typer.Option("--page/--no-page", help="serve it, or only write files")] = True,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="open a browser")] = True,
    new_classes: NewClasses = None,
) -> None:
    """Decide, on a page in the browser, what is in doubt: review sample, disagreements, suspected labels."""
    from pydantic_core import to_jsonable_python

    from holotype.config import AgreeConfig

    config = common.resolve(AgreeConfig)
    need_training_libraries("relabelling")
    from holotype import terminal
    from holotype.agree.adjudicate import adjudicate as run

    result = run(
        data,
        votes=votes or (),
        plan=plan_file,
        out=out,
        config=config,
        port=port if page else None,
        open_browser=browser,
        new_classes=new_classes or (),
    )
    common.show(to_jsonable_python(result), lambda: terminal.show_adjudicated(result, data))


@verb(agree, without=("device",))
def apply(
    common: Common,
    data: Data,
    *,
    decisions: Annotated[
        Path | None,
        typer.Option("--decisions", metavar="FILE", help="a filled queue.csv or Label Studio export"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="also write all labels as a .csv")
    ] = None,
    new_classes: NewClasses = None,
) -> None:
    """Make the decisions a new revision of the labels; the data and earlier revisions are kept."""
    from pydantic_core import to_jsonable_python

    from holotype.config import AgreeConfig

    config = common.resolve(AgreeConfig)
    need_training_libraries("applying decisions")
    from holotype import terminal
    from holotype.agree.apply import apply as run

    result = run(data, decisions=decisions, out=out, config=config, new_classes=new_classes or ())
    common.show(to_jsonable_python(result), lambda: terminal.show_applied(result))


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]

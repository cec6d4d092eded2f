"""The command line: `..._verb.py` and `..._verbs.py` hold the verbs, `options.py` what they share."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from holotype import __version__
from holotype.cli import data_verbs, deploy_verbs, insight_verbs, model_verbs, serve_verbs, tune_verb

__all__ = ["app", "main", "run"]

app = typer.Typer(
    name="holotype",
    help="From a folder of images to an image classifier in production, with proof at every step.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _tell_version(asked: bool) -> None:
    if asked:
        typer.echo(f"holotype {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="print it and exit")
    ] = False,
) -> None:
    pass


app.add_typer(data_verbs.app)
app.add_typer(data_verbs.agree, name="agree")
app.add_typer(model_verbs.app)
app.add_typer(deploy_verbs.app)
app.add_typer(serve_verbs.app)
app.add_typer(serve_verbs.ab, name="ab")
app.add_typer(insight_verbs.app)
app.add_typer(tune_verb.app)


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

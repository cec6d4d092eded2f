"""The README's blocks are executed as they stand, in order, in one empty folder with the demo's digits."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    return [body for kind, body in BLOCK.findall(README.read_text()) if kind == language]


def commands() -> list[str]:
    """The lines after `$ ` of the console blocks, but the two commands of a fresh clone and the server."""
    lines = [line[2:] for body in blocks("console") for line in body.splitlines() if line.startswith("$ ")]
    waiting = ("holotype serve", "holotype agree adjudicate", "holotype ab")
    return [line for line in lines if line.startswith("holotype") and not line.startswith(waiting)]


def verdicts(command: str) -> tuple[int, ...]:
    """The exit codes with which a command has done what it should; 3 asks for a fix."""
    return (0, 3) if command.startswith("holotype audit") else (0,)


@pytest.mark.slow
def test_every_command_and_the_five_lines_work(tmp_path: Path) -> None:
    environment = {**os.environ, "COLUMNS": "110"}
    found = commands()
    assert found[0] == "holotype demo"
    assert len(found) >= 6
    for command in found:
        arguments = [sys.executable, "-m", *shlex.split(command)]
        done = subprocess.run(
            arguments, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode in verdicts(command), f"{command}\n{done.stderr}"
        assert done.stdout.strip(), command
    (code,) = blocks("python")
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_every_verb_is_shown() -> None:
    import typer

    from holotype.cli import app

    def verbs(command: Any, name: str) -> Iterator[str]:
        parts = getattr(command, "commands", None)
        if parts is None:
            yield name
        for part, inner in (parts or {}).items():
            yield from verbs(inner, f"{name} {part}".strip())

    text = README.read_text()
    names = list(verbs(typer.main.get_command(app), ""))
    assert len(names) >= 14
    assert [name for name in names if f"holotype {name}" not in text] == []

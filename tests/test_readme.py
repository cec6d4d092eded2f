"""The README's blocks are executed as they stand, in order, in one empty folder with the demo's digits."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    return [body for kind, body in BLOCK.findall(README.read_text()) if kind == language]


def commands() -> list[str]:
    """The lines after `$ ` of the console blocks, but the two commands of a fresh clone and the server."""
    lines = [line[2:] for body in blocks("console") for line in body.splitlines() if line.startswith("$ ")]
    return [line for line in lines if line.startswith("holotype") and "serve" not in line]


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
        assert done.returncode == 0, f"{command}\n{done.stderr}"
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
    from holotype.cli import app

    text = README.read_text()
    names = [command.callback.__name__ for command in app.registered_commands if command.callback]
    assert len(names) >= 8
    assert [name for name in names if f"holotype {name}" not in text] == []

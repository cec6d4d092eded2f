"""A real PostgreSQL on loopback, which tests start, stop and start again."""

from __future__ import annotations

import getpass
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))


@dataclass(frozen=True)
class Postgres:
    """A cluster of its own in a temporary folder."""

    folder: Path
    port: int

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        _run("pg_ctl", "-D", f"{self.folder}/data", "-l", f"{self.folder}/log", "-w", "-o", options, "start")

    def stop(self) -> None:
        _run("pg_ctl", "-D", f"{self.folder}/data", "-w", "-m", "immediate", "stop")


@contextmanager
def postgres() -> Iterator[Postgres]:
    folder = Path(tempfile.mkdtemp(prefix="holotype-postgres-"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if getpass.getuser() == "root":
        shutil.chown(folder, "postgres")
    _run("initdb", "-D", f"{folder}/data", "-A", "trust", "-U", "postgres")
    cluster = Postgres(folder, port)
    cluster.start()
    try:
        yield cluster
    finally:
        subprocess.run(_command("pg_ctl", "-D", f"{folder}/data", "-m", "immediate", "stop"), check=False)
        shutil.rmtree(folder, ignore_errors=True)


def _run(program: str, *arguments: str) -> None:
    subprocess.run(_command(program, *arguments), check=True, stdout=subprocess.DEVNULL, timeout=60)


def _command(program: str, *arguments: str) -> list[str]:
    """PostgreSQL refuses to run as root."""
    command = [str(BINARIES[-1].with_name(program)), *arguments]
    return ["runuser", "-u", "postgres", "--", *command] if getpass.getuser() == "root" else command

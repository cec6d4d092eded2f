"""Progress with time left, on stderr, so that stdout stays clean for results."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Tracker", "console", "note", "quiet", "track", "warn"]

quiet: ContextVar[bool] = ContextVar("quiet", default=False)
"""True silences progress and notes (`--quiet`); errors are always shown."""


class Tracker(Protocol):
    """What a long job calls as it goes."""

    def advance(self, steps: int = 1, /, *, status: str = "") -> None: ...


class _Silent:
    def advance(self, steps: int = 1, /, *, status: str = "") -> None:
        pass


def console() -> Console:
    """The rich console on stderr."""
    from rich.console import Console

    return Console(stderr=True, quiet=quiet.get(), highlight=False, soft_wrap=True)


def note(message: str) -> None:
    """Tell the user one line, unless `quiet`."""
    if not quiet.get():
        with suppress(OSError):  # a log on a full disk is no reason to stop
            console().print(message, markup=False)


def warn(message: str) -> None:
    """Tell the user one line about what is not as it should be, unless `quiet`."""
    note(f"warning: {message}")


@contextmanager
def track(label: str, *, total: int) -> Iterator[Tracker]:
    """A progress bar with rate and time left on a terminal; silent when stderr is not one."""
    if quiet.get() or not sys.stderr.isatty():
        yield _Silent()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )
    with Progress(*columns, console=console(), transient=True) as progress:
        task = progress.add_task(label, total=total, status="")

        class Bar:
            def advance(self, steps: int = 1, /, *, status: str = "") -> None:
                if status:
                    progress.update(task, status=status)
                progress.advance(task, steps)

        yield Bar()

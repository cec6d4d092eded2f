"""How tables and lines look on every terminal."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

__all__ = [
    "named_way",
    "open_console",
    "open_table",
]

_WIDE = 200


def named_way(runtime: str, precision: str) -> str:
    """A runtime, with the arithmetic of what is not in integers where it is not the usual one."""
    return runtime if precision == "fp32" else f"{runtime} {precision}"


def open_table(*titles: str, left: Sequence[str] | None = None) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        aligned_left = title == titles[0] if left is None else title in left
        table.add_column(
            title, justify="left" if aligned_left else "right", no_wrap=title in (titles[0], "runs in")
        )
    return table


def open_console() -> Console:
    """As wide as the terminal; in a file or a pipe, where nobody knows how wide, no row is folded."""
    console = Console(highlight=False, soft_wrap=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDE
    return console

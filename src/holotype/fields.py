"""Types of the fields of our JSON contracts."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

__all__ = ["Count", "Share", "Text", "printable"]


def printable(text: str) -> str:
    """File names that are not UTF-8 reach Python as lone surrogates, which neither JSON nor HTML can hold."""
    return text.encode("utf-8", "backslashreplace").decode()


def _printable(value: object) -> object:
    return printable(value) if isinstance(value, str) else value


Text = Annotated[str, BeforeValidator(_printable)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]

"""JSON from elsewhere: every value has its line for messages, and none is trusted to be what it should."""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from holotype.errors import DatasetError

__all__ = ["JsonFile", "Place", "as_list", "as_number", "as_object", "as_text", "read_json"]

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")
Pointer = tuple[str | int, ...]


@dataclass(frozen=True)
class JsonFile:
    """A parsed file. `name` is POSIX and relative to the dataset's root."""

    name: str
    text: str = field(repr=False)
    value: Any = field(repr=False)
    _latest: dict[int, tuple[Pointer, dict[str | int, int]]] = field(
        default_factory=dict, repr=False, compare=False
    )

    @property
    def folder(self) -> str:
        return self.name.rpartition("/")[0]

    def at(self, *pointer: str | int) -> Place:
        """Where the value at `pointer`, such as `("annotations", 17)`, is written."""
        return Place(self, pointer)

    def line(self, pointer: Pointer) -> int:
        """The line on which the value at `pointer` starts, from 1."""
        offset = _SPACE.match(self.text).end()  # type: ignore[union-attr]  # matches anything
        for depth, key in enumerate(pointer):
            offset = self._members(pointer[:depth], offset)[key]
        return bisect_left(self._breaks, offset) + 1

    def _members(self, pointer: Pointer, offset: int) -> dict[str | int, int]:
        # Bad records come in order: the list that holds one, at each depth, holds the next one too.
        known, members = self._latest.get(len(pointer), (None, {}))
        if known != pointer:
            members = dict(_members(self.text, offset))
            self._latest[len(pointer)] = pointer, members
        return members

    @cached_property
    def _breaks(self) -> list[int]:
        return [found.start() for found in re.finditer("\n", self.text)]


@dataclass(frozen=True)
class Place:
    """A value's place. The line is only looked for where a message needs it: few records are bad."""

    file: JsonFile
    pointer: Pointer

    def __str__(self) -> str:
        steps = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in self.pointer)
        return f"{self.file.name}: line {self.file.line(self.pointer)} ({steps.lstrip('.')})"


def read_json(file: Path, *, name: str) -> JsonFile:
    """Parse a UTF-8 file; `DatasetError` with the line where it is not JSON."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
        return JsonFile(name, text, json.loads(text))
    except OSError as error:
        raise DatasetError(f"cannot be read ({error.strerror})", where=name, fix="check the file") from error
    except UnicodeDecodeError as error:
        raise DatasetError("is not UTF-8", where=name, fix="save it as UTF-8") from error
    except json.JSONDecodeError as error:
        raise DatasetError(
            f"is not JSON ({error.msg})", where=f"{name}: line {error.lineno}", fix="export it again"
        ) from error
    except RecursionError as error:
        raise DatasetError(
            "is nested too deeply to be annotations", where=name, fix="export it again"
        ) from error
    except ValueError as error:  # a number of thousands of digits
        raise DatasetError(f"is not usable JSON ({error})", where=name, fix="export it again") from error


def _members(text: str, start: int) -> Iterator[tuple[str | int, int]]:
    """Key and offset of each value in the array or object at `start` of a text that is known to be JSON."""
    named = text[start] == "{"
    position = _skip(text, start + 1)
    index = 0
    while text[position] not in "]}":
        key: str | int = index
        if named:
            key, position = _DECODER.raw_decode(text, position)
            position = _skip(text, _skip(text, position) + 1)
        yield key, position
        _, position = _DECODER.raw_decode(text, position)
        position = _skip(text, position)
        if text[position] == ",":
            position = _skip(text, position + 1)
        index += 1


def _skip(text: str, position: int) -> int:
    return _SPACE.match(text, position).end()  # type: ignore[union-attr]  # matches anything


def as_object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DatasetError(f"{what} is {_kind(value)}, not an object")
    return value


def as_list(value: object, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise DatasetError(f"{what} is {_kind(value)}, not a list")
    return value


def as_number(value: object, what: str) -> float:
    """A finite number. JSON from Python may hold NaN, and integers of any length."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DatasetError(f"{what} is {_kind(value)}, not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise DatasetError(f"{what} is not a finite number")
    return number


def as_text(value: object, what: str) -> str:
    """Text that is not blank, without the space around it, and that a file can hold."""
    if not isinstance(value, str):
        raise DatasetError(f"{what} is {_kind(value)}, not text")
    text = value.strip()
    if not text:
        raise DatasetError(f"{what} is empty")
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise DatasetError(f"{what} holds characters that no text file can")
    return text


def _kind(value: object) -> str:
    if value is None:
        return "missing"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "an object")

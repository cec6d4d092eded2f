"""What is told to people on stderr, as JSON lines: for those who collect logs, every line is JSON."""

from __future__ import annotations

import io
import json
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO, cast

__all__ = ["JsonNotes", "speak_json"]

_LEVEL = re.compile(r"(critical|error|warning|info|debug|holotype): +", re.IGNORECASE)
_TRACEBACK = "Traceback (most recent call last)"


class JsonNotes(io.TextIOBase):
    """A stream that makes `{"at", "level", "text"}` of each line; a traceback is one line.

    The level is what the line begins with (`warning: ...`), else info. `sink` gets lines without their end.
    """

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, sink: Callable[[str], None]) -> None:
        self._sink = sink
        self._lock = threading.Lock()
        self._rest = ""
        self._traceback: list[str] = []

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._rest = (self._rest + text).split("\n")
            for line in lines:
                self._take(line)
        return len(text)

    def _take(self, line: str) -> None:
        if line.startswith(_TRACEBACK):
            self._traceback = [line]
        elif self._traceback:
            self._traceback.append(line)
            if not line.startswith(" "):  # the error itself
                text, self._traceback = "\n".join(self._traceback), []
                self._say("error", text)
        elif line.strip():
            found = _LEVEL.match(line)
            level = found[1].lower() if found else "info"
            self._say("error" if level == "holotype" else level, line[found.end() :] if found else line)

    def _say(self, level: str, text: str) -> None:
        self._sink(json.dumps({"at": round(time.time(), 3), "level": level, "text": text}))


def speak_json(sink: Callable[[str], None] | None = None) -> None:
    """From now on what this process writes to `sys.stderr` is JSON, but on a terminal, where people read.

    By default it goes where it went before.
    """
    before = sys.stderr
    if not before.isatty():
        sys.stderr = cast("TextIO", JsonNotes(sink or (lambda line: _write(before, line))))


def _write(stream: TextIO, line: str) -> None:
    stream.write(line + "\n")
    stream.flush()

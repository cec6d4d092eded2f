"""Ctrl-C and SIGTERM while training: the step is finished and saved; a second Ctrl-C stops at once.

SIGTERM is what a job scheduler sends, and a launcher to the processes that are left when one has died.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Interrupt", "interruptible", "say_the_last_word", "terminable"]


class Interrupt:
    """Whether somebody asked to stop."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, _number: int, _frame: FrameType | None, /) -> None:
        """Handle a signal."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Within, SIGINT and SIGTERM are noted rather than obeyed; elsewhere than in the main thread nothing is.

    An optimizer step that is half done can be neither saved nor repeated, so nobody may break into it.
    """
    outer = signal.getsignal(signal.SIGINT)
    if isinstance(outer, Interrupt):
        yield outer  # a block within another: who asked to stop one of them asked both
        return
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def terminable() -> Iterator[None]:
    """Within, SIGTERM raises `KeyboardInterrupt` as Ctrl-C does, so that how to go on can still be said."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        # Who has a last word to say keeps it: the process ends anyway.
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
            signal.signal(signal.SIGTERM, before)


def say_the_last_word() -> None:
    """Let no SIGTERM end this process before it has said its error: a launcher sends one within 0.1 s."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

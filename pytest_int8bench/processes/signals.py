"""Handle signals temporarily."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn


@contextlib.contextmanager
def handling(
    handler: signal._HANDLER, *signals: signal.Signals, only_default: bool = False
) -> Iterator[None]:
    """Replace the handlers of signals temporarily, except for ignored signals.

    Python allows this only in the main thread; in other threads, this does nothing.

    Args:
        handler: the new handler.
        signals: the signals to handle.
        only_default: leave signals alone that already have a handler.
    """
    before: dict[signal.Signals, signal._HANDLER] = {}
    if threading.current_thread() is threading.main_thread():
        # A handler that C code installed shows as None, and Python could not restore it.
        found = {number: signal.getsignal(number) for number in signals}
        before = {n: old for n, old in found.items() if old not in (None, signal.SIG_IGN)}
    if only_default:
        before = {number: old for number, old in before.items() if old is signal.SIG_DFL}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def exit_now(number: int, frame: FrameType | None) -> NoReturn:
    """Exit on a signal with the exit code that shells use, unwinding the stack like Ctrl-C."""
    raise SystemExit(128 + number)


#: Signals that ask a process to end. Windows has no SIGHUP.
ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))

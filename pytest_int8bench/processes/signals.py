"""Handle signals for a while."""

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
    """Handle signals otherwise for a while, but for those that are ignored.

    Only the main thread may; in another one, nothing is done.

    Args:
        handler: what handles them.
        signals: those that are handled.
        only_default: leave those alone that the program handles itself.
    """
    before: dict[signal.Signals, signal._HANDLER] = {}
    if threading.current_thread() is threading.main_thread():
        # None: set by code in C, which Python cannot set back.
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
    """Handle a signal by ending as Ctrl-C does, with the exit code that shells give it."""
    raise SystemExit(128 + number)


#: What asks a process to end. Windows has no SIGHUP.
ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))

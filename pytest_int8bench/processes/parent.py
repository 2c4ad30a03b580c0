"""End a process together with its parent."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1  # prctl(2): set the signal to receive when the parent ends


def end_with(is_parent: Callable[[int], bool]) -> bool:
    """Make the system send this process SIGTERM when its parent ends (Linux only).

    The signal is sent when the thread that started this process ends, even if other threads of the
    parent live on.

    Args:
        is_parent: returns whether a process id belongs to the process that started this one.

    Returns:
        Whether the parent was still alive; always true on other systems.
    """
    if sys.platform != "linux":
        return True
    with contextlib.suppress(OSError, AttributeError):  # a C library without it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    return is_parent(os.getppid())

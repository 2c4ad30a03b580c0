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
    """Make Linux send this process SIGTERM when the thread that started it ends.

    Args:
        is_parent: returns whether a process id is the parent's.

    Returns:
        Whether the parent is still alive; always true on other systems.
    """
    if sys.platform != "linux":
        return True
    with contextlib.suppress(OSError, AttributeError):  # a C library without it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    return is_parent(os.getppid())

"""End a process together with the one that started it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1  # prctl(2): the signal that comes when the parent ends


def end_with(is_parent: Callable[[int], bool]) -> bool:
    """Have the system end this process when its parent ends. Return whether that can still be:
    ``is_parent`` says whether a process id is that of the parent, which may have ended before.

    It is the end of the thread that counts that started this process. Only Linux has this;
    elsewhere, nothing is done.
    """
    if sys.platform != "linux":
        return True
    with contextlib.suppress(OSError, AttributeError):  # a C library without it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    return is_parent(os.getppid())

"""The clock of a measurement. Imports nothing heavy, so that pytest markers may name it."""

from __future__ import annotations

import sys
import time


def synchronize() -> None:
    """Wait until the current CUDA device has done all its work; nothing without CUDA."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def synchronized_perf_counter() -> float:
    """Seconds of ``time.perf_counter`` after all submitted device work is done.

    A host clock alone sees when kernels are submitted, not when they end.
    """
    synchronize()
    return time.perf_counter()

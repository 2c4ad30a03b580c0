"""Allocated and peak memory, and recognizing out-of-memory errors."""

from __future__ import annotations

import gc
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch

# -- memory ---------------------------------------------------------------------------------


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """Watch the peak of allocated bytes on ``device``; the yielded callable returns it.

    It returns None on a CPU, where it is not measured.
    """
    if device.type != "cuda":
        yield lambda: None
        return
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    yield lambda: torch.cuda.max_memory_allocated(device)


def allocated_bytes(device: torch.device) -> int:
    """Return the bytes that tensors hold on ``device``; 0 on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


_OOM_TEXT = re.compile(
    r"CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED"
    r"|CUDNN_STATUS_ALLOC_FAILED|DefaultCPUAllocator: .*allocate",
    re.DOTALL,
)
_REQUEST = re.compile(r"[Tt]ried to allocate ([\d.]+)\s*([KMG]?i?B|bytes)")
_UNITS = {"B": 1, "bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def oom_of(error: BaseException) -> BaseException | None:
    """Return the out-of-memory error that ``error`` is or was raised from, or None."""
    for current in chain_of(error):
        if isinstance(current, torch.OutOfMemoryError | MemoryError):
            return current
        if isinstance(current, RuntimeError) and _OOM_TEXT.search(str(current)):
            return current
    return None


def chain_of(error: BaseException) -> Iterator[BaseException]:
    """Yield ``error`` and what it was raised from; torch.compile keeps that in a field of its
    own."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        if not current.__suppress_context__:
            waiting.append(current.__context__)
        waiting += [current.__cause__, getattr(current, "inner_exception", None)]


def release(error: BaseException) -> None:
    """Let go of the tensors that the frames of ``error``, and of what it was raised from, hold."""
    for current in chain_of(error):
        traceback.clear_frames(current.__traceback__)
        current.__traceback__ = None


def requested_bytes(error: BaseException) -> int | None:
    """Return the bytes whose allocation failed, if ``error`` or its cause says so."""
    match = _REQUEST.search(str(oom_of(error) or error))
    if match is None or match[2] not in _UNITS:
        return None
    return round(float(match[1]) * _UNITS[match[2]])


def collect_garbage(device: torch.device) -> None:
    """Collect garbage before reading allocated bytes (CUDA only; slow)."""
    if device.type == "cuda":
        free_memory()


def free_memory() -> None:
    """Give back memory of models that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        with suppress(torch.AcceleratorError):  # a device that failed frees nothing
            torch.cuda.empty_cache()

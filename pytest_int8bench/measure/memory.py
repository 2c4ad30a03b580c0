"""Measure allocated and peak memory, and free memory after an error."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch

from pytest_int8bench.out_of_memory import chain_of as chain_of
from pytest_int8bench.out_of_memory import oom_of as oom_of
from pytest_int8bench.out_of_memory import requested_bytes as requested_bytes


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """Watch the peak of allocated bytes on ``device``; the yielded callable returns it.

    The callable returns None on a CPU, where the peak is not measured.
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


def release(error: BaseException) -> None:
    """Release the tensors held by the frames of ``error`` and of its causes."""
    for current in chain_of(error):
        traceback.clear_frames(current.__traceback__)
        current.__traceback__ = None


def collect_garbage(device: torch.device) -> None:
    """Collect garbage before reading allocated bytes (CUDA only; slow)."""
    if device.type == "cuda":
        free_memory()


def free_memory() -> None:
    """Free the memory of models that are no longer referenced."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        with suppress(torch.AcceleratorError):  # a failed device frees nothing
            torch.cuda.empty_cache()

"""Compiling kernels while Dynamo and Inductor still work on the rest of the model.

At its first launch a kernel takes a second to compile, in the process and one after the other.
Most of that time is the compiler's, outside Python, so threads can spend it earlier.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

_THREADS = 4
_compiling: dict[Hashable, Future[Any]] = {}


def start(key: Hashable, compile_kernel: Callable[[], Any], device: torch.device) -> None:
    """Compile a kernel for a GPU in a thread.

    Args:
        key: what is compiled; only once, if it is still being compiled.
        compile_kernel: does it, for the current device. What it raises is left to the launch.
    """

    def compiled() -> None:
        on = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with contextlib.suppress(BaseException), on:
            compile_kernel()

    if key not in _compiling:
        _compiling[key] = _executor().submit(compiled)


def finish() -> None:
    """Wait for what was started, so that nothing is compiled twice."""
    for key, future in list(_compiling.items()):
        future.result()
        _compiling.pop(key, None)


@functools.cache
def _executor() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, thread_name_prefix="int8bench-compile")


def _forget() -> None:
    _compiling.clear()
    _executor.cache_clear()


# Threads do not come along.
os.register_at_fork(after_in_child=_forget)

"""Compile kernels in threads while Dynamo and Inductor work on the rest of the model.

Otherwise each kernel compiles at its first launch, for about a second each, one after another.
The compiler spends most of that time without holding the GIL, so threads run in parallel.
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
        key: identifies the kernel; the call does nothing if a kernel with this key is compiling.
        compile_kernel: compiles for the current device. Its errors are ignored, because the launch
            compiles again and raises them.
        device: becomes the thread's current device.
    """

    def compiled() -> None:
        on = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with contextlib.suppress(BaseException), on:
            compile_kernel()

    if key not in _compiling:
        _compiling[key] = _executor().submit(compiled)


def finish() -> None:
    """Wait for all compilations, so that a launch does not compile the same kernel again."""
    for key, future in list(_compiling.items()):
        future.result()
        _compiling.pop(key, None)


@functools.cache
def _executor() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, thread_name_prefix="int8bench-compile")


def _forget() -> None:
    _compiling.clear()
    _executor.cache_clear()


# Threads do not survive fork().
os.register_at_fork(after_in_child=_forget)

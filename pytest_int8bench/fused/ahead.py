"""Compiling kernels while Dynamo and Inductor still work on the rest of the model.

At its first launch a kernel takes a second to compile, in the process and one after the other.
Most of that time is the compiler's, outside Python, so threads can spend it earlier.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

_THREADS = 4
_compiling: list[Future[Any]] = []


def start(compile_kernel: Callable[[], Any], device: torch.device) -> None:
    """Compile a kernel for a GPU in a thread.

    Args:
        compile_kernel: does it, for the current device. What it raises is left to the launch.
    """

    def compiled() -> None:
        on = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with contextlib.suppress(Exception), on:
            compile_kernel()

    _compiling.append(_executor().submit(compiled))


def finish() -> None:
    """Wait for what was started, so that nothing is compiled twice."""
    while _compiling:
        _compiling.pop().result()


@functools.cache
def _executor() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, thread_name_prefix="int8bench-compile")

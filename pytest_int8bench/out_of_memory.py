"""Recognize out-of-memory errors of any library."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

from pytest_int8bench.errors import ClearError

# The wording of torch, the CUDA, HIP and SYCL drivers, Triton, compilers and allocators.
_TEXT = re.compile(
    r"out[ _]of[ _]((host|device)[ _])?memory|OutOf(Host|Device)?Memory"
    r"|MemoryAllocation|Error Memory Allocation|rocblas_status_memory_error"
    # cuBLAS and its siblings: CUBLAS_STATUS_ALLOC_FAILED, CUFFT_ALLOC_FAILED,
    # miopenStatusAllocFailed, CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED.
    r"|ALLOC(ATION)?_?FAILED"
    r"|(cannot|can't|could not|failed to|unable to) allocate (host |device |pinned )?memory"
    r"|DefaultCPUAllocator: .*allocate|bad_alloc|RESOURCE_EXHAUSTED",
    re.DOTALL | re.IGNORECASE,
)
# Triton's "out of resource: shared memory" and CUDA's "too many resources requested for launch"
# concern the size of a kernel.
_KERNEL_TOO_LARGE = re.compile(r"out of resource|resources requested for launch", re.IGNORECASE)
_TYPE = re.compile(r"Out_?Of_?Memory", re.IGNORECASE)
_REQUEST = re.compile(r"[Tt]ried to allocate ([\d.]+)\s*([KMG]?i?B|bytes)")
_UNITS = {"B": 1, "bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def oom_of(error: BaseException) -> BaseException | None:
    """Return the out-of-memory error that ``error`` is or was raised from, or None."""
    return next((current for current in chain_of(error) if _is_oom(current)), None)


def _is_oom(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or any(_TYPE.search(t.__name__) for t in type(error).__mro__):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # Search only the text of errors that C and C++ bindings raise: users write the messages of
    # AssertionError and ValueError, and we write those of ClearError.
    if not isinstance(error, RuntimeError) or isinstance(error, ClearError):
        return False
    text = str(error)
    return bool(_TEXT.search(text)) and not _KERNEL_TOO_LARGE.search(text)


def chain_of(error: BaseException) -> Iterator[BaseException]:
    """Yield ``error`` and its causes; torch.compile stores the cause in its own field."""
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


def requested_bytes(error: BaseException) -> int | None:
    """Return the size in bytes of the failed allocation, if ``error`` or a cause states it."""
    match = _REQUEST.search(str(oom_of(error) or error))
    if match is None or match[2] not in _UNITS:
        return None
    return round(float(match[1]) * _UNITS[match[2]])

"""Test that out of memory is recognized under every name and nothing else is mistaken for it."""

from __future__ import annotations

import errno

import pytest
import torch

from pytest_int8bench.errors import ClearError
from pytest_int8bench.out_of_memory import oom_of, requested_bytes

RAN_OUT = [
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.80 GiB",
    "HIP out of memory. Tried to allocate 20.00 MiB",
    "XPU out of memory. Tried to allocate 20.00 MiB",
    "MPS backend out of memory (MPS allocated: 1.00 GB)",
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    "CUDA driver error: out of memory",
    "HIP error: out of memory",
    "CUDA error: CUDA_ERROR_OUT_OF_MEMORY",
    "cudaErrorMemoryAllocation",
    "hipErrorOutOfMemory",
    "Triton Error [CUDA]: out of memory",
    "Triton Error [HIP]:  Code: 2, Messsage: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`",
    "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
    "CUDA error: CUSPARSE_STATUS_ALLOC_FAILED when calling `cusparseCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "cuFFT error: CUFFT_ALLOC_FAILED",
    "CURAND_STATUS_ALLOCATION_FAILED",
    "miopenStatusAllocFailed",
    "rocblas_status_memory_error",
    "CUTLASS: Error Memory Allocation",
    "level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)",
    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4398046511104 bytes.",
    "DefaultCPUAllocator: not enough memory: you tried to allocate 99 bytes.",
    "unable to mmap 99 bytes from file </w.safetensors>: Cannot allocate memory (12)",
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 99 bytes",
    "std::bad_alloc",
]
SOMETHING_ELSE = [
    "out of resource: shared memory, Required: 262144, Hardware limit: 232448. Reducing sizes",
    "out of resource: tensor memory, Required: 1024, Hardware limit: 512.",
    "CUDA error: too many resources requested for launch",
    "CUDA error: an illegal memory access was encountered",
    "CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling cublasLtMatmulAlgoGetHeuristic",
    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    "unable to open shared memory object </torch_1> in read-write mode: Too many open files (24)",
    "index 7 is out of bounds for dimension 0 with size 4",
    "view size is not compatible with input tensor's size and stride",
]


@pytest.mark.parametrize("text", RAN_OUT, ids=range(len(RAN_OUT)))
def test_recognizes_by_message(text: str) -> None:
    error = RuntimeError(text)
    assert oom_of(error) is error


@pytest.mark.parametrize("text", SOMETHING_ELSE, ids=range(len(SOMETHING_ELSE)))
def test_rejects_other_messages(text: str) -> None:
    assert oom_of(RuntimeError(text)) is None


class OutOfMemory(Exception):
    """A library's own out-of-memory error."""


class OutOfResources(Exception):
    """Triton's error for a kernel that is too large."""


class Ours(ClearError, RuntimeError):
    pass


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("x"),
        MemoryError(),
        OutOfMemory("x"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        torch.AcceleratorError("CUDA error: out of memory", 2),
    ],
    ids=repr,
)
def test_recognizes_by_type(error: Exception) -> None:
    assert oom_of(error) is error


@pytest.mark.parametrize(
    "error",
    [
        OutOfResources("out of resource: shared memory"),
        OSError(errno.ENOSPC, "No space left on device"),
        AssertionError("out of memory"),
        ValueError("batch_size: would run out of memory"),
        Ours("the baseline ran out of memory"),
        KeyboardInterrupt("out of memory"),
    ],
    ids=repr,
)
def test_rejects_other_types(error: BaseException) -> None:
    assert oom_of(error) is None


def test_finds_out_of_memory_in_causes() -> None:
    cause = RuntimeError("Triton Error [CUDA]: out of memory")
    error = ValueError("the kernel could not be launched")
    error.__cause__ = cause
    assert oom_of(error) is cause
    wrapped = Exception("backend failed")
    wrapped.inner_exception = cause  # type: ignore[attr-defined]
    assert oom_of(wrapped) is cause


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (RAN_OUT[0], 2 * 2**30),
        (RAN_OUT[1], 20 * 2**20),
        ("DefaultCPUAllocator: not enough memory: you tried to allocate 99 bytes.", 99),
        ("Triton Error [CUDA]: out of memory", None),
    ],
)
def test_reports_requested_bytes(text: str, count: int | None) -> None:
    assert requested_bytes(RuntimeError(text)) == count

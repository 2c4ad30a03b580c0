"""Choose the kernel that runs, and say why another does not."""

from __future__ import annotations

import importlib.util

import torch

from pytest_int8bench.errors import QuantizationError as QuantizationError
from pytest_int8bench.kernels.device import capability
from pytest_int8bench.kernels.override import KERNEL_VARIABLE, KernelError, forced_product
from pytest_int8bench.kernels.tile_types import (
    ALIGNMENT,
    Problem,
)


def product_kernel(device: torch.device) -> str:
    """Return ``specialized`` for sm90, ``tma`` for later ones, else ``pointers``.

    Raises:
        KernelError: if ``INT8BENCH_PRODUCT`` is set to something else, or to what the device has
            not.
    """
    forced = forced_product()
    has_tma = capability(device)[0] >= 9
    is_hopper = capability(device) == (9, 0)
    if forced:
        major, minor = capability(device)
        if forced == "tma" and not has_tma:
            raise KernelError(
                f"{KERNEL_VARIABLE}=tma needs sm90 or later, this is sm{major}{minor}"
            )
        if forced == "specialized" and not is_hopper:
            raise KernelError(f"{KERNEL_VARIABLE}=specialized needs sm90, this is sm{major}{minor}")
        return forced
    return "specialized" if is_hopper else "tma" if has_tma else "pointers"


def kernel_for(
    problem: Problem,
    kernel: str,
    stride: int,
    residual: torch.Tensor | None,
    dtype: torch.dtype,
    aligned: bool,
) -> str:
    """Return ``kernel``, or the next one that takes the operands of a product.

    Args:
        stride: from row to row of the residual.
        dtype: of the output.
        aligned: the addresses of inputs, output and residual are multiples of ``ALIGNMENT``.
    """
    # Strides must be multiples of what TMA takes, and none may be zero.
    takes_tma = (
        aligned
        and problem.k % ALIGNMENT == 0
        and problem.n * problem.out_bytes % ALIGNMENT == 0
        and (residual is None or (stride > 0 and stride * residual.element_size() % ALIGNMENT == 0))
    )
    if not takes_tma:
        return "pointers"
    # That kernel loads the residual to where it stores the output from.
    if kernel == "specialized" and residual is not None and residual.dtype != dtype:
        return "tma"
    return kernel


#: Compute capability from which Triton's INT8 product runs on tensor cores.
FUSED_CAPABILITY = (8, 0)


def fused_problem(device: torch.device) -> str | None:
    """Say why no layer can run on the fused kernels here, or return None."""
    if device.type != "cuda" or torch.version.hip is not None:
        return (
            f"the fused kernels run on CUDA, not on {'ROCm' if torch.version.hip else device.type}"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < FUSED_CAPABILITY:
        return f"the fused kernels need sm80 or later, this is sm{capability[0]}{capability[1]}"
    if importlib.util.find_spec("triton") is None:
        return "the fused kernels need Triton, which is not installed"
    return None

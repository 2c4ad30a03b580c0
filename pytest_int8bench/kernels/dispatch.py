"""Choose a kernel from :mod:`.table` for each call, and explain why a kernel cannot run.

Importing this module loads neither torch nor Triton, because pytest checks ``INT8BENCH_PRODUCT``
at the start of a session, and :func:`fused_problem` must work without Triton.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pytest_int8bench.errors import ClearError
from pytest_int8bench.kernels import device as devices
from pytest_int8bench.kernels import selftest, tuning
from pytest_int8bench.kernels.table import FUSED_CAPABILITY, Kernel, kernels_of
from pytest_int8bench.kernels.tile_types import ALIGNMENT, Heads, Problem, Tile

if TYPE_CHECKING:
    import torch

    from pytest_int8bench.kernels.launch import Launch, Operands

#: Environment variable that forces one kernel of the INT8 matmul, by its name in the table.
KERNEL_VARIABLE = "INT8BENCH_PRODUCT"


class KernelError(ClearError, ValueError):
    """Raised if no kernel runs a call, or if ``INT8BENCH_PRODUCT`` names an unusable kernel."""


# -- INT8 matmul --------------------------------------------------------------------------------


def forced_kernel() -> str | None:
    """Return the kernel that ``INT8BENCH_PRODUCT`` names, or None if it is empty or unset.

    Raises:
        KernelError: if no kernel has that name.
    """
    forced = os.environ.get(KERNEL_VARIABLE)
    if not forced:
        return None
    names = [kernel.name for kernel in kernels_of("linear")]
    if forced not in names:
        raise KernelError(f"{KERNEL_VARIABLE} must be one of {', '.join(names)}, got {forced!r}")
    return forced


def matmul_kernel(device: torch.device) -> str:
    """Return the name of the preferred INT8 matmul kernel for a device.

    Raises:
        KernelError: if ``INT8BENCH_PRODUCT`` names a kernel that does not exist or that the device
            cannot run.
    """
    forced = forced_kernel()
    for kernel in kernels_of("linear"):
        if forced and kernel.name != forced:
            continue
        if kernel.runs_on(device):
            return kernel.name
        if forced:
            raise KernelError(f"{KERNEL_VARIABLE}={forced} {kernel.unmet(device)}")
    raise KernelError(f"there is no INT8 matmul kernel for {device}")


def accepting(
    name: str,
    device: torch.device,
    problem: Problem,
    stride: int,
    residual: torch.Tensor | None,
    dtype: torch.dtype,
    is_aligned: bool,
) -> list[Kernel]:
    """Return the kernels that accept the operands of a matmul, in order of preference.

    Args:
        name: the first kernel to consider; it must run on the device.
        device: where the operands are.
        problem: the sizes of the matmul.
        stride: row stride of the residual in elements, 0 without a residual.
        residual: added last, or None.
        dtype: of the output.
        is_aligned: whether the addresses of inputs, output and residual are multiples of
            ``ALIGNMENT``.
    """
    kernels = kernels_of("linear")
    start = [kernel.name for kernel in kernels].index(name)
    return [
        kernel
        for kernel in kernels[start:]
        if (kernel.name == name or kernel.runs_on(device))
        and kernel.accepts(problem, stride, residual, dtype, is_aligned)
    ]


def kernel_and_tile(
    kernels: Sequence[Kernel],
    device: torch.device,
    problem: Problem,
    time: Callable[[Kernel, Tile], float] | None,
) -> tuple[Kernel, Tile]:
    """Return the first kernel that has tiles for a matmul, and those tiles.

    Args:
        kernels: kernels that accept the operands.
        device: where the operands are.
        problem: the sizes of the matmul.
        time: runs the matmul and returns seconds, infinite if the tiles do not fit; None if
            nothing can be timed now, for example during CUDA graph capture.
    """
    for kernel in kernels:
        timed = None if time is None else functools.partial(time, kernel)
        tile = kernel.tiles(kernel.name, problem, device, timed)
        if tile is not None:
            return kernel, tile
    raise KernelError(f"no kernel has tiles for {problem}")


def matmul_launch(
    kernels: Sequence[Kernel],
    device: torch.device,
    problem: Problem,
    has_bias: bool,
    has_gamma: bool,
    stride: int,
    operands: Callable[[], Operands] | None,
) -> Launch:
    """Return the launch of a matmul: its kernel, tiles and all arguments except the tensors.

    Args:
        kernels: kernels that accept the operands, from :func:`accepting`.
        device: where the operands are.
        problem: the sizes of the matmul.
        has_bias: whether there is a bias.
        has_gamma: whether there is a factor for each column.
        stride: row stride of the residual in elements, 0 without a residual.
        operands: function that returns operands for timing tiles; None if nothing can be timed now.
    """
    call = problem, has_bias, has_gamma, stride

    def time(kernel: Kernel, tile: Tile) -> float:
        assert operands is not None
        return tuning.seconds(operands(), kernel.launch(*call, tile, device))

    can_run = operands is not None
    passed = [kernel for kernel in kernels if has_passed(kernel, device, may_try=can_run)]
    kernel, tile = kernel_and_tile(passed, device, problem, time if can_run else None)
    return kernel.launch(*call, tile, device)


def has_passed(kernel: Kernel, device: torch.device, *, may_try: bool) -> bool:
    """Return whether a kernel may be used on a device: it needs no self-test or has passed it.

    The self-test compares its output bit for bit with the next kernel that runs on the device.

    Args:
        kernel: a row of the table.
        device: where it runs.
        may_try: run the self-test if it has not run yet.
    """
    test = kernel.selftest
    if test is None or os.environ.get(KERNEL_VARIABLE):
        return True

    def launches(problem: Problem) -> list[Launch]:
        tile = kernel.tiles(kernel.name, problem, device, None)
        if tile is None:
            count = devices.multiprocessors(device)
            raise RuntimeError(f"the self-test has no tiles for {count} multiprocessors")
        rows = kernels_of("linear")
        others = [other for other in rows[rows.index(kernel) + 1 :] if other.runs_on(device)]
        pairs = kernel_and_tile(others, device, problem, None), (kernel, tile)
        stride = problem.n if problem.residual else 0
        return [other.launch(problem, True, False, stride, tile, device) for other, tile in pairs]

    return selftest.has_passed(test, device, launches, may_try=may_try)


def selftest_failure(kernel: Kernel, device: torch.device) -> str | None:
    """Run the self-test of a kernel, if it needs one; return why it failed, or None."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if has_passed(kernel, device, may_try=True):
            return None
    return str(caught[-1].message) if caught else "its self-test failed"


# -- other operators ----------------------------------------------------------------------------


def rows_launch(
    shape: tuple[int, int],
    strides: tuple[int, int],
    norm: str,
    activation: str,
    eps: float,
    keep: bool,
    has: Sequence[bool],
    device: torch.device,
) -> Launch | None:
    """Return the launch that quantizes rows, or None if no kernel accepts rows of that length.

    Args:
        shape: number and length of the rows.
        strides: row strides of the input and of its gate, in elements.
        norm: as in :func:`.ops.quantize_rows`; so are ``activation``, ``eps`` and ``keep``.
        has: whether there is a gate, a weight, a bias and a factor, in this order.
        device: where the rows are.
    """
    for kernel in kernels_of("quantize_rows"):
        if kernel.runs_on(device) and kernel.accepts(shape[1]):
            tile = kernel.tiles(*shape, devices.multiprocessors(device))
            return kernel.launch(shape, strides, norm, activation, eps, keep, has, tile)
    return None


def weights_launch(sizes: Sequence[tuple[int, ...]], device: torch.device) -> Launch:
    """Return the launch that dequantizes weights of the given sizes (N, K).

    The caller passes no more weights than one launch takes.
    """
    for kernel in kernels_of("dequantize"):
        if kernel.runs_on(device) and kernel.accepts(sizes):
            return kernel.launch(sizes, kernel.tiles())
    raise KernelError(f"no kernel can dequantize weights of size {sizes}")


def heads_launch(
    operator: str,
    heads: Heads,
    rotation: str,
    terms: int,
    strides: Sequence[Sequence[int]],
    device: torch.device,
) -> Launch:
    """Return the launch that quantizes or rotates queries and keys.

    Args:
        operator: ``quantize_heads`` or ``rotate_heads``.
        heads: number and sizes of the heads.
        rotation: one of ``schema.ROTATIONS``.
        terms: number of positions that an angle is computed from, if it is.
        strides: of the tensors.
        device: where the tensors are.
    """
    for kernel in kernels_of(operator):
        if kernel.runs_on(device) and kernel.accepts(heads):
            return kernel.launch(heads, rotation, terms, strides)
    raise KernelError(f"no {operator} kernel accepts {heads}")


def attention_launch(
    heads: Heads, scale: float, v: torch.Tensor, is_aligned: bool, device: torch.device
) -> Launch:
    """Return the launch of INT8 attention.

    Args:
        heads: number and sizes of the heads.
        scale: multiplies the scores; includes log2(e), because the kernel uses exp2.
        v: the values.
        is_aligned: whether the addresses of keys and values are multiples of ``ALIGNMENT``.
        device: where the tensors are.
    """
    steps = [stride * v.element_size() for stride in v.stride()[:3]]
    fits = is_aligned and all(step > 0 and step % ALIGNMENT == 0 for step in steps)
    tma = fits and devices.capability(device) >= (9, 0) and forced_kernel() != "pointers"
    for kernel in kernels_of("int8_attention"):
        if kernel.runs_on(device) and kernel.accepts(heads):
            return kernel.launch(heads, scale, v.stride()[:3], kernel.tiles(heads, tma), tma)
    raise KernelError(f"no kernel computes attention of {heads}")


def short_launch(
    heads: Heads,
    scale: float,
    causal: bool,
    strides: Sequence[Sequence[int]],
    device: torch.device,
) -> Launch:
    """Return the launch of attention for short sequences.

    Args:
        heads: number and sizes of the heads.
        scale: multiplies the scores; includes log2(e), because the kernel uses exp2.
        causal: whether query i attends only to keys 0 to i.
        strides: of queries, keys and values.
        device: where the tensors are.
    """
    for kernel in kernels_of("short_attention"):
        if kernel.runs_on(device) and kernel.accepts(heads):
            return kernel.launch(heads, scale, causal, strides, kernel.tiles(heads))
    raise KernelError(f"no kernel computes attention of {heads}")


# -- availability -------------------------------------------------------------------------------


def fused_problem(device: torch.device) -> str | None:
    """Return why the fused kernels cannot run on a device, or None if they can."""
    import torch

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


def attention_problem(device: torch.device) -> str | None:
    """Return why our attention operators cannot run on a device, or None if they can.

    On a CPU they always can, in plain torch.
    """
    return None if device.type == "cpu" else fused_problem(device)

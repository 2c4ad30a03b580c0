"""Launching the Triton kernels behind the operators, and which product a problem takes.

Triton looks at every argument of every call to find the kernel that was compiled for it, which
takes the host longer than the launch, and often longer than the GPU computes. Here it does so once
for each kind of call; what it found is kept as a :class:`~launches.Launch` and repeated.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from pytest_int8bench.errors import first_line
from pytest_int8bench.fused import configs, reference
from pytest_int8bench.fused.configs import (
    ALIGNMENT,
    SPECIALIZED_FROM,
    SPECIALIZED_TILE,
    Problem,
    Product,
    Specialized,
)
from pytest_int8bench.fused.launches import (
    AT_ONCE,
    Launch,
    ceil,
    of_product,
    of_rows,
    of_weights,
)
from pytest_int8bench.fused.operators import Three
from pytest_int8bench.fused.products import KERNEL_VARIABLE

#: Kinds of calls that are kept: models with a dynamic batch have one for each of its sizes.
_KEPT = 4096
_kept: dict[tuple[Any, ...], Launch] = {}
#: Versions of Triton with which the kernel whose warps have roles has passed its tests on a GPU.
#: The language it is written in is experimental: with others it has to prove itself first.
_PROVED_WITH = ("3.6.",)
_proved: dict[torch.device, bool] = {}

Operands: TypeAlias = tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor | None,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor | None,
    torch.Tensor | None,
]


def quantize_rows(
    x: torch.Tensor,
    norm: str,
    activation: str,
    gate: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    factor: torch.Tensor | None,
    keep: bool,
) -> Three:
    """Run the kernel of :func:`operators.quantize_rows`; x on the current device."""
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    kept = torch.empty(x.shape if keep else (0,), dtype=x.dtype, device=x.device)
    if q.numel() == 0:
        return q, scale.zero_(), kept
    x, stride = _rows(x)
    other, other_stride = (None, 0) if gate is None else _rows(gate)
    vectors = [None if part is None else part.contiguous() for part in (weight, bias, factor)]
    tensors = (x, other, q, scale, *vectors, kept if keep else None)
    key = (q.shape, stride, other_stride, norm, activation, eps, x.get_device(), _kinds(tensors))
    launch = _kept.get(key)
    if launch is None:
        columns = q.shape[-1]
        there = [part is not None for part in (gate, *vectors)]
        launch = of_rows(
            (q.numel() // columns, columns),
            (stride, other_stride),
            norm,
            activation,
            eps,
            keep,
            there,
            x.device,
        )
        _keep(key, launch)
    launch(*tensors)
    return q, scale, kept


def linear(
    q: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    gamma: torch.Tensor | None,
    residual: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    kernel: str,
    tile: Product | Specialized | None = None,
) -> torch.Tensor:
    """Run the kernel of :func:`operators.linear`; q on the current device.

    Args:
        kernel: one of :data:`.products.PRODUCTS`; tensors that TMA cannot address take pointers.
        tile: the tiles, instead of those of :mod:`configs`.
    """
    n, k = weight.shape
    out = torch.empty((*q.shape[:-1], n), dtype=dtype, device=q.device)
    if out.numel() == 0:
        return out
    if k == 0:
        return reference.linear(q, scale, weight, weight_scale, bias, gamma, residual, dtype)
    stride = 0
    if residual is not None:
        residual, stride = _rows(residual)
    operands: Operands = (
        q.contiguous(),
        weight.contiguous(),
        out,
        residual,
        scale.contiguous(),
        weight_scale.contiguous(),
        None if bias is None else bias.contiguous(),
        None if gamma is None else gamma.contiguous(),
    )
    key = (kernel, q.numel() // k, n, k, stride, q.get_device(), _kinds(operands))
    launch = _kept.get(key) if tile is None else None
    if launch is None:
        problem = Problem(q.numel() // k, n, k, out.element_size(), residual is not None)
        kernel = kernel_for(problem, kernel, stride, residual, dtype, _aligned(operands[:4]))
        there = (bias is not None, gamma is not None)
        recording = q.is_cuda and torch.cuda.is_current_stream_capturing()
        if tile is not None:
            launch = of_product(problem, *there, kernel, stride, tile, q.device)
        else:
            timed = None if recording else lambda: operands
            launch = chosen_product(problem, *there, kernel, stride, q.device, timed)
        # While a CUDA graph is recorded, the tiles may be a guess.
        if tile is None and not recording:
            _keep(key, launch)
    launch(*operands)
    return out


def dequantize(
    weights: Sequence[torch.Tensor], scales: Sequence[torch.Tensor], dtype: torch.dtype
) -> list[torch.Tensor]:
    """Run the kernel of :func:`operators.dequantize`; the tensors on the current device."""
    outs = [torch.empty(weight.shape, dtype=dtype, device=weight.device) for weight in weights]
    whole = [
        (weight.contiguous(), scale.contiguous(), out)
        for weight, scale, out in zip(weights, scales, outs, strict=True)
        if out.numel()
    ]
    for start in range(0, len(whole), AT_ONCE):
        there = whole[start : start + AT_ONCE]
        none = [None] * 3 * (AT_ONCE - len(there))
        tensors = [*(tensor for part in there for tensor in part), *none]
        sizes = tuple(tuple(out.shape) for _, _, out in there)
        key = ("dequantize", sizes, there[0][2].get_device(), _kinds(tensors))
        launch = _kept.get(key)
        if launch is None:
            launch = of_weights(sizes)
            _keep(key, launch)
        launch(*tensors)
    return outs


def chosen_product(
    problem: Problem,
    has_bias: bool,
    has_gamma: bool,
    kernel: str,
    stride: int,
    device: torch.device,
    operands: Callable[[], Operands] | None,
) -> Launch:
    """Return the launch of a product with the tiles of :mod:`configs`.

    Args:
        stride: as in :func:`of_product`.
        operands: returns what candidates are timed with, where they are; None where nothing can be
            timed now.
    """

    def launched(tile: Product | Specialized) -> Launch:
        return of_product(problem, has_bias, has_gamma, kernel, stride, tile, device)

    if kernel == "specialized" and not _roles_are_proved(device, may_try=operands is not None):
        kernel = "tma"
    time = None if operands is None else lambda tile: seconds(operands(), launched(tile))
    return launched(configs.product(problem, kernel, device, time))


def _roles_are_proved(device: torch.device, *, may_try: bool) -> bool:
    """Say whether warps with roles are known to compute what the other kernels do."""
    import triton

    if triton.__version__.startswith(_PROVED_WITH) or os.environ.get(KERNEL_VARIABLE):
        return True
    if device not in _proved and may_try:
        try:
            problem = None if _have_equal_bits(device) else "they give other bits"
        except Exception as error:  # whatever comes of another language
            problem = first_line(error)
        _proved[device] = problem is None  # before the warning, which may be an error
        if problem is not None:
            warnings.warn(
                f"INT8 products by warps with roles are off with triton {triton.__version__}: "
                f"{problem}",
                stacklevel=2,
            )
    return _proved.get(device, False)


def _have_equal_bits(device: torch.device) -> bool:
    """Say whether the kernel whose warps have roles gives the bits of the one without, in each of
    its forms."""
    columns, multiprocessors = 6, configs.multiprocessors(device)
    tiles = ceil(SPECIALIZED_FROM * multiprocessors, columns)
    for depth, residual in ((768, False), (768, True), (2048, True)):
        n = SPECIALIZED_TILE * columns
        problem = Problem(SPECIALIZED_TILE * tiles - 5, n, depth, 2, residual)
        shared_out = configs.specialized(problem, multiprocessors)
        if shared_out is None:
            raise RuntimeError(f"nothing to compare on {multiprocessors} multiprocessors")
        tiles_of = {"tma": configs.product(problem, "tma", device, None), "specialized": shared_out}
        with torch.random.fork_rng(devices=[device]), torch.cuda.device(device):
            a, b, c, *rest = operands_like(problem, True, False, torch.bfloat16, device)
            outs = []
            for kernel, tile in tiles_of.items():
                out = torch.full_like(c, math.nan)
                stride = n if residual else 0
                launch = of_product(problem, True, False, kernel, stride, tile, device)
                launch(a, b, out, *rest)
                outs.append(out)
            if not torch.equal(*outs):
                return False
    return True


def operands_like(
    problem: Problem, has_bias: bool, has_gamma: bool, dtype: torch.dtype, device: torch.device
) -> Operands:
    """Return random operands of a product, to time it with."""
    m, n, k = problem.m, problem.n, problem.k

    def row(there: bool) -> torch.Tensor | None:
        return torch.randn(n, dtype=dtype, device=device) if there else None

    return (
        torch.randint(-127, 128, (m, k), dtype=torch.int8, device=device),
        torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device),
        torch.empty((m, n), dtype=dtype, device=device),
        torch.randn((m, n), dtype=dtype, device=device) if problem.residual else None,
        torch.rand(m, device=device),
        torch.rand(n, device=device),
        row(has_bias),
        row(has_gamma),
    )


def seconds(operands: Operands, launch: Launch) -> float:
    """Return seconds of a product with given tiles, infinite where they do not fit."""
    from triton.errors import TritonError
    from triton.testing import do_bench

    try:
        with torch.cuda.device_of(operands[0]):  # while a graph is compiled, any may be current
            milliseconds = do_bench(
                lambda: launch(*operands), warmup=5, rep=20, return_mode="median"
            )
    except TritonError:  # too large for this GPU, or not to be compiled for it
        return math.inf
    return float(milliseconds) / 1e3


def _keep(key: tuple[Any, ...], launch: Launch) -> None:
    if len(_kept) >= _KEPT:
        _kept.clear()
    _kept[key] = launch


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return ``x`` with adjacent columns, a copy where it must be, and the stride of its rows."""
    if x.is_contiguous():
        return x, x.shape[-1]
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(-1) != 1 and rows.shape[-1] != 1:
        rows = rows.contiguous()
    return rows, rows.stride(0)


def _kinds(tensors: Sequence[torch.Tensor | None]) -> tuple[Any, ...]:
    """Return what of tensors Triton compiles a kernel for, beside numbers: which there are, their
    dtypes, and whether their addresses are aligned."""
    return tuple(
        [
            None if tensor is None else (tensor.dtype, tensor.data_ptr() % ALIGNMENT == 0)
            for tensor in tensors
        ]
    )


def _aligned(tensors: Sequence[torch.Tensor | None]) -> bool:
    return all(tensor is None or tensor.data_ptr() % ALIGNMENT == 0 for tensor in tensors)


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

"""Launching the Triton kernels behind the operators, and which product a problem takes.

Triton looks at every argument of every call to find the kernel that was compiled for it, which
takes the host longer than the launch, and often longer than the GPU computes. Here it does so once
for each kind of call; what it found is kept as a :class:`~launches.Launch` and repeated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pytest_int8bench.kernels import reference, tiles
from pytest_int8bench.kernels.dispatch import kernel_for
from pytest_int8bench.kernels.launch import (
    AT_ONCE,
    Launch,
    Operands,
    of_product,
    of_rows,
    of_weights,
)
from pytest_int8bench.kernels.schema import Three
from pytest_int8bench.kernels.selftest import is_specialized_proved
from pytest_int8bench.kernels.tile_types import (
    ALIGNMENT,
    Problem,
    Product,
    Specialized,
)

#: Kinds of calls that are kept: models with a dynamic batch have one for each of its sizes.
_KEPT = 4096
_kept: dict[tuple[Any, ...], Launch] = {}


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

    if kernel == "specialized" and not is_specialized_proved(device, may_try=operands is not None):
        kernel = "tma"
    time = None if operands is None else lambda tile: seconds(operands(), launched(tile))
    return launched(tiles.product(problem, kernel, device, time))


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

"""The operators of the fused backend, as ``torch.ops.int8bench``.

They have fake implementations, so that ``torch.compile(fullgraph=True)`` and dynamic shapes take
them, run Triton kernels on CUDA, and plain torch (:mod:`reference`) elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from pytest_int8bench.fused import configs, reference
from pytest_int8bench.fused.configs import Problem, Product

NORMS = ("none", "layer", "rms")
ACTIVATIONS = ("none", "gelu", "gelu_tanh", "silu", "relu")
#: Columns of the longest row that stays in registers; longer ones take plain torch.
MAX_COLUMNS = 32768
#: TMA takes addresses and strides in multiples of this.
_TMA_BYTES = 16

Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@torch.library.custom_op("int8bench::quantize_rows", mutates_args=())
def quantize_rows(
    x: torch.Tensor,
    norm: str = "none",
    activation: str = "none",
    gate: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 0.0,
    factor: torch.Tensor | None = None,
    keep: bool = False,
) -> Three:
    """Quantize rows to INT8, one symmetric scale each, after what stands before a linear layer.

    Args:
        x: floating (..., K).
        norm: ``none``, ``layer`` or ``rms``.
        activation: ``none``, ``gelu``, ``gelu_tanh``, ``silu`` or ``relu``; not with a norm.
        gate: like ``x``; multiplies the activated row.
        weight: (K,) of the norm.
        bias: (K,) of the norm.
        eps: of the norm.
        factor: (K,) that the row is multiplied by last (SmoothQuant).
        keep: also return the row as it was before ``factor``.

    Returns:
        INT8 values (..., K); FP32 scales (...), so that value x scale is the row; and the row in
        the dtype of ``x``, empty without ``keep``. A row that is all zero has scale 0, one that
        holds NaN or infinity has scale NaN.
    """
    if x.is_cuda and x.shape[-1] <= MAX_COLUMNS:
        # Triton launches on the current device, which need not be that of the tensors.
        with torch.cuda.device(x.device):
            return launch_quantize_rows(x, norm, activation, gate, weight, bias, eps, factor, keep)
    q, scale, kept = reference.quantize_rows(x, norm, activation, gate, weight, bias, eps, factor)
    kept = kept.to(x.dtype).contiguous() if keep else x.new_empty(0)
    if kept.data_ptr() == x.data_ptr():  # an operator must not return its input
        kept = kept.clone()
    return q.contiguous(), scale.contiguous(), kept


@quantize_rows.register_fake
def _(
    x: torch.Tensor,
    norm: str = "none",
    activation: str = "none",
    gate: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 0.0,
    factor: torch.Tensor | None = None,
    keep: bool = False,
) -> Three:
    q = x.new_empty(x.shape, dtype=torch.int8)
    scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return q, scale, x.new_empty(x.shape if keep else (0,))


@torch.library.custom_op("int8bench::linear", mutates_args=())
def linear(
    q: torch.Tensor,
    scale: torch.Tensor,
    weights: Sequence[torch.Tensor],
    weight_scales: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    gamma: torch.Tensor | None,
    residual: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply INT8 rows with INT8 weights: one product where the weights lie one after another.

    Args:
        q: INT8 (..., K), contiguous.
        scale: FP32 (...), of the rows.
        weights: INT8 (N, K) each.
        weight_scales: FP32 (N,) each.
        biases: (N,) or None each.
        gamma: (sum of N,) that the result is multiplied by.
        residual: (..., sum of N) that is added last.
        dtype: of the result.

    Returns:
        (..., sum of N): ``(q @ weight.T * scale * weight_scale + bias) * gamma + residual``,
        joined along the last dimension and computed in INT32 and FP32.
    """
    if q.is_cuda:
        with torch.cuda.device(q.device):
            kernel = configs.product_kernel(q.device)
            return launch_linear(
                q, scale, weights, weight_scales, biases, gamma, residual, dtype, kernel
            )
    out = reference.linear(q, scale, weights, weight_scales, biases, gamma, residual, dtype)
    return out.contiguous()


@linear.register_fake
def _(
    q: torch.Tensor,
    scale: torch.Tensor,
    weights: Sequence[torch.Tensor],
    weight_scales: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    gamma: torch.Tensor | None,
    residual: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    columns = sum(weight.shape[0] for weight in weights)
    return q.new_empty((*q.shape[:-1], columns), dtype=dtype)


def launch_quantize_rows(
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
    """Run the Triton kernel of :func:`quantize_rows`."""
    from pytest_int8bench.fused import kernels

    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    kept = torch.empty(x.shape if keep else (0,), dtype=x.dtype, device=x.device)
    columns = x.shape[-1]
    if q.numel() == 0:
        return q, scale.zero_(), kept
    flat = _as_rows(x)
    flat_gate = flat if gate is None else _as_rows(gate)
    count = flat.shape[0]
    cut = configs.rows(count, columns, configs.multiprocessors(x.device))
    kernels.quantize_rows[(_ceil(count, cut.rows),)](
        flat,
        flat_gate,
        q,
        scale,
        *(x if part is None else part.contiguous() for part in (weight, bias, factor)),
        kept,
        count,
        flat.stride(0),
        flat_gate.stride(0),
        eps,
        K=columns,
        ROWS=cut.rows,
        BLOCK=cut.block,
        CHUNKS=cut.chunks,
        NORM=NORMS.index(norm),
        ACTIVATION=ACTIVATIONS.index(activation),
        HAS_GATE=gate is not None,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        HAS_FACTOR=factor is not None,
        KEEP=keep,
        num_warps=cut.warps,
    )
    return q, scale, kept


def launch_linear(
    q: torch.Tensor,
    scale: torch.Tensor,
    weights: Sequence[torch.Tensor],
    weight_scales: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    gamma: torch.Tensor | None,
    residual: torch.Tensor | None,
    dtype: torch.dtype,
    kernel: str,
    tile: Product | None = None,
) -> torch.Tensor:
    """Run the Triton kernels of :func:`linear`.

    Args:
        kernel: ``tma`` or ``pointers``; tensors that TMA cannot address take pointers.
        tile: the tiles, instead of those of :mod:`configs`.
    """
    columns = [weight.shape[0] for weight in weights]
    out = torch.empty((*q.shape[:-1], sum(columns)), dtype=dtype, device=q.device)
    if out.numel() == 0:
        return out
    if q.shape[-1] == 0:
        return reference.linear(q, scale, weights, weight_scales, biases, gamma, residual, dtype)
    rows = _as_rows(q)
    flat_scale = scale.reshape(-1).contiguous()
    flat_out = out.view(-1, out.shape[-1])
    flat_residual = None if residual is None else _as_rows(residual)
    whole = joined(weights), joined(weight_scales), _joined_biases(biases)
    groups: list[tuple[Any, Any, Any]]
    if whole[0] is not None and whole[1] is not None and whole[2] is not False:
        groups = [whole]
    else:
        groups = list(zip(weights, weight_scales, biases, strict=True))
    start = 0
    for weight, weight_scale, bias in groups:
        part = slice(start, start + weight.shape[0])
        start = part.stop
        _launch_product(
            rows,
            weight.contiguous(),
            flat_out[:, part],
            None if flat_residual is None else flat_residual[:, part],
            flat_scale,
            weight_scale.contiguous(),
            None if bias is None else bias.contiguous(),
            None if gamma is None else gamma.contiguous()[part],
            kernel,
            tile,
        )
    return out


def _launch_product(
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    residual: torch.Tensor | None,
    row_scale: torch.Tensor,
    column_scale: torch.Tensor,
    bias: torch.Tensor | None,
    gamma: torch.Tensor | None,
    kernel: str,
    tile: Product | None,
) -> None:
    """Choose the tiles and run one product into ``c``, a slice of the output."""
    moved = [a, b, c, *([] if residual is None else [residual])]
    if kernel == "tma" and not all(map(_tma_addressable, moved)):
        kernel = "pointers"
    operands = (a, b, c, residual, row_scale, column_scale, bias, gamma)
    if tile is None:
        (m, n), k = c.shape, a.shape[1]
        problem = Problem(m, n, k, c.element_size(), residual is not None)
        recording = a.is_cuda and torch.cuda.is_current_stream_capturing()
        tile = configs.product(
            problem,
            kernel,
            a.device,
            None if recording else lambda chosen: _seconds(operands, kernel, chosen),
        )
    _run_product(operands, kernel, tile)


def _run_product(operands: tuple[torch.Tensor | None, ...], kernel: str, tile: Product) -> None:
    from pytest_int8bench.fused import kernels

    a, b, c, residual, row_scale, column_scale, bias, gamma = operands
    assert a is not None
    assert b is not None
    assert c is not None
    (m, k), n = a.shape, b.shape[0]
    tiles = _ceil(m, tile.bm) * _ceil(n, tile.bn)
    flags: dict[str, Any] = {
        "BM": tile.bm,
        "BN": tile.bn,
        "BK": tile.bk,
        "GROUP": tile.group,
        "HAS_BIAS": bias is not None,
        "HAS_GAMMA": gamma is not None,
        "HAS_RESIDUAL": residual is not None,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    vectors = [row_scale, column_scale, *(row_scale if v is None else v for v in (bias, gamma))]
    if kernel == "pointers":
        kernels.int8_product_pointers[(tiles,)](
            a,
            b,
            c,
            c if residual is None else residual,
            *vectors,
            m,
            n,
            k,
            a.stride(0),
            c.stride(0),
            0 if residual is None else residual.stride(0),
            EVEN_K=k % tile.bk == 0,
            **flags,
        )
        return
    from triton.tools.tensor_descriptor import TensorDescriptor

    part = [tile.bm, tile.bn // tile.parts]
    stored = TensorDescriptor.from_tensor(c, part)
    programs = tile.programs_per_sm * configs.multiprocessors(a.device)
    kernels.int8_product_tma[(min(tiles, programs),)](
        TensorDescriptor.from_tensor(a, [tile.bm, tile.bk]),
        TensorDescriptor.from_tensor(b, [tile.bn, tile.bk]),
        stored,
        stored if residual is None else TensorDescriptor.from_tensor(residual, part),
        *vectors,
        m,
        n,
        k,
        PROGRAMS=programs,
        PARTS=tile.parts,
        FLATTEN=tile.flatten,
        EARLY=tile.early,
        **flags,
    )


def _seconds(operands: tuple[torch.Tensor | None, ...], kernel: str, tile: Product) -> float:
    """Return seconds of a product with given tiles, infinite where they do not fit."""
    from triton.errors import TritonError
    from triton.testing import do_bench

    try:
        milliseconds = do_bench(
            lambda: _run_product(operands, kernel, tile), warmup=5, rep=20, return_mode="median"
        )
    except TritonError:  # too large for this GPU, or not to be compiled for it
        return math.inf
    return float(milliseconds) / 1e3


def joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return tensors that lie one after another in one storage as one, None if they do not."""
    first = tensors[0]
    if len(tensors) == 1:
        return first
    end = first.data_ptr()
    storage = first.untyped_storage().data_ptr()
    for tensor in tensors:
        fits = tensor.dtype == first.dtype and tensor.shape[1:] == first.shape[1:]
        if not (fits and tensor.is_contiguous() and tensor.data_ptr() == end):
            return None
        if tensor.untyped_storage().data_ptr() != storage:
            return None
        end += tensor.nbytes
    rows = sum(tensor.shape[0] for tensor in tensors)
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def _joined_biases(biases: Sequence[torch.Tensor | None]) -> torch.Tensor | bool | None:
    """Return biases as one, None if there are none, False if they cannot be one."""
    there = [bias for bias in biases if bias is not None]
    if not there:
        return None
    whole = joined(there) if len(there) == len(biases) else None
    return False if whole is None else whole


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` as (rows, columns) with adjacent columns, without a copy where it can be."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def _tma_addressable(x: torch.Tensor) -> bool:
    return (
        x.data_ptr() % _TMA_BYTES == 0
        and x.stride(0) > 0  # no rows that were expanded
        and x.stride(0) * x.element_size() % _TMA_BYTES == 0
        and x.stride(1) == 1
    )


def _ceil(count: int, size: int) -> int:
    return -(-count // size)

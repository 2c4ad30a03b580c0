"""The INT8 matmul in Triton, with TMA and with pointers, and the launches of both kernels.

All symbols follow the usual letters: ``C[M, N] = A[M, K] @ B[N, K].T``.

Nothing here chooses a tile size or checks an argument: see :mod:`..tiles` and :mod:`..dispatch`.
The kernels also run on the CPU under Triton's interpreter (``TRITON_INTERPRET=1``), which is how CI
tests them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from pytest_int8bench.kernels import device as devices
from pytest_int8bench.kernels.launch import Described, Launch, ceil
from pytest_int8bench.kernels.tile_types import Problem, Product


@triton.jit
def _tile_of(index, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Return the tile row and tile column of tile ``index``. Tiles are numbered within groups of
    ``GROUP`` tile rows, so that consecutive tiles share inputs, which are then in the cache."""
    in_m = tl.cdiv(M, BM)
    in_n = tl.cdiv(N, BN)
    group = index // (GROUP * in_n)
    first = group * GROUP
    rows = min(in_m - first, GROUP)
    inside = index % (GROUP * in_n)
    return first + inside % rows, inside // rows


@triton.jit
def _scaled(
    acc,
    rows,
    columns,
    M,
    N,
    row_scale,
    column_scale,
    bias,
    gamma,
    HAS_BIAS: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
):
    """Return ``(acc * row_scale * column_scale + bias) * gamma`` in FP32."""
    scale_m = tl.load(row_scale + rows, mask=rows < M, other=0.0)
    out = acc.to(tl.float32) * scale_m[:, None] * _of_columns(column_scale, columns, N)
    if HAS_BIAS:
        out += _of_columns(bias, columns, N)
    if HAS_GAMMA:
        out *= _of_columns(gamma, columns, N)
    return out


@triton.jit
def _of_columns(vector, columns, N):
    """Load the values of ``vector`` for the given columns, as a row in FP32."""
    return tl.load(vector + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _finish(
    acc,
    at_m,
    at_n,
    c,
    residual,
    M,
    N,
    row_scale,
    column_scale,
    bias,
    gamma,
    held,
    HAS_BIAS: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Scale a part of a tile, add the residual, and store the result through the descriptor
    ``c``."""
    rows = at_m + tl.arange(0, acc.shape[0])
    columns = at_n + tl.arange(0, acc.shape[1])
    out = _scaled(
        acc, rows, columns, M, N, row_scale, column_scale, bias, gamma, HAS_BIAS, HAS_GAMMA
    )
    if HAS_RESIDUAL:
        if EARLY:
            out += held.to(tl.float32)
        else:
            out += residual.load([at_m, at_n]).to(tl.float32)
    c.store([at_m, at_n], out.to(c.dtype))


@triton.jit
def _halves(acc):
    """Return the left and the right half of ``acc``."""
    wide: tl.constexpr = acc.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, wide)), (0, 2, 1)))


@triton.jit
def int8_product_tma(
    a,
    b,
    c,
    residual,
    row_scale,
    column_scale,
    bias,
    gamma,
    M,
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PARTS: tl.constexpr,
    FLATTEN: tl.constexpr,
    EARLY: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """Compute the matmul with tensor descriptors; each program computes many tiles.

    A tile is stored in ``PARTS`` parts, which leaves enough shared memory for a second program on
    the same multiprocessor: one multiplies while the other scales and stores.
    """
    tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    k_tiles = tl.cdiv(K, BK)
    PART: tl.constexpr = BN // PARTS
    for index in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=FLATTEN):
        tile_m, tile_n = _tile_of(index, M, N, BM, BN, GROUP)
        at_m = tile_m * BM
        at_n = tile_n * BN
        held = ()
        for part in tl.static_range(PARTS):
            if EARLY and HAS_RESIDUAL:
                held = held + (residual.load([at_m, at_n + part * PART]),)
            else:
                held = held + (0,)
        acc = tl.zeros((BM, BN), dtype=tl.int32)
        for k in range(k_tiles):
            left = a.load([at_m, k * BK])
            right = b.load([at_n, k * BK])
            acc = tl.dot(left, right.T, acc, out_dtype=tl.int32)
        if PARTS == 1:
            pieces = (acc,)
        elif PARTS == 2:
            pieces = _halves(acc)
        else:
            left_half, right_half = _halves(acc)
            first, second = _halves(left_half)
            third, fourth = _halves(right_half)
            pieces = (first, second, third, fourth)
        for part in tl.static_range(PARTS):
            _finish(
                pieces[part],
                at_m,
                at_n + part * PART,
                c,
                residual,
                M,
                N,
                row_scale,
                column_scale,
                bias,
                gamma,
                held[part],
                HAS_BIAS,
                HAS_GAMMA,
                HAS_RESIDUAL,
                EARLY,
            )


@triton.jit
def int8_product_pointers(
    a,
    b,
    c,
    residual,
    row_scale,
    column_scale,
    bias,
    gamma,
    M,
    N,
    K,
    residual_stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Compute the matmul with pointers, for GPUs without TMA (sm80, sm89) and any K and N."""
    tile_m, tile_n = _tile_of(tl.program_id(0), M, N, BM, BN, GROUP)
    rows = tile_m * BM + tl.arange(0, BM)
    columns = tile_n * BN + tl.arange(0, BN)
    depth = tl.arange(0, BK)
    # Indices beyond M or N wrap around, so that loads need no mask for them. Their results are not
    # stored.
    left_at = a + (rows % M).to(tl.int64)[:, None] * K + depth[None, :]
    right_at = b + (columns % N).to(tl.int64)[None, :] * K + depth[:, None]
    # Load these before the loop, which hides their latency.
    scale_m = tl.load(row_scale + rows, mask=rows < M, other=0.0)
    scale_n = _of_columns(column_scale, columns, N)
    if HAS_BIAS:
        added = _of_columns(bias, columns, N)
    acc = tl.zeros((BM, BN), dtype=tl.int32)
    for k in range(tl.cdiv(K, BK)):
        if EVEN_K:
            left = tl.load(left_at)
            right = tl.load(right_at)
        else:
            inside = depth < K - k * BK
            left = tl.load(left_at, mask=inside[None, :], other=0)
            right = tl.load(right_at, mask=inside[:, None], other=0)
        acc = tl.dot(left, right, acc, out_dtype=tl.int32)
        left_at += BK
        right_at += BK
    out = acc.to(tl.float32) * scale_m[:, None] * scale_n
    if HAS_BIAS:
        out += added
    if HAS_GAMMA:
        out *= _of_columns(gamma, columns, N)
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    long_rows = rows.to(tl.int64)[:, None]
    if HAS_RESIDUAL:
        at = residual + long_rows * residual_stride + columns[None, :]
        out += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    at = c + long_rows * N + columns[None, :]
    tl.store(at, out.to(c.dtype.element_ty), mask=mask)


def launch_tma(
    problem: Problem,
    has_bias: bool,
    has_gamma: bool,
    stride: int,
    tile: Product,
    device: torch.device,
) -> Launch:
    """Return the launch of the kernel with tensor descriptors.

    Args:
        problem: the sizes of the matmul.
        has_bias: whether there is a bias.
        has_gamma: whether there is a factor for each column.
        stride: row stride of the residual; 0 without one.
        tile: the tiles.
        device: where the kernel runs.
    """
    m, n, k = problem.m, problem.n, problem.k
    programs = tile.programs_per_sm * devices.multiprocessors(device)
    part = [tile.bm, tile.bn // tile.parts]
    return Launch(
        int8_product_tma,
        min(_count(problem, tile), programs),
        (m, n, k),
        _constants(problem, has_bias, has_gamma, tile)
        | {
            "PROGRAMS": programs,
            "PARTS": tile.parts,
            "FLATTEN": tile.flatten,
            "EARLY": tile.early,
        },
        {"num_warps": tile.warps, "num_stages": tile.stages},
        (
            Described((m, k), (k, 1), [tile.bm, tile.bk]),
            Described((n, k), (k, 1), [tile.bn, tile.bk]),
            Described((m, n), (n, 1), part),
            Described((m, n), (stride or n, 1), part),
        ),
    )


def launch_pointers(
    problem: Problem,
    has_bias: bool,
    has_gamma: bool,
    stride: int,
    tile: Product,
    device: torch.device,
) -> Launch:
    """Return the launch of the kernel with pointers, which takes the arguments of
    :func:`launch_tma`."""
    return Launch(
        int8_product_pointers,
        _count(problem, tile),
        (problem.m, problem.n, problem.k, stride),
        _constants(problem, has_bias, has_gamma, tile) | {"EVEN_K": problem.k % tile.bk == 0},
        {"num_warps": tile.warps, "num_stages": tile.stages},
    )


def _count(problem: Problem, tile: Product) -> int:
    """Return the number of tiles of the output."""
    return ceil(problem.m, tile.bm) * ceil(problem.n, tile.bn)


def _constants(problem: Problem, has_bias: bool, has_gamma: bool, tile: Product) -> dict[str, Any]:
    return {
        "BM": tile.bm,
        "BN": tile.bn,
        "BK": tile.bk,
        "GROUP": tile.group,
        "HAS_BIAS": has_bias,
        "HAS_GAMMA": has_gamma,
        "HAS_RESIDUAL": problem.residual,
    }

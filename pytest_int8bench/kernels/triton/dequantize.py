"""Dequantize INT8 weights."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import triton
import triton.language as tl

from pytest_int8bench.kernels.launch import DEFAULT_STAGES, Launch, ceil

#: Maximum number of weights that one launch dequantizes.
AT_ONCE = 4


@triton.jit
def _dequantized_tile(
    weight, scale, out, tile, N, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    across: tl.constexpr = (K + COLUMNS - 1) // COLUMNS
    rows = tile // across * ROWS + tl.arange(0, ROWS)
    columns = tile % across * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < N)[:, None]
    if K % COLUMNS != 0:
        inside = inside & (columns < K)[None, :]
    at = rows.to(tl.int64)[:, None] * K + columns[None, :]
    values = tl.load(weight + at, mask=inside, other=0).to(tl.float32)
    values *= tl.load(scale + rows, mask=rows < N, other=0.0)[:, None]
    tl.store(out + at, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def dequantize(
    weight0,
    scale0,
    out0,
    weight1,
    scale1,
    out1,
    weight2,
    scale2,
    out2,
    weight3,
    scale3,
    out3,
    N0,
    N1,
    N2,
    N3,
    end0,
    end1,
    end2,
    K0: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    K3: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write up to four weights ``weight[N, K] * scale[N]`` in one launch.

    One launch serves several weights because launching takes about as long as dequantizing one.
    Programs before ``end0`` compute the first weight, those before ``end1`` the second, and so on.
    K is 0 for absent weights.
    """
    program = tl.program_id(0)
    if program < end0:
        _dequantized_tile(weight0, scale0, out0, program, N0, K0, ROWS, COLUMNS)
    elif program < end1:
        if K1 > 0:
            _dequantized_tile(weight1, scale1, out1, program - end0, N1, K1, ROWS, COLUMNS)
    elif program < end2:
        if K2 > 0:
            _dequantized_tile(weight2, scale2, out2, program - end1, N2, K2, ROWS, COLUMNS)
    elif K3 > 0:
        _dequantized_tile(weight3, scale3, out3, program - end2, N3, K3, ROWS, COLUMNS)


def launch(sizes: Sequence[tuple[int, ...]], tile: tuple[int, int]) -> Launch:
    """Return the launch of the kernel.

    Args:
        sizes: (N, K) of each weight, at most ``AT_ONCE`` of them.
        tile: rows and columns of a weight that one program dequantizes.
    """
    rows, columns = tile
    padded = [*sizes, *[(0, 0)] * (AT_ONCE - len(sizes))]
    ends = list(itertools.accumulate(ceil(n, rows) * ceil(k, columns) for n, k in padded))
    return Launch(
        dequantize,
        ends[-1],
        (*(n for n, _ in padded), *ends[:-1]),
        {**{f"K{i}": k for i, (_, k) in enumerate(padded)}, "ROWS": rows, "COLUMNS": columns},
        {"num_warps": 4, "num_stages": DEFAULT_STAGES},
    )

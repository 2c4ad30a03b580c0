"""Triton kernels of INT8 inference: the INT8 product, the pass that quantizes its rows, and the one
that dequantizes weights.

All symbols follow the usual letters: the product is ``C[M, N] = A[M, K] @ B[N, K].T``.

Nothing here chooses a tile size or checks an argument: that is ``operators``. The kernels also run
on the CPU under Triton's interpreter (``TRITON_INTERPRET=1``), which is how CI tests them.
"""

from __future__ import annotations

import triton
import triton.language as tl

# What quantize_rows does to a row before it quantizes it.
PLAIN, LAYER_NORM, RMS_NORM = 0, 1, 2
NO_ACTIVATION, GELU, GELU_TANH, SILU, RELU = 0, 1, 2, 3, 4

# A row's largest value becomes 127.5, which rounds to even and would be 128: the factor keeps it
# under. It is eight parts in ten million, an eighth of what INT8 could tell from 127.5.
_TOP = tl.constexpr(127.4999)
# Adding and taking away 1.5 * 2**23 rounds a float to the nearest integer, half to even, and
# leaves the integer in the low bits.
_ROUND = tl.constexpr(12582912.0)
# Rows whose largest value is smaller are zero: its reciprocal would not be finite.
_TINY = tl.constexpr(1e-36)
_INFINITY_BITS = tl.constexpr(0x7F800000)


@triton.jit
def _tile_of(index, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Return row and column of tile ``index``. Tiles that share rows of A and columns of B come
    one after the other in groups of ``GROUP`` tile rows, so that both are found in the cache."""
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
    column_ok = columns < N
    scale_n = tl.load(column_scale + columns, mask=column_ok, other=0.0)
    out = acc.to(tl.float32) * scale_m[:, None] * scale_n[None, :]
    if HAS_BIAS:
        out += tl.load(bias + columns, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    if HAS_GAMMA:
        out *= tl.load(gamma + columns, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    return out


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
    """Scale a part of a tile and store it through the descriptor ``c``."""
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
    """Return the left and the right half of the columns of ``acc``."""
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
    """The product with tensor descriptors; each program runs many tiles.

    A tile is stored in ``PARTS`` parts, which leaves shared memory for a second program on the
    same multiprocessor: one multiplies while the other scales and stores.
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
    """The product with pointers, for GPUs without TMA (sm80, sm89) and any K and N."""
    tile_m, tile_n = _tile_of(tl.program_id(0), M, N, BM, BN, GROUP)
    rows = tile_m * BM + tl.arange(0, BM)
    columns = tile_n * BN + tl.arange(0, BN)
    depth = tl.arange(0, BK)
    # Rows beyond the end are read again from the start, which needs no mask, and not stored.
    left_at = a + (rows % M).to(tl.int64)[:, None] * K + depth[None, :]
    right_at = b + (columns % N).to(tl.int64)[None, :] * K + depth[:, None]
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
    out = _scaled(
        acc, rows, columns, M, N, row_scale, column_scale, bias, gamma, HAS_BIAS, HAS_GAMMA
    )
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    long_rows = rows.to(tl.int64)[:, None]
    if HAS_RESIDUAL:
        at = residual + long_rows * residual_stride + columns[None, :]
        out += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    at = c + long_rows * N + columns[None, :]
    tl.store(at, out.to(c.dtype.element_ty), mask=mask)


@triton.jit
def _normal_cdf(x):
    """Return the cumulative normal distribution by Abramowitz and Stegun 7.1.26: at most 1.5e-7
    off. With libdevice's erf, arithmetic would take longer than memory does."""
    z = 1.0 + 0.2316418882 * tl.abs(x)  # 0.3275911 / sqrt(2)
    t = tl.rsqrt(z * z)  # 1 / z in one instruction
    tail = t * (
        0.127414796
        + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)))
    )
    tail *= tl.exp2(x * x * -0.72134752044)  # exp(-x * x / 2)
    return tl.where(x < 0, tail, 1.0 - tail)


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == 1:
        x = x * _normal_cdf(x)
    elif ACTIVATION == 2:
        x = x * tl.sigmoid(1.5957691216 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == 3:
        x = x * tl.sigmoid(x)
    elif ACTIVATION == 4:
        x = tl.where(x < 0, 0.0, x)  # keeps NaN, which a maximum would lose
    return x


@triton.jit
def quantize_rows(
    x,
    gate,
    q,
    scale,
    weight,
    bias,
    factor,
    kept,
    M,
    x_stride,
    gate_stride,
    EPS: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Quantize rows ``x[M, K]`` to ``q[M, K]`` (INT8) and ``scale[M]`` (FP32) in one pass.

    Before that, in FP32: an activation (times ``gate``), or a norm with ``weight`` and ``bias``;
    then ``factor``, one per column. With ``KEEP`` the row as it was before ``factor`` goes to
    ``kept`` too. A row stays in registers as ``CHUNKS`` pieces of ``BLOCK`` columns.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_ok = (rows < M)[:, None]
    lanes = tl.arange(0, BLOCK)
    EVEN: tl.constexpr = BLOCK * CHUNKS == K
    pieces = ()
    for chunk in tl.static_range(CHUNKS):
        columns = (chunk * BLOCK + lanes)[None, :]
        mask = row_ok if EVEN else row_ok & (columns < K)
        piece = tl.load(x + rows[:, None] * x_stride + columns, mask=mask, other=0.0)
        piece = _activated(piece.to(tl.float32), ACTIVATION)
        if HAS_GATE:
            other = tl.load(gate + rows[:, None] * gate_stride + columns, mask=mask, other=0.0)
            piece *= other.to(tl.float32)
        pieces = pieces + (piece,)

    if NORM != 0:
        # Pieces are added up first, so that threads exchange one value a row.
        mean = tl.zeros((ROWS,), dtype=tl.float32)
        if NORM == 1:
            total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
            for chunk in tl.static_range(CHUNKS):
                total += pieces[chunk]
            mean = tl.sum(total, axis=1) / K
        squares = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        for chunk in tl.static_range(CHUNKS):
            centred = pieces[chunk] - mean[:, None]
            if not EVEN:
                centred = tl.where((chunk * BLOCK + lanes)[None, :] < K, centred, 0.0)
            squares += centred * centred
        inverse = tl.rsqrt(tl.sum(squares, axis=1) / K + EPS)
        normed = ()
        for chunk in tl.static_range(CHUNKS):
            columns = chunk * BLOCK + lanes
            piece = (pieces[chunk] - mean[:, None]) * inverse[:, None]
            if HAS_WEIGHT:
                w = tl.load(weight + columns, mask=columns < K, other=0.0)
                piece *= w.to(tl.float32)[None, :]
            if HAS_BIAS:
                b = tl.load(bias + columns, mask=columns < K, other=0.0)
                piece += b.to(tl.float32)[None, :]
            normed = normed + (piece,)
        pieces = normed

    # Magnitudes compared as integers: the same order, and NaN is the largest.
    magnitudes = tl.zeros((ROWS, BLOCK), dtype=tl.int32)
    ready = ()
    for chunk in tl.static_range(CHUNKS):
        columns = chunk * BLOCK + lanes
        piece = pieces[chunk]
        if KEEP:
            mask = row_ok & (columns < K)[None, :]
            where = rows[:, None] * K + columns[None, :]
            tl.store(kept + where, piece.to(kept.dtype.element_ty), mask=mask)
        if HAS_FACTOR:
            f = tl.load(factor + columns, mask=columns < K, other=0.0)
            piece *= f.to(tl.float32)[None, :]
        if not EVEN:
            piece = tl.where((columns < K)[None, :], piece, 0.0)
        magnitudes = tl.maximum(magnitudes, piece.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        ready = ready + (piece,)

    largest = tl.max(magnitudes, axis=1)
    peak = largest.to(tl.float32, bitcast=True)
    # An infinite or undefined value makes the whole row undefined, instead of passing for 127.
    finite = largest < _INFINITY_BITS
    used = finite & (peak > _TINY)
    inverse = tl.where(used, _TOP / tl.where(used, peak, 1.0), 0.0)
    row_scale = tl.where(used, peak / 127.5, tl.where(finite, 0.0, float("nan")))
    tl.store(scale + rows, row_scale, mask=rows < M)
    for chunk in tl.static_range(CHUNKS):
        columns = chunk * BLOCK + lanes
        bits = (ready[chunk] * inverse[:, None] + _ROUND).to(tl.int32, bitcast=True)
        mask = row_ok if EVEN else row_ok & (columns < K)[None, :]
        tl.store(q + rows[:, None] * K + columns[None, :], bits.to(tl.int8), mask=mask)


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
    """Write up to four weights ``weight[N, K] * scale[N]`` in one launch: each alone takes about as
    long to start as to run. Programs up to ``end0`` work on the first one, up to ``end1`` on the
    second one, and so on; K is 0 where there is none."""
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

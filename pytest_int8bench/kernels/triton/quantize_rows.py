"""Quantize the rows of a linear layer's input to INT8, fused with the norm or activation before."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from pytest_int8bench.kernels.launch import DEFAULT_STAGES, Launch, ceil
from pytest_int8bench.kernels.schema import ACTIVATIONS, NORMS
from pytest_int8bench.kernels.tile_types import Rows

# The largest magnitude of a row is scaled to just below 127.5, which would round to 128 (half to
# even) and overflow. The difference is eight parts in ten million.
_TOP = tl.constexpr(127.4999)
# Adding 1.5 * 2**23 rounds a float to the nearest integer, half to even, and leaves the integer in
# the low bits.
_ROUND = tl.constexpr(12582912.0)
# Rows whose largest magnitude is smaller count as zero, because its reciprocal may not be finite.
_TINY = tl.constexpr(1e-36)
_INFINITY_BITS = tl.constexpr(0x7F800000)


@triton.jit
def _normal_cdf(x):
    """Return the normal CDF by Abramowitz and Stegun 7.1.26, with an error of at most 1.5e-7.

    libdevice's erf would make the kernel compute-bound.
    """
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
    """Return ``x`` after the activation with this index in ``schema.ACTIVATIONS``."""
    if ACTIVATION == 1:
        x = x * _normal_cdf(x)
    elif ACTIVATION == 2:
        x = x * tl.sigmoid(1.5957691216 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == 3:
        x = x * tl.sigmoid(x)
    elif ACTIVATION == 4:
        x = tl.where(x < 0, 0.0, x)  # tl.maximum would drop NaN
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

    First apply in FP32 either an activation (times ``gate``) or a norm with ``weight`` and
    ``bias``, then multiply by ``factor``, one per column. With ``KEEP``, also store the row from
    before ``factor`` in ``kept``. ``NORM`` and ``ACTIVATION`` are indices in ``schema.NORMS`` and
    ``schema.ACTIVATIONS``. A row stays in registers as ``CHUNKS`` pieces of ``BLOCK`` columns.
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
        # Add up the pieces before reducing, so that threads exchange only one value per row.
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

    # Compare magnitudes by their bits as integers: the order is the same, and NaN is the largest.
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
    # Infinity or NaN makes the scale of the row NaN, so that it does not pass for an INT8 value.
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


def launch(
    shape: tuple[int, int],
    strides: tuple[int, int],
    norm: str,
    activation: str,
    eps: float,
    keep: bool,
    has: Sequence[bool],
    tile: Rows,
) -> Launch:
    """Return the launch of the kernel.

    Args:
        shape: number and length of the rows.
        strides: row strides of the input and of its gate, in elements.
        norm: as in :func:`..ops.quantize_rows`; so are ``activation``, ``eps`` and ``keep``.
        has: whether there is a gate, a weight, a bias and a factor, in this order.
        tile: how programs divide the rows.
    """
    count, columns = shape
    has_gate, has_weight, has_bias, has_factor = has
    return Launch(
        quantize_rows,
        ceil(count, tile.rows),
        (count, *strides),
        {
            "EPS": eps,
            "K": columns,
            "ROWS": tile.rows,
            "BLOCK": tile.block,
            "CHUNKS": tile.chunks,
            "NORM": NORMS.index(norm),
            "ACTIVATION": ACTIVATIONS.index(activation),
            "HAS_GATE": has_gate,
            "HAS_WEIGHT": has_weight,
            "HAS_BIAS": has_bias,
            "HAS_FACTOR": has_factor,
            "KEEP": keep,
        },
        {"num_warps": tile.warps, "num_stages": DEFAULT_STAGES},
    )

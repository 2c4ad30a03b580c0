"""Rotary position embedding (RoPE): rotate pairs of columns by an angle.

The results match, bit for bit, those of the kernels that Inductor generates from a model's own
rotation: FP32 throughout, the same sines and cosines, and the same fused multiply-adds, which are
written out here so that no compiler chooses others.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from pytest_int8bench.kernels.launch import DEFAULT_STAGES, Launch, ceil
from pytest_int8bench.kernels.schema import ROTATIONS
from pytest_int8bench.kernels.tile_types import Heads

#: Number of elements of each tensor that one program of ``rotate_heads`` rotates, in whole rows.
_TILE = 2048
_NONE = tl.constexpr(ROTATIONS.index("none"))
_ANGLES = tl.constexpr(ROTATIONS.index("angles"))
_HALVES = tl.constexpr(ROTATIONS.index("halves"))
# Adding and then subtracting 1.5 * 2**23 rounds a float to the nearest integer.
_ROUND = tl.constexpr(12582912.0)
# From this angle on, libdevice uses integer arithmetic to reduce angles.
_LARGE = tl.constexpr(105615.0)


@triton.jit
def _sine_and_cosine(x):
    """Return sine and cosine: bit-identical to libdevice's for angles below ``_LARGE``, and with an
    error of at most 2e-7 up to a hundred thousand turns."""
    # Not a plain multiplication, which the compiler would fuse with the addition.
    quarters = tl.fma(x, 0.6366197466850281, 0.0) + _ROUND
    turns = quarters - _ROUND
    r = tl.fma(turns, -1.570796251296997, x)
    r = tl.fma(turns, -7.549789415861596e-08, r)
    r = tl.fma(turns, -5.390302953474238e-15, r)
    square = r * r
    sine = tl.fma(square, -0.00019574658654164523, 0.00833270326256752)
    sine = tl.fma(tl.fma(sine, square, -0.16666662693023682), square * r, r)
    cosine = tl.fma(square, 2.4279579520225525e-05, -0.0013887860113754869)
    cosine = tl.fma(tl.fma(cosine, square, 0.041666727513074875), square, -0.4999999701976776)
    cosine = tl.fma(cosine, square, 1.0)
    quadrant = quarters.to(tl.int32, bitcast=True)
    swapped = (quadrant & 1) != 0
    first, second = tl.where(swapped, cosine, sine), tl.where(swapped, sine, cosine)
    return (
        tl.where((quadrant & 2) != 0, -first, first),
        tl.where(((quadrant + 1) & 2) != 0, -second, second),
    )


@triton.jit
def _angles(
    turn,
    turn_row,
    other,
    other_row,
    at,
    there,
    ROTATION: tl.constexpr,
    TERMS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Return the angles of rows: loaded, or as a sum of ``TERMS`` positions times their
    frequencies."""
    columns = tl.arange(0, PADDED // 2)
    fits = columns < WIDTH // 2
    rows = turn + at.to(tl.int64) * turn_row
    if ROTATION == _ANGLES:
        angles = tl.load(rows[:, None] + columns[None, :], there[:, None] & fits[None, :], 0.0)
    else:
        position = _position(rows, there)
        frequency = _frequency(other, columns, fits)
        if TERMS == 1:
            angles = position * frequency
        else:
            angles = _position(rows + 1, there) * _frequency(other + other_row, columns, fits)
            angles = tl.fma(position, frequency, angles)
        for term in tl.static_range(2, TERMS):
            position = _position(rows + term, there)
            frequency = _frequency(other + term * other_row, columns, fits)
            angles = tl.fma(position, frequency, angles)
    return angles


@triton.jit
def _position(rows, there):
    return tl.load(rows, there, 0.0).to(tl.float32)[:, None]


@triton.jit
def _frequency(row, columns, fits):
    return tl.load(row + columns, fits, 0.0).to(tl.float32)[None, :]


@triton.jit
def _pairs(
    source, row_step, at, there, HALVES: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr
):
    """Return the first and the second columns of all pairs in FP32: the two halves of each row with
    ``HALVES``, else its even and its odd columns."""
    rows = source + at.to(tl.int64)[:, None] * row_step
    if HALVES:
        columns = tl.arange(0, PADDED // 2)[None, :]
        fits = there[:, None] & (columns < WIDTH // 2)
        first = tl.load(rows + columns, fits, 0.0).to(tl.float32)
        second = tl.load(rows + WIDTH // 2 + columns, fits, 0.0).to(tl.float32)
    else:
        columns = tl.arange(0, PADDED)[None, :]
        x = tl.load(rows + columns, there[:, None] & (columns < WIDTH), 0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(x, (x.shape[0], PADDED // 2, 2)))
    return first, second


@triton.jit
def _turned(first, second, first_sine, first_cosine, second_sine, second_cosine):
    return (
        tl.fma(first, first_cosine, -second * first_sine),
        tl.fma(second, second_cosine, first * second_sine),
    )


@triton.jit
def rotated_pairs(
    source,
    row_step,
    turn,
    turn_row,
    other,
    other_row,
    at,
    there,
    ROTATION: tl.constexpr,
    TERMS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Load rows and return the first and the second columns of all pairs, rotated as ``ROTATION``
    specifies."""
    first, second = _pairs(source, row_step, at, there, ROTATION == _HALVES, WIDTH, PADDED)
    if ROTATION == _HALVES:
        cosine, second_cosine = _pairs(turn, turn_row, at, there, True, WIDTH, PADDED)
        sine, second_sine = _pairs(other, other_row, at, there, True, WIDTH, PADDED)
        first, second = _turned(first, second, sine, cosine, second_sine, second_cosine)
    elif ROTATION != _NONE:
        angles = _angles(
            turn, turn_row, other, other_row, at, there, ROTATION, TERMS, WIDTH, PADDED
        )
        sine, cosine = _sine_and_cosine(angles)
        first, second = _turned(first, second, sine, cosine, sine, cosine)
    return first, second


@triton.jit
def _store(
    out, out_row, first, second, sine, cosine, at, there, WIDTH: tl.constexpr, PADDED: tl.constexpr
):
    """Rotate pairs, and store them in adjacent columns."""
    first, second = _turned(first, second, sine, cosine, sine, cosine)
    result = tl.reshape(tl.join(first, second), (first.shape[0], PADDED))
    columns = tl.arange(0, PADDED)[None, :]
    to = out + at.to(tl.int64)[:, None] * out_row + columns
    tl.store(to, result.to(out.dtype.element_ty), there[:, None] & (columns < WIDTH))


@triton.jit
def rotate_heads(
    q,
    k,
    turn,
    other,
    q_out,
    k_out,
    HEADS,
    ROWS,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    turn_batch,
    turn_head,
    turn_row,
    other_batch,
    other_head,
    other_row,
    out_batch,
    out_head,
    out_row,
    BLOCK: tl.constexpr,
    ROTATION: tl.constexpr,
    TERMS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Rotate pairs of adjacent columns of ``q[B, H, N, WIDTH]``, and of ``k`` if there is one, by
    the same angles. Consecutive programs take the heads of the same rows, which are close in
    memory."""
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    block = tl.program_id(0) // HEADS
    blocks = tl.cdiv(ROWS, BLOCK)
    batch = (block // blocks).to(tl.int64)
    at = block % blocks * BLOCK + tl.arange(0, BLOCK)
    there = at < ROWS
    q += batch * q_batch + head * q_head
    first, second = _pairs(q, q_row, at, there, False, WIDTH, PADDED)
    q_out += batch * out_batch + head * out_head
    if k is not None:
        k += batch * k_batch + head * k_head
        k_first, k_second = _pairs(k, k_row, at, there, False, WIDTH, PADDED)
        k_out += batch * out_batch + head * out_head
    turn += batch * turn_batch + head * turn_head
    if other is not None:
        other += batch * other_batch + head * other_head
    angles = _angles(turn, turn_row, other, other_row, at, there, ROTATION, TERMS, WIDTH, PADDED)
    sine, cosine = _sine_and_cosine(angles)
    _store(q_out, out_row, first, second, sine, cosine, at, there, WIDTH, PADDED)
    if k is not None:
        _store(k_out, out_row, k_first, k_second, sine, cosine, at, there, WIDTH, PADDED)
    # The minimum is 0. Taking it of a pair keeps the angle in the thread of that pair; otherwise,
    # Triton would compute the angle again in another thread.
    sizes = tl.maximum(tl.abs(angles), tl.minimum(tl.abs(first), 0.0))
    if tl.max(tl.max(sizes, 1), 0) >= _LARGE:
        tl.debug_barrier()
        sine, cosine = tl.sin(angles), tl.cos(angles)
        first, second = _pairs(q, q_row, at, there, False, WIDTH, PADDED)
        _store(q_out, out_row, first, second, sine, cosine, at, there, WIDTH, PADDED)
        if k is not None:
            first, second = _pairs(k, k_row, at, there, False, WIDTH, PADDED)
            _store(k_out, out_row, first, second, sine, cosine, at, there, WIDTH, PADDED)


def launch(heads: Heads, rotation: str, terms: int, strides: Sequence[Sequence[int]]) -> Launch:
    """Return the launch that rotates queries, and keys if there are any.

    Args:
        heads: number and sizes of the heads.
        rotation: one of ``schema.ROTATIONS``.
        terms: number of positions that an angle is computed from; 0 if angles are given.
        strides: batch, head and row strides of each of queries, keys, the two tensors that describe
            the rotation, and the result.
    """
    rows = max(_TILE // heads.padded, 1)
    return Launch(
        rotate_heads,
        heads.batch * heads.heads * ceil(heads.q_rows, rows),
        (heads.heads, heads.q_rows, *(step for steps in strides for step in steps)),
        {
            "BLOCK": rows,
            "ROTATION": ROTATIONS.index(rotation),
            "TERMS": terms,
            "WIDTH": heads.width,
            "PADDED": heads.padded,
        },
        {"num_warps": 4, "num_stages": DEFAULT_STAGES},
    )

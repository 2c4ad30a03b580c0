"""Attention with INT8 queries and keys: one kernel quantizes them, another computes attention.

The norm of a query times the largest norm of a key bounds the scores of the query's row. If that
bound is small enough, exp2 of the scores can be summed without subtracting the row maximum, which
does not change softmax. Then nothing is rescaled, and no block of keys depends on the one before.
Tiles with a larger bound use the usual online softmax with a running maximum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import triton
import triton.language as tl

from pytest_int8bench.kernels.launch import DEFAULT_STAGES, Described, Launch, ceil
from pytest_int8bench.kernels.schema import ROTATIONS
from pytest_int8bench.kernels.tile_types import KEY_BLOCK, KEY_SAMPLE, Attention, Heads
from pytest_int8bench.kernels.triton.rotation import rotated_pairs

#: Blocks of ``KEY_BLOCK`` rows that one program of ``quantize_heads`` quantizes.
_BLOCKS = 4
_SAMPLE = tl.constexpr(KEY_SAMPLE)
# Adding and subtracting 1.5 * 2**23 rounds a float to the nearest integer.
_ROUND = tl.constexpr(12582912.0)
_TINY = tl.constexpr(1e-36)
_INFINITY_BITS = tl.constexpr(0x7F800000)
# Largest bounds on scores for which exp2 of the scores, and sums of it, stay well within the range
# of BF16 and FP32 (the first limit), and of FP16 (the second one).
_LIMIT, _FP16_LIMIT = tl.constexpr(64.0), tl.constexpr(10.0)


@triton.jit
def _magnitudes(even, odd):
    """Return the larger magnitude of each pair as integer bits, among which NaN is the largest."""
    first = even.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.maximum(first, odd.to(tl.int32, bitcast=True) & 0x7FFFFFFF)


@triton.jit
def _scale_of(largest):
    """Return the scale for the largest magnitude (integer bits), and the inverse of the scale.

    The scale is NaN if the magnitude is not finite.
    """
    peak = largest.to(tl.float32, bitcast=True)
    finite = largest < _INFINITY_BITS
    used = finite & (peak > _TINY)
    inverse = tl.where(used, 127.0 / tl.where(used, peak, 1.0), 0.0)
    return tl.where(used, peak / 127.0, tl.where(finite, 0.0, float("nan"))), inverse


@triton.jit
def _store_levels(target, at, mask, even, odd, inverse, PADDED: tl.constexpr):
    """Store pairs as INT8, even columns before odd ones; return the sum of squares of each pair."""
    columns = tl.arange(0, PADDED // 2)
    to = target + at.to(tl.int64)[:, None] * PADDED + columns[None, :]
    squares = tl.zeros(even.shape, tl.float32)
    for half in tl.static_range(2):
        levels = (even if half == 0 else odd) * inverse + _ROUND
        bits = levels.to(tl.int32, bitcast=True)
        tl.store(to + half * (PADDED // 2), bits.to(tl.int8), mask[:, None])
        levels -= _ROUND
        squares += levels * levels
    return squares


@triton.jit
def quantize_heads(
    q,
    k,
    q_turn,
    k_turn,
    q_other,
    k_other,
    q8,
    q_scale,
    k8,
    k_scale,
    Q_PROGRAMS,
    K_PROGRAMS,
    HEADS,
    KV_HEADS,
    Q_ROWS,
    K_ROWS,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    q_turn_batch,
    q_turn_head,
    q_turn_row,
    k_turn_batch,
    k_turn_head,
    k_turn_row,
    q_other_batch,
    q_other_head,
    q_other_row,
    k_other_batch,
    k_other_head,
    k_other_row,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    ROTATION: tl.constexpr,
    TERMS: tl.constexpr,
):
    """Rotate as ``ROTATION`` says and quantize queries ``q[B, H, N, WIDTH]`` and keys.

    Each row of queries has a scale; each block of ``BLOCK`` keys has one, after the mean of a
    sample of the keys is subtracted. ``q8`` and ``k8`` are padded with zeros to ``PADDED`` columns,
    and ``k8`` to whole blocks of rows. ``k_scale[B, H, blocks, 2]`` holds the scale of each block
    and the largest norm of its keys. Programs alternate between queries and keys, so that the
    rotation of both is in the cache.
    """
    program = tl.program_id(0)
    both = tl.minimum(Q_PROGRAMS, K_PROGRAMS)
    paired = program < 2 * both
    is_keys = tl.where(paired, program % 2 == 1, K_PROGRAMS > Q_PROGRAMS)
    program = tl.where(paired, program // 2, program - both)
    rows = tl.arange(0, BLOCK)
    if is_keys:
        blocks = tl.cdiv(K_ROWS, BLOCK)
        parts = tl.cdiv(blocks, BLOCKS)
        head = (program // parts).to(tl.int64)
        batch, head_in_batch = head // KV_HEADS, head % KV_HEADS
        source = k + batch * k_batch + head_in_batch * k_head
        if k_turn is not None:
            k_turn += batch * k_turn_batch + head_in_batch * k_turn_head
        if k_other is not None:
            k_other += batch * k_other_batch + head_in_batch * k_other_head
        sample = tl.arange(0, _SAMPLE) * K_ROWS // _SAMPLE
        even, odd = rotated_pairs(
            source, k_row, k_turn, k_turn_row, k_other, k_other_row, sample, sample < K_ROWS,
            ROTATION, TERMS, WIDTH, PADDED,
        )  # fmt: skip
        mean_even, mean_odd = tl.sum(even, 0) / _SAMPLE, tl.sum(odd, 0) / _SAMPLE
        for part in range(BLOCKS):
            block = program % parts * BLOCKS + part
            at = block * BLOCK + rows
            mask = at < K_ROWS
            x, y = rotated_pairs(
                source, k_row, k_turn, k_turn_row, k_other, k_other_row, at, mask,
                ROTATION, TERMS, WIDTH, PADDED,
            )  # fmt: skip
            x = tl.where(mask[:, None], x - mean_even[None, :], 0.0)
            y = tl.where(mask[:, None], y - mean_odd[None, :], 0.0)
            scale, inverse = _scale_of(tl.max(tl.max(_magnitudes(x, y), 1), 0))
            target = k8 + head * blocks * BLOCK * PADDED
            squares = _store_levels(target, at, at < blocks * BLOCK, x, y, inverse, PADDED)
            norm = tl.sqrt(tl.max(tl.sum(squares, 1), 0)) * scale
            to = k_scale + (head * blocks + block) * 2
            tl.store(to, scale, block < blocks)
            tl.store(to + 1, norm, block < blocks)
    else:
        parts = tl.cdiv(Q_ROWS, BLOCK * BLOCKS)
        head = (program // parts).to(tl.int64)
        batch, head_in_batch = head // HEADS, head % HEADS
        source = q + batch * q_batch + head_in_batch * q_head
        if q_turn is not None:
            q_turn += batch * q_turn_batch + head_in_batch * q_turn_head
        if q_other is not None:
            q_other += batch * q_other_batch + head_in_batch * q_other_head
        for part in range(BLOCKS):
            at = (program % parts * BLOCKS + part) * BLOCK + rows
            mask = at < Q_ROWS
            x, y = rotated_pairs(
                source, q_row, q_turn, q_turn_row, q_other, q_other_row, at, mask,
                ROTATION, TERMS, WIDTH, PADDED,
            )  # fmt: skip
            scale, inverse = _scale_of(tl.max(_magnitudes(x, y), 1))
            _store_levels(q8 + head * Q_ROWS * PADDED, at, mask, x, y, inverse[:, None], PADDED)
            tl.store(q_scale + head * Q_ROWS + at, scale, mask)


@triton.jit
def _block(
    state,
    tiles,
    q_tile,
    factor,
    scales,
    start,
    where,
    TMA: tl.constexpr,
    ONLINE: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Add one block of keys and values to the state of attention, and return it."""
    acc, partial, peak = state
    k8, v = tiles
    batch, head, kv_row, v_row, K_ROWS = where
    rows = start + tl.arange(0, BLOCK)
    columns = tl.arange(0, PADDED)
    if TMA:
        k_tile = k8.load([kv_row + start, 0])
        v_tile = v.load([batch, head, start, 0]).reshape(BLOCK, PADDED)
    else:
        k_tile = tl.load(k8 + (kv_row + rows)[:, None] * PADDED + columns[None, :])
        mask = tl.full((BLOCK, PADDED), True, tl.int1)
        if MASKED:
            mask = mask & (rows < K_ROWS)[:, None]
        if WIDTH < PADDED:
            mask = mask & (columns < WIDTH)[None, :]
        at = rows.to(tl.int64)[:, None] * v_row + columns[None, :]
        v_tile = tl.load(v + at, mask, 0.0)
    scores = tl.dot(q_tile, k_tile.T).to(tl.float32)
    scores *= (factor * tl.load(scales + start // BLOCK * 2))[:, None]
    if ONLINE:
        if MASKED:
            scores = tl.where((rows < K_ROWS)[None, :], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        rescale = tl.exp2(peak - higher)
        acc *= rescale[:, None]
        partial *= rescale[:, None]
        peak = higher
        p = tl.exp2(scores - peak[:, None])
    else:
        p = tl.exp2(scores)
        if MASKED:
            p = tl.where((rows < K_ROWS)[None, :], p, 0.0)
    # Each thread sums only its own columns of a row; the threads' sums are combined at the end.
    partial += tl.sum(tl.reshape(p, (p.shape[0], BLOCK // 8, 8)), 1)
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc)
    return acc, partial, peak


@triton.jit
def _attend(
    tiles,
    q_tile,
    factor,
    scales,
    where,
    TMA: tl.constexpr,
    ONLINE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Return the sum of the values weighted by exp2 of the scores, and the sum of the weights."""
    ROWS: tl.constexpr = q_tile.shape[0]
    state = (
        tl.zeros((ROWS, PADDED), tl.float32),
        tl.zeros((ROWS, 8), tl.float32),
        tl.full((ROWS,), -1e30, tl.float32),
    )
    whole = where[4] // BLOCK * BLOCK
    for start in tl.range(0, whole, BLOCK):
        state = _block(
            state, tiles, q_tile, factor, scales, start, where,
            TMA, ONLINE, False, BLOCK, WIDTH, PADDED,
        )  # fmt: skip
    if not EVEN:
        state = _block(
            state, tiles, q_tile, factor, scales, whole, where,
            TMA, ONLINE, True, BLOCK, WIDTH, PADDED,
        )  # fmt: skip
    return state[0], tl.sum(state[1], 1)


@triton.jit
def int8_attention(
    k8,
    v,
    q8,
    q_scale,
    k_scale,
    out,
    HEADS,
    GROUP,
    Q_ROWS,
    K_ROWS,
    v_batch,
    v_head,
    v_row,
    SCALE: tl.constexpr,
    TMA: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Attend with INT8 queries and keys from ``quantize_heads`` and values ``v[B, H, N, WIDTH]``.

    ``out[B, N, H, WIDTH]`` has the memory order that the next linear layer reads. ``SCALE``
    multiplies the scores and includes log2(e), because softmax uses exp2. ``BLOCKS`` is the number
    of blocks of keys, rounded up to a power of two.
    """
    parts = tl.cdiv(Q_ROWS, ROWS)
    head = (tl.program_id(0) // parts).to(tl.int64)
    rows = tl.program_id(0) % parts * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, PADDED)
    mask = rows < Q_ROWS
    at = (head * Q_ROWS + rows)[:, None] * PADDED + columns[None, :]
    q_tile = tl.load(q8 + at, mask[:, None], 0)
    factor = tl.load(q_scale + head * Q_ROWS + rows, mask, 0.0) * SCALE

    batch = head // HEADS
    kv = batch * (HEADS // GROUP) + head % HEADS // GROUP
    blocks = tl.cdiv(K_ROWS, BLOCK)
    scales = k_scale + kv * blocks * 2
    each = tl.arange(0, BLOCKS)
    longest = tl.max(tl.load(scales + each * 2 + 1, each < blocks, 0.0), 0)
    squares = q_tile.to(tl.float32) * q_tile.to(tl.float32)
    bound = tl.max(tl.sqrt(tl.sum(squares, 1)) * tl.abs(factor), 0) * longest

    kv_head = (head % HEADS // GROUP).to(tl.int32)
    where = (batch.to(tl.int32), kv_head, (kv * blocks * BLOCK).to(tl.int32), v_row, K_ROWS)
    if not TMA:
        k8 += kv * blocks * BLOCK * PADDED
        v += batch * v_batch + kv_head * v_head
        where = (0, 0, 0, v_row, K_ROWS)
    tiles = (k8, v)
    if bound <= (_FP16_LIMIT if out.dtype.element_ty == tl.float16 else _LIMIT):
        acc, total = _attend(
            tiles, q_tile, factor, scales, where, TMA, False, EVEN, BLOCK, WIDTH, PADDED
        )
    else:
        acc, total = _attend(
            tiles, q_tile, factor, scales, where, TMA, True, EVEN, BLOCK, WIDTH, PADDED
        )
    result = acc / total[:, None]
    to = (batch * Q_ROWS + rows) * HEADS + head % HEADS
    fits = mask[:, None] & (columns < WIDTH)[None, :]
    tl.store(out + to[:, None] * WIDTH + columns[None, :], result.to(out.dtype.element_ty), fits)


#: Batch, head and row strides of a tensor with adjacent columns, in elements.
Strides: TypeAlias = Sequence[int]


def launch_quantize(heads: Heads, rotation: str, terms: int, strides: Sequence[Strides]) -> Launch:
    """Return the launch that quantizes queries and keys.

    Args:
        heads: number and sizes of the heads.
        rotation: one of ``schema.ROTATIONS``.
        terms: number of positions that an angle is computed from, if it is.
        strides: of queries and keys, then of the first tensors that describe their rotations, then
            of the second ones.
    """
    rows = _BLOCKS * KEY_BLOCK
    queries = heads.batch * heads.heads * ceil(heads.q_rows, rows)
    keys = heads.batch * heads.kv_heads * ceil(heads.k_rows, rows)
    sizes = (queries, keys, heads.heads, heads.kv_heads, heads.q_rows, heads.k_rows)
    return Launch(
        quantize_heads,
        queries + keys,
        (*sizes, *(step for steps in strides for step in steps)),
        {
            "BLOCK": KEY_BLOCK,
            "BLOCKS": _BLOCKS,
            "WIDTH": heads.width,
            "PADDED": heads.padded,
            "ROTATION": ROTATIONS.index(rotation),
            "TERMS": terms,
        },
        {"num_warps": 4, "num_stages": DEFAULT_STAGES},
    )


def launch(heads: Heads, scale: float, v: Strides, tile: Attention, tma: bool) -> Launch:
    """Return the launch that computes attention.

    Args:
        heads: number and sizes of the heads.
        scale: multiplies the scores; includes log2(e).
        v: strides of the value tensor.
        tile: how programs divide the queries.
        tma: whether to load keys and values through TMA.
    """
    blocks = heads.k_blocks
    described: tuple[Described, ...] = ()
    if tma:
        keys = heads.batch * heads.kv_heads * blocks * KEY_BLOCK
        described = (
            Described((keys, heads.padded), (heads.padded, 1), [KEY_BLOCK, heads.padded]),
            Described(
                (heads.batch, heads.kv_heads, heads.k_rows, heads.width),
                (*v, 1),
                [1, 1, KEY_BLOCK, heads.padded],
            ),
        )
    limit = {} if tile.registers is None else {"maxnreg": tile.registers}
    return Launch(
        int8_attention,
        heads.batch * heads.heads * ceil(heads.q_rows, tile.rows),
        (heads.heads, heads.heads // heads.kv_heads, heads.q_rows, heads.k_rows, *v),
        {
            "SCALE": scale,
            "TMA": tma,
            "EVEN": heads.k_rows % KEY_BLOCK == 0,
            "ROWS": tile.rows,
            "BLOCK": KEY_BLOCK,
            "WIDTH": heads.width,
            "PADDED": heads.padded,
            "BLOCKS": triton.next_power_of_2(blocks),
        },
        {"num_warps": tile.warps, "num_stages": tile.stages, **limit},
        described,
    )

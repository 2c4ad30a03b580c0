"""Attention for sequences so short that one program computes whole heads.

The kernel needs neither a loop over keys nor a running maximum.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from pytest_int8bench.kernels.launch import DEFAULT_STAGES, Launch, ceil
from pytest_int8bench.kernels.tile_types import Heads, Short


@triton.jit
def _offsets(
    heads,
    rows,
    columns,
    HEADS,
    ROWS,
    head_step,
    row_step,
    TOGETHER: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Return the offsets of the elements of ``TOGETHER`` heads, and the mask of those that exist.

    A single head is a matrix, not a batch of one: GPUs have faster instructions for matrices.
    """
    at = rows.to(tl.int64)[:, None] * row_step + columns[None, :]
    mask = (rows < ROWS)[:, None] & (columns < WIDTH)[None, :]
    if TOGETHER == 1:
        at = heads * head_step + at
    else:
        at = (heads * head_step)[:, None, None] + at[None, :, :]
        mask = (heads < HEADS)[:, None, None] & mask[None, :, :]
    return at, mask


@triton.jit
def short_attention(
    q,
    k,
    v,
    out,
    HEADS,
    GROUP,
    Q_ROWS,
    K_ROWS,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    SCALE: tl.constexpr,
    CAUSAL: tl.constexpr,
    TOGETHER: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Attend from ``q[B, H, N, WIDTH]`` to keys, N and their number at most ``ROWS`` and ``KEYS``.

    Softmax is in FP32. A program computes ``TOGETHER`` heads. ``out[B, N, H, WIDTH]`` has the
    memory order that the next linear layer reads. ``SCALE`` multiplies the scores and includes
    log2(e), because softmax uses exp2. ``GROUP`` query heads share one head of keys and values.
    """
    parts = tl.cdiv(HEADS, TOGETHER)
    batch = (tl.program_id(0) // parts).to(tl.int64)
    heads = (tl.program_id(0) % parts).to(tl.int64) * TOGETHER
    if TOGETHER > 1:
        heads += tl.arange(0, TOGETHER)
    rows, keys, columns = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, PADDED)
    at, mask = _offsets(heads, rows, columns, HEADS, Q_ROWS, q_head, q_row, TOGETHER, WIDTH)
    q_tile = tl.load(q + batch * q_batch + at, mask, 0.0)
    kv_heads = heads // GROUP
    at, mask = _offsets(
        kv_heads, keys, columns, HEADS // GROUP, K_ROWS, k_head, k_row, TOGETHER, WIDTH
    )
    k_tile = tl.load(k + batch * k_batch + at, mask, 0.0)
    at, mask = _offsets(
        kv_heads, keys, columns, HEADS // GROUP, K_ROWS, v_head, v_row, TOGETHER, WIDTH
    )
    v_tile = tl.load(v + batch * v_batch + at, mask, 0.0)

    seen = (keys < K_ROWS)[None, :]
    if CAUSAL:
        seen = seen & (keys[None, :] <= rows[:, None])
    if TOGETHER == 1:
        scores = tl.dot(q_tile, tl.trans(k_tile))
        scores = tl.where(seen, scores * SCALE, float("-inf"))
    else:
        scores = tl.dot(q_tile, tl.permute(k_tile, (0, 2, 1)))
        scores = tl.where(seen[None, :, :], scores * SCALE, float("-inf"))
    # tl.max ignores NaN, but a NaN score minus the maximum remains NaN.
    p = tl.exp2(scores - tl.max(scores, -1, keep_dims=True))
    result = tl.dot(p.to(v_tile.dtype), v_tile) / tl.sum(p, -1, keep_dims=True)
    at, mask = _offsets(
        heads, rows, columns, HEADS, Q_ROWS, WIDTH, HEADS * WIDTH, TOGETHER, WIDTH
    )  # fmt: skip
    to = out + batch * Q_ROWS * HEADS * WIDTH + at
    tl.store(to, result.to(out.dtype.element_ty), mask)


def launch(
    heads: Heads, scale: float, causal: bool, strides: Sequence[Sequence[int]], tile: Short
) -> Launch:
    """Return the launch of the kernel.

    Args:
        heads: number and sizes of the heads.
        scale: multiplies the scores; includes log2(e).
        causal: whether query i attends only to keys 0 to i.
        strides: batch, head and row strides of queries, keys and values, in elements.
        tile: how programs divide the heads.
    """
    rows, keys = (max(triton.next_power_of_2(n), 16) for n in (heads.q_rows, heads.k_rows))
    steps = [step for tensor in strides for step in tensor]
    return Launch(
        short_attention,
        heads.batch * ceil(heads.heads, tile.together),
        (heads.heads, heads.heads // heads.kv_heads, heads.q_rows, heads.k_rows, *steps),
        {
            "SCALE": scale,
            "CAUSAL": causal,
            "TOGETHER": tile.together,
            "ROWS": rows,
            "KEYS": keys,
            "WIDTH": heads.width,
            "PADDED": heads.padded,
        },
        {"num_warps": tile.warps, "num_stages": DEFAULT_STAGES},
    )

"""Warp-specialized INT8 matmul for large matrices on sm90, and its launch.

One warp group loads the inputs and two multiply: while one of these runs its epilogue, the other
multiplies. INT8 matmuls run into the GPU's power limit, so less memory traffic makes them faster:
weights that fit stay in shared memory while rows stream past, which halves the traffic from L2.

Triton cannot express warp specialization by hand, so this kernel is in Gluon, its lower-level
language. Triton's interpreter does not support Gluon: GPU tests run the kernel, and CI compiles it.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from pytest_int8bench.kernels.launch import Described, Launch, ceil
from pytest_int8bench.kernels.tile_types import SPECIALIZED_TILE, Problem, Specialized

# Triton 3.9 removed the longer names.
_copy_in = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_copy_out = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

#: Rows and columns of an output tile, and the depth of one step.
BM = BN = BK = gl.constexpr(SPECIALIZED_TILE)
#: Columns of the output that the epilogue scales and stores at once.
HALF = gl.constexpr(SPECIALIZED_TILE // 2)
# Registers per thread of the second consumer warp group, and of the producer. The first consumer
# gets the rest of 504, which is 248.
_MULTIPLYING, _LOADING = gl.constexpr(232), gl.constexpr(24)


@gluon.jit
def _load(
    a,
    b,
    memory,
    sizes,
    K_TILES: gl.constexpr,
    STAGES: gl.constexpr,
    STATIONARY: gl.constexpr,
):
    """Load tiles of A into a ring of ``STAGES``, and B with them, or a whole tile column's B first.

    This is the producer: the other warp groups consume these tiles.
    """
    a_tiles, b_tiles, full, empty, b_full, b_empty, _order, _residual_full = memory
    M, SLOTS, GROUPS, PASSES, k_tiles = sizes
    slot = gl.program_id(0) % SLOTS
    group = gl.program_id(0) // SLOTS
    count = gl.cdiv(gl.cdiv(M, BM) - group, GROUPS)
    step = 0
    for turn in range(PASSES):
        at_n = (turn * SLOTS + slot) * BN
        if STATIONARY:
            mbarrier.wait(b_empty, (turn & 1) ^ 1)
            mbarrier.expect(b_full, K_TILES * BN * BK)
            for k in gl.static_range(K_TILES):
                _copy_in(b, [at_n, k * BK], b_full, b_tiles.index(k))
        for i in range(count):
            at_m = (group + i * GROUPS) * BM
            for j in range(k_tiles):
                stage = step % STAGES
                mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
                mbarrier.expect(full.index(stage), BM * BK if STATIONARY else (BM + BN) * BK)
                _copy_in(a, [at_m, j * BK], full.index(stage), a_tiles.index(stage))
                if not STATIONARY:
                    _copy_in(b, [at_n, j * BK], full.index(stage), b_tiles.index(stage))
                step += 1


@gluon.jit
def _multiply(
    c,
    residual,
    row_scale,
    column_scale,
    bias,
    gamma,
    c_tiles,
    memory,
    sizes,
    WHICH: gl.constexpr,
    K_TILES: gl.constexpr,
    STAGES: gl.constexpr,
    BUFFERS: gl.constexpr,
    STATIONARY: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_GAMMA: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
):
    """Compute and store every second tile, starting at the first (``WHICH`` 0) or second (1)."""
    a_tiles, b_tiles, full, empty, b_full, b_empty, order, residual_full = memory
    M, SLOTS, GROUPS, PASSES, k_tiles = sizes
    whole: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32])
    half: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 32])
    slot = gl.program_id(0) % SLOTS
    group = gl.program_id(0) // SLOTS
    count = gl.cdiv(gl.cdiv(M, BM) - group, GROUPS)
    for turn in range(PASSES):
        at_n = (turn * SLOTS + slot) * BN
        if STATIONARY:
            mbarrier.wait(b_full, turn & 1)
        for i in range((WHICH + turn * count) & 1, count, 2):
            ordinal = turn * count + i
            at_m = (group + i * GROUPS) * BM
            if HAS_RESIDUAL:
                tma.store_wait(0)
                for part in gl.static_range(BUFFERS):
                    arrived = residual_full.index(WHICH * BUFFERS + part)
                    mbarrier.expect(arrived, BM * HALF * c.dtype.primitive_bitwidth // 8)
                    _copy_in(residual, [at_m, at_n + part * HALF], arrived, c_tiles.index(part))
            rows = at_m + gl.arange(0, BM, gl.SliceLayout(1, half))
            scale_m = gl.load(row_scale + rows, mask=rows < M, other=0.0)

            # The consumers take turns: one waits for the steps of its tile only after the other has
            # waited for all steps of the tile before. A wait checks only the parity of a phase, so
            # it would mistake a phase that is two older for its own.
            mbarrier.wait(order.index(WHICH), ((ordinal + 1) // 2 + 1) & 1)
            step = ordinal * k_tiles
            acc = gl.zeros((BM, BN), gl.int32, whole)
            for j in range(k_tiles):
                stage = (step + j) % STAGES
                mbarrier.wait(full.index(stage), ((step + j) // STAGES) & 1)
                right = b_tiles.index(j if STATIONARY else stage).permute((1, 0))
                acc = warpgroup_mma(a_tiles.index(stage), right, acc, use_acc=j > 0, is_async=True)
                acc = warpgroup_mma_wait(1, deps=[acc])
                mbarrier.arrive(empty.index((step + j + STAGES - 1) % STAGES), pred=j > 0)
            mbarrier.arrive(order.index(1 - WHICH))
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index((step + k_tiles - 1) % STAGES))

            halves = acc.reshape((BM, 2, HALF)).permute((0, 2, 1)).split()
            for part in gl.static_range(2):
                tile = c_tiles.index(part % BUFFERS)
                columns = at_n + part * HALF + gl.arange(0, HALF, gl.SliceLayout(0, half))
                scale_n = gl.load(column_scale + columns)
                piece = gl.convert_layout(halves[part], half, assert_trivial=True)
                out = piece.to(gl.float32) * scale_m[:, None] * scale_n[None, :]
                if HAS_BIAS:
                    out += gl.load(bias + columns).to(gl.float32)[None, :]
                if HAS_GAMMA:
                    out *= gl.load(gamma + columns).to(gl.float32)[None, :]
                if HAS_RESIDUAL:
                    arrived = residual_full.index(WHICH * BUFFERS + part % BUFFERS)
                    if part >= BUFFERS:
                        tma.store_wait(0)
                        mbarrier.expect(arrived, BM * HALF * c.dtype.primitive_bitwidth // 8)
                        _copy_in(residual, [at_m, at_n + part * HALF], arrived, tile)
                    seen = ordinal // 2 * (2 // BUFFERS) + part // BUFFERS
                    mbarrier.wait(arrived, seen & 1)
                    out += tile.load(half).to(gl.float32)
                else:
                    tma.store_wait(BUFFERS - 1)
                tile.store(out.to(c.dtype))
                fence_async_shared()
                _copy_out(c, [at_m, at_n + part * HALF], tile)
        if STATIONARY:
            mbarrier.arrive(b_empty)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "SLOTS", "GROUPS", "PASSES", "k_tiles"])
def int8_product_specialized(
    a,
    b,
    c,
    residual,
    row_scale,
    column_scale,
    bias,
    gamma,
    M,
    SLOTS,
    GROUPS,
    PASSES,
    k_tiles,
    K_TILES: gl.constexpr,
    STAGES: gl.constexpr,
    BUFFERS: gl.constexpr,
    STATIONARY: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_GAMMA: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
):
    """Compute the matmul and its epilogue; N must be a multiple of the tile.

    Program ``slot + SLOTS * group`` computes the tile columns ``slot``, ``slot + SLOTS``, …, one
    after another in ``PASSES`` passes. In each it computes the tile rows ``group``, ``group +
    GROUPS``, …. Programs that run at the same time thus share rows, which they find in the cache.

    If ``STATIONARY``, the ``K_TILES`` tiles of B for a tile column stay in shared memory for a
    pass; otherwise B is loaded in steps like A, and ``K_TILES`` is not used. Each consumer warp
    group stores through ``BUFFERS`` half tiles, into which it first loads the residual.
    """
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    a_tiles = gl.allocate_shared_memory(gl.int8, [STAGES, BM, BK], a.layout)
    b_tiles = gl.allocate_shared_memory(
        gl.int8, [K_TILES if STATIONARY else STAGES, BN, BK], b.layout
    )
    c_first = gl.allocate_shared_memory(c.dtype, [BUFFERS, BM, HALF], c.layout)
    c_second = gl.allocate_shared_memory(c.dtype, [BUFFERS, BM, HALF], c.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    b_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    b_empty = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    order = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    residual_full = gl.allocate_shared_memory(gl.int64, [2 * BUFFERS, 1], BARRIER)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    mbarrier.init(b_full, count=1)
    mbarrier.init(b_empty, count=2)
    for which in gl.static_range(2):
        mbarrier.init(order.index(which), count=1)
    for part in gl.static_range(2 * BUFFERS):
        mbarrier.init(residual_full.index(part), count=1)
    fence_async_shared()

    memory = (a_tiles, b_tiles, full, empty, b_full, b_empty, order, residual_full)
    sizes = (M, SLOTS, GROUPS, PASSES, k_tiles)
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    c,
                    residual,
                    row_scale,
                    column_scale,
                    bias,
                    gamma,
                    c_first,
                    memory,
                    sizes,
                    0,
                    K_TILES,
                    STAGES,
                    BUFFERS,
                    STATIONARY,
                    HAS_BIAS,
                    HAS_GAMMA,
                    HAS_RESIDUAL,
                ),
            ),
            (
                _multiply,
                (
                    c,
                    residual,
                    row_scale,
                    column_scale,
                    bias,
                    gamma,
                    c_second,
                    memory,
                    sizes,
                    1,
                    K_TILES,
                    STAGES,
                    BUFFERS,
                    STATIONARY,
                    HAS_BIAS,
                    HAS_GAMMA,
                    HAS_RESIDUAL,
                ),
            ),
            (_load, (a, b, memory, sizes, K_TILES, STAGES, STATIONARY)),
        ],
        [4, 1],
        [_MULTIPLYING, _LOADING],
    )


def launch(
    problem: Problem,
    has_bias: bool,
    has_gamma: bool,
    stride: int,
    tile: Specialized,
    device: torch.device,
) -> Launch:
    """Return the launch of the kernel.

    Args:
        problem: the sizes of the matmul.
        has_bias: whether there is a bias.
        has_gamma: whether there is a factor for each column.
        stride: row stride of the residual in elements, 0 without a residual.
        tile: how programs divide the tiles.
        device: where the kernel runs.
    """
    m, n, k = problem.m, problem.n, problem.k
    size = SPECIALIZED_TILE
    depth = ceil(k, size)
    inputs, halves = _layout(8), _layout(8 * problem.out_bytes)
    half = [size, size // 2]
    return Launch(
        int8_product_specialized,
        tile.slots * tile.groups,
        (m, tile.slots, tile.groups, tile.passes, depth),
        {
            "K_TILES": depth if tile.stationary else 0,
            "STAGES": tile.stages,
            "BUFFERS": tile.buffers,
            "STATIONARY": tile.stationary,
            "HAS_BIAS": has_bias,
            "HAS_GAMMA": has_gamma,
            "HAS_RESIDUAL": problem.residual,
        },
        {"num_warps": 4},
        (
            Described((m, k), (k, 1), [size, size], inputs),
            Described((n, k), (k, 1), [size, size], inputs),
            Described((m, n), (n, 1), half, halves),
            Described((m, n), (stride or n, 1), half, halves),
        ),
    )


def _layout(bits: int) -> gl.NVMMASharedLayout:
    """Return the shared-memory layout of tiles with elements of ``bits`` bits."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=2)

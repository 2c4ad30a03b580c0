"""Which tile sizes the kernels run with: a small measured table, and tuning where it is silent."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from pytest_int8bench.kernels.device import capability, multiprocessors
from pytest_int8bench.kernels.tile_types import (
    SPECIALIZED_FROM,
    SPECIALIZED_TILE,
    Problem,
    Product,
    Rows,
    Specialized,
)
from pytest_int8bench.kernels.tuning import load_tuned, save_tuned

# Measured on an H200 (132 multiprocessors), Triton 3.6, for widths of 768 and 1024. Two programs
# of one multiprocessor beat one with larger tiles: one stores while the other multiplies.
_WIDE = Product(128, 128, 128, 4, 3, programs_per_sm=2, parts=2, group=4)
_WIDE_SHALLOW = Product(128, 128, 64, 4, 3, programs_per_sm=3, parts=4, group=4)
_RESIDUAL = Product(128, 128, 128, 8, 3, programs_per_sm=2, parts=4, group=4)
_RESIDUAL_DEEP = Product(
    128, 128, 128, 4, 3, programs_per_sm=2, parts=2, group=4, flatten=False, early=True
)
_RESIDUAL_WAVE = Product(128, 128, 128, 4, 3, programs_per_sm=2, parts=2, group=4, flatten=False)
_MIDDLE = Product(64, 128, 128, 4, 4, programs_per_sm=2, parts=2)
_SMALL = Product(64, 64, 128, 4, 4, programs_per_sm=4, flatten=False)
_SMALL_DEEP = Product(64, 64, 256, 4, 3, programs_per_sm=2, flatten=False)
_TINY = Product(64, 32, 256, 4, 3, programs_per_sm=4, flatten=False)
# The part of the multiprocessors that must have work, and the columns of one at most.
_SPECIALIZED_PART = 0.96
_SPECIALIZED_PASSES = 3
# Tiles of both inputs that fit into shared memory, beside two halves of one of the output.
_INPUT_TILES = 12

TMA_CANDIDATES = (
    _WIDE,
    _WIDE_SHALLOW,
    _RESIDUAL,
    _RESIDUAL_DEEP,
    _RESIDUAL_WAVE,
    _MIDDLE,
    _SMALL,
    _SMALL_DEEP,
    _TINY,
)
# Chosen to fit 99 KiB of shared memory (sm86, sm89) as well as 163 KiB (sm80).
POINTER_CANDIDATES = (
    Product(128, 128, 64, 4, 4, group=8),
    Product(128, 128, 128, 4, 3, group=8),
    Product(128, 256, 64, 8, 3, group=8),
    Product(128, 64, 128, 4, 3, group=8),
    Product(64, 128, 128, 4, 3, group=8),
    Product(64, 64, 128, 4, 4, group=8),
    Product(64, 32, 128, 4, 4, group=8),
    Product(32, 32, 128, 4, 4, group=8),
)


def product(
    problem: Problem,
    kernel: str,
    device: torch.device,
    time: Callable[[Product], float] | None,
) -> Product | Specialized:
    """Return the tiles for a problem: from the table, else what tuning once found fastest.

    Args:
        problem: the product.
        kernel: one of :data:`.products.PRODUCTS`.
        device: where it runs.
        time: runs the product with given tiles and returns seconds, infinite if they do not fit;
            None where nothing can be timed now, as while a CUDA graph is recorded.
    """
    if kernel == "specialized":
        shared_out = specialized(problem, multiprocessors(device))
        if shared_out is not None:
            return shared_out
        kernel = "tma"
    if kernel == "tma" and capability(device) == (9, 0):
        return _hopper(problem, multiprocessors(device))
    candidates = TMA_CANDIDATES if kernel == "tma" else POINTER_CANDIDATES
    known = load_tuned(kernel, device)
    found = known.get(problem.key)
    if found is None:
        if time is None:
            return _untuned(problem, candidates, multiprocessors(device))
        seconds = {tile: time(tile) for tile in candidates}
        found = min(candidates, key=seconds.__getitem__)
        if math.isinf(seconds[found]):
            return found  # none fits: Triton says what is in the way
        known[problem.key] = found
        save_tuned(kernel, device, known)
    return found


def specialized(problem: Problem, multiprocessors: int) -> Specialized | None:
    """Return how the kernel whose warps have roles shares out a problem, None if that is not one
    for it: too small, or of sizes that leave multiprocessors idle.

    Of the ways that do not, the one with the fewest passes reads the rows least often.
    """
    tile = SPECIALIZED_TILE
    if problem.n % tile or problem.out_bytes != 2:
        return None
    columns, depth = problem.n // tile, -(-problem.k // tile)
    if -(-problem.m // tile) * columns < SPECIALIZED_FROM * multiprocessors:
        return None
    stationary = depth <= 8 and not problem.residual
    if stationary:
        stages, buffers = min(_INPUT_TILES - depth, 8), 1
    elif depth <= 8:  # soon through a tile: half of one must not wait for the other to be stored
        stages, buffers = 4, 2
    else:
        stages, buffers = 6, 1
    for passes in range(1, _SPECIALIZED_PASSES + 1):
        slots = columns // passes
        groups = multiprocessors // slots if slots else 0
        if columns % passes == 0 and slots * groups >= _SPECIALIZED_PART * multiprocessors:
            return Specialized(slots, groups, passes, stages, buffers, stationary)
    return None


def rows(m: int, k: int, multiprocessors: int) -> Rows:
    """Return how to cut ``m`` rows of ``k`` columns."""
    few = m < 16 * multiprocessors
    if k <= 1536:
        count, warps = (1, 2) if few else (4, 2)
    else:
        count, warps = 1, min(max(4, (k + 1023) // 1024), 32)
        warps = 1 << (warps - 1).bit_length()
    largest = 512 if 1536 < k < 4096 else 2048
    block = min(k & -k, largest)
    # Many small pieces cost more than lanes that are masked.
    if k // block > 16:
        block = 1 << (k - 1).bit_length()
    return Rows(count, block, -(-k // block), warps)


def _hopper(problem: Problem, multiprocessors: int) -> Product:
    """Return the tiles by how many there are for each multiprocessor; within 7 % of the fastest
    of the candidates on the shapes measured, 192 to 196,608 rows."""
    wide = -(-problem.m // 128) * -(-problem.n // 128) / multiprocessors
    small = -(-problem.m // 64) * -(-problem.n // 64) / multiprocessors
    if problem.residual or problem.out_bytes > 2:
        if wide >= 3:
            return _RESIDUAL if problem.k < 2048 or problem.out_bytes > 2 else _RESIDUAL_DEEP
        if 1.2 <= wide <= 2:  # all at once
            return _RESIDUAL_WAVE
        if wide > 2:
            return _MIDDLE
    elif wide >= 1.5:
        return _WIDE_SHALLOW if 2 < wide <= 3 else _WIDE
    if small >= 2:
        return _SMALL
    return _SMALL_DEEP if small >= 0.6 else _TINY


def _untuned(problem: Problem, candidates: tuple[Product, ...], multiprocessors: int) -> Product:
    """Return the largest tiles that give every multiprocessor one."""
    for tile in sorted(candidates, key=lambda c: -c.bm * c.bn):
        if -(-problem.m // tile.bm) * -(-problem.n // tile.bn) >= multiprocessors:
            return tile
    return min(candidates, key=lambda c: c.bm * c.bn)

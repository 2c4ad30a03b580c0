"""Choose the tiles that a kernel runs with: from a small table of measurements, or by tuning on
devices that the table does not cover.

Importing this module does not load torch (see :mod:`.dispatch`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from pytest_int8bench.kernels import device as devices
from pytest_int8bench.kernels.tile_types import (
    DEQUANTIZED_TILE,
    SPECIALIZED_FROM,
    SPECIALIZED_TILE,
    Attention,
    Heads,
    Problem,
    Product,
    Rows,
    Short,
    Specialized,
)
from pytest_int8bench.kernels.tuning import load_tuned, save_tuned

if TYPE_CHECKING:
    import torch

#: Columns of the longest row that stays in registers; longer rows take plain torch.
MAX_COLUMNS = 32768

# Measured on an H200 (132 multiprocessors) with Triton 3.6, for model widths of 768 and 1024. Two
# programs per multiprocessor beat one with larger tiles: one stores while the other multiplies.
_WIDE = Product(128, 128, 128, 4, 3, programs_per_sm=2, parts=2, group=4)
_WIDE_SHALLOW = Product(128, 128, 64, 4, 4, programs_per_sm=3, parts=4)
_RESIDUAL = Product(128, 128, 128, 8, 3, programs_per_sm=2, parts=4, group=4)
_RESIDUAL_DEEP = Product(
    128, 128, 128, 4, 3, programs_per_sm=2, parts=2, group=4, flatten=False, early=True
)
_RESIDUAL_WAVE = Product(128, 128, 128, 4, 3, programs_per_sm=2, parts=2, group=4, flatten=False)
_MIDDLE = Product(64, 128, 128, 4, 4, programs_per_sm=2, parts=2)
_MIDDLE_WAVE = Product(64, 128, 128, 4, 4, programs_per_sm=2)
_SMALL = Product(64, 64, 128, 4, 4, programs_per_sm=3, flatten=False)
_SMALL_DEEP = Product(64, 64, 256, 4, 3, programs_per_sm=2, flatten=False)
_TINY = Product(64, 32, 256, 4, 4, programs_per_sm=2, flatten=False)
# The smallest share of multiprocessors that must have work, and the most tile columns that one
# program may compute.
_SPECIALIZED_PART = 0.96
_SPECIALIZED_PASSES = 3
# Number of input tiles, of A and B together, that fit in shared memory next to two half tiles of
# the output.
_INPUT_TILES = 12

TMA_CANDIDATES = (
    _WIDE,
    _WIDE_SHALLOW,
    _RESIDUAL,
    _RESIDUAL_DEEP,
    _RESIDUAL_WAVE,
    _MIDDLE,
    _MIDDLE_WAVE,
    _SMALL,
    _SMALL_DEEP,
    _TINY,
)
# Each fits in 99 KiB of shared memory (sm86, sm89), and those with 128 x 128 outputs and at most 81
# KiB fit twice in the 163 KiB of sm80. Which of them is fastest differs between devices.
POINTER_CANDIDATES = (
    Product(128, 128, 64, 4, 4),
    Product(128, 128, 64, 4, 5),
    Product(128, 128, 128, 4, 2),
    Product(128, 128, 128, 4, 3),
    Product(256, 128, 128, 8, 2),
    Product(128, 256, 64, 8, 3),
    Product(64, 128, 128, 4, 3),
    Product(128, 64, 128, 4, 3),
    Product(64, 64, 128, 4, 3),
    Product(64, 64, 256, 4, 3),
    Product(64, 32, 128, 4, 6),
    Product(32, 32, 256, 4, 4),
    Product(16, 32, 128, 2, 6),
    Product(16, 32, 256, 2, 4),
)
# Only tiles with at least the first number of outputs are timed if there are 128 x 128 tiles for
# all multiprocessors, else only those with at most the second.
_MANY_FROM, _FEW_UP_TO = 64 * 64, 64 * 128


def specialized_tiles(
    name: str,
    problem: Problem,
    device: torch.device,
    time: Callable[[Product], float] | None,
) -> Specialized | None:
    """Return the tiles of the warp-specialized kernel, or None if the problem does not suit it. For
    the arguments, see :func:`pointer_tiles`."""
    return specialized(problem, devices.multiprocessors(device))


def tma_tiles(
    name: str,
    problem: Problem,
    device: torch.device,
    time: Callable[[Product], float] | None,
) -> Product:
    """Return the tiles of the TMA kernel: from a table on sm90, elsewhere by tuning. For the
    arguments, see :func:`pointer_tiles`."""
    if devices.capability(device) == (9, 0):
        return _hopper(problem, devices.multiprocessors(device))
    return _fastest(TMA_CANDIDATES, name, problem, device, time)


def pointer_tiles(
    name: str,
    problem: Problem,
    device: torch.device,
    time: Callable[[Product], float] | None,
) -> Product:
    """Return the fastest tiles of the kernel with pointers.

    Args:
        name: the kernel's name in the file of tuned tiles.
        problem: the sizes of the matmul.
        device: where the kernel runs.
        time: runs the kernel with the given tiles and returns seconds, or infinity if they do not
            fit; None if nothing can be timed now, such as while a CUDA graph is recorded.
    """
    return _fastest(POINTER_CANDIDATES, name, problem, device, time)


def _fastest(
    candidates: tuple[Product, ...],
    name: str,
    problem: Problem,
    device: torch.device,
    time: Callable[[Product], float] | None,
) -> Product:
    """Return the fastest candidate: the one saved by an earlier tuning, or found by timing
    candidates now. If nothing can be timed, return a guess."""
    known = load_tuned(name, device)
    # Accept only candidates from the file: anybody may have edited it, and its values become
    # constants of a kernel.
    found = next((tile for tile in candidates if tile == known.get(problem.key)), None)
    if found is None:
        if time is None:
            return _untuned(problem, candidates, devices.multiprocessors(device))
        timed = _worth_timing(problem, candidates, devices.multiprocessors(device))
        seconds = {tile: time(tile) for tile in timed}
        found = min(timed, key=seconds.__getitem__)
        if math.isinf(seconds[found]):
            return found  # none fits: launching it makes Triton report why
        known[problem.key] = found
        save_tuned(name, device, known)
    return found


def specialized(problem: Problem, multiprocessors: int) -> Specialized | None:
    """Return how the warp-specialized kernel distributes a problem, or None if the problem is
    unsuitable or too small, or if too many multiprocessors would be idle.

    The result has the fewest possible passes, and so reads the rows least often.
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
    elif depth <= 8:  # tiles are short: one half must not wait for the other to be stored
        stages, buffers = 4, 2
    else:
        stages, buffers = 6, 1
    for passes in range(1, _SPECIALIZED_PASSES + 1):
        slots = columns // passes
        groups = multiprocessors // slots if slots else 0
        if columns % passes == 0 and slots * groups >= _SPECIALIZED_PART * multiprocessors:
            return Specialized(slots, groups, passes, stages, buffers, stationary)
    return None


def specialized_forms(multiprocessors: int) -> list[Problem]:
    """Return the smallest problems that run each variant of the warp-specialized kernel."""
    columns = 6
    tiles = -(-SPECIALIZED_FROM * multiprocessors // columns)
    m, n = SPECIALIZED_TILE * tiles - 5, SPECIALIZED_TILE * columns
    return [
        Problem(m, n, depth, 2, residual)
        for depth, residual in ((768, False), (768, True), (2048, True))
    ]


def fits_registers(columns: int) -> bool:
    """Return whether a row stays in registers while it is quantized."""
    return columns <= MAX_COLUMNS


def weights() -> tuple[int, int]:
    """Return how many rows and columns of a weight one program dequantizes."""
    return DEQUANTIZED_TILE


def rows(m: int, k: int, multiprocessors: int) -> Rows:
    """Return how to distribute ``m`` rows of ``k`` columns to programs."""
    few = m < 16 * multiprocessors
    if k <= 1536:
        count, warps = (1, 2) if few else (4, 2)
    else:
        count, warps = 1, min(max(4, (k + 1023) // 1024), 32)
        warps = 1 << (warps - 1).bit_length()
    largest = 512 if 1536 < k < 4096 else 2048
    block = min(k & -k, largest)
    # Many small blocks cost more than masked lanes.
    if k // block > 16:
        block = 1 << (k - 1).bit_length()
    return Rows(count, block, -(-k // block), warps)


def attention(heads: Heads, tma: bool) -> Attention:
    """Return how to distribute queries to programs for INT8 attention: the fastest choice measured
    on an H200, with TMA at 197 to 9,216 tokens and with the instructions of sm80."""
    if heads.padded > 64:
        return Attention(128, 8, 3, registers=128 if tma else None)
    if heads.q_rows <= 64:
        return Attention(64, 4, 3)
    return Attention(128, 4, 3, registers=168 if tma else None)


def short(heads: Heads) -> Short:
    """Return how to distribute heads to programs for short attention."""
    cells = max(heads.q_rows, 16) * max(heads.k_rows, 16)
    if cells <= 32 * 32:
        return Short(4, 4)
    return Short(1, 4 if cells <= 64 * 64 else 8)


def _hopper(problem: Problem, multiprocessors: int) -> Product:
    """Choose tiles by how many there would be per multiprocessor.

    On the measured shapes of 16 to 196,608 rows, they take at most 12 % longer than the fastest
    candidate. The operands were not in the L2 cache, because in a model other layers evict them.
    """
    wide = -(-problem.m // 128) * -(-problem.n // 128) / multiprocessors
    middle = -(-problem.m // 64) * -(-problem.n // 128) / multiprocessors
    small = -(-problem.m // 64) * -(-problem.n // 64) / multiprocessors
    if problem.residual or problem.out_bytes > 2:
        if wide >= 3:
            return _RESIDUAL if problem.k < 2048 or problem.out_bytes > 2 else _RESIDUAL_DEEP
        if 1 <= wide <= 2:  # all tiles run at once
            return _RESIDUAL_WAVE
        if wide > 2:
            return _SMALL if problem.k < 2048 else _MIDDLE
    elif wide >= 1.5:
        return _WIDE_SHALLOW if 2 < wide <= 3 else _WIDE
    elif 1.2 <= middle <= 2:
        return _MIDDLE_WAVE
    if small >= 2 or (small >= 1 and not problem.residual):
        return _SMALL
    return _SMALL_DEEP if small >= 1 else _TINY


def _worth_timing(
    problem: Problem, candidates: tuple[Product, ...], multiprocessors: int
) -> list[Product]:
    """Return the candidates worth timing: compiling each of the others would waste a second or
    two."""
    wide = -(-problem.m // 128) * -(-problem.n // 128)
    if wide >= multiprocessors:
        return [tile for tile in candidates if tile.bm * tile.bn >= _MANY_FROM]
    return [tile for tile in candidates if tile.bm * tile.bn <= _FEW_UP_TO]


def _untuned(problem: Problem, candidates: tuple[Product, ...], multiprocessors: int) -> Product:
    """Return the largest tiles that give every multiprocessor one, or else the smallest tiles."""
    for tile in sorted(candidates, key=lambda c: -c.bm * c.bn):
        if -(-problem.m // tile.bm) * -(-problem.n // tile.bn) >= multiprocessors:
            return tile
    return min(candidates, key=lambda c: c.bm * c.bn)

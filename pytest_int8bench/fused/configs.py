"""Which tile sizes the kernels run with: a small measured table, and tuning where it is silent."""

from __future__ import annotations

import functools
import json
import math
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pytest_int8bench.fused.products import KERNEL_VARIABLE, KernelError, forced_product

#: Environment variable with the folder where tuning is kept.
CACHE_VARIABLE = "INT8BENCH_TUNING_DIR"
#: Triton compiles for addresses in multiples of this, and TMA takes no others, nor other strides.
ALIGNMENT = 16
_FILE = "int8-products.json"


@dataclass(frozen=True)
class Product:
    """How the INT8 product is cut into tiles."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    programs_per_sm: int = 1
    """TMA only: programs that stay on a multiprocessor."""
    parts: int = 1
    """TMA only: parts in which a tile is stored."""
    flatten: bool = True
    """TMA only: load for the next tile while one is stored."""
    early: bool = False
    """TMA only: load the residual before the product, into registers."""
    group: int = 8


@dataclass(frozen=True)
class Specialized:
    """How :mod:`specialized` shares out its tiles, and what it keeps in shared memory."""

    slots: int
    """Columns of tiles of the output that are worked on at once."""
    groups: int
    """Rows of tiles of the output that are worked on at once."""
    passes: int
    """Columns that a program works on, one after the other."""
    stages: int
    """Steps that are loaded ahead."""
    buffers: int
    """Halves of a tile that a group of warps stores at once."""
    stationary: bool
    """The rows of the weight for a column of the output stay in shared memory."""


@dataclass(frozen=True)
class Rows:
    """How rows are cut for :func:`kernels.quantize_rows`."""

    rows: int
    block: int
    chunks: int
    warps: int


@dataclass(frozen=True)
class Problem:
    """A product: rows, columns, depth, and what its epilogue moves."""

    m: int
    n: int
    k: int
    out_bytes: int
    """Bytes of an element of the output."""
    residual: bool

    @property
    def key(self) -> str:
        """The problem as text; near sizes of M are one."""
        m = 1 << max(self.m - 1, 0).bit_length()
        return f"{m}x{self.n}x{self.k}:{self.out_bytes}:{'r' if self.residual else '-'}"


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

#: Rows, columns and depth of a tile of the kernel whose warps have roles.
SPECIALIZED_TILE = 128
#: Tiles for each multiprocessor from which on it is faster.
SPECIALIZED_FROM = 16
# The part of the multiprocessors that must have work, and the columns of one at most.
_SPECIALIZED_PART = 0.96
_SPECIALIZED_PASSES = 3
# Tiles of both inputs that fit into shared memory, beside two halves of one of the output.
_INPUT_TILES = 12

#: Rows and columns of a weight that a program dequantizes.
DEQUANTIZED_TILE = (16, 256)

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


def product_kernel(device: torch.device) -> str:
    """Return ``specialized`` for sm90, ``tma`` for later ones, else ``pointers``.

    Raises:
        KernelError: if ``INT8BENCH_PRODUCT`` is set to something else, or to what the device has
            not.
    """
    forced = forced_product()
    has_tma = _capability(device)[0] >= 9
    is_hopper = _capability(device) == (9, 0)
    if forced:
        major, minor = _capability(device)
        if forced == "tma" and not has_tma:
            raise KernelError(
                f"{KERNEL_VARIABLE}=tma needs sm90 or later, this is sm{major}{minor}"
            )
        if forced == "specialized" and not is_hopper:
            raise KernelError(f"{KERNEL_VARIABLE}=specialized needs sm90, this is sm{major}{minor}")
        return forced
    return "specialized" if is_hopper else "tma" if has_tma else "pointers"


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
    if kernel == "tma" and _capability(device) == (9, 0):
        return _hopper(problem, multiprocessors(device))
    candidates = TMA_CANDIDATES if kernel == "tma" else POINTER_CANDIDATES
    known = _tuned(kernel, device)
    found = known.get(problem.key)
    if found is None:
        if time is None:
            return _untuned(problem, candidates, multiprocessors(device))
        seconds = {tile: time(tile) for tile in candidates}
        found = min(candidates, key=seconds.__getitem__)
        if math.isinf(seconds[found]):
            return found  # none fits: Triton says what is in the way
        known[problem.key] = found
        _save(kernel, device, known)
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


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return the multiprocessors of a GPU, 1 elsewhere."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def tuning_file() -> Path:
    """Return the file that tuning is kept in."""
    folder = os.environ.get(CACHE_VARIABLE)
    if folder:
        return Path(folder) / _FILE
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "pytest-int8bench" / _FILE


def _section(kernel: str, device: torch.device) -> str:
    import triton

    return f"{torch.cuda.get_device_name(device)}, triton {triton.__version__}, {kernel}"


@functools.cache
def _tuned(kernel: str, device: torch.device) -> dict[str, Product]:
    """Return what is known of a device; the dictionary is kept and grows."""
    with suppress(OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError):
        saved = json.loads(tuning_file().read_text())[_section(kernel, device)]
        return {key: Product(**value) for key, value in saved.items()}
    return {}


def _save(kernel: str, device: torch.device, known: dict[str, Product]) -> None:
    """Write what is known, whole or not at all; without it the next process tunes again."""
    with suppress(OSError, RuntimeError):  # the latter where there is no home
        path = tuning_file()
        everything: Any = {}
        with suppress(OSError, ValueError):
            everything = json.loads(path.read_text())
        if not isinstance(everything, dict):
            everything = {}
        section = _section(kernel, device)
        there = everything.get(section)
        # Another process may have tuned something else meanwhile.
        others = there if isinstance(there, dict) else {}
        everything[section] = others | {key: asdict(tile) for key, tile in known.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(everything, file, indent=1, sort_keys=True)
        os.replace(file.name, path)

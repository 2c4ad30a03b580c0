"""The sizes of a matmul, and how kernels cut them into tiles; :mod:`.tiles` chooses.

Importing this module does not load torch (see :mod:`.dispatch`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import torch

#: Triton compiles for addresses in multiples of this, and TMA takes no others, nor other strides.
ALIGNMENT = 16


@dataclass(frozen=True)
class Product:
    """Tiles of the INT8 matmul, with TMA and with pointers."""

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
    """TMA only: load the residual before the matmul, into registers."""
    group: int = 8


@dataclass(frozen=True)
class Specialized:
    """How the warp-specialized kernel (:mod:`.triton.int8_matmul_sm90`) shares out its tiles, and
    what it keeps in shared memory."""

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


#: Tiles of a kernel of the INT8 matmul.
Tile: TypeAlias = Product | Specialized


@dataclass(frozen=True)
class Rows:
    """Tiles of :func:`.triton.quantize_rows.quantize_rows`."""

    rows: int
    block: int
    chunks: int
    warps: int


@dataclass(frozen=True)
class Problem:
    """An INT8 matmul: rows, columns, depth, and what its epilogue moves."""

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


#: Rows, columns and depth of a tile of the warp-specialized kernel.
SPECIALIZED_TILE = 128
#: Tiles for each multiprocessor from which the warp-specialized kernel is faster.
SPECIALIZED_FROM = 16

#: Rows and columns of the weight that one program dequantizes.
DEQUANTIZED_TILE = (16, 256)

#: Keys that share a scale, and that INT8 attention takes at once.
KEY_BLOCK = 64
#: Keys, evenly spaced, whose mean is taken from all before they are quantized. Softmax does not
#: change by it, whatever the vector; what all keys have in common goes.
KEY_SAMPLE = 64


@dataclass(frozen=True)
class Heads:
    """The sizes of attention."""

    batch: int
    heads: int
    kv_heads: int
    """Heads of keys and values, which divide those of queries."""
    q_rows: int
    k_rows: int
    width: int
    """Columns of a head."""

    @classmethod
    def of(cls, q: torch.Tensor, k: torch.Tensor) -> Heads:
        """Return the sizes for queries (B, H, N, D) and keys."""
        batch, heads, q_rows, width = q.shape
        return cls(batch, heads, k.shape[1], q_rows, k.shape[2], width)

    @property
    def k_blocks(self) -> int:
        """Blocks of keys, the last of them padded."""
        return -(-self.k_rows // KEY_BLOCK)

    @property
    def padded(self) -> int:
        """Columns of a head as the kernels see them: a power of two."""
        return max(1 << (self.width - 1).bit_length(), 32)


@dataclass(frozen=True)
class Attention:
    """Tiles of INT8 attention."""

    rows: int
    warps: int
    stages: int
    registers: int | None = None
    """Of a thread at most, so that more programs fit a multiprocessor; None for what it takes."""


#: Queries, and keys, up to which a program of :mod:`.triton.short_attention` holds all of a head.
SHORT_ROWS = 128


@dataclass(frozen=True)
class Short:
    """Distribution of heads in short attention."""

    together: int
    """Heads that one program computes."""
    warps: int

"""Types for the sizes of a call and for the tiles of its kernel, which :mod:`.tiles` chooses.

Importing this module does not load torch; :mod:`.dispatch` says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import torch

#: In bytes. Triton specializes kernels for addresses that are multiples of it; TMA requires that of
#: addresses and strides.
ALIGNMENT = 16


@dataclass(frozen=True)
class Product:
    """Tiles of the INT8 matmul kernels with TMA and with pointers."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    programs_per_sm: int = 1
    """TMA only: persistent programs per multiprocessor."""
    parts: int = 1
    """TMA only: number of parts in which a tile is stored."""
    flatten: bool = True
    """TMA only: whether to load inputs of the next tile while storing the current one."""
    early: bool = False
    """TMA only: whether to load the residual into registers before the matmul."""
    group: int = 8


@dataclass(frozen=True)
class Specialized:
    """Tile schedule and shared memory of the kernel in :mod:`.triton.int8_matmul_sm90`."""

    slots: int
    """Tile columns of the output that are computed at the same time."""
    groups: int
    """Tile rows of the output that are computed at the same time."""
    passes: int
    """Tile columns that each program computes, one after another."""
    stages: int
    """Steps of the inputs that shared memory holds."""
    buffers: int
    """Half tiles of the output that shared memory holds for each consumer warp group."""
    stationary: bool
    """Whether the weights for a tile column of the output stay in shared memory."""


#: Tiles of an INT8 matmul kernel.
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
    """The sizes of an INT8 matmul (M, N, K) and of its epilogue's memory traffic."""

    m: int
    n: int
    k: int
    out_bytes: int
    """Bytes per element of the output."""
    residual: bool
    """Whether a residual is added."""

    @property
    def key(self) -> str:
        """The problem as text, with M rounded up to a power of two."""
        m = 1 << max(self.m - 1, 0).bit_length()
        return f"{m}x{self.n}x{self.k}:{self.out_bytes}:{'r' if self.residual else '-'}"


#: Rows, columns and depth of a tile of the warp-specialized kernel.
SPECIALIZED_TILE = 128
#: Minimum number of tiles per multiprocessor for the warp-specialized kernel, which is slower with
#: fewer.
SPECIALIZED_FROM = 16

#: Rows and columns of the weight that one program dequantizes.
DEQUANTIZED_TILE = (16, 256)

#: Number of keys that share a scale and that INT8 attention processes at once.
KEY_BLOCK = 64
#: Number of evenly spaced keys whose mean is subtracted from all keys before quantization. This
#: removes the component that all keys share. Softmax is invariant to subtracting any vector from
#: all keys.
KEY_SAMPLE = 64


@dataclass(frozen=True)
class Heads:
    """The sizes of attention."""

    batch: int
    heads: int
    kv_heads: int
    """Number of key and value heads; it divides ``heads``, the number of query heads."""
    q_rows: int
    k_rows: int
    width: int
    """Columns of a head."""

    @classmethod
    def of(cls, q: torch.Tensor, k: torch.Tensor) -> Heads:
        """Return the sizes of queries (B, H, N, D) and keys (B, G, M, D)."""
        batch, heads, q_rows, width = q.shape
        return cls(batch, heads, k.shape[1], q_rows, k.shape[2], width)

    @property
    def k_blocks(self) -> int:
        """Number of blocks of keys, including a partial last one."""
        return -(-self.k_rows // KEY_BLOCK)

    @property
    def padded(self) -> int:
        """Columns of a head as padded for the kernels: a power of two, at least 32."""
        return max(1 << (self.width - 1).bit_length(), 32)


@dataclass(frozen=True)
class Attention:
    """Tiles of INT8 attention."""

    rows: int
    warps: int
    stages: int
    registers: int | None = None
    """Maximum registers per thread, to fit more programs on a multiprocessor; None for no limit."""


#: Maximum number of queries and of keys for :mod:`.triton.short_attention`.
SHORT_ROWS = 128


@dataclass(frozen=True)
class Short:
    """How short attention distributes heads to programs."""

    together: int
    """Heads that one program computes."""
    warps: int

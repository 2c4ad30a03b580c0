"""BF16 linear layers with sm80 instructions: the baseline of ``sm80-proxy-*`` in quote.py.

cuBLAS uses wgmma on newer GPUs, and so does Triton without ``DISABLE_MMA_V3=1``. The tiles are the
same as in the INT8 kernel with pointers and take as many bytes.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import nn
from torch.nn import functional as F

from pytest_int8bench.kernels.launch import Launch, ceil
from pytest_int8bench.kernels.tile_types import Product
from pytest_int8bench.kernels.tiles import POINTER_CANDIDATES
from pytest_int8bench.kernels.tuning import seconds

# BF16 takes two bytes per element. Small tiles are left out, because only large matmuls are
# measured.
CANDIDATES = tuple(
    dataclasses.replace(tile, bk=tile.bk // 2)
    for tile in POINTER_CANDIDATES
    if tile.bm * tile.bn >= 128 * 64
)


@triton.jit
def matmul(
    a, b, bias, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """Compute ``C[M, N] = A[M, K] @ B[N, K].T + bias``.

    Programs that run at the same time share ``GROUP`` tile rows, which they find in the cache.
    """
    index, in_n = tl.program_id(0), tl.cdiv(N, BN)
    first = index // (GROUP * in_n) * GROUP
    height = min(tl.cdiv(M, BM) - first, GROUP)
    inside = index % (GROUP * in_n)
    rows = (first + inside % height) * BM + tl.arange(0, BM)
    columns = inside // height * BN + tl.arange(0, BN)
    depth = tl.arange(0, BK)
    # Rows past the end wrap around to the start, so loads need no mask; they are not stored.
    left_at = a + (rows % M).to(tl.int64)[:, None] * K + depth[None, :]
    right_at = b + (columns % N).to(tl.int64)[None, :] * K + depth[:, None]
    if HAS_BIAS:
        added = tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(tl.cdiv(K, BK)):
        if EVEN_K:
            left = tl.load(left_at)
            right = tl.load(right_at)
        else:
            left = tl.load(left_at, mask=depth[None, :] < K - k * BK, other=0.0)
            right = tl.load(right_at, mask=depth[:, None] < K - k * BK, other=0.0)
        acc = tl.dot(left, right, acc)
        left_at += BK
        right_at += BK
    if HAS_BIAS:
        acc += added
    at = c + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(at, acc.to(c.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])


def launch(m: int, n: int, k: int, has_bias: bool, tile: Product) -> Launch:
    """Return the launch of the matmul with the given tiles."""
    return Launch(
        matmul,
        ceil(m, tile.bm) * ceil(n, tile.bn),
        (m, n, k),
        {"BM": tile.bm, "BN": tile.bn, "BK": tile.bk, "GROUP": tile.group}
        | {"HAS_BIAS": has_bias, "EVEN_K": k % tile.bk == 0},
        {"num_warps": tile.warps, "num_stages": tile.stages},
    )


@functools.cache
def fastest(m: int, n: int, k: int, has_bias: bool, device: torch.device) -> Launch:
    """Return the launch with the fastest tiles.

    Raises:
        RuntimeError: if Triton used wgmma.
    """
    new = functools.partial(torch.randn, dtype=torch.bfloat16, device=device)
    operands: Any = (new(m, k), new(n, k), new(n) if has_bias else None, new(m, n))
    found = min(
        (launch(m, n, k, has_bias, tile) for tile in CANDIDATES),
        key=lambda candidate: seconds(operands, candidate),
    )
    compiled = matmul.warmup(
        *operands, *found.numbers, grid=(1,), **found.constants, **found.options
    )
    if "wgmma.mma" in compiled.asm["ptx"]:
        raise RuntimeError("Triton used wgmma, which sm80 lacks; set DISABLE_MMA_V3=1")
    return found


@torch.library.custom_op("int8bench_quote::sm80_linear", mutates_args=())
def sm80_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return ``F.linear(x, weight, bias)``."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    (m, k), n = rows.shape, weight.shape[0]
    out = x.new_empty(m, n)
    fastest(m, n, k, bias is not None, x.device)(rows, weight, bias, out)
    return out.view(*x.shape[:-1], n)


@sm80_linear.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


class Sm80Linear(nn.Linear):
    """A linear layer whose BF16 matmul uses only sm80 instructions."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.dtype != torch.bfloat16:
            return F.linear(input, self.weight, self.bias)
        return sm80_linear(input, self.weight, self.bias)


def use_sm80_linears(model: nn.Module) -> None:
    """Make the unquantized linear layers of a model use :func:`sm80_linear`."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Sm80Linear

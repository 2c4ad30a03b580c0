"""The kernel of short attention under Triton's interpreter, against FP64.

The interpreter cannot multiply BF16: values are FP32 or FP16 here, and BF16 on a GPU.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from pytest_int8bench.kernels import reference, tiles
from pytest_int8bench.kernels.tile_types import Heads, Short

triton = pytest.importorskip("triton")
kernels = pytest.importorskip("pytest_int8bench.kernels.triton.short_attention")
pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1, set where no GPU is"
)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def operands(*shape: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Return q, k and v as views of joined projections."""
    batch, heads, kv_heads, rows, keys, width = shape
    q = torch.randn(batch, rows, 3, heads, width, dtype=dtype)[:, :, 0]
    kv = torch.randn(batch, keys, 2, kv_heads, width, dtype=dtype)
    return [x.transpose(1, 2) for x in (q, kv[:, :, 0], kv[:, :, 1])]


def attended(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool = False,
    tile: Short | None = None,
) -> torch.Tensor:
    heads = Heads.of(q, k)
    out = torch.full((heads.batch, heads.q_rows, heads.heads, heads.width), 77.0, dtype=q.dtype)
    strides = [x.stride()[:3] for x in (q, k, v)]
    tile = tile or tiles.short(heads)
    kernels.launch(heads, scale * math.log2(math.e), causal, strides, tile)(q, k, v, out)
    return out.transpose(1, 2)


SHAPES: dict[str, Any] = {
    "odd": (2, 3, 3, 49, 49, 64),
    "tiny": (1, 1, 1, 1, 1, 16),
    "several heads a program, one left over": (1, 5, 5, 17, 9, 32),
    "grouped": (2, 4, 2, 3, 30, 24),
    "cross": (1, 2, 1, 128, 77, 80),
    "whole": (1, 1, 1, 128, 128, 128),
}


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("name", SHAPES)
def test_kernel_matches_fp64(name: str, causal: bool) -> None:
    q, k, v = operands(*SHAPES[name])
    out = attended(q, k, v, 0.3, causal)
    double = [x.double() for x in (q, k, v)]
    want = scaled_dot_product_attention(*double, is_causal=causal, scale=0.3, enable_gqa=True)
    assert torch.allclose(out.double(), want, atol=1e-5)
    assert torch.allclose(reference.short_attention(q, k, v, 0.3, causal), out, atol=1e-5)


@pytest.mark.parametrize("tile", [Short(1, 4), Short(2, 4)])
def test_every_tile_gives_the_same_in_fp16(tile: Short) -> None:
    q, k, v = operands(1, 3, 3, 20, 40, 64, dtype=torch.float16)
    want = reference.short_attention(q, k, v, 8.0, False)  # scores beyond what exponentials hold
    assert torch.allclose(attended(q, k, v, 8.0, tile=tile), want, atol=5e-3)


@pytest.mark.parametrize("tile", [Short(1, 4), Short(4, 4)])
def test_what_is_not_finite_stays_where_it_is(tile: Short) -> None:
    q, k, v = operands(1, 3, 3, 5, 7, 32)
    q[0, 0, 2, 3] = torch.nan
    k[0, 1, 6, 0] = torch.inf
    v[0, 2, 6, 5] = torch.nan
    bad = attended(q, k, v, 0.2, tile=tile).isnan()
    assert bad[0, 0].any(-1).tolist() == [False, False, True, False, False]
    assert torch.equal(bad, reference.short_attention(q, k, v, 0.2, False).isnan())
    assert bad[0, 2].nonzero()[:, 1].tolist() == [5] * 5

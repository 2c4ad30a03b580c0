"""The kernels of INT8 attention under Triton's interpreter, against plain torch and FP64.

The interpreter cannot multiply BF16: values are FP32 or FP16 here, and BF16 on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from pytest_int8bench.kernels import reference, tiles
from pytest_int8bench.kernels.schema import Four
from pytest_int8bench.kernels.tile_types import Heads

triton = pytest.importorskip("triton")
cuda = pytest.importorskip("pytest_int8bench.kernels.cuda")
kernels = pytest.importorskip("pytest_int8bench.kernels.triton.int8_attention")
pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1, set where no GPU is"
)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    # Fills what the kernels are given to write to.
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def operands(
    batch: int,
    heads: int,
    kv_heads: int,
    rows: int,
    keys: int,
    width: int,
    *,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return q, k and v as views of joined projections; keys have something in common."""
    q = torch.randn(batch, rows, 3, heads, width, dtype=dtype)[:, :, 0].transpose(1, 2)
    kv = torch.randn(batch, keys, 2, kv_heads, width, dtype=dtype)
    k, v = (kv[:, :, part].transpose(1, 2) for part in (0, 1))
    return q, k + 4, v


def quantized(q: torch.Tensor, k: torch.Tensor) -> Four:
    return cuda.quantize_heads(q, k, "none", [], [])


def attended(parts: Four, v: torch.Tensor, scale: float, *, tma: bool = False) -> torch.Tensor:
    q8, q_scale, k8, k_scale = parts
    batch, count, rows, _ = q8.shape
    heads = Heads(batch, count, v.shape[1], rows, v.shape[2], v.shape[3])
    out = torch.full((batch, rows, count, v.shape[3]), 77.0, dtype=v.dtype)
    launch = kernels.launch(
        heads, scale * math.log2(math.e), v.stride()[:3], tiles.attention(heads, tma), tma
    )
    launch(k8, v, q8, q_scale, k_scale, out)
    return out.transpose(1, 2)


def alike(part: torch.Tensor, want: torch.Tensor) -> bool:
    """Say whether two are equal but for rounding: a value between two may become either."""
    if part.dtype == torch.int8:
        return bool((part.short() - want.short()).abs().max() <= 1)
    return torch.allclose(part, want, rtol=1e-5)


def error(out: torch.Tensor, want: torch.Tensor) -> float:
    return float((out.double() - want.double()).norm() / want.double().norm())


SHAPES = {
    "one block and more": (1, 2, 2, 70, 130, 64),
    "whole blocks, TMA": (2, 1, 1, 64, 128, 32),
    "grouped": (1, 4, 2, 3, 65, 32),
    "padded width": (1, 1, 1, 40, 70, 96),
    "wide": (1, 1, 1, 130, 20, 128),
}


@pytest.mark.parametrize("name", SHAPES)
def test_kernels_match_plain_torch(name: str) -> None:
    q, k, v = operands(*SHAPES[name])
    scale = q.shape[-1] ** -0.5
    parts, wanted = quantized(q, k), reference.quantize_heads(q, k, "none", [], [])
    assert all(map(alike, parts, wanted))
    out = attended(parts, v, scale, tma="TMA" in name)
    assert error(out, reference.int8_attention(*parts, v, scale)) < 1e-5
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True)
    assert error(out, exact) < 0.015


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scale", [0.05, 8.0])
def test_large_scores_are_computed_by_a_running_maximum(dtype: torch.dtype, scale: float) -> None:
    """Scores of 8 x 64 are far beyond what FP32 could hold the exponential of."""
    q, k, v = operands(1, 1, 1, 20, 150, 64, dtype=dtype)
    parts = quantized(q, k)
    out = attended(parts, v, scale)
    assert error(out, reference.int8_attention(*parts, v, scale)) < 2e-3


def test_what_is_not_finite_stays_where_it_is() -> None:
    q, k, v = operands(1, 3, 3, 5, 70, 32)
    q[0, 0, 2, 3] = torch.nan
    k[0, 1, 69, 0] = torch.inf
    v[0, 2, 66, 5] = torch.nan
    parts = quantized(q, k)
    out = attended(parts, v, 0.2)
    bad = out.isnan()
    assert bad[0, 0].any(-1).tolist() == [False, False, True, False, False]
    assert bad[0, 1].all()
    assert bad[0, 2, :, 5].all()
    assert bad[0, 2].sum() == 5
    assert torch.equal(bad, reference.int8_attention(*parts, v, 0.2).isnan())


def test_zeros_are_quantized_to_zeros() -> None:
    q, k, v = operands(1, 1, 1, 3, 64, 32)
    parts = quantized(q * 0, k * 0)
    assert all(not part.any() for part in parts)
    assert torch.allclose(attended(parts, v, 1.0), v.mean(-2, keepdim=True), atol=1e-6)

"""Rotation of queries and keys under Triton's interpreter, against FP64.

The interpreter truncates to BF16, which a GPU rounds to.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pytest_int8bench.kernels import reference

triton = pytest.importorskip("triton")
cuda = pytest.importorskip("pytest_int8bench.kernels.cuda")
pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1, set where no GPU is"
)
Turn = list[torch.Tensor]


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    # Fills what the kernels are given to write to.
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def heads(batch: int, count: int, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Return a view of joined projections."""
    return torch.randn(batch, rows, 3, count, width).to(dtype)[:, :, 1].transpose(1, 2)


def turns(kind: str, x: torch.Tensor, size: float = 1.0) -> Turn:
    """Return what rotates ``x``, as models broadcast it."""
    batch, count, rows, width = x.shape
    if kind == "angles":
        return [torch.randn(batch, 1, rows, width // 2) * size]
    if kind == "halves":
        one = torch.randn(1, 1, rows, width).to(torch.bfloat16)
        return [one, torch.randn(batch, 1, rows, width).to(torch.bfloat16)]
    terms = int(kind)
    positions = torch.randint(-40, 400, (batch, 1, rows, terms)).float() * size
    return [positions, torch.randn(1, count, terms, width // 2)]


def in_fp64(x: torch.Tensor, kind: str, turn: Turn) -> torch.Tensor:
    angles = turn[0].double() if kind == "angles" else turn[0].double() @ turn[1].double()
    even, odd = x.double().unflatten(-1, (-1, 2)).unbind(-1)
    sine, cosine = angles.sin(), angles.cos()
    return torch.stack([even * cosine - odd * sine, odd * cosine + even * sine], -1).flatten(-2)


@pytest.mark.parametrize("rows_first", [True, False])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("angles", torch.float16), ("1", torch.float32), ("2", torch.float16), ("3", torch.float32)],
)
def test_rotates_as_fp64_does(kind: str, dtype: torch.dtype, rows_first: bool) -> None:
    q, k = (heads(2, 3, 69, 24, dtype) for _ in range(2))
    turn = turns(kind, q)
    rotation = "angles" if kind == "angles" else "positions"
    both = cuda.rotate_heads([q, k], rotation, turn, rows_first)
    [alone] = cuda.rotate_heads([k], rotation, turn, rows_first)
    assert torch.equal(alone, both[1])
    # Angles up to a thousand are rounded to 6e-5.
    limit = 1e-6 + 2e-4 * (kind != "angles") + torch.finfo(dtype).eps / 2
    for x, out in zip((q, k), both, strict=True):
        want = in_fp64(x, kind, turn)
        assert out.dtype == dtype
        assert out.transpose(1, 2).is_contiguous() == rows_first
        assert out.is_contiguous() != rows_first
        assert (out.double() - want).abs().max() <= limit * want.abs().max()
        plain = reference.rotate_heads([x], rotation, turn, rows_first)[0]
        assert plain.stride() == out.stride()
        assert (plain.double() - want).abs().max() <= limit * want.abs().max()


@pytest.mark.parametrize("kind", ["angles", "3", "halves"])
def test_quantizes_what_it_rotates(kind: str) -> None:
    q, k = heads(1, 2, 5, 24, torch.float32), heads(1, 2, 4, 24, torch.float32)
    rotation = kind if kind in ("angles", "halves") else "positions"
    operands = (q, k, rotation, turns(kind, q), turns(kind, k))
    want = reference.quantize_heads(*operands)
    for part, wanted in zip(cuda.quantize_heads(*operands), want, strict=True):
        if part.dtype == torch.int8:  # a value between two may become either
            assert (part.short() - wanted.short()).abs().max() <= 1
        else:
            assert torch.allclose(part, wanted, rtol=1e-4)
    if kind != "halves":
        even, odd = in_fp64(q, kind, operands[3]).unflatten(-1, (-1, 2)).unbind(-1)
        exact = torch.cat([even, odd], -1)
        levels = want[0].double().unflatten(-1, (2, -1))[..., :12].flatten(-2)
        assert (levels * want[1][..., None] - exact).abs().max() < want[1].max()


# The interpreter of earlier versions rounds a fused multiply-add twice.
_VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
_REDUCED = pytest.mark.skipif(_VERSION < (3, 9), reason="needs the interpreter of Triton 3.9")


@pytest.mark.parametrize("size", [1.0, pytest.param(3e4, marks=_REDUCED), 1e6, float("inf")])
def test_angles_of_any_size(size: float) -> None:
    """Large ones take another path, with all of their block."""
    x = heads(1, 1, 40, 100, torch.float32)
    angles = torch.rand(1, 1, 40, 50) * size
    if size == float("inf"):
        angles = torch.ones(1, 1, 40, 50)
        angles[0, 0, 3, 4], angles[0, 0, 39, 0] = torch.inf, torch.nan
    [out] = cuda.rotate_heads([x], "angles", [angles], True)
    want = in_fp64(x, "angles", [angles])
    assert torch.equal(out.isnan(), want.isnan())
    assert want.isnan().sum() == (4 if size == float("inf") else 0)
    assert (out.double() - want).nan_to_num().abs().max() < 2e-6

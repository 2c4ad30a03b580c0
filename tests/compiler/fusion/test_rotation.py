"""Rotary position embedding in front of INT8 attention: found by what it computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from olmoearth_pretrain_minimal.olmoearth_pretrain_v1.nn import encodings
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from pytest_int8bench.compiler.fusion.int8_attention import AttentionCoverage, replace_attention
from pytest_int8bench.compiler.fusion.nodes import QUANTIZE_HEADS

HEADS, ROWS, WIDTH = 2, 9, 32
Rotate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


class Rotated(nn.Module):
    """Attention of rotated queries and keys."""

    def __init__(self, rotate: Rotate) -> None:
        super().__init__()
        self.rotate = rotate

    def forward(self, qkv: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        q, k, v = qkv.unbind(2)
        q, k = (self.rotate(x.transpose(1, 2), positions) for x in (q, k))
        return scaled_dot_product_attention(q, k, v.transpose(1, 2))


def run(rotate: Rotate, axes: int, dtype: torch.dtype = torch.float32) -> tuple[float, bool]:
    """Return how far INT8 attention is off, and whether it does the rotation itself."""
    model = Rotated(rotate)
    qkv = torch.randn(2, ROWS, 3, HEADS, WIDTH, dtype=dtype)
    positions = torch.randint(0, 50, (2, ROWS, axes)).float()
    nodes: list[Any] = []

    def backend(module: Any, _: Any) -> Callable[..., Any]:
        replace_attention(module, AttentionCoverage())
        module.graph.eliminate_dead_code()
        module.graph.lint()
        nodes.extend(module.graph.nodes)
        return module.forward  # type: ignore[no-any-return]

    with torch.inference_mode():
        out = torch.compile(model, backend=backend, fullgraph=True)(qkv, positions)
        want = model(qkv, positions)
    [call] = [node for node in nodes if node.target is QUANTIZE_HEADS]
    inside = call.args[2] is not None
    assert inside != any(node.target in (torch.cos, torch.stack) for node in nodes)
    return float((out - want).norm() / want.norm()), inside


MIXED_2D = torch.randn(2, HEADS, WIDTH // 2)
MIXED_3D = torch.randn(3, HEADS, WIDTH // 2)
OLMOEARTH: dict[str, tuple[Rotate, int]] = {
    "rope": (encodings.apply_2d_axial_rope, 2),
    "rope_mixed": (lambda x, at: encodings.apply_2d_mixed_rope(x, at, MIXED_2D), 2),
    "rope_3d": (encodings.apply_3d_axial_rope, 3),
    "rope_3d_mixed": (lambda x, at: encodings.apply_3d_mixed_rope(x, at, MIXED_3D), 3),
}


@pytest.mark.parametrize("name", OLMOEARTH)
def test_rotations_of_olmoearth(name: str) -> None:
    error, inside = run(*OLMOEARTH[name])
    assert inside
    assert 0 < error < 0.02


def test_rotation_in_bf16() -> None:
    error, inside = run(*OLMOEARTH["rope_3d_mixed"], dtype=torch.bfloat16)
    assert inside
    assert error < 0.03


def angles_of(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return positions[:, None, :, :1] * torch.arange(1, x.shape[-1] // 2 + 1).float()


def twice(x: torch.Tensor) -> torch.Tensor:
    return torch.repeat_interleave(x, 2, dim=-1)


def crossed(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)


def sine_of_other_angles(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    a = angles_of(x, at)
    return x * twice(torch.cos(a)) + crossed(x) * twice(torch.sin(a + 1))


def other_way_round(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    a = angles_of(x, at)
    swapped = torch.stack((x[..., 1::2], -x[..., 0::2]), dim=-1).flatten(-2)
    return x * twice(torch.cos(a)) + swapped * twice(torch.sin(a))


def halves(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    a = torch.cat([angles_of(x, at)] * 2, -1)
    first, second = x.chunk(2, -1)
    return x * torch.cos(a) + torch.cat([-second, first], -1) * torch.sin(a)


def weighted(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    a = angles_of(x, at)
    return torch.add(x * twice(torch.cos(a)), crossed(x) * twice(torch.sin(a)), alpha=2)


def written_after(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    a, x = angles_of(x, at), x + 1
    turned = x * twice(torch.cos(a)) + crossed(x) * twice(torch.sin(a))
    x.mul_(3)
    return turned


def of_another(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    a = angles_of(x, at)
    return x * twice(torch.cos(a)) + crossed(x + 1) * twice(torch.sin(a))


def part_of_columns(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    a, first = angles_of(x[..., :16], at), x[..., :16]
    turned = first * twice(torch.cos(a)) + crossed(first) * twice(torch.sin(a))
    return torch.cat([turned, x[..., 16:]], -1)


def chunks_out_of_order(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    turned = []
    for part in (x[..., 16:], x[..., :16]):
        a = angles_of(part, at)
        turned.append(part * twice(torch.cos(a)) + crossed(part) * twice(torch.sin(a)))
    return torch.cat(turned, -1)


@pytest.mark.parametrize(
    "rotate",
    [
        weighted,
        written_after,
        sine_of_other_angles,
        other_way_round,
        halves,
        of_another,
        part_of_columns,
        chunks_out_of_order,
    ],
)
def test_what_is_no_rotation_of_pairs_stays(rotate: Rotate) -> None:
    error, inside = run(rotate, 1)
    assert not inside
    assert 0 < error < 0.02


def test_factors_in_any_order() -> None:
    def swapped(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        a = angles_of(x, at)
        return twice(torch.sin(a)) * crossed(x) + twice(torch.cos(a)) * x

    error, inside = run(swapped, 1)
    assert inside
    assert 0 < error < 0.02

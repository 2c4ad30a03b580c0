"""Test finding rotary position embeddings before attention by what they compute."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from olmoearth_pretrain_minimal.olmoearth_pretrain_v1.nn import encodings
from olmoearth_pretrain_minimal.olmoearth_pretrain_v1.nn.attention import Block
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from pytest_int8bench.compiler.fusion import passes
from pytest_int8bench.compiler.fusion.int8_attention import AttentionCoverage, replace_attention
from pytest_int8bench.compiler.fusion.nodes import LINEAR, QUANTIZE_HEADS, ROTATE_HEADS, value_of
from pytest_int8bench.kernels import dispatch
from toys.models import lowered

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


def compiled(model: nn.Module, *inputs: torch.Tensor, change: Callable[[Any], Any]) -> Any:
    """Return outputs of a model with and without changing its graph, and the changed nodes."""
    nodes: list[Any] = []

    def backend(module: Any, _: Any) -> Callable[..., Any]:
        change(module)
        module.graph.eliminate_dead_code()
        module.graph.lint()
        module.recompile()
        nodes.extend(module.graph.nodes)
        return module.forward  # type: ignore[no-any-return]

    with torch.inference_mode():
        out = torch.compile(model, backend=backend, fullgraph=True)(*inputs)
        return out, model(*inputs), nodes


def inputs_of(axes: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    qkv = torch.randn(2, ROWS, 3, HEADS, WIDTH, dtype=dtype)
    return qkv, torch.randint(0, 50, (2, ROWS, axes)).float()


def run(rotate: Rotate, axes: int, dtype: torch.dtype = torch.float32) -> tuple[float, str]:
    """Return the error of INT8 attention, and the rotation that it computes itself."""
    out, want, nodes = compiled(
        Rotated(rotate),
        *inputs_of(axes, dtype),
        change=lambda module: replace_attention(module, AttentionCoverage()),
    )
    [call] = [node for node in nodes if node.target is QUANTIZE_HEADS]
    kind: str = call.args[2]
    assert (kind == "none") == any(node.target in (torch.neg, operator.neg) for node in nodes)
    assert kind in ("none", "halves") or not any(node.target is torch.cos for node in nodes)
    return float((out - want).norm() / want.norm()), kind


MIXED_2D = torch.randn(2, HEADS, WIDTH // 2)
MIXED_3D = torch.randn(3, HEADS, WIDTH // 2)
OLMOEARTH: dict[str, tuple[Rotate, int, str]] = {
    "rope": (encodings.apply_2d_axial_rope, 2, "angles"),
    "rope_mixed": (lambda x, at: encodings.apply_2d_mixed_rope(x, at, MIXED_2D), 2, "positions"),
    "rope_3d": (encodings.apply_3d_axial_rope, 3, "angles"),
    "rope_3d_mixed": (lambda x, at: encodings.apply_3d_mixed_rope(x, at, MIXED_3D), 3, "positions"),
}


@pytest.mark.parametrize("name", OLMOEARTH)
def test_fuses_rotations_of_olmoearth(name: str) -> None:
    rotate, axes, kind = OLMOEARTH[name]
    error, inside = run(rotate, axes)
    assert inside == kind
    assert 0 < error < 0.02


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reads_positions_and_frequencies_without_copying(axes: int, dtype: torch.dtype) -> None:
    apply = getattr(encodings, f"apply_{axes}d_mixed_rope")
    frequencies = torch.randn(axes, HEADS, WIDTH // 2).to(dtype)
    out, want, nodes = compiled(
        Rotated(lambda x, at: apply(x, at, frequencies)),
        *inputs_of(axes, torch.float32),
        change=lambda module: replace_attention(module, AttentionCoverage()),
    )
    assert (out - want).norm() < 0.02 * want.norm()
    assert not any(node.target is torch.cat for node in nodes)
    [call] = [node for node in nodes if node.target is QUANTIZE_HEADS]
    assert [value_of(part).dtype for part in call.args[3]] == [torch.float32, dtype]


@pytest.mark.parametrize("order", [(0, 2, 1), (0, 1, 1), (0, 1)], ids=str)
def test_copies_positions_in_another_order(order: tuple[int, ...]) -> None:
    def rotate(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        angles = [
            at[..., i][:, None, :, None] * MIXED_3D[j][None, :, None, :]
            for j, i in enumerate(order)
        ]
        a = functools.reduce(operator.add, angles)
        return x * twice(torch.cos(a)) + crossed(x) * twice(torch.sin(a))

    error, kind = run(rotate, 3)
    assert kind == "positions"
    assert error < 0.02


def test_fuses_rotation_in_bf16() -> None:
    rotate, axes, kind = OLMOEARTH["rope_3d_mixed"]
    error, inside = run(rotate, axes, torch.bfloat16)
    assert inside == kind
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


def tables(x: torch.Tensor, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines as transformers models compute them: without heads."""
    a = torch.cat([angles_of(x, at)] * 2, -1)[:, 0]
    return a.cos().to(x.dtype), a.sin().to(x.dtype)


def halves(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Rotate as Llama does."""
    cosine, sine = (table.unsqueeze(1) for table in tables(x, at))
    half = x.shape[-1] // 2
    return (x * cosine) + (torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sine)


def in_fp32(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Rotate as ModernBERT does."""
    cosine, sine = (table.unsqueeze(1) for table in tables(x, at))
    half = x.shape[-1] // 2
    swapped = torch.cat((-x.float()[..., half:], x.float()[..., :half]), dim=-1)
    return ((x.float() * cosine) + (swapped * sine)).to(x.dtype)


def chunked(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    cosine, sine = (table[:, None] for table in tables(x, at))
    first, second = x.chunk(2, dim=-1)
    return (sine * torch.cat([-second, first], -1) + cosine * x).contiguous()


def halves_other_way_round(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    cosine, sine = (table[:, None] for table in tables(x, at))
    first, second = x.chunk(2, -1)
    return x * cosine + torch.cat([second, -first], -1) * sine


def unequal_parts(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    cosine, sine = (table[:, None] for table in tables(x, at))
    return x * cosine + torch.cat([-x[..., 14:], x[..., :14]], -1) * sine


def table_for_each_head(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Tables as large as queries and keys cost more than they save."""
    cosine, sine = (table[:, None].repeat(1, HEADS, 1, 1) for table in tables(x, at))
    first, second = x.chunk(2, -1)
    return x * cosine + torch.cat([-second, first], -1) * sine


def rounded_before(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    return chunked(x.to(torch.float16), at).to(x.dtype)


def weighted(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    a = angles_of(x, at)
    return torch.add(x * twice(torch.cos(a)), crossed(x) * twice(torch.sin(a)), alpha=2)


def written_after(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    a, x = angles_of(x, at), x + 1
    turned = x * twice(torch.cos(a)) + crossed(x) * twice(torch.sin(a))
    x.mul_(3)
    return turned


def angles_written_after(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    a = angles_of(x, at)
    cosine, sine = twice(torch.cos(a)), twice(torch.sin(a))
    a.zero_()
    x = x + 1
    return x * cosine + crossed(x) * sine


def positions_written_after(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    position = at[:, None, :, :1].clone()
    a = position * torch.arange(1, x.shape[-1] // 2 + 1)[None, None, None].float()
    position.zero_()
    x = x + 1
    return x * twice(torch.cos(a)) + crossed(x) * twice(torch.sin(a))


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
        angles_written_after,
        positions_written_after,
        sine_of_other_angles,
        other_way_round,
        halves_other_way_round,
        unequal_parts,
        table_for_each_head,
        of_another,
        part_of_columns,
        chunks_out_of_order,
    ],
)
def test_keeps_expressions_that_are_not_rotations(rotate: Rotate) -> None:
    error, inside = run(rotate, 1)
    assert inside == "none"
    assert 0 < error < 0.02


def test_accepts_factors_in_any_order() -> None:
    def swapped(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        a = angles_of(x, at)
        return twice(torch.sin(a)) * crossed(x) + twice(torch.cos(a)) * x

    error, inside = run(swapped, 1)
    assert inside == "angles"
    assert 0 < error < 0.02


@pytest.mark.parametrize(
    ("rotate", "dtype"),
    [
        (halves, torch.bfloat16),
        (in_fp32, torch.float32),
        (in_fp32, torch.bfloat16),
        (chunked, torch.bfloat16),
        (rounded_before, torch.float32),
    ],
)
def test_fuses_rotations_of_halves(rotate: Rotate, dtype: torch.dtype) -> None:
    error, inside = run(rotate, 1, dtype)
    assert inside == "halves"
    assert 0 < error < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "modernbert", "qwen3"])
def test_fuses_rotations_of_transformers(name: str) -> None:
    module = pytest.importorskip(f"transformers.models.{name}.modeling_{name}")
    error, inside = run(
        lambda x, at: module.apply_rotary_pos_emb(x, x, *tables(x, at))[1], 1, torch.bfloat16
    )
    assert inside == "halves"
    assert 0 < error < 0.03


# -- without INT8 attention -----------------------------------------------------------------------


@pytest.fixture
def _on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that kernels exist; the operators run in plain torch."""
    monkeypatch.setattr(dispatch, "fused_problem", lambda device: None)


def run_at_once(rotate: Rotate, axes: int, dtype: torch.dtype = torch.float32) -> list[Any]:
    """Compare attention outputs, and return the calls of the operator."""
    out, want, nodes = compiled(
        Rotated(rotate), *inputs_of(axes, dtype), change=lambda m: passes.fuse(m, always=True)
    )
    assert out.stride() == want.stride()
    assert (out - want).norm() < (1e-5 if dtype == torch.float32 else 0.01) * want.norm()
    return [node for node in nodes if node.target is ROTATE_HEADS]


@pytest.mark.usefixtures("_on_gpu")
@pytest.mark.parametrize("name", OLMOEARTH)
def test_queries_and_keys_share_angles(name: str) -> None:
    rotate, axes, kind = OLMOEARTH[name]
    [call] = run_at_once(rotate, axes, torch.bfloat16 if "3d" in name else torch.float32)
    both, found, _, rows_first = call.args
    assert (len(both), found) == (2, kind)
    assert rows_first == ("mixed" in name)  # torch.cat returns the rows of a head side by side


@pytest.mark.usefixtures("_on_gpu")
@pytest.mark.parametrize(
    "rotate", [weighted, positions_written_after, sine_of_other_angles, part_of_columns, halves]
)
def test_does_not_rotate_heads_in_one_kernel_if_unsupported(rotate: Rotate) -> None:
    """We leave halves alone, which Inductor rotates as fast as we could."""
    assert run_at_once(rotate, 1) == []


@pytest.mark.usefixtures("_on_gpu")
def test_queries_and_keys_with_different_angles() -> None:
    class Crossed(Rotated):
        def forward(self, qkv: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
            q, k = self.rotate(q, positions), self.rotate(k, positions + 1)
            return scaled_dot_product_attention(q, k, v)

    out, want, nodes = compiled(
        Crossed(OLMOEARTH["rope_mixed"][0]),
        *inputs_of(2, torch.float32),
        change=lambda module: passes.fuse(module, always=True),
    )
    assert torch.allclose(out, want, atol=1e-5)
    assert [len(node.args[0]) for node in nodes if node.target is ROTATE_HEADS] == [1, 1]


def test_nothing_changes_without_kernels_or_int8_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    rotate, axes, _ = OLMOEARTH["rope_3d_mixed"]
    assert run_at_once(rotate, axes) == []  # on a CPU
    monkeypatch.setattr(dispatch, "fused_problem", lambda device: None)
    _, _, nodes = compiled(Rotated(rotate), *inputs_of(axes, torch.float32), change=passes.fuse)
    assert not any(node.target is ROTATE_HEADS for node in nodes)


@pytest.mark.usefixtures("_on_gpu")
def test_fuses_olmoearth_block_with_int8_layers() -> None:
    """Projections of queries, keys and values are still joined into one matmul."""
    block = Block(32, 2, qkv_bias=True, position_encoding="rope_3d_mixed").eval()
    lowered(block)
    positions = torch.randint(0, 50, (2, ROWS, 3)).float()

    class Called(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return block(x, rope_positions=positions)  # type: ignore[no-any-return]

    out, want, nodes = compiled(Called(), torch.randn(2, ROWS, 32), change=passes.fuse)
    assert (out - want).norm() < 1e-5 * want.norm()
    assert [len(node.args[0]) for node in nodes if node.target is ROTATE_HEADS] == [2]
    assert len([node for node in nodes if node.target is LINEAR]) == 4

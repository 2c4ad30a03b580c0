"""Test which attention calls run in INT8, in graphs and in eager forwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pytest_int8bench.compiler.api import compile_for_a100
from pytest_int8bench.compiler.fusion.int8_attention import (
    AttentionCoverage,
    EagerInt8Attention,
    replace_attention,
)
from tests.toys.models import Attention

ROWS = 70


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


def run(model: nn.Module, *inputs: torch.Tensor, how: str) -> tuple[Any, AttentionCoverage]:
    """Run a model with INT8 attention, eagerly or as Dynamo's graph."""
    coverage = AttentionCoverage()
    with torch.inference_mode():
        if how == "eager":
            with EagerInt8Attention(coverage):
                return model(*inputs), coverage

        def backend(module: Any, _: Any) -> Callable[..., Any]:
            replace_attention(module, coverage)
            module.graph.lint()
            return module.forward  # type: ignore[no-any-return]

        return torch.compile(model, backend=backend, fullgraph=True)(*inputs), coverage


def heads(*shape: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(shape, dtype=dtype) for _ in range(3)]


class Calls(nn.Module):
    """Call attention in the given way."""

    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.given = given

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, **self.given)


@pytest.mark.parametrize("how", ["eager", "graph"])
@pytest.mark.parametrize(
    ("given", "shapes"),
    [
        ({}, [(2, 3, ROWS, 16)] * 3),
        ({"scale": 0.3}, [(1, 2, 5, 64), (1, 2, ROWS, 64), (1, 2, ROWS, 64)]),
        ({"enable_gqa": True}, [(1, 4, 5, 32), (1, 2, 9, 32), (1, 2, 9, 32)]),
        ({"dropout_p": 0.0, "is_causal": False}, [(1, 1, 3, 128)] * 3),
    ],
)
def test_replaces_supported_calls(given: Any, shapes: Any, how: str) -> None:
    inputs = [torch.randn(shape) for shape in shapes]
    out, coverage = run(Calls(**given), *inputs, how=how)
    want = F.scaled_dot_product_attention(*inputs, **given)
    assert (coverage.replaced, coverage.left) == (1, {})
    assert 0 < (out - want).norm() < 0.02 * want.norm()  # not exact, so INT8 did run
    assert (out.dtype, out.shape) == (want.dtype, want.shape)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("how", ["eager", "graph"])
@pytest.mark.parametrize(
    ("given", "shape", "reason"),
    [
        ({"is_causal": True}, (1, 2, 8, 16), "causal"),
        ({"attn_mask": torch.ones(8, 8, dtype=torch.bool)}, (1, 2, 8, 16), "with a mask"),
        ({"dropout_p": 0.5}, (1, 2, 8, 16), "with dropout"),
        ({}, (1, 2, 8, 256), "of heads with 256 columns"),
        ({}, (2, 8, 16), "without batch and head dimensions"),
        ({}, (1, 2, 0, 16), "of broadcast or empty shapes"),
    ],
)
def test_leaves_unsupported_calls_to_torch(given: Any, shape: Any, reason: str, how: str) -> None:
    inputs = heads(*shape)
    torch.manual_seed(1)
    out, coverage = run(Calls(**given), *inputs, how=how)
    torch.manual_seed(1)
    assert (coverage.replaced, coverage.left) == (0, {reason: 1})
    assert torch.equal(out, F.scaled_dot_product_attention(*inputs, **given))
    assert str(coverage) == (
        f"0 of 1 attention calls on INT8 queries and keys; left out: 1 {reason}"
    )


@pytest.mark.parametrize("how", ["eager", "graph"])
def test_leaves_attention_of_torch_modules_to_torch(how: str) -> None:
    layer = nn.MultiheadAttention(16, 2, batch_first=True)  # training: no fast path
    x = torch.randn(1, 5, 16)
    _, coverage = run(layer, x, x, x, how=how)
    assert (coverage.replaced, coverage.left) == (0, {"inside nn.MultiheadAttention": 1})


def test_leaves_double_precision_to_torch() -> None:
    _, coverage = run(Calls(), *heads(1, 1, 4, 8, dtype=torch.float64), how="eager")
    assert coverage.left == {"in float64": 1}


@pytest.mark.parametrize("how", ["eager", "graph"])
def test_autocast_applies_to_the_values(how: str) -> None:
    inputs = heads(1, 2, 9, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, coverage = run(Calls(), *inputs, how=how)
    assert coverage.replaced == 1
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("mode", ["off", pytest.param("default", marks=pytest.mark.slow)])
def test_compiled_model_counts_each_call(mode: str) -> None:
    """Repeated blocks share one region, which is called once per block."""
    model = nn.Sequential(*(Attention(32, 2) for _ in range(3))).eval()
    x = torch.randn(2, 9, 32)
    compiled = compile_for_a100(model, mode=mode, attention="auto", int8_attention=True)
    out = compiled(x)
    with torch.inference_mode():
        want = model(x)
    assert compiled.int8_attention is not None
    assert compiled.int8_attention.replaced == 3
    assert 0 < (out - want).norm() < 0.02 * want.norm()

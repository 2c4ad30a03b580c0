"""Test which attention calls use our kernel for short sequences, in graphs and eagerly."""

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
from pytest_int8bench.compiler.fusion.short_attention import EagerShortAttention, replace_short
from tests.toys.models import Attention


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


def run(
    model: Callable[..., Any], *inputs: torch.Tensor, how: str
) -> tuple[Any, AttentionCoverage, AttentionCoverage]:
    """Run a model eagerly or as Dynamo's graph, with short attention in our kernel and the rest in
    INT8; also return how its calls were handled."""
    short, int8 = AttentionCoverage(), AttentionCoverage()
    with torch.inference_mode():
        if how == "eager":
            with EagerInt8Attention(int8), EagerShortAttention(short):
                return model(*inputs), short, int8

        def backend(module: Any, _: Any) -> Callable[..., Any]:
            replace_short(module, short)
            replace_attention(module, int8)
            module.graph.lint()
            return module.forward  # type: ignore[no-any-return]

        out = torch.compile(model, backend=backend, fullgraph=True)(*inputs)
    return out, short, int8


@pytest.mark.parametrize("how", ["eager", "graph"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("given", "shapes"),
    [
        ({}, [(2, 3, 128, 16)] * 3),
        ({"scale": 0.3, "is_causal": True}, [(1, 2, 5, 64), (1, 2, 70, 64), (1, 2, 70, 64)]),
        ({"enable_gqa": True}, [(1, 4, 9, 32), (1, 2, 5, 32), (1, 2, 5, 32)]),
        ({"dropout_p": 0.0, "is_causal": True}, [(1, 1, 1, 128)] * 3),
    ],
)
def test_replaces_supported_calls(given: Any, shapes: Any, dtype: torch.dtype, how: str) -> None:
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    attend = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **given)  # noqa: E731
    out, short, int8 = run(attend, *inputs, how=how)
    want = attend(*(x.double() for x in inputs))
    assert (short.replaced, short.left) == (1, {})
    assert int8.to_dict() == {
        "int8": 0,
        "left_out": {"of up to 128 tokens, which attention=short computes": 1},
    }
    assert (out.double() - want).norm() < 0.005 * want.norm()
    assert (out.dtype, out.shape) == (dtype, want.shape)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("how", ["eager", "graph"])
@pytest.mark.parametrize(
    ("given", "shape", "dtype", "reason", "taken"),
    [
        ({}, (1, 1, 129, 16), torch.bfloat16, "of more than 128 tokens", 1),
        ({}, (1, 2, 8, 16), torch.float32, "in float32", 1),
        ({}, (1, 2, 8, 256), torch.bfloat16, "of heads with 256 columns", 0),
        ({"dropout_p": 0.5}, (1, 2, 8, 16), torch.bfloat16, "with dropout", 0),
        (
            {"attn_mask": torch.ones(8, 8, dtype=torch.bool)},
            (1, 2, 8, 16),
            torch.bfloat16,
            "with a mask",
            0,
        ),
    ],
)
def test_leaves_other_calls_to_int8_or_torch(
    given: Any, shape: Any, dtype: torch.dtype, reason: str, taken: int, how: str
) -> None:
    attend = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **given)  # noqa: E731
    inputs = [torch.randn(shape, dtype=dtype) for _ in range(3)]
    _, short, int8 = run(attend, *inputs, how=how)
    assert (short.replaced, short.left) == (0, {reason: 1})
    assert (int8.replaced, int8.left) == (taken, {} if taken else {reason: 1})


@pytest.mark.parametrize("how", ["eager", "graph"])
def test_autocast_applies_to_the_operands(how: str) -> None:
    inputs = [torch.randn(1, 2, 9, 16) for _ in range(3)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, short, _ = run(F.scaled_dot_product_attention, *inputs, how=how)
    assert (short.replaced, out.dtype) == (1, torch.bfloat16)


@pytest.mark.parametrize("mode", ["off", pytest.param("default", marks=pytest.mark.slow)])
def test_compiled_model_counts_each_call(mode: str) -> None:
    """Repeated blocks share one region, which is called once per block."""
    model = nn.Sequential(*(Attention(32, 2) for _ in range(3))).eval().bfloat16()
    x = torch.randn(2, 9, 32).bfloat16()
    compiled = compile_for_a100(model, mode=mode, attention="short", int8_attention=True)
    out = compiled(x)
    with torch.inference_mode():
        want = model(x)
    assert compiled.short_attention.replaced == 3
    assert str(compiled.int8_attention) == (
        "0 of 3 attention calls on INT8 queries and keys; left out: "
        "3 of up to 128 tokens, which attention=short computes"
    )
    assert (out - want).norm() < 0.02 * want.norm()

"""Compare the attention calls of a graph with those of an eager forward."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from pytest_int8bench.attention import FlashSDPA
from pytest_int8bench.compiler.attention_calls import Call, calls_in, recorded_calls
from pytest_int8bench.compiler.regions import Regions, repeated_blocks
from toys import attending

X = torch.randn(2, attending.TOKENS, attending.DIM)


def in_graph(model: nn.Module, x: torch.Tensor = X) -> Counter[Call]:
    """Return the calls in Dynamo's graph of a model, without compiling it."""
    found: list[Counter[Call]] = []

    def backend(module: torch.fx.GraphModule, inputs: object) -> object:
        found.append(calls_in(module))
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: model(x), backend=backend, fullgraph=True)
    with torch.inference_mode(), Regions(repeated_blocks(model)):
        compiled(x)
    [calls] = found
    return calls


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        (attending.NoAttention, 0),
        (attending.Twice, 2),
        (attending.Causal, 1),
        (attending.Grouped, 1),
        (attending.MultiHead, 1),
        (attending.ChoosesMath, 0),
        (attending.Autocast, 1),
        (attending.Blocks, 3),
    ],
)
def test_graph_makes_the_same_calls_as_eager_forward(kind: type[nn.Module], count: int) -> None:
    model = kind().eval().requires_grad_(False)
    with FlashSDPA("auto"):
        calls = in_graph(model)
        assert calls == recorded_calls(lambda: model(X))
    assert calls.total() == count


def test_records_the_traced_branches() -> None:
    calls = [in_graph(kind()) for kind in (attending.MaskedIfCompiled, attending.MaskedIfEager)]
    assert [[call.mask is not None for call in found] for found in calls] == [[True], [False]]


def test_dynamic_sizes_have_their_traced_values() -> None:
    x = torch.randn(5, attending.TOKENS, attending.DIM)
    torch._dynamo.mark_dynamic(x, 0)
    [call] = in_graph(attending.Attends(), x)
    assert call.query.shape == (5, 1, attending.TOKENS, attending.DIM)
    assert all(type(size) is int for size in call.query.shape + call.query.stride)

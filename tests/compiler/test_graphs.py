"""Test which weights a graph computes with, and how often it runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from pytest_int8bench.compiler.graphs import Graph
from pytest_int8bench.quantization.api import apply_int8_quant
from pytest_int8bench.quantization.stored import stored_weight
from toys.layers import is_linear

X, KEPT, SPARE = torch.randn(3, 4), torch.randn(4, 4), torch.randn(4, 4)


def graph_of(function: Callable[..., object]) -> Graph:
    return Graph(fx.symbolic_trace(function), (X, KEPT, SPARE))


@pytest.mark.parametrize(
    ("function", "is_used"),
    [
        (lambda x, kept, spare: F.linear(x, kept), None),  # Dynamo passes the traced module
        (lambda x, kept, spare: (F.linear(x, kept), F.linear(x, spare))[0], False),
        (lambda x, kept, spare: F.linear(F.linear(x, kept), spare), True),
        (lambda x, kept, spare: F.linear(x, kept).add_(F.linear(x, spare)), True),
        (lambda x, kept, spare: (x.add_(F.linear(x, spare)), F.linear(x, kept))[1], True),
        (lambda x, kept, spare: (torch.mm(x, spare, out=x), F.linear(x, kept))[1], True),
        (lambda x, kept, spare: (x.__setitem__(0, spare[0]), F.linear(x, kept))[1], True),
    ],
    ids=["unread", "dropped", "chained", "in-place-result", "in-place", "out", "setitem"],
)
def test_finds_weights_that_outputs_depend_on(
    function: Callable[..., object], is_used: bool | None
) -> None:
    graph = graph_of(function)
    assert graph.computes_with(KEPT)
    assert graph.computes_with(KEPT[1:])
    assert not graph.drops(KEPT)
    assert graph.computes_with(SPARE) is bool(is_used)
    assert graph.drops(SPARE) is (not is_used)
    assert not graph.computes_with(torch.zeros(1))
    assert not graph.drops(torch.zeros(1))


@pytest.mark.parametrize(
    ("function", "is_used"),
    [
        (lambda x, block: (F.linear(x, block[:4]), F.linear(x, block[4:]))[0], False),
        (lambda x, block: F.linear(x, block[:4]) + F.linear(x, block[4:]), True),
        (lambda x, block: F.linear(x, block[:4]) + block.sum(), True),
        (lambda x, block: F.linear(x, block[:5])[:, :4], True),
    ],
    ids=["dropped", "both", "whole", "one-row"],
)
def test_layers_may_share_a_block(function: Callable[..., object], is_used: bool) -> None:
    block = torch.randn(8, 4)
    graph = Graph(fx.symbolic_trace(function), (X, block))
    assert graph.computes_with(block[:4])
    assert not graph.drops(block[:4])
    assert graph.computes_with(block[4:]) is is_used
    assert graph.drops(block[4:]) is (not is_used)


def test_finds_weights_that_regions_use() -> None:
    region = fx.symbolic_trace(
        lambda x, kept, spare: (F.linear(x, kept), F.linear(x, spare))[0],
    )
    module = fx.GraphModule(nn.ModuleDict({"region": region}), fx.Graph())
    x, kept, spare = map(module.graph.placeholder, ("x", "kept", "spare"))
    module.add_submodule("region", region)
    operands = (module.graph.get_attr("region"), "region", x, kept, spare)
    called = module.graph.call_function(torch.ops.higher_order.invoke_subgraph, operands)
    module.graph.output(called)
    graph = Graph(module, (X, KEPT, SPARE))
    assert (graph.computes_with(KEPT), graph.computes_with(SPARE)) == (True, False)
    assert graph.drops(SPARE)


def test_finds_weights_inside_tensor_subclasses() -> None:
    model = nn.Sequential(nn.Linear(4, 8, dtype=torch.bfloat16))
    apply_int8_quant(model, filter_fn=is_linear)
    weight = model[0].weight
    graph = Graph(fx.symbolic_trace(lambda x, w: F.linear(x, w)), (X, weight))
    assert graph.computes_with(stored_weight(model[0]))
    assert graph.computes_with(weight.scale)


def test_counts_calls() -> None:
    graph = graph_of(lambda x, kept, spare: x)
    run = graph.counted(lambda x, y: x + y)
    assert graph.calls == 0
    assert [run(1, 2), run(3, 4)] == [3, 7]
    assert graph.calls == 2

"""Test recording what an eager forward does with each linear layer's weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pytest_int8bench.kernels.ops  # noqa: F401
from pytest_int8bench.measure.layer_runs import LayerRuns, layer_runs
from pytest_int8bench.measure.linear_calls import Size
from pytest_int8bench.quantization.api import apply_int8_quant
from toys import layers as toys
from toys.models import Attention, lowered

ROWS = 20
ONE = float(ROWS)
Rows = dict[str, tuple[float, float]]

# Rows in INT8 and rows in other matmuls.
USES: list[tuple[type[nn.Module], Rows]] = [
    (toys.FourLayers, {"a": (1, 0), "b": (1, 0), "c": (1, 0), "d": (1, 0)}),
    (toys.InClosure, {"a": (1, 0), "b": (1, 0), "c": (1, 0), "d": (1, 0)}),
    (toys.Uncalled, {"a": (1, 0), "b": (1, 0), "c": (0, 0), "d": (0, 0)}),
    (toys.Multiplies, {"a": (1, 0), "b": (1, 0), "c": (0, 1), "d": (1, 0)}),
    (toys.MultipliesOnce, {"a": (1, 0), "b": (1, 0), "c": (1, 1), "d": (2, 0)}),
    (toys.CallsTwice, {"a": (1, 0), "b": (1, 0), "c": (2, 0), "d": (2, 0)}),
    (toys.SharesLayer, {"a": (2, 0), "b": (1, 0), "d": (1, 0)}),
    (toys.Checkpointed, {"a": (1, 0), "b": (1, 0), "c": (1, 0), "d": (1, 0)}),
    (toys.ChangesGradMode, {"a": (1, 0), "b": (1, 0), "c": (1, 0), "d": (1, 0)}),
]


def build(toy: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return toy().to(torch.bfloat16).eval().requires_grad_(False)


def look(model: nn.Module, *, inference: bool = True) -> LayerRuns:
    x = torch.randn(2, ROWS // 2, 32, dtype=torch.bfloat16)
    with torch.inference_mode(inference), torch.no_grad():
        return layer_runs(model, lambda: model(x))


def rows_of(runs: LayerRuns) -> Rows:
    return {
        name: tuple(
            work / (run.size.inputs * run.size.outputs) / ONE
            for work in (run.quantized_work, run.other_work)
        )
        for name, run in runs.items()
    }


@pytest.mark.parametrize("inference", [True, False], ids=["inference", "no-grad"])
@pytest.mark.parametrize(("toy", "expected"), USES, ids=lambda x: getattr(x, "__name__", ""))
def test_every_matmul_counts_once(toy: type[nn.Module], expected: Rows, inference: bool) -> None:
    model = build(toy)
    before = rows_of(look(model, inference=inference))
    assert before == {name: (0, sum(rows)) for name, rows in expected.items()}
    apply_int8_quant(model, mode="w8a8", filter_fn=toys.is_linear)
    runs = look(model, inference=inference)
    assert rows_of(runs) == expected
    assert {run.quantized for run in runs.values()} == {True}
    weight_only = apply_int8_quant(build(toy), mode="w8", filter_fn=toys.is_linear)
    assert rows_of(look(weight_only, inference=inference)) == before


def test_layers_of_plain_tensors_count_too() -> None:
    runs = look(lowered(build(toys.FourLayers)))
    assert rows_of(runs) == dict.fromkeys("abcd", (1, 0))
    # q, k and v share one storage but are distinguished.
    model = lowered(Attention(32).to(torch.bfloat16))
    runs = layer_runs(model, lambda: model.k(torch.randn(4, 32, dtype=torch.bfloat16)))
    assert [name for name, run in runs.items() if run.was_used] == ["k"]
    assert len({runs[name].storage for name in "qkv"}) == 1


def test_tied_weight_counts_half_for_each_layer() -> None:
    runs = look(build(toys.SharesWeight))
    assert rows_of(runs) == {"a": (0, 1), "b": (0, 1), "c": (0, 1), "d": (0, 1)}


def test_reading_a_weight_is_not_a_matmul() -> None:
    model = nn.Sequential(nn.Linear(8, 16, dtype=torch.bfloat16))
    apply_int8_quant(model, mode="w8a8", filter_fn=toys.is_linear)
    ids = torch.tensor([1, 2])
    runs = layer_runs(model, lambda: F.embedding(ids, model[0].weight.dequantize()))
    assert (runs["0"].work, runs["0"].was_used) == (0, True)
    assert "aten.embedding.default" in runs["0"].readers
    # Views and queries of shape and dtype read no values.
    plain = nn.Sequential(nn.Linear(8, 16))
    runs = layer_runs(plain, lambda: (plain[0].weight.t().shape, plain[0].weight[2:].dtype))
    assert not runs["0"].was_used


@pytest.mark.parametrize(
    "multiply",
    [
        lambda x, w: F.linear(x, w),
        lambda x, w: x @ w.T,
        lambda x, w: torch.einsum("bi,oi->bo", x, w),
        lambda x, w: torch.addmm(x.new_zeros(16), x, w.t()),
        lambda x, w: torch.bmm(x[None], w.t()[None])[0],
        lambda x, w: torch.cat([F.linear(x, part) for part in w.chunk(2)], 1),
        lambda x, w: F.linear(x, (w * 2).contiguous()),
        lambda x, w: x @ w.T.contiguous(),
    ],
    ids=["linear", "matmul", "einsum", "addmm", "bmm", "chunk", "scaled", "transposed"],
)
def test_counts_matmuls_in_every_notation(multiply) -> None:  # type: ignore[no-untyped-def]
    model = nn.Sequential(nn.Linear(8, 16))
    x = torch.randn(5, 8)
    for inference in (True, False):
        with torch.inference_mode(inference), torch.no_grad():
            runs = layer_runs(model, lambda: multiply(x, model[0].weight))
        assert (runs["0"].size, runs["0"].rows) == (Size(8, 16), 5)


def test_an_expert_without_rows_was_not_used() -> None:
    runs = look_at_experts(toys.Experts())
    assert [name for name, run in runs.items() if not run.was_used] == ["experts.3"]
    assert sum(runs[f"experts.{i}"].rows for i in range(4)) == 64


def look_at_experts(model: nn.Module) -> LayerRuns:
    x = torch.randn(64, 32)
    with torch.inference_mode():
        return layer_runs(model, lambda: model(x))

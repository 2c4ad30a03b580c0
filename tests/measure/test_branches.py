"""Test models that behave differently when compiled: only the compiled code counts."""

from __future__ import annotations

import weakref

import pytest
from torch import nn

from pytest_int8bench.compiler.torch_workarounds.names import InductorBackend
from pytest_int8bench.measure.evidence import EvidenceError
from pytest_int8bench.measure.model import Model
from pytest_int8bench.measure.pool import ModelPool
from pytest_int8bench.params import RunParams
from toys import layers
from toys.models import make_workload

W8A8 = RunParams(
    gpu_type="cpu",
    int8_enabled=True,
    compile_mode="default",
    batch_size=32,
    benchmark_interval_s=0.001,
)
BASELINE = W8A8.baseline()
NO_C_D = "the forward does not use 2 of 4 quantized layers: c, d"


@pytest.fixture(autouse=True)
def _no_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run graphs as traced, without Inductor."""
    monkeypatch.setattr(InductorBackend, "__call__", lambda self, module, inputs: module.forward)


def ready(kind: type[nn.Module], params: RunParams) -> Model:
    model = ModelPool().get(make_workload(kind, filter_fn=layers.is_linear), params)
    model.ready()
    return model


@pytest.mark.parametrize(
    ("kind", "mode", "remarks"),
    [
        (layers.OnlyCompiled, "default", []),
        (layers.OnlyCompiled, "off", [NO_C_D]),
        (layers.OnlyEager, "default", [NO_C_D]),
        (layers.OnlyEager, "off", []),
        (layers.DequantizesIfEager, "default", []),
    ],
)
def test_layer_runs_follow_the_graphs(kind: type[nn.Module], mode: str, remarks: list[str]) -> None:
    model = ready(kind, W8A8.replace(compile_mode=mode))
    model.evidence()
    assert model.layers.remarks("INT8") == remarks
    assert list(model.layers.unused) == (["c", "d"] if remarks else [])


@pytest.mark.parametrize(
    ("kind", "mode"),
    [(layers.DequantizesIfCompiled, "default"), (layers.DequantizesIfEager, "off")],
)
def test_fails_if_the_executed_branch_dequantizes(kind: type[nn.Module], mode: str) -> None:
    with pytest.raises(EvidenceError, match="ran matmuls that are not INT8: c"):
        ready(kind, W8A8.replace(compile_mode=mode)).evidence()


def test_linear_calls_follow_the_graphs() -> None:
    def called(kind: type[nn.Module], params: RunParams = BASELINE) -> list[str]:
        return [call.name for call in ready(kind, params).linear_calls()]

    off = BASELINE.replace(compile_mode="off")
    breaks = BASELINE.replace(compile_fullgraph=False)
    assert called(layers.OnlyCompiled) == ["a", "b", "c", "d"]
    assert called(layers.OnlyCompiled, off) == ["a", "b"]
    assert called(layers.OnlyEager) == ["a", "b"]
    assert called(layers.NotCompiled, breaks) == ["a", "b", "c", "d"]
    blocks = [f"blocks.{block}.{name}" for block in range(2) for name in "abcd"]
    assert called(layers.PairOfCompiled) == blocks


def test_counts_layers_inside_regions() -> None:
    model = ready(layers.PairOfCompiled, BASELINE)
    assert model.ready().regions == 2
    runs = model.forward().runs
    assert runs is not None
    assert {name: run.rows for name, run in runs.items()} == dict.fromkeys(runs, 32)


def test_traces_are_freed_with_their_model() -> None:
    """Dynamo keeps backends, and everything they refer to, for the life of the process."""
    pool = ModelPool()
    model = pool.get(make_workload(layers.OnlyCompiled), BASELINE)
    model.ready()
    model.forward()
    [graph] = model.compiled.graphs
    left = [weakref.ref(each) for each in (model.eager, model.compiled, graph._traced)]
    del model
    pool.clear()
    assert [ref() for ref in left] == [None] * 3

"""Test the proof that each quantized layer ran as labelled."""

from __future__ import annotations

import re

import pytest

from pytest_int8bench.kernels import table
from pytest_int8bench.measure.evidence import Evidence, EvidenceError, Kernel
from pytest_int8bench.measure.layer_checks import (
    check_kernel_count,
    check_layers,
    check_same_work,
    listed,
)
from pytest_int8bench.measure.layer_runs import LayerRun, LayerRuns
from pytest_int8bench.measure.linear_calls import Size
from pytest_int8bench.params import RunParams

W8A8 = RunParams(int8_enabled=True, gpu_type="cpu")
W8 = W8A8.replace(int8_mode="w8")
CUDA = W8A8.replace(gpu_type="cuda")
NAME = W8A8.run_name
SQUARE = Size(8, 8)
FUSED = table.kernels_of("linear")[0].function
CUTLASS = "cutlass_80_tensorop_i16832gemm_s8_256x128_64x3_tn_align16"


def layer(
    int8: float = 0,
    other: float = 0,
    *readers: str,
    storage: int = 0,
    size: Size = SQUARE,
    quantized: bool = True,
    hidden: bool = False,
) -> LayerRun:
    """Return a layer that multiplied the given numbers of rows in INT8 and in other matmuls."""
    each = size.inputs * size.outputs
    return LayerRun(size, storage, quantized, int8 * each, other * each, set(readers), hidden)


def check(runs: LayerRuns, params: RunParams = W8A8, **changes: bool) -> str:
    with pytest.raises(EvidenceError) as caught:
        check_layers(runs, params, **changes)
    return str(caught.value)


# -- the label ----------------------------------------------------------------------------------


def test_accepts_layers_that_ran_in_int8() -> None:
    runs = {"a": layer(4), "b": layer(4, 0, "aten.sum"), "head": layer(0, 4, quantized=False)}
    check_layers(runs, W8A8)
    check_layers({**runs, "unused": layer()}, W8A8)
    check_layers({**runs, "unknown": layer(hidden=True)}, W8A8)


@pytest.mark.parametrize(
    ("run", "by"),
    [
        (layer(0, 4), ""),
        (layer(4, 4), ""),  # called twice, once to read its values
        (layer(0, 4, "aten.mul.Tensor"), " (their weights are read by aten.mul.Tensor)"),
        (layer(0, 0, "mine.matmul"), " (their weights are read by mine.matmul)"),
    ],
    ids=["other", "once", "dequantized", "unknown-operator"],
)
def test_rejects_layer_that_ran_another_matmul(run: LayerRun, by: str) -> None:
    runs = {"a": layer(4), "qkv": run}
    problem = "1 of 2 quantized layers ran matmuls that are not INT8"
    end = "leave them out with filter_fn or --int8-filter"
    assert check(runs) == f"{NAME} is labelled W8A8, but {problem}: qkv{by}; {end}"
    hint = " (on CUDA, matmuls of 16 rows or fewer run in floating point)"
    assert check(runs, CUDA).endswith(f"{problem}{hint}: qkv{by}; {end}")
    check_layers(runs, W8)
    check_layers(runs, W8A8, own_config=True)


@pytest.mark.parametrize("params", [W8A8, W8])
def test_rejects_forward_without_quantized_layers(params: RunParams) -> None:
    runs = {"a": layer(), "b": layer(), "head": layer(0, 4, quantized=False)}
    assert check(runs, params) == (
        f"{params.run_name} is labelled {params.int8_mode.upper()}, but the forward uses none of "
        "its 2 quantized layers: a, b"
    )


def test_truncates_long_lists_of_names() -> None:
    assert listed(map(str, range(8))) == "0, 1, 2, 3, 4, 5, 6, 7"
    assert listed(map(str, range(11))) == "0, 1, 2, 3, 4, 5, 6, 7 and 3 more"


# -- against the baseline -----------------------------------------------------------------------


def runs_less(baseline: LayerRuns, candidate: LayerRuns) -> str | None:
    try:
        check_same_work(baseline, candidate, W8A8)
    except EvidenceError as error:
        found = re.fullmatch(
            re.escape(NAME) + r": the candidate's forward runs less of \d layers than the "
            r"baseline's: (.*); if build keeps layers in closures, hooks or functions set on "
            r"modules, a copy of the model still calls the original's",
            str(error),
        )
        assert found is not None
        return found[1]
    return None


def test_candidate_must_run_the_layers_of_the_baseline() -> None:
    baseline = {name: layer(0, 4, quantized=False) for name in "abc"}
    assert runs_less(baseline, {name: layer(4) for name in "abc"}) is None
    assert runs_less(baseline, {"a": layer(4), "b": layer(4), "c": layer()}) == "c"
    assert runs_less(baseline, {"a": layer(4), "b": layer(2), "c": layer()}) == "b, c"
    assert runs_less(baseline, {"a": layer(4), "b": layer(4)}) == "c"
    # Padding adds work.
    assert runs_less(baseline, {name: layer(32) for name in "abc"}) is None
    # Unquantized layers must match the baseline, too.
    assert runs_less(baseline, {**baseline, "a": layer(0, 3)}) == "a"
    assert runs_less(baseline, {**baseline, "a": layer(hidden=True)}) is None


def test_rows_may_move_to_another_expert() -> None:
    baseline = {"0": layer(0, 5), "1": layer(0, 1), "proj": layer(0, 6, size=Size(8, 4))}
    candidate = {"0": layer(6), "1": layer(), "proj": layer(6, size=Size(8, 4))}
    assert runs_less(baseline, candidate) is None
    assert runs_less(baseline, {**candidate, "proj": layer(5, size=Size(8, 4))}) == "proj"


# -- kernels on CUDA ----------------------------------------------------------------------------


def count(runs: LayerRuns, kernels: dict[str, int], *dropped: str) -> None:
    evidence = Evidence(tuple(Kernel(name, 1e-3, calls) for name, calls in kernels.items()))
    check_kernel_count(evidence, runs, CUDA, dropped)


SIX = {str(i): layer(4, storage=i) for i in range(6)}


@pytest.mark.parametrize(
    "kernels",
    [
        {FUSED: 6},
        {FUSED: 4, CUTLASS: 2},
        {FUSED: 24},
        {FUSED: 5, "triton_tem_fused_mul_3": 1},  # a template that may be INT8
        {FUSED: 6, "nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_bias_TNN": 3},
    ],
)
def test_accepts_one_kernel_per_layer(kernels: dict[str, int]) -> None:
    count(SIX, kernels)


@pytest.mark.parametrize("kernels", [{FUSED: 5}, {FUSED: 3, CUTLASS: 2, "nvjet_sm90_tst": 9}])
def test_rejects_fewer_kernels_than_layers(kernels: dict[str, int]) -> None:
    with pytest.raises(EvidenceError) as caught:
        count(SIX, kernels)
    assert str(caught.value).startswith(
        f"{CUDA.run_name}: 6 INT8 matmuls are needed for one forward, but 5 ran (layers: 0, 1, 2, "
        "3, 4, 5); kernels: "
    )


def test_some_layers_need_no_separate_kernel() -> None:
    joined = {name: layer(4, storage=1) for name in "qkv"}
    count({**joined, "proj": layer(4, storage=2)}, {FUSED: 2})
    count({"a": layer(4, storage=1), "unused": layer(storage=2)}, {FUSED: 1})
    count({"a": layer(4, storage=1), "dead": layer(4, storage=2)}, {FUSED: 1}, "dead")
    # If called twice with one input, compilers may run it once.
    count({"a": layer(8, storage=1)}, {FUSED: 1})
    # An expert with few rows.
    count({"0": layer(30, storage=1), "1": layer(1, storage=2)}, {FUSED: 1})
    check_kernel_count(Evidence((Kernel("nvjet", 1e-3, 1),)), SIX, W8, ())

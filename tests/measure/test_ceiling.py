"""Test the upper bound of INT8 on hand-made breakdowns and rates."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pytest_int8bench.measure.ceiling import (
    CeilingError,
    bound_of,
    find_ceiling,
    quantized_calls,
    reached,
)
from pytest_int8bench.measure.device_rates import Rates
from pytest_int8bench.measure.kernel_kinds import Breakdown
from pytest_int8bench.measure.linear_calls import LinearCall, Size, linear_calls
from pytest_int8bench.quantization.modes import Bound

W8A8, W8 = bound_of("w8a8"), bound_of("w8")
SQUARE = Size(1000, 1000)
#: 6 s of matmuls, 3 s of attention, 1 s of everything else.
SPLIT = Breakdown(0.0, 6.0, 3.0, 1.0)
#: Memory bandwidth so high that matmuls are compute-bound.
FAST = 1e30


def rates_of(
    float_rate: float = 1e12,
    int8_rate: float = 2e12,
    bytes_per_s: float = FAST,
    size: Size = SQUARE,
) -> Rates:
    return Rates({size: float_rate}, {size: int8_rate}, bytes_per_s)


def calls_of(*names: str, rows: int = 1000, size: Size = SQUARE) -> list[LinearCall]:
    return [LinearCall(name, rows, size) for name in names]


# -- matmuls ------------------------------------------------------------------------------------


def test_rewriting_other_kernels_may_save_all_of_the_rest() -> None:
    alone, rewriting = (
        find_ceiling(
            SPLIT, calls_of("a", "b", "c"), {"a", "b"}, rates_of(), bound=W8A8, rewrites=rewrites
        )
        for rewrites in (False, True)
    )
    assert rewriting.speedup > alone.speedup
    assert rewriting.products_speedup == alone.products_speedup


def test_matmuls_twice_as_fast_halve_their_time() -> None:
    found = find_ceiling(SPLIT, calls_of("a", "b"), {"a", "b"}, rates_of(), bound=W8A8)
    assert found.product_ratio == 2.0
    assert found.quantized_share == 1.0
    assert found.products_speedup == pytest.approx(10 / (3 + 3 + 1))
    # The rest could run at memory speed, which takes no time here.
    assert found.speedup == pytest.approx(10 / (3 + 3))
    assert found.float_ops_per_s == pytest.approx(1e12)
    assert found.int8_ops_per_s == pytest.approx(2e12)
    assert found.bytes_per_s == FAST


def test_layers_left_in_bf16_gain_nothing() -> None:
    found = find_ceiling(SPLIT, calls_of("a", "b", "c"), {"a", "b"}, rates_of(), bound=W8A8)
    assert found.quantized_share == pytest.approx(2 / 3)
    assert found.products_speedup == pytest.approx(10 / (2 + 2 + 3 + 1))


def test_layers_are_weighted_by_their_operations() -> None:
    wide = Size(1000, 3000)
    rates = Rates({SQUARE: 1e12, wide: 1e12}, {SQUARE: 2e12, wide: 1e12}, FAST)
    calls = [LinearCall("a", 1000, SQUARE), LinearCall("b", 1000, wide)]
    found = find_ceiling(SPLIT, calls, {"a", "b"}, rates, bound=W8A8)
    assert found.product_ratio == pytest.approx(4 / (0.5 + 3))
    assert found.float_ops_per_s == pytest.approx(1e12)
    assert found.int8_ops_per_s == pytest.approx(4 / (0.5 + 3) * 1e12)
    found = find_ceiling(SPLIT, calls, {"a"}, rates, bound=W8A8)
    assert found.quantized_share == pytest.approx(1 / 4)
    assert found.products_speedup == pytest.approx(10 / (10 - 6 / 4 / 2))


def test_slower_int8_gives_bound_below_one() -> None:
    rates = rates_of(int8_rate=0.5e12)
    found = find_ceiling(replace(SPLIT, rest=0.0), calls_of("a"), {"a"}, rates, bound=W8A8)
    assert found.speedup == pytest.approx(9 / (12 + 3))
    assert reached(0.9, found.speedup) is None


def test_memory_bounds_small_matmuls() -> None:
    # 1 row: 2e6 operations against 2,004,000 bytes in BF16 and 1,003,000 in INT8.
    rates = rates_of(1e15, 2e15, 1e9)
    found = find_ceiling(SPLIT, calls_of("a", rows=1), {"a"}, rates, bound=W8A8)
    assert found.product_ratio == pytest.approx(2_004_000 / 1_003_000)


# -- weights only -------------------------------------------------------------------------------


def test_w8_gains_nothing_if_compute_bound() -> None:
    found = find_ceiling(SPLIT, calls_of("a"), {"a"}, rates_of(), bound=W8)
    assert (found.speedup, found.products_speedup, found.product_ratio) == (1.0, 1.0, 1.0)
    assert found.int8_ops_per_s is None


def test_w8_halves_the_weights_that_are_read() -> None:
    rates = Rates({SQUARE: 1e15}, {}, 1e9)
    found = find_ceiling(SPLIT, calls_of("a", rows=1), {"a"}, rates, bound=W8)
    assert found.product_ratio == pytest.approx(2_004_000 / 1_004_000)
    assert found.speedup == found.products_speedup == pytest.approx(10 / (4 + 6 * 1004 / 2004))


# -- the rest -----------------------------------------------------------------------------------


def test_remaining_time_includes_one_pass_over_each_input() -> None:
    # Each pass reads 2 bytes an element and writes 1: 3 MB, 0.1 s. Matmuls: 6 MB in BF16.
    rates = rates_of(1e9, 2e9, 30e6)
    calls = calls_of("q", "k", "fc")
    calls[1] = replace(calls[1], first=False)  # shares the input of q
    found = find_ceiling(SPLIT, calls, {"q", "k", "fc"}, rates, bound=W8A8)
    assert found.speedup == pytest.approx(10 / (3 + 3 + 0.2))
    assert found.products_speedup == pytest.approx(10 / (3 + 3 + 1))


def test_pass_takes_at_least_the_shortest_kernel() -> None:
    found = find_ceiling(
        SPLIT, calls_of("a", "b"), {"a", "b"}, rates_of(), bound=W8A8, shortest_s=0.25
    )
    assert found.speedup == pytest.approx(10 / (3 + 3 + 0.5))


def test_remaining_time_shorter_than_the_passes_is_kept() -> None:
    found = find_ceiling(SPLIT, calls_of("a"), {"a"}, rates_of(), bound=W8A8, shortest_s=5.0)
    assert found.speedup == found.products_speedup


def test_keeps_remaining_time_of_unquantized_layers() -> None:
    found = find_ceiling(SPLIT, calls_of("a", "b"), {"a"}, rates_of(), bound=W8A8)
    assert found.speedup == pytest.approx(10 / (1.5 + 3 + 3 + 0.5))


# -- laws ---------------------------------------------------------------------------------------

seconds = st.floats(0.0, 10.0)
splits = st.builds(Breakdown, st.just(0.0), st.floats(1e-3, 10.0), seconds, seconds)
sizes = st.builds(Size, st.integers(1, 5000), st.integers(1, 5000))
some_calls = st.lists(
    st.tuples(st.integers(1, 10**6), st.booleans(), st.booleans()), min_size=1, max_size=6
)


@given(
    splits, some_calls, sizes, st.floats(1e9, 1e15), st.floats(1.0, 8.0), st.floats(1.0, 8.0),
    st.floats(1e6, 1e13), st.sampled_from([W8A8, W8]),
)  # fmt: skip
def test_bound_is_at_least_one_and_grows_with_the_int8_rate(
    split: Breakdown,
    rows: list[tuple[int, bool, bool]],
    size: Size,
    rate: float,
    faster: float,
    again: float,
    bytes_per_s: float,
    bound: Bound,
) -> None:
    calls = [LinearCall(str(i), m, size, first) for i, (m, first, _) in enumerate(rows)]
    converted = {str(i) for i, (_, _, yes) in enumerate(rows) if yes} | {"0"}
    one, two = (
        find_ceiling(
            split, calls, converted, rates_of(rate, rate * r, bytes_per_s, size), bound=bound
        )
        for r in (faster, faster * again)
    )
    assert 1 - 1e-9 <= one.products_speedup <= one.speedup + 1e-9
    assert one.speedup <= two.speedup * (1 + 1e-9)
    assert 0 < one.quantized_share <= 1
    if bound is W8A8:
        assert one.product_ratio <= max(faster, 2) * (1 + 1e-9)
    else:
        assert one.product_ratio <= 2
        assert one == replace(two, int8_ops_per_s=None)


@given(splits, some_calls, sizes)
def test_bound_falls_to_one_as_fewer_layers_are_converted(
    split: Breakdown, rows: list[tuple[int, bool, bool]], size: Size
) -> None:
    small = LinearCall("small", 1, size)
    others = [LinearCall(str(i), 10**12 * m, size, f) for i, (m, f, _) in enumerate(rows)]
    found = find_ceiling(split, [small, *others], {"small"}, rates_of(size=size), bound=W8A8)
    assert found.speedup == pytest.approx(1.0, abs=1e-4)


def test_reports_no_quantized_layer() -> None:
    message = r"^no quantized layer was called in a forward of the baseline$"
    for converted in (set(), {"other"}):
        with pytest.raises(CeilingError, match=message):
            find_ceiling(SPLIT, calls_of("a"), converted, rates_of(), bound=W8A8)
    with pytest.raises(CeilingError, match=message):
        quantized_calls(calls_of("a", rows=0), {"a"})


def test_reports_no_known_matmul() -> None:
    with pytest.raises(
        CeilingError, match=r"^no kernel of the baseline was recognized as a matmul$"
    ):
        find_ceiling(
            replace(SPLIT, other_products=0.0), calls_of("a"), {"a"}, rates_of(), bound=W8A8
        )


@pytest.mark.parametrize(
    ("speedup", "ceiling", "part"),
    [(1.25, 1.5, 0.5), (1.5, 1.5, 1.0), (1.0, 1.5, 0.0), (0.5, 2.0, -0.5), (2.0, 1.5, 2.0)],
)
def test_reached_share_of_gain(speedup: float, ceiling: float, part: float) -> None:
    assert reached(speedup, ceiling) == part


@pytest.mark.parametrize(("speedup", "ceiling"), [(1.2, 1.0), (1.2, 0.9), (None, 1.5)])
def test_no_gain_gives_no_reached_share(speedup: float | None, ceiling: float) -> None:
    assert reached(speedup, ceiling) is None


# -- calls of linear layers ---------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.q = nn.Linear(8, 8)
        self.k = nn.Linear(8, 8, bias=False)
        self.mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        self.unused = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        mixed = self.q(y) * nn.functional.linear(input=y, weight=self.k.weight)
        return self.mlp(mixed) @ torch.eye(8)


def test_records_linear_calls_of_a_forward() -> None:
    model = Block()
    with torch.inference_mode():
        calls = linear_calls(model, lambda: model(torch.randn(2, 3, 8)))
    assert calls == (
        LinearCall("q", 6, Size(8, 8), first=True),
        LinearCall("k", 6, Size(8, 8), first=False),
        LinearCall("mlp.0", 6, Size(8, 32), first=True),
        LinearCall("mlp.2", 6, Size(32, 8), first=True),
    )
    assert [call.ops for call in calls] == [768, 768, 3072, 3072]
    assert not any(module._forward_hooks for module in model.modules())


def test_recording_calls_does_not_recompile() -> None:
    import torch._dynamo

    model, x = Block().eval(), torch.randn(2, 8)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, example: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend)
    with torch.inference_mode():
        compiled(x)
        linear_calls(model, lambda: model(x))
        compiled(x)
    assert len(graphs) == 1
    torch._dynamo.reset()

"""Test the upper bound of INT8 attention on hand-made calls."""

from __future__ import annotations

import math
import re
from collections import Counter

import pytest
import torch
from torch import nn

from pytest_int8bench.compiler.attention_calls import Call, recorded_calls
from pytest_int8bench.compiler.fusion.int8_attention import (
    AttentionCoverage,
    EagerInt8Attention,
)
from pytest_int8bench.measure.attention_bound import attention_part, head_of, replaced_calls
from pytest_int8bench.measure.ceiling import AttentionPart, CeilingError
from pytest_int8bench.measure.device_rates import Head, Rates
from toys import attending


def call_of(
    *shape: int,
    groups: int = 0,
    keys: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    **options: bool,
) -> Call:
    q = torch.empty(shape, dtype=dtype)
    batch, heads, rows, width = shape
    k = q.new_empty(batch, groups or heads, keys or rows, width)
    return Call.of(q, k, k, **options)


def part_of(
    calls: dict[Call, int], replaced: list[Call], bytes_per_s: float = math.inf
) -> AttentionPart:
    rates = Rates({}, {}, bytes_per_s, {head_of(call): 1e12 for call in replaced})
    return attention_part(6.0, calls, replaced, rates, lambda call: call.query.shape[2])


LONG, SHORT = call_of(2, 3, 4000, 64), call_of(2, 3, 1000, 64)


def test_all_calls_at_the_measured_rate() -> None:
    ops = 4 * 2 * 3 * 64 * (2 * 4000**2 + 1000**2)
    found = part_of({LONG: 2, SHORT: 1}, [LONG, SHORT])
    assert found == AttentionPart(1.0, pytest.approx(6.0 / (ops / 1e12)), pytest.approx(1e12))


def test_calls_left_to_torch_save_no_time() -> None:
    found = part_of({LONG: 2, SHORT: 2}, [SHORT])
    assert found.share == pytest.approx(2000 / (2000 + 8000))
    assert found.ratio == pytest.approx(6.0 * 0.2 / (2 * 4 * 2 * 3 * 64 * 1000**2 / 1e12))


def test_memory_bounds_short_sequences() -> None:
    # Grouped: 8 query heads, and 2 heads of keys and values, read as INT8, INT8 and BF16.
    call = call_of(16, 8, 48, 64, groups=2, keys=24)
    q, k = 16 * 8 * 48 * 64, 16 * 2 * 24 * 64
    moved = q + k + 2 * k + 2 * q
    found = part_of({call: 3}, [call], bytes_per_s=1e6)
    assert found.ratio == pytest.approx(6.0 / (3 * moved / 1e6))


def test_no_bound_without_attention_kernels() -> None:
    rates = Rates({}, {}, 1.0, {head_of(LONG): 1e12})
    message = r"^no kernel of the baseline was recognized as attention$"
    with pytest.raises(CeilingError, match=message):
        attention_part(0.0, {LONG: 1}, [LONG], rates, lambda call: 1.0)
    with pytest.raises(
        CeilingError, match=r"^an attention call of the baseline cannot be timed separately"
    ):
        attention_part(1.0, {LONG: 1, SHORT: 1}, [LONG], rates, lambda call: math.inf)


def test_head_has_width_and_dtype_of_the_call() -> None:
    assert head_of(LONG) == Head(64, torch.bfloat16)


@pytest.mark.parametrize(
    ("calls", "left", "problem"),
    [
        ([], {}, "the baseline's attention calls are unknown"),
        ([call_of(1, 2, 8, 16, is_causal=True)], {}, "INT8 attention replaces none of the b"),
        (
            [call_of(1, 2, 8, 256)],
            {},
            "INT8 attention replaces none of the baseline's attention calls",
        ),
        (
            [LONG],
            {"inside nn.MultiheadAttention": 1},
            "the calls that INT8 attention replaces are unknown inside nn.MultiheadAttention",
        ),
    ],
    ids=["none-known", "causal", "wide", "multihead"],
)
def test_reports_unknown_bound(calls: list[Call], left: dict[str, int], problem: str) -> None:
    with pytest.raises(CeilingError, match=f"^{re.escape(problem)}"):
        replaced_calls(Counter(calls), AttentionCoverage(left=Counter(left)))


@pytest.mark.parametrize(
    "kind",
    [attending.Attends, attending.Masked, attending.Twice, attending.Causal, attending.Grouped],
    ids=lambda kind: kind.__name__,
)
@torch.inference_mode()
def test_counts_baseline_calls_that_the_candidate_replaces(kind: type[nn.Module]) -> None:
    model, x = kind(), torch.randn(3, attending.TOKENS, attending.DIM)
    calls, coverage = recorded_calls(lambda: model(x)), AttentionCoverage()
    with EagerInt8Attention(coverage):
        model(x)
    try:
        replaced = replaced_calls(calls, coverage)
    except CeilingError:
        replaced = []
    assert sum(calls[call] for call in replaced) == coverage.replaced
    assert calls.total() == coverage.replaced + coverage.left.total()

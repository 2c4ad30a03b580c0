"""Upper bound of INT8 attention: the calls that it replaces and their minimum time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from pytest_int8bench.compiler.attention_calls import Call, Layout
from pytest_int8bench.compiler.fusion.int8_attention import (
    INSIDE,
    SHORT,
    AttentionCoverage,
    refusal_of,
)
from pytest_int8bench.measure.attention_auto import is_short
from pytest_int8bench.measure.ceiling import AttentionPart, CeilingError
from pytest_int8bench.measure.device_rates import Head, Rates


def replaced_calls(calls: Mapping[Call, int], coverage: AttentionCoverage) -> list[Call]:
    """Return which of the baseline's calls run in INT8.

    Args:
        calls: all calls and how often each occurs.
        coverage: attention coverage of the candidate.

    Raises:
        CeilingError: if this cannot be determined, or if none runs in INT8.
    """
    if coverage.left[INSIDE]:
        raise CeilingError(f"the calls that INT8 attention replaces are unknown {INSIDE}")
    if not calls:
        raise CeilingError("the baseline's attention calls are unknown")
    with_short = coverage.left[SHORT] > 0
    replaced = [
        call for call in calls if _is_replaced(call) and not (with_short and is_short(call))
    ]
    if not replaced:
        raise CeilingError("INT8 attention replaces none of the baseline's attention calls")
    return replaced


def _is_replaced(call: Call) -> bool:
    given = {**dict(call.options), "attn_mask": call.mask}
    q, k, v = (
        torch.empty(layout.shape, dtype=layout.dtype, device="meta")
        for layout in (call.query, call.key, call.value)
    )
    return refusal_of(q, k, v, given) is None


def head_of(call: Call) -> Head:
    """Return the kind of heads of a call."""
    return Head(call.value.shape[-1], call.value.dtype)


def attention_part(
    attention_s: float,
    calls: Mapping[Call, int],
    replaced: list[Call],
    rates: Rates,
    seconds_of: Callable[[Call], float],
) -> AttentionPart:
    """Return the possible effect of INT8 attention on the baseline's time in attention.

    That time is divided among the calls in proportion to the time that each takes alone. A call
    takes at least ``max(ops / rate, bytes / bandwidth)`` on queries and keys already in INT8.

    Args:
        attention_s: seconds of the baseline's attention kernels.
        calls: the baseline's calls and how often each occurs.
        replaced: the calls that run in INT8.
        rates: the device's rates at the heads of these calls.
        seconds_of: measures the seconds of a call that runs alone in the baseline.

    Raises:
        CeilingError: if the baseline's time in attention is unknown.
    """
    if not attention_s:
        raise CeilingError("no kernel of the baseline was recognized as attention")
    share = 1.0
    if len(replaced) < len(calls):
        alone = {call: count * seconds_of(call) for call, count in calls.items()}
        if math.isinf(sum(alone.values())):
            raise CeilingError("an attention call of the baseline cannot be timed separately")
        share = sum(alone[call] for call in replaced) / sum(alone.values())
    ops = {call: calls[call] * _ops(call) for call in replaced}
    fastest = {call: ops[call] / rates.attention_ops_per_s[head_of(call)] for call in replaced}
    least_s = sum(
        max(fastest[call], calls[call] * _traffic(call) / rates.bytes_per_s) for call in replaced
    )
    rate = sum(ops.values()) / sum(fastest.values())
    return AttentionPart(share, attention_s * share / least_s, rate)


def _ops(call: Call) -> int:
    """Return the operations of both matmuls; a multiply-add counts as two."""
    batch, heads, rows, width = call.query.shape
    return 4 * batch * heads * rows * call.key.shape[-2] * width


def _traffic(call: Call) -> int:
    """Return the fewest bytes that must be read and written."""

    def count(layout: Layout) -> int:
        return math.prod(layout.shape)

    moved = count(call.value) + count(call.query)  # values, and an output of the queries' shape
    return count(call.query) + count(call.key) + moved * call.value.dtype.itemsize

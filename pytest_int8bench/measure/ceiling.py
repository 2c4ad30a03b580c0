"""Compute the upper bound of INT8's speedup at a point, and how much of the gain was reached.

``docs/measuring.md`` has the formula and its assumptions.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from pytest_int8bench.errors import ClearError
from pytest_int8bench.measure.device_rates import Rates
from pytest_int8bench.measure.kernel_kinds import Breakdown
from pytest_int8bench.measure.linear_calls import LinearCall, Size
from pytest_int8bench.quantization.modes import MODES, Bound


class CeilingError(ClearError, RuntimeError):
    """The upper bound cannot be computed."""


@dataclass(frozen=True)
class AttentionPart:
    """Possible effect of INT8 attention on the baseline's time in attention."""

    share: float
    """Fraction of that time in calls that run in INT8, 0 to 1."""
    ratio: float
    """How many times faster these calls could be."""
    ops_per_s: float
    """Their measured rate on INT8 queries and keys, on a long sequence."""


@dataclass(frozen=True)
class Ceiling:
    """Upper bound of INT8's speedup at a point."""

    speedup: float
    """Baseline time divided by the least possible time with INT8."""
    products_speedup: float
    """The same if only matmuls got faster."""
    product_ratio: float
    """How many times faster the matmuls of the quantized layers could be."""
    quantized_share: float
    """Fraction of the baseline's matmul time in quantized layers, 0 to 1."""
    float_ops_per_s: float
    """Measured rate of their matmuls in the baseline's dtype."""
    int8_ops_per_s: float | None
    """The same on INT8 operands; None if the mode's matmuls run in the baseline's dtype."""
    bytes_per_s: float
    attention: AttentionPart | None = None
    """None if attention is unchanged."""


def find_ceiling(
    baseline: Breakdown,
    calls: Sequence[LinearCall],
    converted: Collection[str],
    rates: Rates,
    *,
    bound: Bound,
    attention: AttentionPart | None = None,
    rewrites: bool = False,
    element_bytes: int = 2,
    shortest_s: float = 0.0,
) -> Ceiling:
    """Return the upper bound of INT8's speedup.

    A roofline gives the least time of each linear layer, ``max(ops / rate, bytes / bandwidth)``,
    both in the baseline and quantized. The baseline's measured matmul time is divided among layers
    by the former, and the share of quantized layers shrinks by the latter. With INT8 matmuls,
    kernels between quantized layers may also shrink to one pass over each input, the least that
    can quantize rows by their own maximum. All kernels may be of that kind with INT8 attention,
    whose first pass also rotates and lays out queries and keys, and if the candidate replaces
    kernels elsewhere.
    Everything else is unchanged.

    Args:
        baseline: breakdown of the baseline's time.
        calls: calls of its linear layers.
        converted: names of the quantized layers.
        rates: the device's rates at the sizes of the quantized layers.
        bound: inputs of the mode's upper bound.
        attention: possible effect of INT8 attention; None if attention is unchanged.
        rewrites: the candidate replaces kernels that are not next to a quantized layer, by a pass
            that rotates queries and keys or by matmuls that resize images.
        element_bytes: bytes per element of the baseline's weights and activations.
        shortest_s: seconds of the shortest possible kernel.

    Raises:
        CeilingError: if no call of a quantized layer was seen, or no known matmul ran.
    """
    quantized = quantized_calls(calls, converted)
    if not baseline.products_s:
        raise CeilingError("no kernel of the baseline was recognized as a matmul")
    others = [call for call in calls if call.name not in converted]
    int8_rates = rates.int8_ops_per_s if bound.int8_matmuls else None
    share, ratio = _share_and_ratio(quantized, others, rates, bound, element_bytes)
    left_s = baseline.total_s - baseline.products_s * share * (1 - 1 / ratio)
    element_s = None if int8_rates is None else (element_bytes + 1) / rates.bytes_per_s
    may_shrink = rewrites or attention is not None
    saved_s = _saved_s(baseline.rest, quantized, others, may_shrink, element_s, shortest_s)
    if attention:
        saved_s += baseline.attention * attention.share * (1 - 1 / attention.ratio)
    return Ceiling(
        baseline.total_s / (left_s - saved_s),
        baseline.total_s / left_s,
        ratio,
        share,
        _together(quantized, rates.float_ops_per_s),
        None if int8_rates is None else _together(quantized, int8_rates),
        rates.bytes_per_s,
        attention,
    )


def _share_and_ratio(
    quantized: Sequence[LinearCall],
    others: Sequence[LinearCall],
    rates: Rates,
    bound: Bound,
    width: int,
) -> tuple[float, float]:
    """Return the quantized layers' fraction of matmul time, and how many times faster they could
    be; an element of the baseline has ``width`` bytes."""
    typical = _together(quantized, rates.float_ops_per_s)

    def least_s(call: LinearCall, rate: float, inputs: int, weights: float) -> float:
        return max(call.ops / rate, call.traffic(inputs, weights, width) / rates.bytes_per_s)

    before = [least_s(c, rates.float_ops_per_s[c.size], width, width) for c in quantized]
    int8_rates = rates.int8_ops_per_s if bound.int8_matmuls else None
    used, inputs = (rates.float_ops_per_s, width) if int8_rates is None else (int8_rates, 1)
    after = [least_s(c, used[c.size], inputs, bound.weight_bytes) for c in quantized]
    share = sum(before) / (sum(before) + sum(least_s(c, typical, width, width) for c in others))
    return share, sum(before) / sum(after)


def _saved_s(
    rest_s: float,
    quantized: Sequence[LinearCall],
    others: Sequence[LinearCall],
    may_shrink: bool,
    element_s: float | None,
    shortest_s: float,
) -> float:
    """Return the seconds by which kernels between what is INT8, their part of the rest, are longer
    than one pass over each input of a layer, at ``element_s`` for each element; None for layers
    that need no pass."""
    if element_s is None:
        return rest_s if may_shrink else 0.0
    touched = sum(call.activations for call in quantized)
    besides = 0 if may_shrink else sum(call.activations for call in others)
    near_s = rest_s * touched / (touched + besides)
    passes_s = sum(
        max(c.rows * c.size.inputs * element_s, shortest_s) for c in quantized if c.first
    )
    return max(near_s - passes_s, 0.0)


def bound_of(mode: str) -> Bound:
    """Return the inputs of a mode's upper bound.

    Raises:
        CeilingError: if none is known.
    """
    bound = MODES[mode].bound
    if bound is None:
        raise CeilingError(f"no upper bound is known for int8_mode={mode}")
    return bound


def quantized_calls(calls: Sequence[LinearCall], converted: Collection[str]) -> list[LinearCall]:
    """Return the calls of the layers that were quantized.

    Raises:
        CeilingError: if there is none.
    """
    quantized = [call for call in calls if call.name in converted and call.rows]
    if not quantized:
        raise CeilingError("no quantized layer was called in a forward of the baseline")
    return quantized


def _together(calls: Sequence[LinearCall], ops_per_s: Mapping[Size, float]) -> float:
    """Return the rate of all ``calls``."""
    return sum(c.ops for c in calls) / sum(c.ops / ops_per_s[c.size] for c in calls)


def reached(speedup: float | None, ceiling: float) -> float | None:
    """Return the fraction of the possible gain that was reached: 0 for none, below 0 if INT8 is
    slower, None if there is no speedup or no possible gain."""
    if speedup is None or ceiling <= 1:
        return None
    return (speedup - 1) / (ceiling - 1)

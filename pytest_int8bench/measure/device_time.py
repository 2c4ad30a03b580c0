"""Break down the device time of a point, and compute the speedup's upper bound from it.

Both stages run after the timed rounds.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from pytest_int8bench.errors import ClearError, first_line
from pytest_int8bench.measure.attention_auto import Call, seconds_of
from pytest_int8bench.measure.attention_bound import attention_part, head_of, replaced_calls
from pytest_int8bench.measure.ceiling import (
    Ceiling,
    bound_of,
    find_ceiling,
    quantized_calls,
    reached,
)
from pytest_int8bench.measure.device_rates import measure_rates
from pytest_int8bench.measure.evidence import Keep
from pytest_int8bench.measure.kernel_kinds import Breakdown, break_down, shortest_s
from pytest_int8bench.measure.memory import free_memory, release
from pytest_int8bench.measure.model import Model
from pytest_int8bench.measure.timing import Timer
from pytest_int8bench.quantization.api import coverage
from pytest_int8bench.results.parts import Kernels, UpperBound

KERNELS_KEPT = 20
# Torch's kernel for antialiased resizing, upsample_gen2d_aa_out_frame.
_RESIZE = "upsample_gen2d_aa"
#: Devices whose profile lists kernels. On a CPU, it lists a graph that Inductor fused as one entry.
WITH_KERNELS = ("cuda",)


@dataclass(frozen=True)
class NoCeiling:
    """Reason why there is no upper bound."""

    problem: str

    def to_dict(self) -> dict[str, str]:
        """Return the problem for JSON."""
        return {"problem": self.problem}


@dataclass(frozen=True)
class CeilingSources:
    """An upper bound and the breakdown of the baseline's time."""

    baseline: Breakdown
    ceiling: Ceiling

    def to_dict(self) -> dict[str, Any]:
        """Return the inputs of the upper bound for JSON."""
        values = dataclasses.asdict(self.ceiling)
        del values["speedup"]
        if values["attention"] is None:
            del values["attention"]
        return {"baseline": self.baseline.to_dict(), **values}


def kernels_of(model: Model, keep: Keep | None) -> Kernels:
    """Return the kernels that ran, after comparing them with the labels."""
    evidence = model.evidence(keep)
    with_kernels = model.device.type in WITH_KERNELS
    return Kernels(
        device_time_s=evidence.total_s if model.device.type == "cuda" else None,
        int8_time_share=evidence.int8_time_share,
        attention_kernel=evidence.attention_kernel,
        longest=evidence.kernels[:KERNELS_KEPT],
        trace=evidence.trace if keep is not None else None,
        breakdown=break_down(evidence) if with_kernels else None,
    )


def upper_bound(
    baseline: Model, candidate: Model, speedup: float, timer: Timer
) -> UpperBound | None:
    """Return the upper bound of INT8's speedup or why it is unknown; None if kernels cannot be
    profiled."""
    if baseline.device.type not in WITH_KERNELS:
        return None
    try:
        sources = _find_ceiling(baseline, candidate, timer)
    except Exception as error:  # the measurement is complete, so no error may discard it
        problem = f"{type(error).__name__}: {first_line(error)}"
        if isinstance(error, ClearError):
            problem = first_line(error)
        release(error)
    else:
        bound = sources.ceiling.speedup
        return UpperBound(speedup=bound, reached=reached(speedup, bound), sources=sources)
    free_memory()
    return UpperBound(sources=NoCeiling(problem))


def _find_ceiling(baseline: Model, candidate: Model, timer: Timer) -> CeilingSources:
    evidence, bound = baseline.evidence(), bound_of(candidate.params.int8_mode)
    dtype = torch.bfloat16 if baseline.params.bf16 else torch.float32
    left_out = {*candidate.layers.unused, *candidate.layers.other_precision}
    calls = [call for call in baseline.linear_calls() if call.name not in candidate.layers.unused]
    converted = {layer.name for layer in coverage(candidate.eager).converted} - left_out
    sizes = {call.size for call in quantized_calls(calls, converted)}
    attention_calls, replaced = Counter[Call](), list[Call]()
    if (covered := candidate.compiled.int8_attention) is not None:
        attention_calls = baseline.attention_calls()
        replaced = replaced_calls(attention_calls, covered)
    with baseline.compiled.settings():
        rates = measure_rates(
            sizes,
            baseline.device,
            dtype,
            timer,
            with_int8=bound.int8_matmuls,
            heads=set(map(head_of, replaced)),
        )
    split = break_down(evidence)
    attention = None
    if replaced:
        backend = baseline.compiled.attention
        attention = attention_part(
            split.attention,
            attention_calls,
            replaced,
            rates,
            lambda call: seconds_of(backend, call, timer),
        )
    ceiling = find_ceiling(
        split,
        calls,
        converted,
        rates,
        bound=bound,
        attention=attention,
        rewrites=_has_kernel(candidate, "rotate_heads")
        or (_has_kernel(baseline, _RESIZE) and not _has_kernel(candidate, _RESIZE)),
        element_bytes=dtype.itemsize,
        shortest_s=shortest_s(evidence),
    )
    return CeilingSources(split, ceiling)


def _has_kernel(model: Model, name: str) -> bool:
    return any(name in kernel.name for kernel in model.evidence().kernels)

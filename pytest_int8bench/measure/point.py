"""Measuring one point: from a pool of models to a ``Result``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from pytest_int8bench.clock import synchronized_perf_counter
from pytest_int8bench.environment import gpu_state
from pytest_int8bench.errors import ClearError, WorkloadError, first_line
from pytest_int8bench.measure.ceiling import bound_of, find_ceiling, quantized_calls, reached
from pytest_int8bench.measure.device_rates import measure_rates
from pytest_int8bench.measure.evidence import Keep
from pytest_int8bench.measure.kernel_kinds import break_down, shortest_s
from pytest_int8bench.measure.memory import free_memory, oom_of, release, requested_bytes
from pytest_int8bench.measure.model import Model, Ready
from pytest_int8bench.measure.pool import Key, ModelPool
from pytest_int8bench.measure.speedup import (
    alternate,
    median_and_interval,
)
from pytest_int8bench.measure.steps import Step, built, interleave, step_label, warmed
from pytest_int8bench.measure.timing import Plan, Run, Timer, pilot, summarize, synchronization_cost
from pytest_int8bench.measure.traces import Profiles
from pytest_int8bench.nvml import throttled
from pytest_int8bench.params import RunParams
from pytest_int8bench.quantization.api import coverage
from pytest_int8bench.results.records import Result
from pytest_int8bench.workloads import UNITS, Workload

#: Runs a plan and returns seconds per batch, one value a round.
TimeRounds = Callable[[Run, Plan], list[float]]

KERNELS_KEPT = 20
#: Difference between the speedup and the ratio of the rates over which the reader is told.
DRIFT = 0.05
#: Devices whose profile lists kernels. On a CPU, what Inductor fused is one graph.
WITH_KERNELS = ("cuda",)


class OutputError(ClearError, AssertionError):
    """Baseline and candidate do not give the same kind of output."""


class Throughput:
    """Measures points on one pool, and remembers the baselines' times.

    Args:
        pool: where the models come from.
        with_baseline: measure the speedup against the BF16 twin.
        with_evidence: look at the kernels that ran, and hold the labels to them.
        profiles: where profiles of points that want one go; None for nowhere.
        timer: a timer that waits for the device.
        step: entered around each long step that really runs.
    """

    def __init__(
        self,
        pool: ModelPool,
        *,
        with_baseline: bool = True,
        with_evidence: bool = True,
        profiles: Profiles | None = None,
        timer: Timer = synchronized_perf_counter,
        step: Step = lambda action, name: nullcontext(),
    ) -> None:
        self._pool = pool
        self._with_baseline = with_baseline
        self._with_evidence = with_evidence
        self._profiles = profiles
        self._timer = timer
        self._step = step
        self._baseline_s: dict[Key, float] = {}
        self._baseline_oom: set[Key] = set()

    def measure(
        self, workload: Workload, params: RunParams, time_rounds: TimeRounds, *, nodeid: str
    ) -> Result:
        """Measure one point. Running out of memory is a result, every other error is raised.

        Args:
            workload: what to measure.
            params: the point.
            time_rounds: runs the rounds, e.g. through pytest-benchmark.
            nodeid: identity of the result.

        Raises:
            EvidenceError: if the kernels that ran contradict the labels.
            OutputError: if the candidate's output differs from the baseline's in shape or dtype.
            CompileError: if something was compiled while the clock ran.
        """
        common: dict[str, Any] = {
            "nodeid": nodeid,
            "workload": workload.name,
            "run_name": params.run_name,
            "params": params.to_dict(),
        }
        try:
            return Result(**common, **self._measure(workload, params, time_rounds))
        except Exception as error:
            if oom_of(error) is None:
                raise
            asked = requested_bytes(error)
            release(error)
        if not params.int8_enabled:
            self._baseline_oom.add(self._pool.key(workload, params))
        self._pool.clear()
        reason = "out of memory" + (f": tried to allocate {asked / 2**30:.2f} GiB" if asked else "")
        return Result(**common, status="oom", reason=reason, requested_bytes=asked)

    def _measure(
        self, workload: Workload, params: RunParams, time_rounds: TimeRounds
    ) -> dict[str, Any]:
        baseline, note = self._ready_baseline(workload, params)
        try:
            model = built(self._pool, workload, params, self._step)
            ready = warmed(model, self._timer, self._step)
        except Exception as error:
            if baseline is None or oom_of(error) is None:
                raise
            release(error)
            model = None
        if model is None:  # both do not fit: once more, alone
            baseline, note = None, "baseline and candidate do not fit in memory together"
            self._pool.evict("candidate")
            self._pool.evict("baseline")
            model = built(self._pool, workload, params, self._step)
            ready = warmed(model, self._timer, self._step)
        if baseline is not None:
            _compare_outputs(baseline.ready(self._timer), ready, params)
        units = _units(model, ready)

        before = gpu_state()
        name = step_label(workload, params)
        with self._step("measuring", name), model.compiled.entered():
            plan = pilot(
                model.run,
                self._timer,
                interval_s=params.benchmark_interval_s,
                min_batches=params.min_batches_per_interval,
            )
            feeding = _Feeding(model)
            with model.compiled.no_compilation():
                times = time_rounds(model.run, plan)
            feed = feeding.waited()
        after = gpu_state()
        timing = summarize(times)
        values: dict[str, Any] = {
            "batch_time_s": timing.median_s,
            "batch_time_mean_s": timing.mean_s,
            "batch_time_p95_s": timing.p95_s,
            "batch_time_min_s": timing.min_s,
            "batch_time_standard_error": timing.standard_error,
            "rounds": len(times),
            "iterations": plan.iterations,
            "synchronization_share": plan.synchronization_share,
            "peak_memory_bytes": ready.peak_memory_bytes,
            "compile_s": ready.compile_s,
            "compile_cache": ready.compile_cache,
            "warm_up_s": ready.warm_up.seconds,
            "steady": ready.warm_up.steady,
            "cuda_graphs_skipped": ready.cuda_graphs_skipped,
            "regions": ready.regions,
            "regions_refused": ready.regions_refused,
            "attention_backend": model.compiled.attention,
            "gpu_before": before,
            "gpu_after": after,
            "throttled": sorted({*throttled(before), *throttled(after)}),
            **{f"{unit}_per_s": count / timing.median_s for unit, count in units.items()},
            **feed,
        }
        if feed and self._with_evidence:
            with self._step("comparing", name):
                values |= feeding.compared(self._timer, params.benchmark_interval_s)
        if params.int8_enabled:
            speedup, problem = self._speedup(workload, params, baseline, model, timing.median_s)
            values |= speedup
            note = note or problem
            covered = coverage(model.eager)
            values["coverage"] = covered.to_dict()
            values["int8_backend"] = covered.backend
            if baseline is not None and values.get("speedup_method") == "interleaved":
                baseline.evidence()
        if self._with_evidence:
            keep = None
            if self._profiles is not None and self._profiles.wants(params):
                keep = self._profiles.writer(workload.name, params.run_name, model.device)
            values |= _evidence(model, keep)
            if baseline is not None and values.get("speedup_method") == "interleaved":
                values |= _ceiling(baseline, model, values["speedup"], self._timer)
        if not params.int8_enabled:
            self._baseline_s[self._pool.key(workload, params)] = timing.median_s
        return values | ({"reason": note} if note else {})

    def _ready_baseline(
        self, workload: Workload, params: RunParams
    ) -> tuple[Model | None, str | None]:
        """Return the twin, compiled and warm, or None and why there is none."""
        if not (self._with_baseline and params.int8_enabled):
            return None, None
        twin = params.baseline()
        if self._pool.key(workload, twin) in self._baseline_oom:
            return None, "the baseline ran out of memory"
        self._pool.evict_other_candidate(workload, params)
        try:
            baseline = built(self._pool, workload, twin, self._step)
            warmed(baseline, self._timer, self._step)
            return baseline, None
        except Exception as error:
            if oom_of(error) is None:
                raise
            release(error)
        self._baseline_oom.add(self._pool.key(workload, twin))
        self._pool.clear()
        return None, "the baseline ran out of memory"

    def _speedup(
        self,
        workload: Workload,
        params: RunParams,
        baseline: Model | None,
        candidate: Model,
        candidate_s: float,
    ) -> tuple[dict[str, Any], str | None]:
        """Return the speedup, and what the reader should know about it."""
        problem = None
        apart_s = self._baseline_s.get(self._pool.key(workload, params.baseline()))
        apart = None if apart_s is None else apart_s / candidate_s
        if baseline is not None:
            try:
                with self._step("comparing", step_label(workload, params)):
                    speedup = interleave(
                        baseline, candidate, self._timer, params.benchmark_interval_s
                    )
            except Exception as error:
                if oom_of(error) is None:
                    raise
                release(error)
                problem = "baseline and candidate do not fit in memory together"
            else:
                if apart is not None and abs(apart / speedup.ratio - 1) > DRIFT:
                    problem = (
                        "the machine was not as fast in both tests: the speedup is measured in "
                        f"alternation, the rates alone would give {apart:.2f}x"
                    )
                return {
                    "speedup": speedup.ratio,
                    "speedup_low": speedup.low,
                    "speedup_high": speedup.high,
                    "speedup_method": "interleaved",
                }, problem
            self._pool.evict("baseline")
        if apart is None or not self._with_baseline:
            return {}, problem
        return {"speedup": apart, "speedup_method": "separate"}, problem


class _Feeding:
    """What feeding a model from the host costs. Nothing is known of one that is not.

    Made when the clock is about to start.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        if model.feed is not None:
            self._batches, self._wait_s = model.feed.batches, model.feed.wait_s

    def waited(self) -> dict[str, Any]:
        """Return how long the host waited for the loader, per batch since the start."""
        feed = self._model.feed
        if feed is None:
            return {}
        wait_s = (feed.wait_s - self._wait_s) / max(feed.batches - self._batches, 1)
        return {"feed_workers": feed.workers, "feed_wait_s": wait_s}

    def compared(self, timer: Timer, interval_s: float) -> dict[str, Any]:
        """Return how long a copy takes alone, and how much longer a batch takes from the host than
        one that is on the device, in alternating blocks.

        Raises:
            CompileError: if something was compiled while the clock ran.
        """
        feed, compiled = self._model.feed, self._model.compiled
        if feed is None:
            return {}
        copy_s, _ = synchronization_cost(feed.copy_again, timer)
        with compiled.entered(), compiled.no_compilation():
            pairs = alternate(self._model.run, self._model.run_again, timer, interval_s=interval_s)
        longer_s, low_s, high_s = median_and_interval([fed - here for fed, here in pairs])
        return {
            "feed_copy_s": copy_s,
            "feed_exposed_s": longer_s,
            "feed_exposed_low_s": low_s,
            "feed_exposed_high_s": high_s,
        }


def _units(model: Model, ready: Ready) -> dict[str, float]:
    """Return what one batch counts for."""
    units = dict(model.workload.units(model.workload.with_axes(model.params)))
    if ready.tokens is not None:
        units["tokens"] = ready.tokens
    unknown = set(units) - set(UNITS)
    if unknown or "samples" not in units:
        raise WorkloadError(
            f"workload {model.workload.name!r}: units must give samples, and may give "
            f"{', '.join(UNITS[1:])}; got {', '.join(units) or 'nothing'}"
        )
    for unit, count in units.items():
        if not 0 < float(count) < math.inf:
            raise WorkloadError(
                f"workload {model.workload.name!r}: {unit} must be a number above 0, got {count!r}"
            )
    return {unit: float(count) for unit, count in units.items()}


def _compare_outputs(baseline: Ready, candidate: Ready, params: RunParams) -> None:
    if baseline.outputs != candidate.outputs:
        raise OutputError(
            f"{params.run_name}: outputs of baseline and candidate differ in shape or dtype: "
            f"{baseline.outputs} against {candidate.outputs}"
        )
    if baseline.finite and not candidate.finite:
        raise OutputError(f"{params.run_name}: the candidate's output holds NaN or infinity")


def _evidence(model: Model, keep: Keep | None) -> dict[str, Any]:
    evidence = model.evidence(keep)
    with_kernels = model.device.type in WITH_KERNELS
    return {
        "device_time_s": evidence.total_s if model.device.type == "cuda" else None,
        "int8_time_share": evidence.int8_time_share,
        "attention_kernel": evidence.attention_kernel,
        "kernels": [
            {"name": kernel.name, "seconds": kernel.seconds, "calls": kernel.calls}
            for kernel in evidence.kernels[:KERNELS_KEPT]
        ],
        "trace": evidence.trace if keep is not None else None,
        "device_breakdown": break_down(evidence).to_dict() if with_kernels else None,
    }


def _ceiling(baseline: Model, candidate: Model, speedup: float, timer: Timer) -> dict[str, Any]:
    """Return what INT8 could bring at most, or why that is not known."""
    if baseline.device.type not in WITH_KERNELS:
        return {}
    try:
        found = _find_ceiling(baseline, candidate, timer)
    except Exception as error:  # whatever it is, the measurement is there
        problem = f"{type(error).__name__}: {first_line(error)}"
        if isinstance(error, ClearError):
            problem = first_line(error)
        release(error)
    else:
        return {**found, "ceiling_reached": reached(speedup, found["ceiling_speedup"])}
    free_memory()
    return {"ceiling": {"problem": problem}}


def _find_ceiling(baseline: Model, candidate: Model, timer: Timer) -> dict[str, Any]:
    evidence, bound = baseline.evidence(), bound_of(candidate.params.int8_mode)
    dtype = torch.bfloat16 if baseline.params.bf16 else torch.float32
    calls = baseline.linear_calls()
    converted = {layer.name for layer in coverage(candidate.eager).converted}
    sizes = {call.size for call in quantized_calls(calls, converted)}
    with baseline.compiled.settings():
        rates = measure_rates(sizes, baseline.device, dtype, timer, with_int8=bound.int8_matmuls)
    split = break_down(evidence)
    ceiling = find_ceiling(
        split,
        calls,
        converted,
        rates,
        bound=bound,
        element_bytes=dtype.itemsize,
        shortest_s=shortest_s(evidence),
    )
    values = dataclasses.asdict(ceiling)
    return {
        "ceiling_speedup": values.pop("speedup"),
        "ceiling": {"baseline": split.to_dict(), **values},
    }

"""Measuring one point: from a pool of models to a ``Result``.

``Throughput._measure`` is the way through, one stage a line. Each stage returns a part
(:mod:`pytest_int8bench.results.parts`), and ``Result.from_parts`` joins them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from pytest_int8bench.clock import synchronized_perf_counter, untraced
from pytest_int8bench.environment import gpu_state
from pytest_int8bench.errors import ClearError
from pytest_int8bench.measure.batches import check_late_writes
from pytest_int8bench.measure.device_time import kernels_of, upper_bound
from pytest_int8bench.measure.energy import EnergyCounter, counter_of
from pytest_int8bench.measure.evidence import Keep
from pytest_int8bench.measure.feeding import FeedWatch, with_cost
from pytest_int8bench.measure.memory import oom_of, release, requested_bytes
from pytest_int8bench.measure.model import Model
from pytest_int8bench.measure.pool import Key, ModelPool
from pytest_int8bench.measure.ready import Ready
from pytest_int8bench.measure.repeats import joined
from pytest_int8bench.measure.steps import Step, built, interleave, side_by_side, step_label, warmed
from pytest_int8bench.measure.timing import Plan, Run, Timer, pilot, summarize
from pytest_int8bench.measure.traces import Profiles
from pytest_int8bench.measure.units import units_of
from pytest_int8bench.measure.watchers import tracer_remark
from pytest_int8bench.nvml import throttled
from pytest_int8bench.params import RunParams
from pytest_int8bench.quantization.api import coverage
from pytest_int8bench.results.base import SPEED_CHANGED
from pytest_int8bench.results.parts import Comparison, Feeding, Rounds, Setup
from pytest_int8bench.results.records import Result
from pytest_int8bench.workloads.workload import Workload

#: Runs a plan and returns seconds per batch, one value per round.
TimeRounds = Callable[[Run, Plan], list[float]]

#: Relative difference between the speedup and the ratio of rates that earns a remark.
DRIFT = 0.05
_TOO_LARGE_TOGETHER = "baseline and candidate do not fit in memory together"
_BASELINE_OOM = "the baseline ran out of memory"


class OutputError(ClearError, AssertionError):
    """The outputs of baseline and candidate differ in kind."""


@dataclass(frozen=True)
class Prepared:
    """The models of a point, compiled and warm."""

    model: Model
    """The point's own model."""
    ready: Ready
    baseline: Model | None
    """The model to compare with."""
    baseline_ready: Ready | None
    remark: str | None
    """Why a requested baseline is missing."""


class Throughput:
    """Measures points with the models of one pool, and remembers the baselines' times.

    Args:
        pool: provides the models.
        with_baseline: measure the speedup over the BF16 baseline.
        with_evidence: check the labels against the kernels that ran.
        profiles: saves the profiles of points that request one; None saves none.
        timer: a timer that waits for the device.
        step: entered around each long step that actually runs.
        energy_counter: returns the energy counter of a device.
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
        energy_counter: Callable[[torch.device], EnergyCounter] = counter_of,
    ) -> None:
        self._pool = pool
        self._with_baseline = with_baseline
        self._with_evidence = with_evidence
        self._profiles = profiles
        self._timer = timer
        self._step = step
        self._energy_counter = energy_counter
        self._baseline_s: dict[Key, float] = {}
        self._baseline_oom: set[Key] = set()

    def measure(
        self, workload: Workload, params: RunParams, time_rounds: TimeRounds, *, nodeid: str
    ) -> Result:
        """Measure one point. Running out of memory is a result; all other errors are raised.

        Args:
            workload: the workload to measure.
            params: the point.
            time_rounds: runs the rounds, e.g. through pytest-benchmark.
            nodeid: identity of the result.

        Raises:
            EvidenceError: if the kernels that ran contradict the labels.
            OutputError: if the candidate's output differs from the baseline's in shape or dtype.
            CompileError: if something was compiled while the clock ran.
        """
        try:
            return self._measure(workload, params, time_rounds, nodeid)
        except Exception as error:
            if oom_of(error) is None:
                raise
            asked = requested_bytes(error)
            release(error)
        if not params.int8_enabled:
            self._baseline_oom.add(self._pool.key(workload, params))
        self._pool.clear()
        reason = "out of memory" + (f": tried to allocate {asked / 2**30:.2f} GiB" if asked else "")
        return Result(
            nodeid=nodeid,
            workload=workload.name,
            run_name=params.run_name,
            params=params.to_dict(),
            status="oom",
            reason=reason,
            requested_bytes=asked,
        )

    def _measure(
        self, workload: Workload, params: RunParams, time_rounds: TimeRounds, nodeid: str
    ) -> Result:
        traced = tracer_remark()
        prepared = self._prepare(workload, params)
        model, baseline, remark = prepared.model, prepared.baseline, prepared.remark
        units = units_of(model, prepared.ready)
        rounds, feeding = self._time(model, time_rounds)
        if feeding is not None and self._with_evidence:
            feeding = self._cost_of(feeding, model)
        comparison, covered = None, None
        if params.int8_enabled:
            comparison, problem = self._compare(baseline, model, rounds.timing.median_s)
            remark = remark or problem
            covered = coverage(model.eager)
            if (attention := model.compiled.int8_attention) is not None:
                covered = dataclasses.replace(covered, attention=attention.to_dict())
        interleaved = comparison if comparison and comparison.is_interleaved else None
        if baseline is not None and interleaved is not None:
            baseline.evidence()  # checks its labels
        remarks = [remark, traced, prepared.ready.remark, _nan_remark(prepared)]
        remarks.append((baseline or model).unchecked)
        kernels, bound = None, None
        if self._with_evidence:
            kernels = kernels_of(model, self._keep(model))
            remarks += model.layers.remarks(covered.precision if covered else "")
            if covered is not None:
                covered = dataclasses.replace(covered, unused=model.layers.unused)
            if baseline is not None and interleaved is not None:
                model.check_against(baseline)
                bound = upper_bound(baseline, model, interleaved.speedup, self._timer)
        if not params.int8_enabled:
            self._baseline_s[self._pool.key(workload, params)] = rounds.timing.median_s
        return Result.from_parts(
            nodeid=nodeid,
            workload=workload.name,
            params=params,
            setup=_setup(model, prepared.ready),
            units=units,
            rounds=rounds,
            feeding=feeding,
            comparison=comparison,
            coverage=covered,
            kernels=kernels,
            bound=bound,
            remark=joined(*remarks),
        )

    # -- the models ---------------------------------------------------------------------------

    def _prepare(self, workload: Workload, params: RunParams) -> Prepared:
        """Build, compile and warm up the point's model and, if both fit, its baseline."""
        baseline, remark = self._ready_baseline(workload, params)
        try:
            model = built(self._pool, workload, params, self._step)
            ready = warmed(model, self._timer, self._step)
        except Exception as error:
            if baseline is None or oom_of(error) is None:
                raise
            release(error)
            model = None
        if model is None:  # both do not fit: try the model alone
            baseline, remark = None, _TOO_LARGE_TOGETHER
            self._pool.evict("candidate")
            self._pool.evict("baseline")
            model = built(self._pool, workload, params, self._step)
            ready = warmed(model, self._timer, self._step)
        baseline_ready = None
        if baseline is not None:
            baseline_ready = baseline.ready(self._timer)
            _compare_outputs(baseline_ready, ready, params)
        return Prepared(model, ready, baseline, baseline_ready, remark)

    def _ready_baseline(
        self, workload: Workload, params: RunParams
    ) -> tuple[Model | None, str | None]:
        """Return the baseline, compiled and warm, or None and the reason."""
        if not (self._with_baseline and params.int8_enabled):
            return None, None
        without_int8 = params.baseline()
        key = self._pool.key(workload, without_int8)
        if key in self._baseline_oom:
            return None, _BASELINE_OOM
        self._pool.evict_other_candidate(workload, params)
        try:
            baseline = built(self._pool, workload, without_int8, self._step)
            warmed(baseline, self._timer, self._step)
            return baseline, None
        except Exception as error:
            if oom_of(error) is None:
                raise
            release(error)
        self._baseline_oom.add(key)
        self._pool.clear()
        return None, _BASELINE_OOM

    # -- with the clock -----------------------------------------------------------------------

    def _time(self, model: Model, time_rounds: TimeRounds) -> tuple[Rounds, Feeding | None]:
        """Plan and run the rounds."""
        params = model.params
        before = gpu_state()
        with self._step("measuring", step_label(model.workload, params)), model.compiled.entered():
            plan = pilot(
                model.run,
                self._timer,
                interval_s=params.benchmark_interval_s,
                min_batches=params.min_batches_per_interval,
            )
            watch = FeedWatch(model)
            counter = self._energy_counter(model.device)
            with model.compiled.no_compilation():
                start = counter.next_step()
                times = time_rounds(model.run, plan)
                end_s = self._timer()
            feeding = watch.waited()
        check_late_writes(model.workload.name, model.batch)
        after = gpu_state()
        # Recreating inputs that the model writes to between rounds would use energy too.
        watts = None if model.batch.is_written else counter.watts(start, end_s)
        timing = summarize(times)
        rounds = Rounds(
            timing=timing,
            count=len(times),
            iterations=plan.iterations,
            synchronization_share=plan.synchronization_share,
            gpu_before=before,
            gpu_after=after,
            throttled=sorted({*throttled(before), *throttled(after)}),
            joules_per_batch=None if watts is None else watts * timing.mean_s,
        )
        return rounds, feeding

    def _cost_of(self, feeding: Feeding, model: Model) -> Feeding:
        """Add the cost of feeding relative to inputs on the device."""
        with self._step("comparing", step_label(model.workload, model.params)):
            return with_cost(feeding, model, self._timer, model.params.benchmark_interval_s)

    def _compare(
        self, baseline: Model | None, candidate: Model, candidate_s: float
    ) -> tuple[Comparison | None, str | None]:
        """Return the speedup and a remark on it."""
        workload, params = candidate.workload, candidate.params
        problem = None
        apart_s = self._baseline_s.get(self._pool.key(workload, params.baseline()))
        apart = None if apart_s is None else apart_s / candidate_s
        if baseline is not None:
            try:
                comparison = self._alternate(baseline, candidate, candidate_s)
            except Exception as error:
                if oom_of(error) is None:
                    raise
                release(error)
                problem = _TOO_LARGE_TOGETHER
            else:
                if apart is not None and abs(apart / comparison.speedup - 1) > DRIFT:
                    problem = (
                        f"{SPEED_CHANGED}: the speedup was measured in alternation; the "
                        f"separate rates would give {apart:.2f}x"
                    )
                return comparison, problem
            self._pool.evict("baseline")
        if apart is None or not self._with_baseline:
            return None, problem
        return Comparison(speedup=apart, method="separate"), problem

    def _alternate(self, baseline: Model, candidate: Model, candidate_s: float) -> Comparison:
        """Measure the speedup in alternating blocks, then the energy of both models."""
        interval_s = candidate.params.benchmark_interval_s
        with self._step("comparing", step_label(candidate.workload, candidate.params)):
            speedup = interleave(baseline, candidate, self._timer, interval_s)
            batch_s = (speedup.ratio * candidate_s, candidate_s)
            energy_ratio = self._energy_ratio(baseline, candidate, batch_s)
        return Comparison(
            speedup=speedup.ratio,
            low=speedup.low,
            high=speedup.high,
            method="interleaved",
            energy_ratio=energy_ratio,
        )

    def _energy_ratio(
        self, baseline: Model, candidate: Model, batch_s: tuple[float, float]
    ) -> float | None:
        """Return the ratio of the baseline's to the candidate's energy, or None if unknown."""
        if candidate.batch.is_written:  # each call would count the copy of its inputs too
            return None
        counter = self._energy_counter(candidate.device)
        try:
            with side_by_side(baseline, candidate), untraced():
                return counter.ratio(
                    baseline.run,
                    candidate.run,
                    self._timer,
                    batch_s=batch_s,
                    interval_s=candidate.params.benchmark_interval_s,
                )
        except Exception as error:  # the speedup is still valid
            release(error)
        return None

    def _keep(self, model: Model) -> Keep | None:
        """Return the writer of the point's profile, if a profile is requested."""
        if self._profiles is None or not self._profiles.wants(model.params):
            return None
        return self._profiles.writer(model.workload.name, model.params.run_name, model.device)


def _setup(model: Model, ready: Ready) -> Setup:
    return Setup(
        peak_memory_bytes=ready.peak_memory_bytes,
        compile_s=ready.compile_s,
        compile_cache=ready.compile_cache,
        warm_up_s=ready.warm_up.seconds,
        steady=ready.warm_up.steady,
        cuda_graphs_skipped=ready.cuda_graphs_skipped,
        regions=ready.regions,
        regions_refused=ready.regions_refused,
        attention_backend=model.compiled.attention,
    )


def _nan_remark(prepared: Prepared) -> str | None:
    """Return a remark on whose outputs hold NaN. A candidate with NaN whose baseline has none has
    already failed."""
    if not prepared.ready.has_nan:
        if prepared.baseline_ready is not None and prepared.baseline_ready.has_nan:
            return "the baseline's output holds NaN, and the candidate's does not"
        return None
    both = prepared.baseline is not None
    whose = "the outputs of baseline and candidate hold" if both else "the model's output holds"
    return f"{whose} NaN"


def _compare_outputs(baseline: Ready, candidate: Ready, params: RunParams) -> None:
    if baseline.outputs != candidate.outputs:
        raise OutputError(
            f"{params.run_name}: outputs of baseline and candidate differ in shape or dtype: "
            f"{baseline.outputs} against {candidate.outputs}"
        )
    if (baseline.finite and not candidate.finite) or candidate.has_nan > baseline.has_nan:
        raise OutputError(f"{params.run_name}: the candidate's output holds NaN or infinity")

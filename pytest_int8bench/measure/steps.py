"""Build and warm up models, announcing each long step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal

from pytest_int8bench.measure.baseline_check import check
from pytest_int8bench.measure.batches import check_late_writes
from pytest_int8bench.measure.model import Model
from pytest_int8bench.measure.pool import ModelPool
from pytest_int8bench.measure.ready import Ready
from pytest_int8bench.measure.speedup import Speedup, measure_speedup
from pytest_int8bench.measure.timing import Timer
from pytest_int8bench.params import RunParams
from pytest_int8bench.results.base import point_label
from pytest_int8bench.workloads.workload import Workload

Action = Literal["building", "compiling", "warming up", "measuring", "comparing", "evaluating"]
#: Context manager entered around a long step, given its action and its point.
Step = Callable[[Action, str], AbstractContextManager[None]]


def built(pool: ModelPool, workload: Workload, params: RunParams, step: Step) -> Model:
    """Return the pool's model of ``params``, announcing the step if it must be built."""
    if pool.holds(workload, params):
        return pool.get(workload, params)
    with step("building", step_label(workload, params)):
        return pool.get(workload, params)


def warmed(model: Model, timer: Timer, step: Step) -> Ready:
    """Compile and warm up, announcing the step if it has not been done.

    Raises:
        BaselineError: if it is a miscompiled baseline.
    """
    is_baseline = not model.params.int8_enabled
    if model.is_ready:
        if is_baseline:
            check(model)
        return model.ready(timer)
    compiled = model.compiled.mode == "off" or model.compiled.first_call_s is not None
    action: Action = "warming up" if compiled else "compiling"
    with step(action, step_label(model.workload, model.params)):
        ready = model.ready(timer)
        if is_baseline:
            check(model)
            model.ready(timer)  # recompiles if the check left changes behind
        return ready


def interleave(baseline: Model, candidate: Model, timer: Timer, interval_s: float) -> Speedup:
    """Measure the speedup of two ready models in alternating blocks.

    Raises:
        CompileError: if something was compiled while the clock ran.
        WorkloadError: if a model wrote to the inputs meanwhile.
    """
    with side_by_side(baseline, candidate):
        speedup = measure_speedup(baseline.run, candidate.run, timer, interval_s=interval_s)
    check_late_writes(candidate.workload.name, candidate.batch)
    return speedup


@contextmanager
def side_by_side(baseline: Model, candidate: Model) -> Iterator[None]:
    """Enter the settings of two ready models, to run them alternately.

    Raises:
        CompileError: at the end, if something was compiled.
    """
    with (
        baseline.compiled.entered(),
        candidate.compiled.entered(),
        candidate.compiled.no_compilation(),
    ):
        yield


def step_label(workload: Workload, params: RunParams) -> str:
    return point_label(workload.name, params.run_name)

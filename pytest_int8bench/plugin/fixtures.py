"""The ``int8_*`` fixtures: views of one pool of models per session."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from pytest_int8bench.errors import AccuracyError, ClearError, UndecidedError, first_line
from pytest_int8bench.plugin.markers import marker_changes
from pytest_int8bench.plugin.points import params_of
from pytest_int8bench.plugin.pytest_benchmark import check_compared
from pytest_int8bench.plugin.session import STATE, State
from pytest_int8bench.plugin.settings import LEAN

if TYPE_CHECKING:
    import torch

    from pytest_int8bench.accuracy.limit import Limit
    from pytest_int8bench.compiler.compiled_model import CompiledModel
    from pytest_int8bench.measure.model import Model
    from pytest_int8bench.measure.timing import Plan, Run
    from pytest_int8bench.params import RunParams
    from pytest_int8bench.results.records import Accuracy, Result, Sensitivity
    from pytest_int8bench.workloads import Workload


class AgainError(ClearError, RuntimeError):
    """A test asks twice for what can be measured once in it."""


def _state(request: pytest.FixtureRequest) -> State:
    return request.config.stash[STATE]


@pytest.fixture
def int8_params(request: pytest.FixtureRequest) -> RunParams:
    """The point of this test, a RunParams: one for each point of the sweep and INT8 mode."""
    if not hasattr(request, "param"):
        pytest.fail("int8_params has no point: parametrize it, or let the plugin do so", False)
    from pytest_int8bench.params import MEASURING_FIELDS, RunParams

    if isinstance(request.param, RunParams):
        return request.param
    params = RunParams.from_run_name(request.param)
    settings = _state(request).settings
    changes = {**settings.changes, **marker_changes(request.node)[0]}
    if settings.lean:
        changes = {**LEAN, **changes}
    return params.replace(**{k: v for k, v in changes.items() if k in MEASURING_FIELDS})


@pytest.fixture
def int8_workload(request: pytest.FixtureRequest) -> Workload:
    """What to measure. Override it, at any scope, to bring a model of your own."""
    state, name = _state(request), marker_changes(request.node)[1]
    problem = None
    try:
        return state.workload(name)
    except ValueError as error:
        problem = f"int8 workload: {error}"
        if (params := params_of(request.node)) is not None:
            state.note_point(request.node, params, name or state.settings.workload)
    pytest.fail(problem, pytrace=False)  # outside, so that only this line is shown


@pytest.fixture
def _int8_point(
    request: pytest.FixtureRequest, int8_params: RunParams, int8_workload: Workload
) -> tuple[Workload, RunParams]:
    """The point, after a look at whether it can be run at all."""
    from pytest_int8bench.measure.building import DeviceError, find_device, mode_problem

    _state(request).note_point(request.node, int8_params, int8_workload.name)
    problem = None
    try:
        seen = int8_workload.with_axes(int8_params)
    except ValueError as error:
        problem = str(error)
    if problem is not None:
        pytest.fail(problem, pytrace=False)
    reason = int8_params.impossible_reason()
    if reason is None and int8_workload.prequantized and int8_params.int8_smoothquant:
        reason = f"workload {int8_workload.name!r} is prequantized: SmoothQuant comes too late"
    if reason is None and int8_workload.impossible_reason is not None:
        reason = int8_workload.impossible_reason(seen)
    if (reason := reason or mode_problem(int8_params)) is not None:
        pytest.skip(reason)
    try:
        find_device(int8_params)
        workload = _state(request).filtered(int8_workload)
    except (DeviceError, ValueError) as error:
        problem = str(error)
    if problem is not None:
        pytest.fail(problem, pytrace=False)
    worker = _state(request).worker
    if worker is not None and (reason := worker.no_gpu(int8_params)) is not None:
        pytest.fail(reason, pytrace=False)
    return workload, int8_params


def _not_timed(config: pytest.Config, benchmark: Any, params: RunParams) -> str | None:
    """Return why pytest-benchmark is not to time a test, None if it is. In every worker of
    pytest-xdist it is disabled, also where a worker is alone on its device."""
    worker = config.stash[STATE].worker
    if worker is None:
        return "pytest-benchmark is disabled" if benchmark.disabled else None
    why = worker.not_timed(config, params)
    benchmark.disabled = why is not None
    return why


def _not_kept(state: State) -> str | None:
    return state.worker.not_kept() if state.worker is not None else None


def _model(request: pytest.FixtureRequest, workload: Workload, params: RunParams) -> Model:
    return _state(request).pool().get(workload, params)


@pytest.fixture
def int8_batch(request: pytest.FixtureRequest, _int8_point: tuple[Workload, RunParams]) -> Any:
    """The inputs of one batch, on the device, in the model's dtype."""
    from pytest_int8bench.measure.building import find_device
    from pytest_int8bench.tensors import map_tensors

    device = find_device(_int8_point[1])
    return map_tensors(lambda t: t.to(device), _state(request).pool().batch(*_int8_point))


@pytest.fixture
def int8_baseline(
    request: pytest.FixtureRequest, _int8_point: tuple[Workload, RunParams]
) -> CompiledModel:
    """The BF16 (or FP32) twin, compiled: call it like the model."""
    workload, params = _int8_point
    return _model(request, workload, params.baseline()).compiled


@pytest.fixture
def int8_quantized(
    request: pytest.FixtureRequest, _int8_point: tuple[Workload, RunParams]
) -> torch.nn.Module:
    """The quantized model, eager."""
    return _model(request, *_int8_point).eager


@pytest.fixture
def int8_model(
    request: pytest.FixtureRequest, _int8_point: tuple[Workload, RunParams]
) -> CompiledModel:
    """The quantized model, compiled: call it like the model."""
    return _model(request, *_int8_point).compiled


@pytest.fixture
def int8_throughput(
    request: pytest.FixtureRequest, _int8_point: tuple[Workload, RunParams], _int8_benchmark: Any
) -> Callable[[], Result]:
    """A callable that builds, compiles, warms up, measures and records this test's point, and
    returns its Result."""
    workload, params = _int8_point
    benchmark = _int8_benchmark
    state = _state(request)
    called = False

    def measure() -> Result:
        nonlocal called
        if called:  # pytest-benchmark says so too, in a traceback
            raise AgainError(
                "int8_throughput must be called once in a test, got a second call: for another "
                "point use another test, or parametrize int8_params"
            )
        called = True
        if (why := _not_timed(request.config, benchmark, params)) is not None:
            from pytest_int8bench.results.records import NOT_MEASURED

            # As pytest-benchmark does: run once, time nothing; and nothing passes as measured.
            benchmark.pedantic(_model(request, workload, params).run)
            pytest.skip(f"{NOT_MEASURED}: {why}")
        check_compared(request.config, state)
        gate = state.gate()
        if gate is not None:
            gate.check_machine(state.environment())
        try:
            result = state.throughput().measure(
                workload,
                params,
                lambda run, plan: _pedantic(benchmark, run, plan),
                nodeid=request.node.nodeid,
            )
        except BaseException:  # or the rounds of a point that Ctrl-C ended would be saved
            benchmark.has_error = True
            raise
        if state.worker is not None:
            result = state.worker.placed(result)
        if not result.oom:
            benchmark.extra_info.update(_extra_info(result))
        marked = state.marked(result)
        if marked is not result:
            benchmark.has_error = True
        state.record(marked)
        if gate is not None:
            gate.judge(marked, state.environment())
        return marked

    return measure


@pytest.fixture
def int8_guardrail(
    request: pytest.FixtureRequest, _int8_point: tuple[Workload, RunParams]
) -> Callable[..., list[Accuracy]]:
    """A callable that holds this test's point to its baseline's accuracy, records the verdicts and
    returns them. It fails the test if accuracy dropped by more than ``--int8-max-drop``, or by
    more than its own ``max_drop``, such as ``int8_guardrail(max_drop="0.5%")``. With random
    weights only a comparison of outputs can fail it."""
    workload, params = _int8_point
    state = _state(request)

    def check(max_drop: str | None = None) -> list[Accuracy]:
        from pytest_int8bench.measure.memory import oom_of, release
        from pytest_int8bench.report.verdict_text import describe, message

        if not params.int8_enabled:
            pytest.skip("nothing to compare: the point is a baseline")
        why = _not_kept(state)
        if why is None and state.worker is not None and state.settings.remedy:
            why = state.worker.not_timed(request.config, params)  # remedies have a price in time
        if why is not None:
            pytest.skip(f"not judged: {why}")
        limit = _limit(max_drop) if max_drop else state.settings.max_drop
        action = state.settings.inconclusive
        verdicts: list[Accuracy] = []

        def keep(verdict: Accuracy) -> None:
            verdicts.append(verdict)
            state.record(verdict)
            if _is_failed(verdict):  # at once: whatever comes after may be interrupted
                state.note_accuracy_failed(workload.name, params, describe(verdict)[0])

        problem = None
        try:
            state.guardrail().check(
                workload, params, nodeid=request.node.nodeid, limit=limit, record=keep
            )
        except Exception as error:
            if oom_of(error) is None:
                why = f"not judged: {type(error).__name__}: {first_line(error)}"
                state.note_accuracy_failed(workload.name, params, why)
                raise
            problem = f"not judged: out of memory: {first_line(error)}"
            release(error)
        if problem is not None:
            state.pool().clear()
        if state.settings.remedy and problem is None:
            verdicts = state.remedied(workload, params, verdicts, limit)
        if failing := [verdict for verdict in verdicts if _fails(verdict, action)]:
            text = message(failing, remedied=state.settings.remedy)
            kind = AccuracyError if any(map(_is_failed, failing)) else UndecidedError
            raise kind(f"{text}\n{problem}" if problem else text)
        if problem is not None:
            pytest.skip(problem)
        undecided = [describe(v) for v in verdicts if _fails(v, "fail")]
        if undecided:
            if action == "skip":
                pytest.skip(undecided[0][0])
            warnings.warn("\n".join(line for lines in undecided for line in lines), stacklevel=2)
        return verdicts

    return check


def _limit(text: str) -> Limit:
    from pytest_int8bench.accuracy.limit import Limit

    problem = None
    try:
        return Limit.parse(text)
    except ValueError as error:
        problem = f"int8_guardrail: max_drop {error}"
    pytest.fail(problem, pytrace=False)


def _is_failed(verdict: Accuracy) -> bool:
    """Say whether a verdict is proof against its point."""
    return verdict.outcome == "FAIL" and not verdict.is_pipeline_check


def _fails(verdict: Accuracy, inconclusive: str) -> bool:
    """Say whether a verdict fails its test."""
    undecided = verdict.outcome == "INCONCLUSIVE" and not verdict.is_pipeline_check
    return _is_failed(verdict) or (undecided and inconclusive == "fail")


@pytest.fixture
def int8_sensitivity(
    request: pytest.FixtureRequest, _int8_point: tuple[Workload, RunParams]
) -> Callable[..., Sensitivity]:
    """A callable that quantizes one layer at a time (``by="block"``: one block), ranks them by the
    SQNR of the outputs, or with ``metric=True`` by the drop of the workload's metric, records the
    table and returns it."""
    workload, params = _int8_point
    state = _state(request)

    def scan(by: str = "layer", metric: bool = False) -> Sensitivity:
        from pytest_int8bench.accuracy.sensitivity import SensitivityScan
        from pytest_int8bench.measure.memory import oom_of, release
        from pytest_int8bench.plugin.progress import say

        if not params.int8_enabled:
            pytest.skip("nothing to quantize: the point is a baseline")
        if (why := _not_kept(state)) is not None:
            pytest.skip(f"not measured: {why}")
        problem = None
        try:
            return SensitivityScan(state.guardrail(), workload, params, by=by).run(
                nodeid=request.node.nodeid,
                metric=metric,
                tell=lambda text: say(request.config, f"sensitivity of {params.run_name}: {text}"),
                record=state.record,
            )
        except Exception as error:
            if oom_of(error) is None:
                raise
            problem = f"not finished: out of memory: {first_line(error)}"
            release(error)
        state.pool().clear()
        pytest.skip(problem)

    return scan


def _pedantic(benchmark: Any, run: Run, plan: Plan) -> list[float]:
    from pytest_int8bench import clock
    from pytest_int8bench.measure.timing import ClockError

    benchmark.pedantic(run, rounds=plan.rounds, iterations=plan.iterations)
    if benchmark.stats.options["timer"] is not clock.synchronized_perf_counter:
        raise ClockError(
            "the benchmark ran with a timer that does not wait for the device: "
            f"{benchmark.stats.options['timer']!r}"
        )
    return list(benchmark.stats.stats.data)


_NOT_EXTRA = ("nodeid", "status", "gpu_before", "gpu_after", "kernels")


def _extra_info(result: Result) -> dict[str, Any]:
    values = result.to_dict()
    return {name: value for name, value in values.items() if name not in _NOT_EXTRA}


_NOT_ACTIVE = "not measured: int8_throughput needs pytest-benchmark, which is not active"


class WithBenchmark:
    """Fixtures for when pytest-benchmark is active."""

    @pytest.fixture
    def _int8_benchmark(self, request: pytest.FixtureRequest, benchmark: Any) -> Any:
        # pytest-codspeed, with --codspeed, turns it off late and puts a fixture in its place.
        if not request.config.pluginmanager.hasplugin("pytest-benchmark"):
            pytest.skip(_NOT_ACTIVE)
        return benchmark


class WithoutBenchmark:
    """Fixtures for when pytest-benchmark is turned off or missing."""

    @pytest.fixture
    def _int8_benchmark(self) -> Any:
        pytest.skip(_NOT_ACTIVE)

"""The ``int8_*`` fixtures. All of them share one pool of models per session.

Every pytest session imports this file, including those without benchmarks. Whatever the fixtures
need is therefore imported inside them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from pytest_int8bench.plugin.state import recorder_of

if TYPE_CHECKING:
    import torch

    from pytest_int8bench.compiler.compiled_model import CompiledModel
    from pytest_int8bench.measure.model import Model
    from pytest_int8bench.params import RunParams
    from pytest_int8bench.plugin.pytest_benchmark import Benchmark
    from pytest_int8bench.plugin.recorder import Recorder
    from pytest_int8bench.plugin.session import Session
    from pytest_int8bench.results.records import Result
    from pytest_int8bench.results.verdicts import Accuracy, Sensitivity
    from pytest_int8bench.workloads.workload import Workload

_NOT_ACTIVE = "not measured: int8_throughput needs pytest-benchmark, which is not active"


def _session(request: pytest.FixtureRequest) -> Session:
    return recorder_of(request.config).session


def _recorder(request: pytest.FixtureRequest) -> Recorder:
    return recorder_of(request.config)


@pytest.fixture
def int8_params(request: pytest.FixtureRequest) -> RunParams:
    """The point of this test, a RunParams. A test runs once per point of the sweep and INT8
    mode."""
    if not hasattr(request, "param"):
        pytest.fail("int8_params has no value: parametrize it, or let the plugin do so", False)
    from pytest_int8bench.params import MEASURING_FIELDS, RunParams
    from pytest_int8bench.plugin.markers import marker_changes
    from pytest_int8bench.plugin.points import point_of
    from pytest_int8bench.plugin.settings import LEAN

    if isinstance(request.param, RunParams):
        return point_of(request.node, _session(request), request.param)
    params = point_of(request.node, _session(request), RunParams.from_run_name(request.param))
    settings = _session(request).settings
    changes = {**settings.changes, **marker_changes(request.node)[0]}
    if settings.lean:
        changes = {**LEAN, **changes}
    return params.replace(**{k: v for k, v in changes.items() if k in MEASURING_FIELDS})


@pytest.fixture
def int8_workload(request: pytest.FixtureRequest) -> Workload:
    """The workload to measure. Override this fixture, at any scope, to measure your own model."""
    from pytest_int8bench.plugin.markers import marker_changes
    from pytest_int8bench.plugin.points import params_of

    session, name = _session(request), marker_changes(request.node)[1]
    problem = None
    try:
        return session.workload(name)
    except ValueError as error:
        problem = str(error)
        if (params := params_of(request.node)) is not None:
            workload = name or session.settings.workload
            _recorder(request).note_point(request.node.nodeid, params, workload)
    pytest.fail(problem, pytrace=False)  # outside `except`, so that only this line is shown


@pytest.fixture
def _int8_point(
    request: pytest.FixtureRequest, int8_params: RunParams, int8_workload: Workload
) -> tuple[Workload, RunParams]:
    """The workload and the point of this test. Skip the test if the point is impossible, and fail
    it if the point cannot run on this machine."""
    from pytest_int8bench.measure.building import DeviceError, find_device, mode_problem
    from pytest_int8bench.plugin.points import point_of
    from pytest_int8bench.workloads.workload import Workload

    if not isinstance(int8_workload, Workload):
        got = type(int8_workload).__name__
        pytest.fail(f"int8_workload must return a Workload, got {got}", pytrace=False)
    recorder = _recorder(request)
    # The user may have overridden int8_params.
    int8_params = point_of(request.node, _session(request), int8_params)
    recorder.note_point(request.node.nodeid, int8_params, int8_workload.name)
    problem = None
    try:
        seen = int8_workload.with_axes(int8_params)
    except ValueError as error:
        problem = str(error)
    if problem is not None:
        pytest.fail(problem, pytrace=False)
    reason = int8_params.impossible_reason()
    if reason is None and int8_workload.prequantized and int8_params.int8_smoothquant:
        reason = f"workload {int8_workload.name!r} is already quantized, too late for SmoothQuant"
    if reason is None and int8_workload.impossible_reason is not None:
        reason = int8_workload.impossible_reason(seen)
    if (reason := reason or mode_problem(int8_params)) is not None:
        pytest.skip(reason)
    try:
        find_device(int8_params)
        workload = _session(request).filtered(int8_workload)
    except (DeviceError, ValueError) as error:
        problem = str(error)
    if problem is not None:
        pytest.fail(problem, pytrace=False)
    if (reason := recorder.why_no_gpu(int8_params)) is not None:
        pytest.fail(reason, pytrace=False)
    return workload, int8_params


def _model(request: pytest.FixtureRequest, workload: Workload, params: RunParams) -> Model:
    from pytest_int8bench.measure.generators import kept_generators

    with kept_generators():
        return _session(request).pool().get(workload, params)


@pytest.fixture
def int8_batch(request: pytest.FixtureRequest, _int8_point: tuple[Workload, RunParams]) -> Any:
    """The inputs of one batch, on the point's device and in the model's dtype."""
    return _session(request).pool().fresh_batch(*_int8_point)


@pytest.fixture
def int8_baseline(
    request: pytest.FixtureRequest, _int8_point: tuple[Workload, RunParams]
) -> CompiledModel:
    """The compiled BF16 (or FP32) baseline. Call it like the model."""
    workload, params = _int8_point
    return _model(request, workload, params.baseline()).compiled


@pytest.fixture
def int8_quantized(
    request: pytest.FixtureRequest, _int8_point: tuple[Workload, RunParams]
) -> torch.nn.Module:
    """The quantized model in eager mode."""
    return _model(request, *_int8_point).eager


@pytest.fixture
def int8_model(
    request: pytest.FixtureRequest, _int8_point: tuple[Workload, RunParams]
) -> CompiledModel:
    """The compiled quantized model. Call it like the model."""
    return _model(request, *_int8_point).compiled


@pytest.fixture
def int8_throughput(
    request: pytest.FixtureRequest,
    _int8_point: tuple[Workload, RunParams],
    _int8_benchmark: Benchmark,
) -> Callable[[], Result]:
    """A callable that builds, compiles, warms up, measures and records this test's point and
    returns its Result."""
    from pytest_int8bench.plugin.calls import ThroughputCall
    from pytest_int8bench.plugin.points import name_workload

    name_workload(request.node, _session(request), _int8_point[0], _int8_benchmark)
    return ThroughputCall(request.node.nodeid, _recorder(request), *_int8_point, _int8_benchmark)


@pytest.fixture
def int8_guardrail(
    request: pytest.FixtureRequest, _int8_point: tuple[Workload, RunParams]
) -> Callable[..., list[Accuracy]]:
    """A callable that compares the accuracy of this test's point with that of its baseline, records
    the verdicts and returns them.

    It fails the test if accuracy drops by more than ``--int8-max-drop``, or by more than its
    argument ``max_drop``, as in ``int8_guardrail(max_drop="0.5%")``. With random weights, only the
    comparison of outputs can fail the test.
    """
    from pytest_int8bench.plugin.calls import GuardrailCall

    return GuardrailCall(request.node.nodeid, _recorder(request), *_int8_point)


@pytest.fixture
def int8_sensitivity(
    request: pytest.FixtureRequest, _int8_point: tuple[Workload, RunParams]
) -> Callable[..., Sensitivity]:
    """A callable that quantizes one layer (or, with ``by="block"``, one block) at a time, ranks the
    layers or blocks by the SQNR of the model's outputs, records the ranking and returns it. With
    ``metric=True``, it ranks them by the drop of the workload's metric."""
    from pytest_int8bench.plugin.calls import SensitivityCall

    return SensitivityCall(request.node.nodeid, _recorder(request), *_int8_point)


class WithBenchmark:
    """Fixtures for sessions in which pytest-benchmark is active."""

    @pytest.fixture
    def _int8_benchmark(self, request: pytest.FixtureRequest, benchmark: Any) -> Benchmark:
        from pytest_int8bench.plugin.pytest_benchmark import Benchmark, session_of

        # With --codspeed, pytest-codspeed turns pytest-benchmark off late and replaces its fixture.
        if session_of(request.config) is None:
            pytest.skip(_NOT_ACTIVE)
        return Benchmark(benchmark)


class WithoutBenchmark:
    """Fixtures for sessions in which pytest-benchmark is turned off or missing."""

    @pytest.fixture
    def _int8_benchmark(self) -> Benchmark:
        pytest.skip(_NOT_ACTIVE)


def benchmark_fixtures(config: pytest.Config) -> WithBenchmark | WithoutBenchmark:
    """Return the plugin that provides ``_int8_benchmark`` in this session."""
    return WithBenchmark() if config.pluginmanager.hasplugin("benchmark") else WithoutBenchmark()

"""pytest hooks, each a few lines. What only benchmarks need, such as torch, is imported by them."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Sequence
from typing import Any

import pytest

from pytest_int8bench.plugin import fixtures, options, settings
from pytest_int8bench.plugin.collection import (
    check_named,
    check_workload,
    leave_out_other_tests,
    sort_by_model,
)
from pytest_int8bench.plugin.markers import marker_changes
from pytest_int8bench.plugin.outcomes import record_outcome, shorten
from pytest_int8bench.plugin.points import has_points, params_of
from pytest_int8bench.plugin.pytest_benchmark import merge_benchmark_markers, save_without_timings
from pytest_int8bench.plugin.session import STATE, State
from pytest_int8bench.plugin.summary import (
    gate_problems,
    show_gate,
    show_results,
    write_reports,
)

_MARKER = (
    "int8(**overrides): set RunParams fields (e.g. batch_size=8) or the workload of a test or "
    "a module for int8 benchmarks."
)


def pytest_addoption(parser: pytest.Parser) -> None:
    options.add_options(parser)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    if "INT8BENCH_SEAT" in os.environ:
        from pytest_int8bench.plugin.xdist.worker import pin_at_start

        pin_at_start(early_config)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", _MARKER)
    config.stash[STATE] = State(config, settings.read_settings(config))
    try:
        config.stash[STATE].open_gate()
    except (OSError, ValueError) as error:
        raise pytest.UsageError(f"--int8-compare: {error}") from None
    _register_distributed(config, config.stash[STATE])
    manager = config.pluginmanager
    manager.register(fixtures, "int8bench-fixtures")
    active = manager.hasplugin("benchmark")
    manager.register(
        fixtures.WithBenchmark() if active else fixtures.WithoutBenchmark(), "int8bench-benchmark"
    )


def _register_distributed(config: pytest.Config, state: State) -> None:
    """Register what sessions of several workers need, in them and in what starts them."""
    manager = config.pluginmanager
    if hasattr(config, "workerinput"):
        from pytest_int8bench.plugin.xdist.worker import Worker

        state.worker = Worker(config)
        manager.register(state.worker, "int8bench-worker")
    elif getattr(config.option, "dist", "no") != "no":
        from pytest_int8bench.plugin.xdist.controller import Controller, is_controller

        if is_controller(config):
            state.controller = Controller(config, state)
            manager.register(state.controller, "int8bench-controller")


@pytest.hookimpl(optionalhook=True, wrapper=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> Generator[None, int, int]:
    from pytest_int8bench.plugin.xdist.controller import capped

    return capped(config, (yield))


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "int8_params" not in metafunc.fixturenames:
        return
    state = metafunc.config.stash[STATE]
    if state.worker is not None:
        state.worker.pin()
    problem, points = None, []
    try:
        changes, _ = marker_changes(metafunc.definition)
        if has_points(metafunc):
            return
        points = state.points(changes, twins="int8_throughput" in metafunc.fixturenames)
    except ValueError as error:
        problem = str(error)
    if problem is not None:
        pytest.fail(problem, pytrace=False)  # outside, so that only this line is shown
    # Names, not objects: pytest-benchmark saves parameters as JSON.
    names = [point.run_name for point in points]
    metafunc.parametrize("int8_params", names, ids=names, indirect=True)


def pytest_make_parametrize_id(config: pytest.Config, val: object) -> str | None:
    params = sys.modules.get("pytest_int8bench.params")  # absent: nothing is a RunParams
    return val.run_name if params is not None and isinstance(val, params.RunParams) else None


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Generator[None, object, object]:
    state = config.stash[STATE]
    if state.settings.lean:
        leave_out_other_tests(config, items)
    state.collected |= {item.nodeid for item in items}
    merge_benchmark_markers(config, items)  # before -m looks at them
    result = yield
    sort_by_model(items)  # after plugins that shuffle; --ff then picks from this order
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    state = session.config.stash[STATE]
    # What a worker refuses looks like a crash, and the runner asks what became of each point.
    if state.worker is None and not state.in_suite and not session.config.option.collectonly:
        check_workload(session.config, session.items)
        check_named(session.config, session.items)


def pytest_report_collectionfinish(config: pytest.Config) -> str | None:
    preset = config.stash[STATE].preset
    return f"int8bench: {preset}" if preset is not None else None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    shorten(report, call, item.config.getoption("tbstyle"))
    state = item.config.stash[STATE]
    error = call.excinfo.value if call.excinfo is not None else None
    record_outcome(state, item, report, params_of(item), error)
    if state.worker is not None:
        state.worker.attach(state, item, report, call)
    return report


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]
) -> None:
    journal = config.stash[STATE].journal
    if journal is not None:
        output_json["int8bench"] = journal.saved().to_dict()


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    if items:
        items[0].config.stash[STATE].deselected |= {item.nodeid for item in items}


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_compare_machine_info(
    config: pytest.Config, compared_benchmark: dict[str, Any]
) -> None:
    # Ours needs torch, which is not loaded before a test does.
    block = compared_benchmark.get("int8bench") or {}
    config.stash[STATE].compared_with.append(block.get("environment"))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    state = session.config.stash.get(STATE, None)
    if state is None:
        return
    problems = gate_problems(session.config, state)
    if state.controller is not None:
        problems += state.controller.problems()
    if session.exitstatus == pytest.ExitCode.OK and problems and state.worker is None:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    save_without_timings(session.config, state)
    if not write_reports(session.config, state) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    state.close()
    state.track()


@pytest.hookimpl(wrapper=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> Generator[None, object, object]:
    try:
        return (yield)
    finally:  # --benchmark-compare-fail raises here
        show_results(terminalreporter, config)
        show_gate(terminalreporter, config)

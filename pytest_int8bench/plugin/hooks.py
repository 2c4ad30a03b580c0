"""The hooks that pytest calls, each a few lines.

Every pytest session imports this file, including those without benchmarks. Whatever only benchmarks
need is therefore imported inside the hooks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from pytest_int8bench.plugin import fixtures, options
from pytest_int8bench.plugin.guarding import guarded
from pytest_int8bench.plugin.state import (
    RECORDER,
    existing_recorder,
    is_int8_test,
    recorder_of,
)

if TYPE_CHECKING:
    from pytest_int8bench.plugin.recorder import Recorder
    from pytest_int8bench.plugin.session import Session
    from pytest_int8bench.plugin.settings import Settings

#: The test whose parameters pytest is currently naming.
_PARAMETRIZED = pytest.StashKey[pytest.Item]()

_MARKER = (
    "int8(**overrides): set RunParams fields (such as batch_size=8) or the workload of the INT8 "
    "benchmarks in a test, class or module."
)


def pytest_addoption(parser: pytest.Parser) -> None:
    options.add_options(parser)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    if "INT8BENCH_SLOT" in os.environ:
        from pytest_int8bench.plugin.xdist.worker import pin_at_start

        pin_at_start(early_config)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", _MARKER)
    config.stash[RECORDER] = None
    manager = config.pluginmanager
    if _needs_recorder(config):
        recorder = config.stash[RECORDER] = _new_recorder(config)
        manager.register(recorder, "int8bench-recorder")
    manager.register(fixtures, "int8bench-fixtures")
    manager.register(fixtures.benchmark_fixtures(config), "int8bench-benchmark")
    manager.register(AtTheEnd(), "int8bench-end")


def _needs_recorder(config: pytest.Config) -> bool:
    """Return whether the session needs a recorder before any test asks for one."""
    return (
        options.are_given(config)
        or hasattr(config, "workerinput")
        or getattr(config.option, "dist", "no") != "no"
    )


def _new_recorder(config: pytest.Config) -> Recorder:
    from pytest_int8bench.plugin.session import Session

    session = Session(config, _settings_of(config))
    try:
        session.open_gate()
    except (OSError, ValueError) as error:
        raise pytest.UsageError(f"--int8-compare: {error}") from None
    recorder = _recorder_of(session)
    if not config.option.collectonly:
        recorder.reserve_journal()
    return recorder


def _settings_of(config: pytest.Config) -> Settings:
    if not options.are_given(config):
        from pytest_int8bench.plugin.settings import Settings

        return Settings()
    from pytest_int8bench.plugin.reading import read_settings

    return read_settings(config)


def _recorder_of(session: Session) -> Recorder:
    """Return the recorder for this process: a pytest-xdist worker, its controller, or neither."""
    if hasattr(session.config, "workerinput"):
        from pytest_int8bench.plugin.xdist.worker import Worker

        return Worker(session)
    if getattr(session.config.option, "dist", "no") != "no":
        from pytest_int8bench.plugin.xdist.controller import Controller, is_controller

        if is_controller(session.config):
            return Controller(session)
    from pytest_int8bench.plugin.recorder import Recorder

    return Recorder(session)


@pytest.hookimpl(optionalhook=True, wrapper=True)
@guarded("looking for GPUs")
def pytest_xdist_auto_num_workers(config: pytest.Config) -> Generator[None, int, int]:
    from pytest_int8bench.plugin.xdist.controller import limit_workers

    return limit_workers(config, (yield))


@pytest.hookimpl(wrapper=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> Generator[None, object, object]:
    metafunc.config.stash[_PARAMETRIZED] = metafunc.definition
    result = yield
    if "int8_params" in metafunc.fixturenames:
        from pytest_int8bench.plugin.points import parametrize

        recorder = recorder_of(metafunc.config)
        with recorder.guard("looking for GPUs"):
            recorder.pin()
        parametrize(metafunc, recorder.session)
    return result


@guarded("naming points")
def pytest_make_parametrize_id(config: pytest.Config, val: object) -> str | None:
    params = sys.modules.get(
        "pytest_int8bench.params"
    )  # not imported yet: val cannot be a RunParams
    if params is None or not isinstance(val, params.RunParams):
        return None
    from pytest_int8bench.plugin.points import point_of

    item = config.stash.get(_PARAMETRIZED, None)
    point = val if item is None else point_of(item, recorder_of(config).session, val)
    return point.run_name


@pytest.hookimpl(wrapper=True)
@guarded("ordering tests")
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Generator[None, object, object]:
    recorder = existing_recorder(config)
    if recorder is not None:
        if recorder.session.settings.lean:
            from pytest_int8bench.plugin.collection import leave_out_other_tests

            leave_out_other_tests(config, items)
        recorder.session.collected |= {item.nodeid for item in items}
    if any(map(is_int8_test, items)):
        from pytest_int8bench.plugin.pytest_benchmark import merge_markers

        merge_markers(config, items)  # before -m evaluates them
    result = yield
    if any(map(is_int8_test, items)):
        from pytest_int8bench.plugin.collection import sort_by_model

        sort_by_model(items)  # after plugins that shuffle, before --ff reorders
    return result


@pytest.hookimpl(tryfirst=True)
@guarded("checking the tests")
def pytest_runtestloop(session: pytest.Session) -> None:
    config = session.config
    has_ours = any(map(is_int8_test, session.items))
    recorder = recorder_of(config) if has_ours else existing_recorder(config)
    if recorder is None:
        return
    is_skipping = config.getoption("benchmark_skip", False)
    if (has_ours or recorder.session.needs_benchmarks) and not is_skipping:
        recorder.session.records_benchmarks = True
        from pytest_int8bench.plugin.plain import PlainBenchmarks

        config.pluginmanager.register(PlainBenchmarks(), "int8bench-plain")
    if has_ours:
        recorder.check_collection(session.items)
        from pytest_int8bench.plugin.loading import load_libraries

        load_libraries(config, session.items)


@guarded("naming the preset")
def pytest_report_collectionfinish(config: pytest.Config) -> str | None:
    recorder = existing_recorder(config)
    preset = None if recorder is None else recorder.session.preset
    return None if preset is None else f"int8bench: {preset}"


@pytest.hookimpl(tryfirst=True)
@guarded("recording")
def pytest_runtest_setup(item: pytest.Item) -> None:
    if is_int8_test(item) or _is_recorded_plain(item):
        recorder_of(item.config).begin_attempt(item.nodeid)


def _is_recorded_plain(item: pytest.Item) -> bool:
    recorder = existing_recorder(item.config)
    if recorder is None or not recorder.session.records_benchmarks:
        return False
    from pytest_int8bench.plugin.points import is_plain

    return is_plain(item)


@pytest.hookimpl(wrapper=True, tryfirst=True)
@guarded("recording")
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    # As long as the errors module has not been imported, no exception can be one of ours.
    if is_int8_test(item) or _is_recorded_plain(item) or "pytest_int8bench.errors" in sys.modules:
        from pytest_int8bench.plugin.outcomes import record_outcome, shorten

        recorder = recorder_of(item.config)
        shorten(report, call, item.config.getoption("tbstyle"))
        with recorder.guard("recording"):
            record_outcome(recorder, item, report, call.excinfo and call.excinfo.value)
        if report.when == "teardown":
            with recorder.guard("recording"):
                recorder.end_attempt(item.nodeid)
    if call.excinfo is not None and (existing := existing_recorder(item.config)) is not None:
        with existing.guard("recording"):
            existing.note_error(call.excinfo.value)
    return report


@pytest.hookimpl(optionalhook=True)
@guarded("saving")
def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]
) -> None:
    recorder = existing_recorder(config)
    if recorder is not None and recorder.journal is not None:
        output_json["int8bench"] = recorder.journal.saved().to_dict()


@guarded("noting tests")
def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    recorder = existing_recorder(items[0].config) if items else None
    if recorder is not None:
        recorder.session.deselected |= {item.nodeid for item in items}


@pytest.hookimpl(optionalhook=True)
@guarded("comparing machines")
def pytest_benchmark_compare_machine_info(
    config: pytest.Config, compared_benchmark: dict[str, Any]
) -> None:
    from pytest_int8bench.plugin.benchmark_files import note_compared

    note_compared(config, compared_benchmark)


@pytest.hookimpl(wrapper=True, tryfirst=True)
@guarded("saving")
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, object, object]:
    recorder = existing_recorder(session.config)
    if recorder is not None and recorder.has_something_to_show():
        from pytest_int8bench.plugin.pytest_benchmark import guard_saving

        guard_saving(session.config, recorder.note_failure, recorder.session.handover)
        if recorder.journal is not None:
            from pytest_int8bench.plugin.benchmark_files import rename_compared

            recorder.reported += rename_compared(session.config, recorder.journal.results)
    return (yield)


class AtTheEnd:
    """Finishes the session. It is registered so as to run after pytest-benchmark has saved and
    before pytest writes the terminal summary."""

    @pytest.hookimpl(wrapper=True)
    @guarded("the end of the session")
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None, object, object]:
        try:
            return (yield)
        finally:  # even if another plugin failed
            recorder = existing_recorder(session.config)
            if (
                recorder is not None
                and not recorder.finish()
                and session.exitstatus == pytest.ExitCode.OK
            ):
                session.exitstatus = pytest.ExitCode.TESTS_FAILED
                # No test failed, so pytest's last line is green. This prints a red line above it.
                session.shouldfail = recorder.why_failed()


@pytest.hookimpl(wrapper=True)
@guarded("the summary")
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> Generator[None, object, object]:
    try:
        return (yield)
    finally:  # --benchmark-compare-fail raises in the yield
        recorder = existing_recorder(config)
        if recorder is not None and recorder.has_something_to_show():
            from pytest_int8bench.plugin.summary import show

            show(terminalreporter, recorder)

"""pytest hooks, each a few lines. Nothing imported here loads torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pytest_int8bench import clock, fixtures, options
from pytest_int8bench.outcomes import record_outcome
from pytest_int8bench.params import RunParams
from pytest_int8bench.state import STATE, State, marker_changes

_MARKER = (
    "int8(**overrides): set RunParams fields (e.g. batch_size=8) or the workload of a test or "
    "a module for int8 benchmarks."
)


def pytest_addoption(parser: pytest.Parser) -> None:
    options.add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", _MARKER)
    config.stash[STATE] = State(config, options.read_settings(config))
    manager = config.pluginmanager
    manager.register(fixtures, "int8bench-fixtures")
    active = manager.hasplugin("benchmark")
    manager.register(
        fixtures.WithBenchmark() if active else fixtures.WithoutBenchmark(), "int8bench-benchmark"
    )


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "int8_params" not in metafunc.fixturenames or _has_points(metafunc):
        return
    state = metafunc.config.stash[STATE]
    try:
        changes, _ = marker_changes(metafunc.definition)
        points = state.points(changes, twins="int8_throughput" in metafunc.fixturenames)
    except ValueError as error:
        pytest.fail(str(error), pytrace=False)
    # Names, not objects: pytest-benchmark saves parameters as JSON.
    names = [point.run_name for point in points]
    metafunc.parametrize("int8_params", names, ids=names, indirect=True)


def pytest_make_parametrize_id(config: pytest.Config, val: object) -> str | None:
    return val.run_name if isinstance(val, RunParams) else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    _merge_benchmark_markers(items)
    _sort_by_model(items)


def pytest_report_collectionfinish(config: pytest.Config) -> str | None:
    state = config.stash[STATE]
    if state.preset is None:
        return None
    why = "chosen by auto" if state.settings.preset == "auto" else "as asked"
    found = {"seed": "CUDA is available", "smoke": "no CUDA device"}
    why += f": {found[state.preset]}" if state.settings.preset == "auto" else ""
    return f"int8bench: preset {state.preset} ({why}), workload {state.settings.workload}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Iterator[None] | Any:
    report: pytest.TestReport = yield
    record_outcome(item.config.stash[STATE], item, report)
    return report


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]
) -> None:
    journal = config.stash[STATE].journal
    if journal is not None:
        output_json["int8bench"] = journal.saved().to_dict()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    state = session.config.stash.get(STATE, None)
    if state is None:
        return
    state.close()
    benchmarks = session.config.pluginmanager.get_plugin("pytest-benchmark")
    if state.journal is not None and benchmarks is not None and not benchmarks.benchmarks:
        _save_without_timings(session.config, benchmarks)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    state = config.stash[STATE]
    if state.journal is None:
        return
    from pytest_int8bench.report.terminal import render

    terminal = terminalreporter
    terminal.section("int8bench", sep="-", bold=True)
    width = terminal._tw.fullwidth if terminal.isatty else None
    terminal.write(render(state.journal.saved(), width=width, color=terminal.hasmarkup))
    for line in _where(config, state):
        terminal.write_line(line)


# -- helpers ----------------------------------------------------------------------------------


def _has_points(metafunc: pytest.Metafunc) -> bool:
    """Say whether a test brings its own points, by parametrize or by a fixture."""
    for marker in metafunc.definition.iter_markers("parametrize"):
        names = marker.args[0] if marker.args else marker.kwargs.get("argnames", ())
        names = names.split(",") if isinstance(names, str) else names
        if "int8_params" in [name.strip() for name in names]:
            return True
    defined = metafunc._arg2fixturedefs.get("int8_params", ())
    if defined and defined[-1].func.__module__ != fixtures.__name__:
        return True
    return any("int8_params" in call.params for call in metafunc._calls)


def _merge_benchmark_markers(items: list[pytest.Item]) -> None:
    """Give tests of throughput the synchronizing timer, and keep their own benchmark options:
    pytest-benchmark reads the closest marker only."""
    for item in items:
        if "int8_throughput" not in getattr(item, "fixturenames", ()):
            continue
        merged: dict[str, Any] = {}
        for marker in reversed(list(item.iter_markers("benchmark"))):
            merged |= marker.kwargs
        merged["timer"] = clock.synchronized_perf_counter
        item.add_marker(pytest.mark.benchmark(**merged), append=False)


def _sort_by_model(items: list[pytest.Item]) -> None:
    """Bring tests of the same models together, baselines first, so that each model is built and
    compiled once and at most one baseline and one candidate are on the device.

    Tests without points keep their places.
    """
    groups: dict[object, int] = {}
    keyed: list[tuple[int, tuple[int, int], pytest.Item]] = []
    for index, item in enumerate(items):
        params = _params_of(item)
        if params is None:
            continue
        defined = item._fixtureinfo.name2fixturedefs.get("int8_workload", ())
        where = defined[-1].baseid if defined else ""
        try:
            marked = marker_changes(item)[1]
        except ValueError:
            marked = None
        family = (where, marked, params.baseline())
        first = groups.setdefault(family, len(groups))
        member = groups.setdefault((family, params), len(groups)) if params.int8_enabled else -1
        keyed.append((index, (first, member), item))
    slots = [index for index, _, _ in keyed]
    ordered = sorted(keyed, key=lambda entry: entry[1])
    for slot, (_, _, item) in zip(slots, ordered, strict=True):
        items[slot] = item


def _params_of(item: pytest.Item) -> RunParams | None:
    callspec = getattr(item, "callspec", None)
    value = callspec.params.get("int8_params") if callspec is not None else None
    if isinstance(value, RunParams):
        return value
    try:
        return RunParams.from_run_name(value) if isinstance(value, str) else None
    except ValueError:
        return None


def _save_without_timings(config: pytest.Config, benchmarks: Any) -> None:
    """Save a session in which nothing was timed (all out of memory, skipped, accuracy only):
    pytest-benchmark writes no file then."""
    name = benchmarks.save or benchmarks.autosave
    if not (name or benchmarks.json):
        return
    hook = config.hook
    commit = hook.pytest_benchmark_generate_commit_info(config=config)
    hook.pytest_benchmark_update_commit_info(config=config, commit_info=commit)
    output = hook.pytest_benchmark_generate_json(
        config=config,
        benchmarks=[],
        include_data=False,
        machine_info=benchmarks.get_machine_info(),
        commit_info=commit,
    )
    hook.pytest_benchmark_update_json(config=config, benchmarks=[], output_json=output)
    if benchmarks.json:
        benchmarks.save_json(output)
    if name:
        benchmarks.storage.save(output, name)


def _where(config: pytest.Config, state: State) -> list[str]:
    benchmarks = config.pluginmanager.get_plugin("pytest-benchmark")
    saved = []
    if benchmarks is not None:
        if benchmarks.json:
            saved.append(str(benchmarks.json))
        if benchmarks.save or benchmarks.autosave:
            saved.append(str(benchmarks.storage.location))
    assert state.journal is not None
    journal = state.journal.path
    if journal.is_relative_to(Path.cwd()):
        journal = journal.relative_to(Path.cwd())
    return [
        f"saved: {', '.join(saved)}"
        if saved
        else "not saved as JSON: add --benchmark-autosave or --benchmark-json=PATH",
        f"journal: {journal}",
    ]

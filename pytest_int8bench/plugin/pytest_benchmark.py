"""Everything that depends on the insides of pytest-benchmark."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pytest_int8bench.plugin.session import State


def merge_benchmark_markers(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give tests of throughput the synchronizing timer, and keep their own benchmark options:
    pytest-benchmark reads the closest marker only."""
    if not config.pluginmanager.hasplugin("benchmark"):
        return
    for item in items:
        if "int8_throughput" not in getattr(item, "fixturenames", ()):
            continue
        markers = list(item.iter_markers("benchmark"))
        if any(marker.args for marker in markers):
            continue  # pytest-benchmark says what is wrong with them
        from pytest_int8bench import clock

        merged: dict[str, Any] = {}
        for marker in reversed(markers):
            merged |= marker.kwargs
        merged["timer"] = clock.synchronized_perf_counter
        item.add_marker(pytest.mark.benchmark(**merged), append=False)


#: Folder that pytest-benchmark saves in, from the folder that pytest is started in.
STORAGE = Path(".benchmarks")


def is_benchmark_disabled(config: pytest.Config) -> bool:
    """Say whether the user has disabled pytest-benchmark, which under pytest-xdist does so by
    itself."""
    disable = config.getoption("benchmark_disable", False)
    return bool(disable and not config.getoption("benchmark_enable", False))


def leave_out(config: pytest.Config, nodeid: str) -> None:
    """Keep the timing of a test out of pytest-benchmark's file, where it would pass for a
    baseline."""
    benchmarks: Any = config.pluginmanager.get_plugin("pytest-benchmark")
    for found in benchmarks.benchmarks if benchmarks is not None else []:
        if found.fullname == nodeid:
            found.fixture.has_error = True


def mark_outcome(
    state: State, item: pytest.Item, report: pytest.TestReport, *, stands: bool
) -> None:
    """Keep timings of failed tests out of pytest-benchmark's file, where they would pass for
    baselines (unless what was measured ``stands``), and its warning about unused benchmarks from
    points that failed or ran out of memory."""
    benchmark = getattr(item, "funcargs", {}).get("benchmark")
    if benchmark is None or item.nodeid not in state.points_of:
        return
    if report.failed and not stands:
        benchmark.has_error = True
    if report.failed or any(result.oom for result in state.results_of(item.nodeid)):
        benchmark.skipped = True


def save_without_timings(config: pytest.Config, state: State) -> None:
    """Save a session in which nothing was timed (all out of memory, skipped, accuracy only):
    pytest-benchmark writes no file then."""
    benchmarks: Any = config.pluginmanager.get_plugin("pytest-benchmark")
    if state.journal is None or benchmarks is None or benchmarks.benchmarks or state.worker:
        return
    if benchmarks.disabled:  # it saves nothing either: the latest measured file stays the latest
        return
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


def check_compared(config: pytest.Config, state: State) -> None:
    """Say if a file of ``--benchmark-compare`` was measured on another machine or software, of
    which pytest-benchmark knows a part only.

    Raises:
        IncomparableError: with ``--benchmark-compare-fail``, whose verdict would mean nothing.
    """
    from pytest_int8bench.environment import differences
    from pytest_int8bench.gate.session import IncomparableError

    for base in state.compared_with:
        if base is None:
            problem = "was not saved by pytest-int8bench, so the machine is unknown"
        else:
            allowed = state.settings.rules.allow
            found = differences(base, state.environment())
            listed = [f"{k} {a} -> {b}" for k, (a, b) in found.items() if k not in allowed]
            if not listed:
                continue
            problem = f"was measured on another machine or software: {', '.join(listed)}"
        text = f"the file that is compared with {problem}; see --int8-allow"
        if config.getoption("benchmark_compare_fail"):
            raise IncomparableError(f"--benchmark-compare-fail: {text}")
        warnings.warn(f"int8bench: {text}", stacklevel=2)
        state.compared_with = []  # said once
        return

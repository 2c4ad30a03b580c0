"""Write reports and the terminal summary at the end of a session."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pytest_int8bench.plugin.options import OPTIONS
from pytest_int8bench.plugin.session import STATE, State
from pytest_int8bench.words import plural


def show_results(terminal: pytest.TerminalReporter, config: pytest.Config) -> None:
    state = config.stash[STATE]
    if state.journal is None:
        for line in state.reported:
            terminal.write_line(line)
        return
    from pytest_int8bench.report.terminal import render

    terminal.section("int8bench", sep="-", bold=True)
    width = terminal._tw.fullwidth if terminal.isatty else None
    terminal.write(render(state.journal.saved(), width=width, color=terminal.hasmarkup))
    if state.controller is not None:
        for line in state.controller.summary():
            terminal.write_line(line)
    for line in [*where_saved(config, state), *state.reported]:
        terminal.write_line(line)
    if state.tracked is not None:
        terminal.write_line(state.tracked.line, yellow=state.tracked.failed)
    if state.controller is not None:
        for line in state.controller.problems():
            terminal.write_line(line, red=True)


def show_gate(terminal: pytest.TerminalReporter, config: pytest.Config) -> None:
    state = config.stash[STATE]
    gate = state.gate()
    if gate is None or config.option.collectonly:
        return
    terminal.section("int8bench gate", sep="-", bold=True)
    for line in gate.summary():
        terminal.write_line(line)
    for line in gate_problems(config, state):
        terminal.write_line(line, red=True)


def write_reports(config: pytest.Config, state: State) -> bool:
    """Write the reports of ``--int8-report``, and say so in ``state.reported``. Return whether all
    were written that there is something for."""
    if not state.settings.reports or state.worker is not None or config.option.collectonly:
        return True
    if state.journal is None:
        option = OPTIONS["report"]
        if option.source(config) == option.flag:  # in an ini file it waits for benchmarks
            state.reported.append("int8bench: no report: no test measured or judged a point")
        return True
    from pytest_int8bench.report.write import publish

    written = True
    for path in state.settings.reports:
        try:
            publish([("this session", state.journal.saved())], path)
            state.reported.append(f"report: {_shown(path)}")
        except Exception as error:  # whatever it is, the other files are still to be saved
            written = False
            state.reported.append(f"report: {_not_written(path, error)}")
            if state.journal.path is not None:
                state.reported.append(f"report: try int8bench report {_shown(state.journal.path)}")
    return written


def _not_written(path: Path, error: Exception) -> str:
    from pytest_int8bench.files import FileError

    if isinstance(error, FileError):
        return str(error)
    return f"{path} is not written: {type(error).__name__}: {error}"


def _shown(path: Path) -> Path:
    """Return a path from the current folder, if it is in it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def gate_problems(config: pytest.Config, state: State) -> list[str]:
    """Return what ``--int8-compare`` must not let pass silently, a line each."""
    gate = state.gate()
    if gate is None or config.option.collectonly:
        return []
    by_node = any("::" in argument for argument in config.args)
    start = config.invocation_params.dir
    asked = [(start / argument).resolve() for argument in config.args]

    def is_gone(file: str) -> bool:
        path = (config.rootpath / file).resolve()
        return not path.exists() and any(path.is_relative_to(folder) for folder in asked)

    return gate.problems(state.collected, state.deselected, by_node=by_node, is_gone=is_gone)


def where_saved(config: pytest.Config, state: State) -> list[str]:
    """Return lines that say where the session's results are."""
    benchmarks: Any = config.pluginmanager.get_plugin("pytest-benchmark")
    active = benchmarks is not None and not benchmarks.disabled
    saved = []
    if active:
        if benchmarks.json:
            # An open file before pytest-benchmark 5.3, a path since.
            is_path = isinstance(benchmarks.json, str | Path)
            saved.append(str(benchmarks.json if is_path else benchmarks.json.name))
        if benchmarks.save or benchmarks.autosave:
            saved.append(str(benchmarks.storage.location))
    journal = _shown(state.journal.path) if state.journal and state.journal.path else None
    if saved:
        where = f"saved: {', '.join(saved)}"
    elif active:
        where = "not saved as JSON: add --benchmark-autosave or --benchmark-json=PATH"
    else:
        where = "not saved as JSON: pytest-benchmark is disabled"
    return [
        where,
        f"journal: {journal or 'none, see the warnings'}",
        *_where_profiles(state),
    ]


def _where_profiles(state: State) -> list[str]:
    """Return where the traces of the session are, and what went wrong."""
    written = state.profiles.traces if state.profiles is not None else []
    results = state.journal.results if state.journal else []  # those of other processes too
    traces = {*written, *(result.trace for result in results if result.trace)}
    folders = sorted({os.path.dirname(trace) or "." for trace in traces})
    lines = []
    if traces:
        count = f"{plural(len(traces), 'trace')} for ui.perfetto.dev"
        lines.append(f"profiles: {', '.join(folders)}: {count}, tables of kernels beside them")
    problems = state.profiles.problems if state.profiles is not None else []
    return [*lines, *(f"profiles: not written: {problem}" for problem in problems)]

"""Show the results of a session in the terminal summary."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence

import pytest

from pytest_int8bench.errors import first_line
from pytest_int8bench.files import relative
from pytest_int8bench.plugin.pytest_benchmark import describe_saved
from pytest_int8bench.plugin.recorder import Recorder
from pytest_int8bench.printing import printable
from pytest_int8bench.results.journal import Journal
from pytest_int8bench.words import plural


def show(terminal: pytest.TerminalReporter, recorder: Recorder) -> None:
    show_results(terminal, recorder)
    show_gate(terminal, recorder)


def show_results(terminal: pytest.TerminalReporter, recorder: Recorder) -> None:
    """Show the results of a session, and where they are saved."""
    if recorder.journal is not None:
        _show_journal(terminal, recorder, recorder.journal)
        _show(terminal, "the skipped points", lambda: _none_measured(recorder), yellow=True)
    _show(terminal, "the reports", lambda: recorder.reported)
    if (tracked := recorder.tracked) is not None:
        _show(terminal, "the log", lambda: [tracked.line], yellow=tracked.failed)
    if recorder.journal is not None:
        _show(terminal, "the workers", recorder.problems, red=True)


def show_gate(terminal: pytest.TerminalReporter, recorder: Recorder) -> None:
    gate = recorder.session.gate
    if gate is None or recorder.config.option.collectonly:
        return
    terminal.section("int8bench gate", sep="-", bold=True)
    _show(terminal, "the comparison", gate.summary)
    _show(terminal, "the gate", recorder.session.gate_problems, red=True)


def _show_journal(terminal: pytest.TerminalReporter, recorder: Recorder, journal: Journal) -> None:
    def table() -> list[str]:
        from pytest_int8bench.report.terminal import render

        width = terminal._tw.fullwidth if terminal.isatty else None
        _say(terminal, render(journal.saved(), width=width, color=terminal.hasmarkup))
        return []

    terminal.section("int8bench", sep="-", bold=True)
    _show(terminal, "the results", table)
    _show(terminal, "the workers", recorder.measured_by)
    if recorder.session.handover is None:  # otherwise the runner shows them
        _show(terminal, "the saved files", lambda: [describe_saved(recorder.config)])
        _show(terminal, "the journal", lambda: [_where_journal(journal)])
    _show(terminal, "the profiles", lambda: _where_profiles(recorder, journal))


def _show(
    terminal: pytest.TerminalReporter, what: str, make: Callable[[], Sequence[str]], **markup: bool
) -> None:
    """Write the lines that ``make`` returns, or one line with its error."""
    try:
        lines = make()
    except Exception as error:  # any error: the other lines must still be shown
        problem = f"{type(error).__name__}: {first_line(error)}"
        _say(terminal, f"int8bench: cannot show {what}: {problem}", red=True)
        return
    for line in lines:
        _say(terminal, line, **markup)


def _say(terminal: pytest.TerminalReporter, text: str, **markup: bool) -> None:
    """Write a line, or several lines that end in a newline.

    Replace characters that the output's encoding lacks, because pytest would drop line breaks on an
    encoding error. Ignore a closed pipe, so that other plugins can still write their lines.
    """
    file = getattr(terminal._tw, "_file", None)
    text = printable(text, getattr(file, "encoding", None))
    with contextlib.suppress(OSError, ValueError):
        (terminal.write if text.endswith("\n") else terminal.write_line)(text, **markup)


def _none_measured(recorder: Recorder) -> list[str]:
    """Return a warning if every point was skipped, which pytest reports as a success."""
    journal = recorder.journal
    if journal is None or recorder.session.handover is not None:  # the runner reports it
        return []
    saved = journal.saved()
    skipped = [result for result in saved.results if result.status == "skipped"]
    others = len(saved.results) + len(saved.benchmarks) + len(saved.accuracy)
    if not skipped or len(skipped) < others + len(saved.sensitivity) or skipped[0].is_disabled:
        return []
    count = plural(len({(result.workload, result.run_name) for result in skipped}), "point")
    return [
        f"WARNING: no point was measured: {count} skipped, the first because: {skipped[0].reason}"
    ]


def _where_journal(journal: Journal) -> str:
    problem = journal.problem()  # must come first: it may move the file
    if journal.path is None:
        return "journal: none, see the warnings"
    path = str(relative(journal.path))
    return f"journal: {path}" if problem is None else f"journal: {path} {problem}"


def _where_profiles(recorder: Recorder, journal: Journal) -> list[str]:
    """Return lines with the paths of the session's traces, and with those that could not be
    written."""
    profiles = recorder.session.profiles
    written = profiles.traces if profiles is not None else []
    # Include traces written by other processes.
    traces = {*written, *(result.trace for result in journal.results if result.trace)}
    folders = sorted({os.path.dirname(trace) or "." for trace in traces})
    lines = []
    if traces:
        count = f"{plural(len(traces), 'trace')} for ui.perfetto.dev"
        lines.append(f"profiles: {', '.join(folders)}: {count}, tables of kernels beside them")
    problems = profiles.problems if profiles is not None else []
    return [*lines, *(f"profiles: cannot write: {problem}" for problem in problems)]

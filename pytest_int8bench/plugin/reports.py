"""Write the reports of ``--int8-report`` at the end of a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_int8bench.files import relative
from pytest_int8bench.plugin.options import OPTIONS
from pytest_int8bench.results.journal import Journal


def nothing_to_report(config: pytest.Config) -> list[str]:
    """Return a line for a session that recorded nothing, none if an ini file asks for the
    report: there it waits for benchmarks."""
    option = OPTIONS["report"]
    if option.source(config) != option.flag:
        return []
    return ["int8bench: no report: no test measured or judged a point"]


def write_report(journal: Journal, path: Path) -> tuple[bool, list[str]]:
    """Write one report. Return whether it was written, and the lines that say so or why not."""
    from pytest_int8bench.report.write import publish

    try:
        publish([("this session", journal.saved())], path)
    except Exception as error:  # whatever it is, the other files are still to be saved
        lines = [f"report: {_not_written(path, error)}"]
        if journal.path is not None:
            lines.append(f"report: try int8bench report {relative(journal.path)}")
        return False, lines
    return True, [f"report: {relative(path)}"]


def _not_written(path: Path, error: Exception) -> str:
    from pytest_int8bench.files import FileError

    if isinstance(error, FileError):
        return str(error)
    return f"{path} is not written: {type(error).__name__}: {error}"

"""Write the reports of ``--int8-report``."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_int8bench.files import relative
from pytest_int8bench.plugin.options import OPTIONS
from pytest_int8bench.results.journal import Journal


def nothing_to_report(config: pytest.Config) -> list[str]:
    """Return a line that explains why a session without records has no report. If the option comes
    from an ini file, return nothing: it applies only to sessions with benchmarks."""
    option = OPTIONS["report"]
    if option.source(config) != option.flag:
        return []
    return ["int8bench: no report written: no test measured a point or its accuracy"]


def write_report(journal: Journal, path: Path) -> tuple[bool, list[str]]:
    """Write one report. Return whether that succeeded, and lines for the terminal."""
    from pytest_int8bench.report.write import publish

    try:
        publish([("this session", journal.saved())], path)
    except Exception as error:  # any error: other files must still be saved
        lines = [f"report: {_not_written(path, error)}"]
        if journal.path is not None:
            lines.append(f"report: to try again: int8bench report {relative(journal.path)}")
        return False, lines
    return True, [f"report: {relative(path)}"]


def _not_written(path: Path, error: Exception) -> str:
    from pytest_int8bench.files import FileError

    if isinstance(error, FileError):
        return str(error)
    return f"cannot write {path}: {type(error).__name__}: {error}"

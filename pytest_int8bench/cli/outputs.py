"""Options and files that several commands write their results to."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pytest_int8bench.files import (
    FileError,
    append,
    check_writable,
    probe_report,
    real_path,
    write,
)
from pytest_int8bench.gate.outcomes import UNDECIDED
from pytest_int8bench.printing import one_line, show
from pytest_int8bench.report.junit import Case, to_xml
from pytest_int8bench.report.tables import MARKDOWN_BYTES, Page
from pytest_int8bench.results.locating import Run

SUMMARY = "GITHUB_STEP_SUMMARY"
#: GitHub takes 65,536 characters in a comment.
_COMMENT_BYTES = 60_000
#: Characters of an error: some quote what a file holds.
_LONGEST = 2000


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where reports go."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    parser.add_argument(
        "--markdown",
        type=Path,
        metavar="FILE",
        help=f"write the report as Markdown; it is also appended to ${SUMMARY}, if that is set",
    )
    parser.add_argument(
        "--junit",
        type=Path,
        metavar="FILE",
        help="write JUnit XML in which each regression is a failure",
    )
    parser.add_argument(
        "--comment",
        type=Path,
        metavar="FILE",
        help="write the report as Markdown for a pull-request comment; its first line is a marker "
        "by which a later run finds and updates the comment",
    )


def publish(
    command: str,
    arguments: argparse.Namespace,
    page: Page,
    values: Callable[[], dict[str, Any]],
    cases: Sequence[Case],
    exit_code: int,
) -> int:
    """Write the files asked for, then print a report. Return ``exit_code``, or 2 instead of 0 if a
    file could not be written."""
    outputs: list[Callable[[], None]] = []
    if path := arguments.json:
        outputs.append(lambda: write(path, json.dumps(values(), indent=2) + "\n"))
    summary = _summary()
    # Where both are one file, it gets the report once, behind what other steps wrote.
    if (markdown := arguments.markdown) and not _is_same(markdown, summary):
        outputs.append(lambda: write(markdown, page.markdown(limit_bytes=MARKDOWN_BYTES)))
    if comment := arguments.comment:
        outputs.append(lambda: write(comment, _comment(page)))
    if junit := arguments.junit:
        outputs.append(lambda: write(junit, to_xml(page.title, cases)))
    if summary is not None:
        outputs.append(lambda: _append_summary(summary, page))
    for output in outputs:
        try:
            output()
        except Exception as error:  # whatever it is, the other files are still to be written
            code = refuse(command, error)
            exit_code = exit_code or code
    print_page(page)
    return exit_code


def _comment(page: Page) -> str:
    marker = f"<!-- {page.title} -->\n"
    return marker + page.markdown(limit_bytes=_COMMENT_BYTES - len(marker))


def print_json(values: Any) -> None:
    """Print JSON, in which :func:`show` finds no command of a CI server to change."""
    # A # stands in strings alone, and may be escaped there.
    show(json.dumps(values, indent=2, allow_nan=False).replace("##", "#\\u0023"))


def print_page(page: Page) -> None:
    """Print a report as wide as the terminal, or as it needs."""
    width, color = terminal_style()
    show(page.text(width=width, color=color), end="")


def terminal_style() -> tuple[int | None, bool]:
    """Return the columns of the terminal that stdout is, None where it is none, and whether to use
    colors."""
    try:
        is_terminal = sys.stdout.isatty()
    except (AttributeError, ValueError):  # closed before Python started, or since
        is_terminal = False
    return (shutil.get_terminal_size().columns if is_terminal else None), is_terminal


def _append_summary(path: Path, page: Page) -> None:
    """Add the report to the summary of a step of GitHub Actions, behind what is in it."""
    try:
        used = path.stat().st_size
    except OSError:  # not made yet; what else there is, writing says
        used = 0
    text = page.markdown(limit_bytes=MARKDOWN_BYTES - used - 1) + "\n"
    if used + len(text.encode()) > MARKDOWN_BYTES:
        raise FileError(f"{path} is not written: the summary of this step is full")
    append(path, text)


def tell_broken(command: str, runs: Sequence[Run]) -> None:
    """Say which files have lines that are left out."""
    for run in runs:
        if broken := run.saved.broken():
            show(one_line(f"int8bench {command}: {run.path}: {broken}"), error=True)


def refuse(command: str, problem: BaseException | str) -> int:
    """Print the one line of an error and return the exit code."""
    line = one_line(f"int8bench {command}".rstrip() + f": {problem}")
    show(line if len(line) <= _LONGEST else f"{line[:_LONGEST]}...", error=True)
    return UNDECIDED


def check_outputs(arguments: argparse.Namespace, inputs: set[Path]) -> None:
    """Refuse files that must not be written.

    Raises:
        FileError: one line, for the first of them.
    """
    outputs = _outputs(arguments)
    for index, output in enumerate(outputs):
        if real_path(output) in inputs:
            raise FileError(f"{output} is one of the files to compare, and not overwritten")
        if real_path(output) in {real_path(other) for other in outputs[:index]}:
            raise FileError(f"{output} is given for two reports")
        check_writable(output)
    for output in (arguments.json, arguments.junit, arguments.comment):
        if output is not None and _is_same(output, _summary()):
            raise FileError(f"{output} is ${SUMMARY}, which the report is appended to as Markdown")


def probe_outputs(arguments: argparse.Namespace) -> None:
    """Refuse files that cannot be written, before the command takes its time.

    Raises:
        FileError: one line, for the first of them.
    """
    summary = _summary()
    for output in (*_outputs(arguments), *([] if summary is None else [summary])):
        probe_report(output)


def _outputs(arguments: argparse.Namespace) -> list[Path]:
    given = (arguments.json, arguments.markdown, arguments.junit, arguments.comment)
    return [path for path in given if path is not None]


def _summary() -> Path | None:
    """Return the file for the summary of a step of GitHub Actions."""
    text = os.environ.get(SUMMARY)
    return Path(text) if text else None


def _is_same(path: Path, other: Path | None) -> bool:
    return other is not None and real_path(path) == real_path(other)

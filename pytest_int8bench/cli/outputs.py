"""Options and output files shared by several commands."""

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
#: GitHub accepts up to 65,536 characters in a comment.
_COMMENT_BYTES = 60_000
#: Maximum characters of an error line; some errors quote the contents of a file.
_MAX_LENGTH = 2000


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """Add the options that name output files."""
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
    """Write the requested files, then print the report. Return ``exit_code``, or 2 instead of 0 if
    a file could not be written."""
    outputs: list[Callable[[], None]] = []
    if path := arguments.json:
        outputs.append(lambda: write(path, json.dumps(values(), indent=2) + "\n"))
    summary = _summary()
    # If both are the same file, the report is appended once, after the output of other steps.
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
        except Exception as error:  # write the other files even if one fails
            code = refuse(command, error)
            exit_code = exit_code or code
    print_page(page)
    return exit_code


def _comment(page: Page) -> str:
    marker = f"<!-- {page.title} -->\n"
    return marker + page.markdown(limit_bytes=_COMMENT_BYTES - len(marker))


def print_json(values: Any) -> None:
    """Print JSON so that :func:`show` finds no CI workflow command in it to neutralize."""
    # In JSON, # occurs only inside strings, where it may be escaped.
    show(json.dumps(values, indent=2, allow_nan=False).replace("##", "#\\u0023"))


def print_page(page: Page) -> None:
    """Print a report at the terminal's width, or at its natural width without a terminal."""
    width, color = terminal_style()
    show(page.text(width=width, color=color), end="")


def terminal_style() -> tuple[int | None, bool]:
    """Return the width of the terminal on stdout, None without one, and whether to use colors."""
    try:
        is_terminal = sys.stdout.isatty()
    except (AttributeError, ValueError):  # stdout was closed before Python started, or later
        is_terminal = False
    return (shutil.get_terminal_size().columns if is_terminal else None), is_terminal


def _append_summary(path: Path, page: Page) -> None:
    """Append the report to the summary of a GitHub Actions step."""
    try:
        used = path.stat().st_size
    except OSError:  # the file does not exist yet, or writing will report the problem
        used = 0
    text = page.markdown(limit_bytes=MARKDOWN_BYTES - used - 1) + "\n"
    if used + len(text.encode()) > MARKDOWN_BYTES:
        raise FileError(f"cannot write {path}: the summary of this step is full")
    append(path, text)


def tell_broken(command: str, runs: Sequence[Run]) -> None:
    """Warn about files with unreadable lines, which are left out."""
    for run in runs:
        if broken := run.saved.broken():
            show(one_line(f"int8bench {command}: {run.path}: {broken}"), error=True)


def refuse(command: str, problem: BaseException | str) -> int:
    """Print an error as one line and return the exit code."""
    line = one_line(f"int8bench {command}".rstrip() + f": {problem}")
    show(line if len(line) <= _MAX_LENGTH else f"{line[:_MAX_LENGTH]}...", error=True)
    return UNDECIDED


def check_outputs(arguments: argparse.Namespace, inputs: set[Path]) -> None:
    """Refuse output files that must not be overwritten.

    Raises:
        FileError: one line, for the first such file.
    """
    outputs = _outputs(arguments)
    for index, output in enumerate(outputs):
        if real_path(output) in inputs:
            raise FileError(f"refusing to overwrite {output}: it is one of the files to compare")
        if real_path(output) in {real_path(other) for other in outputs[:index]}:
            raise FileError(f"two reports would be written to {output}; name different files")
        check_writable(output)
    for output in (arguments.json, arguments.junit, arguments.comment):
        if output is not None and _is_same(output, _summary()):
            raise FileError(
                f"refusing to overwrite {output}: it is ${SUMMARY}, to which the report is "
                "appended as Markdown"
            )


def probe_outputs(arguments: argparse.Namespace) -> None:
    """Check that all output files can be written, before a long command starts.

    Raises:
        FileError: one line, for the first file that cannot be written.
    """
    summary = _summary()
    for output in (*_outputs(arguments), *([] if summary is None else [summary])):
        probe_report(output)


def _outputs(arguments: argparse.Namespace) -> list[Path]:
    given = (arguments.json, arguments.markdown, arguments.junit, arguments.comment)
    return [path for path in given if path is not None]


def _summary() -> Path | None:
    """Return the summary file of the GitHub Actions step, or None outside GitHub Actions."""
    text = os.environ.get(SUMMARY)
    return Path(text) if text else None


def _is_same(path: Path, other: Path | None) -> bool:
    return other is not None and real_path(path) == real_path(other)

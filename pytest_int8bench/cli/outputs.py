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

from pytest_int8bench.files import FileError, append, check_writable, write
from pytest_int8bench.gate.outcomes import UNDECIDED
from pytest_int8bench.report.junit import Case, to_xml
from pytest_int8bench.report.tables import Page

SUMMARY = "GITHUB_STEP_SUMMARY"


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
        help="write JUnit XML, in which a regression is a failure",
    )


def publish(
    command: str,
    arguments: argparse.Namespace,
    page: Page,
    values: dict[str, Any],
    cases: Sequence[Case],
    exit_code: int,
) -> int:
    """Print a report and write the files asked for. Return ``exit_code``, or 2 instead of 0 if one
    could not be written."""
    is_terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if is_terminal else None
    print(page.text(width=width, color=is_terminal), end="", flush=True)
    outputs: list[Callable[[], None]] = []
    if path := arguments.json:
        outputs.append(lambda: write(path, json.dumps(values, indent=2) + "\n"))
    if markdown := arguments.markdown:
        outputs.append(lambda: write(markdown, page.markdown()))
    if junit := arguments.junit:
        outputs.append(lambda: write(junit, to_xml(page.title, cases)))
    if summary := os.environ.get(SUMMARY):
        outputs.append(lambda: append(Path(summary), page.markdown() + "\n"))
    for output in outputs:
        try:
            output()
        except FileError as error:
            code = refuse(command, error)
            exit_code = exit_code or code
    return exit_code


def refuse(command: str, error: BaseException) -> int:
    """Print the one line of an error and return the exit code."""
    print(f"int8bench {command}: {error}", file=sys.stderr)
    return UNDECIDED


def check_outputs(arguments: argparse.Namespace, inputs: set[Path]) -> None:
    outputs = [p for p in (arguments.json, arguments.markdown, arguments.junit) if p is not None]
    for index, output in enumerate(outputs):
        if output.resolve() in inputs:
            raise FileError(f"{output} is one of the files to compare, and not overwritten")
        if output.resolve() in {other.resolve() for other in outputs[:index]}:
            raise FileError(f"{output} is given for two reports")
        check_writable(output)

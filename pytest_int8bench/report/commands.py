"""``int8bench report``: saved files in, one page out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from pytest_int8bench.gate.files import FileError
from pytest_int8bench.report.inputs import gather
from pytest_int8bench.report.outputs import check_output, publish

_DEFAULT = "report.html"
_FAILED = 2


def add_report(commands: Any) -> None:
    """Add the command to argparse's sub-commands."""
    parser = commands.add_parser(
        "report",
        help="write a page, or Markdown, from saved files",
        description="Write one file that shows what was saved: throughput, speedup, accuracy, "
        "memory, compile time, where device time went, coverage and layer sensitivity, and with "
        "several files the history, by the times in them. Of a point that several files have, the "
        "last one is shown.",
    )
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="saved JSON files or journals, folders of them, or numbers of pytest-benchmark such "
        "as 0003",
    )
    parser.add_argument(
        "--output",
        action="append",
        metavar="FILE",
        help=f"report to write, .html or .md; repeatable (default: {_DEFAULT})",
    )
    parser.add_argument(
        "--storage",
        type=Path,
        default=Path(".benchmarks"),
        help="folder that pytest-benchmark saves in (default: .benchmarks)",
    )


def run_report(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit code: 0, or 2 if a file cannot be read or written."""
    try:
        try:
            outputs = [check_output(text) for text in arguments.output or [_DEFAULT]]
        except FileError as error:
            raise FileError(f"--output: {error}") from None
        runs = gather(arguments.files, arguments.storage)
        named = [(str(run.path), run.saved) for run in runs]
        for output in dict.fromkeys(outputs):
            publish(named, output)
            print(output)
    except (OSError, ValueError) as error:  # SchemaError and FileError among them
        print(f"int8bench report: {error}", file=sys.stderr)
        return _FAILED
    return 0

"""The ``int8bench`` command."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest_int8bench


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, or 2 if a file cannot be read."""
    parser = argparse.ArgumentParser(prog="int8bench", description="INT8 inference benchmarks.")
    parser.add_argument("--version", action="version", version=pytest_int8bench.__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="print the table of a saved JSON file or a journal")
    show.add_argument("file", type=Path, help="JSON of pytest-benchmark, or a journal (.jsonl)")
    arguments = parser.parse_args(argv)
    return _show(arguments.file)


def _show(path: Path) -> int:
    from pytest_int8bench.report.terminal import render
    from pytest_int8bench.results import SchemaError, read

    try:
        saved = read(path)
    except (OSError, SchemaError) as error:
        print(f"int8bench: {error}", file=sys.stderr)
        return 2
    is_terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if is_terminal else None
    print(render(saved, width=width, color=is_terminal), end="")
    return 0

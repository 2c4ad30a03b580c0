"""Implement ``int8bench show``, which prints the tables of a saved file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_show(commands: Any) -> None:
    """Add the command to argparse's subcommands."""
    parser = commands.add_parser("show", help="print the table of a saved JSON file or a journal")
    parser.add_argument("file", type=Path, help="pytest-benchmark JSON file, or a journal (.jsonl)")


def run_show(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit code: 0, or 2 if the file cannot be read."""
    from pytest_int8bench.cli.outputs import refuse, terminal_style
    from pytest_int8bench.printing import show
    from pytest_int8bench.report.terminal import render
    from pytest_int8bench.results.base import SchemaError
    from pytest_int8bench.results.reading import read

    path: Path = arguments.file
    try:
        saved = read(path)
    except (OSError, SchemaError) as error:
        problem = str(error)
        if isinstance(error, OSError):
            problem = f"{path} must be a saved JSON file or a journal: {error.strerror or error}"
        return refuse("", problem)
    if broken := saved.broken():
        show(f"int8bench: {path}: {broken}", error=True)
    width, color = terminal_style()
    show(render(saved, width=width, color=color), end="")
    return 0

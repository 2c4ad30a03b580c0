"""Implement ``int8bench export``, which converts a saved file for benchmark history services."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pytest_int8bench.cli.arguments import add_storage
from pytest_int8bench.cli.outputs import print_json, refuse, tell_broken
from pytest_int8bench.files import FileError, check_writable, write
from pytest_int8bench.printing import one_line, show
from pytest_int8bench.report import exports
from pytest_int8bench.results.locating import find, read_runs
from pytest_int8bench.words import plural

_BENCHER, _GITHUB = "bencher", "github-action-benchmark"
#: Tool of github-action-benchmark -> whether higher values are better, and the end of its file.
_TOOLS = {"customBiggerIsBetter": (True, "bigger"), "customSmallerIsBetter": (False, "smaller")}
_NAMED = 10


def add_export(commands: Any) -> None:
    """Add the command to argparse's subcommands."""
    parser = commands.add_parser(
        "export",
        help="write a saved file for Bencher or github-action-benchmark",
        description="Convert throughput, times, memory, energy, speedup and accuracy of a saved "
        "file to the format of a history service. Points that failed, ran out of memory, were "
        "skipped or throttled are left out and listed on stderr.",
    )
    parser.add_argument(
        "file",
        metavar="FILE",
        help="a saved JSON file, a journal, or a pytest-benchmark run number such as 0003",
    )
    parser.add_argument("--format", choices=(_BENCHER, _GITHUB), required=True)
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help=f"file to write (default: stdout); {_GITHUB} needs one file per direction, "
        "FILE-bigger and FILE-smaller (default: int8bench.json, that is, int8bench-bigger.json "
        "and int8bench-smaller.json)",
    )
    add_storage(parser)


def run_export(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit code: 0, or 2 if there is nothing to export or a file
    cannot be read or written."""
    try:
        found = find(arguments.file, arguments.storage, journals=True)
        if len(found) > 1:
            raise FileError(f"{arguments.file} must be one saved file, got {len(found)} files")
        runs = read_runs(found)
        [run] = runs
        tell_broken("export", runs)
        metrics = exports.metrics(run.saved)
        _show_left_out(exports.left_out(run.saved))
        if not metrics:
            raise FileError(f"{run.path} contains no successfully measured point to export")
        if arguments.format == _BENCHER:
            values = exports.bencher(metrics)
            if arguments.output is None:
                print_json(values)
            else:
                _write_json(arguments.output, values)
            return 0
        output = arguments.output or Path("int8bench.json")
        if not output.name:
            raise FileError(f"--output must name a file, got {str(output)!r}")
        for tool, (is_higher, end) in _TOOLS.items():
            entries = exports.github_action_benchmark(
                metrics, run.saved.environment, higher_is_better=is_higher
            )
            path = output.with_stem(f"{output.stem}-{end}")
            if entries:
                _write_json(path, entries)
            elif path.exists():  # an older file would be mistaken for this run's
                check_writable(path)
                path.unlink()
            show(f"{path if entries else 'no file'}: tool {tool}, {plural(len(entries), 'figure')}")
    except (OSError, ValueError) as error:  # includes SchemaError and FileError
        return refuse("export", error)
    return 0


def _write_json(path: Path, values: Any) -> None:
    check_writable(path)
    write(path, json.dumps(values, indent=2, allow_nan=False) + "\n")


def _show_left_out(left_out: list[str]) -> None:
    if not left_out:
        return
    more = len(left_out) - _NAMED
    named = "; ".join(left_out[:_NAMED]) + (f"; and {more} more" if more > 0 else "")
    show(one_line(f"int8bench export: left out: {named}"), error=True)

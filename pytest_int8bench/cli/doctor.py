"""Implement ``int8bench doctor``, which checks a machine and its software before measuring."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from pytest_int8bench.cli.checks.lines import OK, PROBLEM, WARNING, Line
from pytest_int8bench.cli.checks.machine import Machine
from pytest_int8bench.cli.checks.registry import lines
from pytest_int8bench.cli.outputs import print_json, refuse, terminal_style
from pytest_int8bench.files import check_writable, probe_report, write
from pytest_int8bench.printing import one_line, show

_SCHEMA = 1
#: Mark -> its sign, the sign for terminals without Unicode, and its ANSI color.
_SIGNS = {OK: ("✓", "+", 32), WARNING: ("!", "!", 33), PROBLEM: ("✗", "x", 31)}
_STDOUT = Path("-")


def add_doctor(commands: Any) -> None:
    """Add the command to argparse's subcommands."""
    parser = commands.add_parser(
        "doctor",
        help="check versions, GPUs, compiler, folders and plugins before you measure",
        description="Check this machine before you measure on it, one line per check. A tick (or "
        "+) means all is well, ! means look at this, and a cross (or x) means fix this first. "
        "Exits with 1 if there is a cross, else with 0.",
    )
    parser.add_argument(
        "--json",
        type=Path,
        nargs="?",
        const=_STDOUT,
        metavar="FILE",
        help="write the lines as JSON; without FILE, print JSON instead of the lines",
    )


def run_doctor(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit code: 0, 1 if there is a problem to fix before measuring,
    or 2 if the JSON cannot be written."""
    path = arguments.json
    try:
        if path is not None and path != _STDOUT:
            check_writable(path)
            probe_report(path)
        found = []
        for name, line in lines(Machine()):
            found.append((name, line))
            if path != _STDOUT:
                show(_text(line))
        code = int(any(line.mark == PROBLEM for _, line in found))
        entries = [{"check": name, **dataclasses.asdict(line)} for name, line in found]
        block = {"schema": _SCHEMA, "exit_code": code, "lines": entries}
        values = {"int8bench_doctor": block}
        if path == _STDOUT:
            print_json(values)
        elif path is not None:
            write(path, json.dumps(values, indent=2) + "\n")
    except (OSError, ValueError) as error:
        return refuse("doctor", error)
    return code


def _text(line: Line) -> str:
    sign, plain, color = _SIGNS[line.mark]
    try:
        sign.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        sign = plain
    if terminal_style()[1]:
        sign = f"\x1b[{color}m{sign}\x1b[0m"
    text = f"{line.text} -> {line.remedy}" if line.remedy else line.text
    return f"{sign} {one_line(text)}"

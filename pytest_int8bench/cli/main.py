"""The ``int8bench`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pytest_int8bench.cli.ab import add_ab, run_ab
from pytest_int8bench.cli.compare import add_compare, run_compare
from pytest_int8bench.cli.report import add_report, run_report
from pytest_int8bench.cli.sensitivity import add_sensitivity, run_sensitivity
from pytest_int8bench.cli.show import add_show, run_show
from pytest_int8bench.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 1 if something regressed, 2 if a file cannot be
    read or something could not be compared, or pytest's."""
    parser = argparse.ArgumentParser(prog="int8bench", description="INT8 inference benchmarks.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    add_show(commands)
    add_sensitivity(commands)
    add_compare(commands)
    add_ab(commands)
    add_report(commands)
    given, for_pytest = _split(sys.argv[1:] if argv is None else argv)
    arguments, rest = parser.parse_known_args(given)
    if for_pytest and arguments.command != "ab":
        rest += ["--", *for_pytest]
    if arguments.command == "sensitivity":
        return run_sensitivity(arguments, rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if arguments.command == "ab":
        return run_ab(arguments, for_pytest)
    if arguments.command == "report":
        return run_report(arguments)
    return run_compare(arguments) if arguments.command == "compare" else run_show(arguments)


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the arguments before and after the first ``--``."""
    at = argv.index("--") if "--" in argv else len(argv)
    return list(argv[:at]), list(argv[at + 1 :])

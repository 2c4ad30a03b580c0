"""The ``int8bench`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pytest_int8bench.cli.ab import add_ab, run_ab
from pytest_int8bench.cli.compare import add_compare, run_compare
from pytest_int8bench.cli.report import add_report, run_report
from pytest_int8bench.cli.show import run_show
from pytest_int8bench.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 1 if something regressed, 2 if a file cannot be
    read or something could not be compared, or pytest's."""
    parser = argparse.ArgumentParser(prog="int8bench", description="INT8 inference benchmarks.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="print the table of a saved JSON file or a journal")
    show.add_argument("file", type=Path, help="JSON of pytest-benchmark, or a journal (.jsonl)")
    scan = commands.add_parser(
        "sensitivity",
        help="quantize one layer at a time and rank the layers by what that loses",
        description="Quantize one layer, or block, at a time and rank them by the SQNR of the "
        "model's outputs, worst first. The cost is linear in their number. Every other option "
        "is the plugin's: --int8-workload, --int8-mode, --int8-set, --int8-weights …",
    )
    scan.add_argument(
        "--by", choices=("layer", "block"), default="layer", help="what is quantized at a time"
    )
    scan.add_argument(
        "--metric",
        action="store_true",
        help="rank by the drop of the workload's metric (on its samples for selection, if any)",
    )
    scan.add_argument("--json", type=Path, help="file to save the table in")
    add_compare(commands)
    add_ab(commands)
    add_report(commands)
    given, for_pytest = _split(sys.argv[1:] if argv is None else argv)
    arguments, rest = parser.parse_known_args(given)
    if for_pytest and arguments.command != "ab":
        rest += ["--", *for_pytest]
    if arguments.command == "sensitivity":
        from pytest_int8bench.cli.sensitivity import run

        return run(by=arguments.by, metric=arguments.metric, json=arguments.json, pytest_args=rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if arguments.command == "ab":
        return run_ab(arguments, for_pytest)
    if arguments.command == "report":
        return run_report(arguments)
    return run_compare(arguments) if arguments.command == "compare" else run_show(arguments.file)


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the arguments before and after the first ``--``."""
    at = argv.index("--") if "--" in argv else len(argv)
    return list(argv[:at]), list(argv[at + 1 :])

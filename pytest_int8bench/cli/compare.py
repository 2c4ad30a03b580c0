"""Implement ``int8bench compare``, which compares saved files of two commits."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from pytest_int8bench.cli.arguments import (
    add_flag,
    add_storage,
    as_argument_type,
    with_default,
)
from pytest_int8bench.cli.outputs import add_outputs, check_outputs, publish, refuse, tell_broken
from pytest_int8bench.cli.picking import parse_expression
from pytest_int8bench.files import FileError, real_path
from pytest_int8bench.gate.compare import compare
from pytest_int8bench.gate.flags import ALLOW, ALLOW_MISSING, LIMITS
from pytest_int8bench.gate.limits import Rules
from pytest_int8bench.gate.rules import (
    check_allow,
    find_pyproject,
    parse_floor,
    read_rules,
)
from pytest_int8bench.report import compare as report
from pytest_int8bench.results.figures import METRICS
from pytest_int8bench.results.locating import find_side, latest_two, read_runs


def add_compare(commands: Any) -> None:
    """Add the command to argparse's subcommands."""
    parser = commands.add_parser(
        "compare",
        help="compare saved files of two commits, and fail if anything regressed",
        description="Compare the saved results of two commits: throughput, batch time, peak "
        "memory, compile time, accuracy verdicts, and the time per call of plain benchmarks. Exits "
        "with 1 if something regressed; else with 2 if something could not be compared or is "
        "suspected, that is, it grew over its limit but not by more than two processes of the "
        "same code may differ; else with 0.",
    )
    _add_sides(parser)
    for limit in LIMITS:
        add_flag(parser, limit, default=...)
    floors = ", ".join(f"{metric.name} {metric.floor:.0%}" for metric in METRICS.values())
    parser.add_argument(
        "--noise-floor",
        action="append",
        default=[],
        type=as_argument_type(parse_floor),
        metavar="METRIC=SHARE",
        help=with_default(
            f"largest difference between two processes on your machine, such as throughput=3%; a "
            "change for the worse above both this and the limit is a regression. Repeatable; "
            f"metrics are {', '.join(METRICS)}",
            f"learned from the files if there are enough, such as 3 per side, else {floors}",
        ),
    )
    add_flag(parser, ALLOW)
    add_flag(parser, ALLOW_MISSING)
    parser.add_argument(
        "--fail-on-inconclusive",
        action="store_true",
        help="treat a verdict that changed from PASS to INCONCLUSIVE as a regression",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="PYPROJECT",
        help="file with a table [tool.int8bench.gate] (default: pyproject.toml of this folder or "
        "its closest parent)",
    )
    add_outputs(parser)


def _add_sides(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that select the saved files and the runs to compare."""
    parser.add_argument(
        "files",
        nargs="*",
        metavar="BASE NEW",
        help="two files, folders of files (several runs per side), or pytest-benchmark run numbers "
        "such as 0003 (default: the latest two runs in --storage)",
    )
    parser.add_argument(
        "--base", action="append", default=[], metavar="FILE", help="an additional run of the base"
    )
    parser.add_argument(
        "--new",
        action="append",
        default=[],
        metavar="FILE",
        help="an additional run of the new commit",
    )
    parser.add_argument(
        "-k",
        dest="pick",
        type=as_argument_type(parse_expression),
        metavar="EXPRESSION",
        help="compare only runs whose run name, node id or workload matches, with the syntax of "
        "pytest's -k: 'bert and not smoothq' (default: all)",
    )
    add_storage(parser)


def run_compare(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    try:
        rules = _rules(arguments)
        base, new = _sides(arguments)
        if same := {real_path(path) for path in base} & {real_path(path) for path in new}:
            raise FileError(f"{min(same)} would be compared with itself")
        check_outputs(arguments, {real_path(path) for path in (*base, *new)})
        sides = read_runs(base), read_runs(new)
        found = compare(*sides, rules, arguments.pick)
        if arguments.pick is not None and not (found.runs or found.accuracy):
            raise FileError("-k matches no run in these files")
    except (OSError, ValueError) as error:  # includes SchemaError, FileError and invalid tables
        return refuse("compare", error)
    tell_broken("compare", [*sides[0], *sides[1]])
    return publish(
        "compare",
        arguments,
        report.page(found),
        lambda: report.to_dict(found),
        report.cases(found),
        found.exit_code,
    )


def _rules(arguments: argparse.Namespace) -> Rules:
    """Return the rules of ``pyproject.toml``, overridden by the command line."""
    if arguments.config is not None and not arguments.config.is_file():
        raise FileError(f"--config must be an existing file, got {arguments.config}")
    rules = read_rules(arguments.config or find_pyproject(Path.cwd()))
    given = {name: getattr(arguments, name) for name in METRICS}
    try:
        allow = check_allow(arguments.allow)
    except ValueError as error:
        raise ValueError(f"--allow: {error}") from None
    return dataclasses.replace(
        rules,
        limits={**rules.limits, **{k: v for k, v in given.items() if v is not ...}},
        floors={**rules.floors, **dict(arguments.noise_floor)},
        allow=rules.allow | allow,
        allow_missing=rules.allow_missing or arguments.allow_missing,
        fail_on_inconclusive=rules.fail_on_inconclusive or arguments.fail_on_inconclusive,
    )


def _sides(arguments: argparse.Namespace) -> tuple[list[Path], list[Path]]:
    names = arguments.files
    if not names and not arguments.base and not arguments.new:
        base, new = latest_two(arguments.storage)
        return [base], [new]
    if len(names) not in (0, 2):
        raise FileError(
            f"BASE and NEW must be two files, got {len(names)}; add more runs of a side with "
            "--base and --new"
        )
    sides = []
    for first, more in zip(names or [None, None], (arguments.base, arguments.new), strict=True):
        given = [*([] if first is None else [first]), *more]
        if not given:
            raise FileError("each side must have at least one file; give both --base and --new")
        sides.append(find_side(given, arguments.storage))
    return sides[0], sides[1]

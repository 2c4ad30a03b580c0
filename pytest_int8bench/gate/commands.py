"""``int8bench compare`` and ``int8bench ab``: options in, reports and an exit code out."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pytest_int8bench.errors import ClearError
from pytest_int8bench.gate.compare import UNDECIDED, compare
from pytest_int8bench.gate.design import Design
from pytest_int8bench.gate.files import (
    FileError,
    append,
    check_writable,
    find_side,
    latest_two,
    read_runs,
    write,
)
from pytest_int8bench.gate.limits import (
    METRICS,
    Rules,
    check_allow,
    find_pyproject,
    parse_floor,
    parse_limit,
    parse_share,
    read_rules,
)
from pytest_int8bench.report import comparison as report
from pytest_int8bench.report.junit import Case, to_xml
from pytest_int8bench.report.tables import Page

SUMMARY = "GITHUB_STEP_SUMMARY"


def add_compare(commands: Any) -> None:
    """Add the command to argparse's sub-commands."""
    parser = commands.add_parser(
        "compare",
        help="compare saved files of two commits, and fail if anything regressed",
        description="Compare what was saved at two commits: throughput, batch time, peak memory, "
        "compile time and accuracy verdicts. Exit code 1: something regressed; else 2: something "
        "could not be compared; else 0.",
    )
    parser.add_argument(
        "files",
        nargs="*",
        metavar="BASE NEW",
        help="two files, folders of files (several runs of a side), or numbers of "
        "pytest-benchmark such as 0003; the latest two of --storage by default",
    )
    parser.add_argument(
        "--base", action="append", default=[], metavar="FILE", help="one more run of the base"
    )
    parser.add_argument(
        "--new", action="append", default=[], metavar="FILE", help="one more run of the new commit"
    )
    parser.add_argument(
        "--storage",
        type=Path,
        default=Path(".benchmarks"),
        help="folder that pytest-benchmark saves in (default: .benchmarks)",
    )
    for metric in METRICS.values():
        default = "off" if metric.limit is None else f"{metric.limit:.0%}"
        parser.add_argument(
            f"--{metric.option}",
            dest=metric.name,
            type=_typed(parse_limit),
            metavar="LIMIT",
            default=...,
            help=f"{metric.help}, a percentage or off (default: {default})".replace("%", "%%"),
        )
    parser.add_argument(
        "--noise-floor",
        action="append",
        default=[],
        type=_typed(parse_floor),
        metavar="METRIC=SHARE",
        help="difference between two processes that is taken for noise, such as throughput=3%%; "
        f"metrics are {', '.join(METRICS)} (default: learned where several files are given for a "
        "side, else "
        + ", ".join(f"{m.name} {m.floor:.0%}" for m in METRICS.values()).replace("%", "%%")
        + ")",
    )
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="NAME",
        help="part of the fingerprint that may differ, such as driver; or throttled",
    )
    parser.add_argument(
        "--allow-missing",
        action="store_true",
        help="runs of the base that are gone, or skipped now, do not count",
    )
    parser.add_argument(
        "--fail-on-inconclusive",
        action="store_true",
        help="a verdict that was PASS and is INCONCLUSIVE is a regression",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="PYPROJECT",
        help="file with a table tool.int8bench.gate (default: the closest pyproject.toml)",
    )
    add_outputs(parser)


def add_ab(commands: Any) -> None:
    """Add the command to argparse's sub-commands."""
    design = Design()
    parser = commands.add_parser(
        "ab",
        help="measure two revisions in alternation, and fail if the new one is slower",
        usage="int8bench ab [options] BASE_REV [NEW_REV] -- PYTEST ARGS",
        description="Check both revisions out into git worktrees and measure them by fresh "
        "processes of pytest in alternation, throughput only. Screening clears most runs; what it "
        "flags is measured afresh and judged. Exit code 1: a run is slower (FAIL); else 2: one is "
        "undecided (INCONCLUSIVE) or could not be compared; else 0. An interrupted command goes "
        "on from its journal when it is given again.",
    )
    parser.add_argument("base_rev", metavar="BASE_REV", help="branch, tag or commit, e.g. main")
    parser.add_argument("new_rev", metavar="NEW_REV", nargs="?", help="default: HEAD")
    parser.add_argument(
        "--install",
        metavar="CMD",
        help="shell command that builds or installs packages, run in each worktree with PIP_TARGET "
        "set to a folder of that side, e.g. 'pip install --no-deps .'",
    )
    parser.add_argument(
        "--margin",
        type=_typed(parse_share),
        default=design.margin,
        help=f"slowdown that is never a FAIL (default: {design.margin:.0%})".replace("%", "%%"),
    )
    parser.add_argument(
        "--max-slowdown",
        type=_typed(parse_share),
        default=design.max_slowdown,
        help="slowdown that must be found, and that a PASS excludes (default: "
        f"{design.max_slowdown:.0%})".replace("%", "%%"),
    )
    parser.add_argument(
        "--noise",
        type=_typed(parse_share),
        default=design.noise,
        help="standard deviation between processes that the number of blocks must cope with "
        f"(default: {design.noise:.0%})".replace("%", "%%"),
    )
    parser.add_argument(
        "--screening-blocks",
        type=int,
        default=design.screening_blocks,
        metavar="N",
        help=f"blocks of two processes, AB or BA (default: {design.screening_blocks})",
    )
    parser.add_argument(
        "--verdict-blocks",
        type=int,
        default=design.verdict_blocks,
        metavar="N",
        help="blocks of three processes, ABA, for what screening flags (default: "
        f"{design.verdict_blocks})",
    )
    parser.add_argument(
        "--statistic",
        choices=("auto", "median", "fastest"),
        default="auto",
        help="what stands for a process: its median or its fastest round (default: auto, the "
        "fastest without a GPU, where other load can only add to a time, else the median)",
    )
    parser.add_argument(
        "--retries",
        type=int,
        default=3,
        metavar="N",
        help="blocks to measure again because the GPU was slowed down by heat (default: 3)",
    )
    parser.add_argument(
        "--budget",
        type=_typed(_parse_duration),
        metavar="TIME",
        help="time to end in, such as 30m: no block is begun that would take longer, and nothing "
        "is measured if screening alone would (default: none)",
    )
    parser.add_argument(
        "--allow-missing",
        action="store_true",
        help="runs of the base that the new revision does not have do not count",
    )
    parser.add_argument(
        "--allow-inconclusive",
        action="store_true",
        help="what the blocks cannot decide does not count; it is still listed",
    )
    add_outputs(parser)


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


def run_compare(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    try:
        rules = _rules(arguments)
        base, new = _sides(arguments)
        if same := {path.resolve() for path in base} & {path.resolve() for path in new}:
            raise FileError(f"{min(same)} would be compared with itself")
        _check_outputs(arguments, {path.resolve() for path in (*base, *new)})
        found = compare(read_runs(base), read_runs(new), rules)
    except (OSError, ValueError) as error:  # SchemaError, FileError and bad tables among them
        return refuse("compare", error)
    return publish(
        "compare",
        arguments,
        report.page(found),
        report.to_dict(found),
        report.cases(found),
        found.exit_code,
    )


def run_ab(arguments: argparse.Namespace, pytest_args: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    from pytest_int8bench.gate import ab, worktrees  # with numpy

    def tell(text: str) -> None:
        print(f"int8bench ab: {text}", file=sys.stderr, flush=True)

    try:
        _check_outputs(arguments, set())  # before it takes its time
        here = Path.cwd().resolve()
        root = worktrees.find_repository(here).resolve()
        base = worktrees.resolve(root, arguments.base_rev)
        new = worktrees.resolve(root, arguments.new_rev or "HEAD")
        if changed := worktrees.changed_files(root):
            what = f"{changed[0]} and {len(changed) - 1} more" if changed[1:] else changed[0]
            if arguments.new_rev is None:
                raise worktrees.GitError(
                    f"uncommitted changes would not be measured ({what}): commit them, or name "
                    "NEW_REV"
                )
            tell(f"uncommitted changes are not measured ({what})")
        if arguments.retries < 0:
            raise FileError(f"--retries must be 0 or more, got {arguments.retries}")
        plan = ab.Plan(
            root=root,
            folder=here,
            base=base,
            new=new,
            pytest_args=tuple(pytest_args),
            design=Design(
                margin=arguments.margin,
                max_slowdown=arguments.max_slowdown,
                noise=arguments.noise,
                screening_blocks=arguments.screening_blocks,
                verdict_blocks=arguments.verdict_blocks,
            ),
            install=arguments.install,
            budget_s=arguments.budget,
            retries=arguments.retries,
            allow_missing=arguments.allow_missing,
            allow_inconclusive=arguments.allow_inconclusive,
            statistic=arguments.statistic,
        )
        result = ab.run(plan, tell)
    except (ClearError, OSError) as error:
        return refuse("ab", error)
    except KeyboardInterrupt:
        return refuse("ab", KeyboardInterrupt("interrupted"))
    from pytest_int8bench.report import ab as ab_report

    return publish(
        "ab",
        arguments,
        ab_report.page(result),
        ab_report.to_dict(result),
        ab_report.cases(result),
        result.exit_code,
    )


_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smh])")
_SECONDS = {"s": 1, "m": 60, "h": 3600}


def _parse_duration(text: str) -> float:
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"must be a time such as 90s, 30m or 2h, got {text!r}")
    return float(match[1]) * _SECONDS[match[2]]


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


def _rules(arguments: argparse.Namespace) -> Rules:
    """Return the rules of ``pyproject.toml``, changed by the command line."""
    if arguments.config is not None and not arguments.config.is_file():
        raise FileError(f"--config: {arguments.config} is not there")
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
            f"give BASE and NEW, got {len(names)} file(s); more runs of a side go to --base and "
            "--new"
        )
    sides = []
    for first, more in zip(names or [None, None], (arguments.base, arguments.new), strict=True):
        given = [*([] if first is None else [first]), *more]
        if not given:
            raise FileError("both sides need a file: --base and --new")
        sides.append(find_side(given, arguments.storage))
    return sides[0], sides[1]


def _check_outputs(arguments: argparse.Namespace, inputs: set[Path]) -> None:
    outputs = [p for p in (arguments.json, arguments.markdown, arguments.junit) if p is not None]
    for index, output in enumerate(outputs):
        if output.resolve() in inputs:
            raise FileError(f"{output} is one of the files to compare, and not overwritten")
        if output.resolve() in {other.resolve() for other in outputs[:index]}:
            raise FileError(f"{output} is given for two reports")
        check_writable(output)


def _typed(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a reader whose errors argparse shows."""

    def typed(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return typed

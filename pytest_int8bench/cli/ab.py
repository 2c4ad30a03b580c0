"""Implement ``int8bench ab``, which measures two revisions in alternation."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytest_int8bench.cli.arguments import add_flag, as_argument_type, with_default
from pytest_int8bench.cli.outputs import add_outputs, check_outputs, probe_outputs, publish, refuse
from pytest_int8bench.errors import ClearError
from pytest_int8bench.files import FileError
from pytest_int8bench.gate.ab.design import Design
from pytest_int8bench.gate.flags import ALLOW_MISSING
from pytest_int8bench.gate.rules import parse_share
from pytest_int8bench.printing import one_line, show
from pytest_int8bench.results.checks import shown

#: Field of Design -> help of its option.
_DESIGN = {
    "margin": "largest slowdown that is never a FAIL",
    "max_slowdown": "slowdown that must be detected, and that a PASS rules out",
    "noise": "standard deviation between processes for which the number of blocks must suffice",
    "screening_blocks": "blocks of two processes, AB or BA in random order",
    "verdict_blocks": "maximum number of blocks of four processes, two of each revision in random "
    "order, for runs that screening flags; clear cases need a third of them",
}


def add_ab(commands: Any) -> None:
    """Add the command to argparse's subcommands."""
    parser = commands.add_parser(
        "ab",
        help="measure two revisions in alternation, and fail if the new one is slower",
        usage="int8bench ab [options] BASE_REV [NEW_REV] -- PYTEST ARGS",
        description="Check out both revisions into git worktrees and measure their throughput in "
        "alternation, in fresh pytest processes. Screening clears most runs; flagged runs are "
        "measured again until they are decided. Exits with 1 if a run is slower (FAIL); else "
        "with 2 if a run is undecided (INCONCLUSIVE) or could not be compared; else with 0. "
        "To resume an interrupted comparison, run the same command again.",
    )
    parser.add_argument("base_rev", metavar="BASE_REV", help="branch, tag or commit, e.g. main")
    parser.add_argument("new_rev", metavar="NEW_REV", nargs="?", help="default: HEAD")
    parser.add_argument(
        "--install",
        metavar="CMD",
        help="shell command that builds or installs packages, run in each worktree with PIP_TARGET "
        "set to a folder of that side, e.g. 'pip install --no-deps .'",
    )
    _add_design(parser)
    parser.add_argument(
        "--statistic",
        choices=("auto", "median", "fastest"),
        default="auto",
        help="represent a process by its median or its fastest round (default: auto, which is the "
        "median on a GPU and the fastest on a CPU, where other load can only lengthen a "
        "round)",
    )
    parser.add_argument(
        "--retries",
        type=int,
        default=3,
        metavar="N",
        help="how many blocks to repeat because the GPU was throttled (default: 3)",
    )
    parser.add_argument(
        "--budget",
        type=as_argument_type(_parse_duration),
        metavar="TIME",
        help="time limit, such as 30m: a block that would exceed it is not started, and nothing is "
        "measured if screening alone would exceed it (default: none)",
    )
    add_flag(parser, ALLOW_MISSING)
    parser.add_argument(
        "--allow-inconclusive",
        action="store_true",
        help="do not fail because of undecided runs; they are still listed",
    )
    add_outputs(parser)


def _add_design(parser: argparse.ArgumentParser) -> None:
    """Add an option for each field of :class:`Design` in ``_DESIGN``."""
    design = Design()
    for field, text in _DESIGN.items():
        default = getattr(design, field)
        is_share = isinstance(default, float)
        parser.add_argument(
            f"--{field.replace('_', '-')}",
            type=as_argument_type(parse_share) if is_share else int,
            default=default,
            metavar=None if is_share else "N",
            help=with_default(text, f"{default:.0%}" if is_share else str(default)),
        )


def run_ab(arguments: argparse.Namespace, pytest_args: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    from pytest_int8bench.gate.ab import experiment, worktrees  # imports numpy
    from pytest_int8bench.gate.ab import plan as ab_plan

    def tell(text: str) -> None:
        show(one_line(f"int8bench ab: {text}"), error=True)

    try:
        check_outputs(arguments, set())
        probe_outputs(arguments)
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
        plan = ab_plan.Plan(
            root=root,
            folder=here,
            base=base,
            new=new,
            pytest_args=tuple(pytest_args),
            design=Design(**{field: getattr(arguments, field) for field in _DESIGN}),
            install=arguments.install,
            budget_s=arguments.budget,
            retries=arguments.retries,
            allow_missing=arguments.allow_missing,
            allow_inconclusive=arguments.allow_inconclusive,
            statistic=arguments.statistic,
        )
        result = experiment.run(plan, tell)
    except (ClearError, OSError) as error:
        return refuse("ab", error)
    from pytest_int8bench.report import ab as ab_report

    return publish(
        "ab",
        arguments,
        ab_report.page(result),
        lambda: ab_report.to_dict(result),
        ab_report.cases(result),
        result.exit_code,
    )


_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smh])")
_SECONDS = {"s": 1, "m": 60, "h": 3600}


def _parse_duration(text: str) -> float:
    match = _DURATION.fullmatch(text.strip())
    if match is None or not math.isfinite(found := float(match[1]) * _SECONDS[match[2]]):
        raise ValueError(f"must be a time such as 90s, 30m or 2h, got {shown(text)}")
    return found

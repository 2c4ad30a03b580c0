"""Report an A/B measurement of two revisions as text, Markdown, JSON and JUnit XML."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

from pytest_int8bench.environment import describe
from pytest_int8bench.gate.ab.journal import SCHEMA
from pytest_int8bench.gate.ab.judging import Estimate
from pytest_int8bench.gate.ab.plan import FIELDS, AbResult, AbRun, duration
from pytest_int8bench.gate.outcomes import PASSES, REGRESSES, UNDECIDED
from pytest_int8bench.report.cells import value_text
from pytest_int8bench.report.junit import Case, case_status
from pytest_int8bench.report.tables import MISSING, Grid, Page, finite
from pytest_int8bench.results.base import point_label
from pytest_int8bench.results.figures import FIGURES, Figure

_TITLE = "int8bench ab"
_HEADLINES = {0: "PASS", 1: "FAIL", 2: "INCONCLUSIVE"}


def page(result: AbResult) -> Page:
    """Return the report of an A/B measurement as a page."""
    count = Counter(run.outcome for run in result.runs)
    listed = ", ".join(f"{number} {outcome}" for outcome, number in count.items()) or "no run"
    runs = sorted(result.runs, key=lambda run: (REGRESSES, UNDECIDED, PASSES).index(run.exit_code))
    return Page(
        title=_TITLE,
        headline=f"{_HEADLINES[result.exit_code]} ({listed})",
        grids=[_table(result)] if result.runs else [],
        remarks=[
            *(["nothing was compared"] if result.is_empty else []),
            *(f"{run.outcome}: {_name(run)}: {run.reason}" for run in runs if run.reason),
            *(f"note: {note}" for note in result.notes),
        ],
        footer=_footer(result),
    )


def to_dict(result: AbResult) -> dict[str, Any]:
    """Return the result as plain values, under ``int8bench_ab``."""
    plan = result.plan
    return {
        "int8bench_ab": {
            "schema": SCHEMA,
            "exit_code": result.exit_code,
            "base": dataclasses.asdict(plan.base),
            "new": dataclasses.asdict(plan.new),
            "pytest_args": list(plan.pytest_args),
            "install": plan.install,
            "design": dataclasses.asdict(plan.design),
            "environment": dict(result.environment),
            "statistic": result.statistic,
            "processes": result.processes,
            "seconds": result.seconds,
            "runs": [finite(dataclasses.asdict(run)) for run in result.runs],
            "notes": list(result.notes),
        }
    }


def cases(result: AbResult) -> list[Case]:
    """Return one JUnit case for each run."""
    found = []
    for run in result.runs:
        status = case_status(run.exit_code, is_skipped=run.outcome != "PASS")
        message = f"{run.outcome}: {run.reason}" if run.reason else run.outcome
        estimate = _estimate(run)
        if estimate is not None:
            message += f" (slowdown {_interval(estimate)})"
        found.append(Case(classname=run.nodeid, name=_name(run), status=status, message=message))
    if result.is_empty:  # skipped cases alone would look like a success
        found.append(
            Case(classname=_TITLE, name="compared", status="error", message="nothing was compared")
        )
    return found


def _table(result: AbResult) -> Grid:
    columns: dict[str, Callable[[AbRun], str]] = {
        "run": _name,
        **_time_columns(result),
        "slowdown [95 %, one-sided]": lambda run: _interval(_estimate(run)),
        "noise": lambda run: MISSING if (e := _estimate(run)) is None else f"{e.noise:.1%}",
        "blocks": _blocks,
        "p": lambda run: MISSING if run.judged is None else f"{run.judged.p_holm:.2g}",
        "base again": lambda run: _interval(run.judged.control if run.judged else None),
        "verdict": lambda run: run.outcome,
    }
    level = result.plan.design.level
    shown = {name.replace("95", f"{100 * (1 - level):g}"): show for name, show in columns.items()}
    return Grid(
        columns=[*shown],
        rows=[[show(run) for show in shown.values()] for run in result.runs],
        styles=[_style(run) for run in result.runs],
        name="run",
        left=("verdict",),
        first=("verdict", next(name for name in shown if name.startswith("slowdown"))),
    )


def _time_columns(result: AbResult) -> dict[str, Callable[[AbRun], str]]:
    """Return a column for the times of points, one for those of plain benchmarks, or both, as
    needed."""

    def column(figure: Figure) -> Callable[[AbRun], str]:
        return lambda run: (
            _times(run, figure) if run.is_benchmark == figure.of_benchmarks else MISSING
        )

    kinds = {run.is_benchmark for run in result.runs}
    figures = (FIGURES[field] for field in FIELDS[result.statistic])
    return {figure.header: column(figure) for figure in figures if figure.of_benchmarks in kinds}


def _estimate(run: AbRun) -> Estimate | None:
    if run.judged is not None:
        return run.judged.estimate
    return run.screened.estimate if run.screened is not None else None


def _times(run: AbRun, time: Figure) -> str:
    if run.base_s is None or run.new_s is None:
        return MISSING
    return f"{value_text(time, run.base_s)} -> {value_text(time, run.new_s)}"


def _interval(estimate: Estimate | None) -> str:
    if estimate is None:
        return MISSING
    low, high = (f"{100 * share:+.1f}" for share in (estimate.low, estimate.high))
    return f"{100 * estimate.slowdown:+.1f}% [{low}, {high}]"


def _blocks(run: AbRun) -> str:
    estimates = [run.screened and run.screened.estimate, run.judged and run.judged.estimate]
    return " + ".join(str(e.blocks) for e in estimates if e) or MISSING


def _style(run: AbRun) -> str | None:
    if run.exit_code == REGRESSES:
        return "red"
    if run.exit_code != PASSES:
        return "yellow"
    return None if run.outcome == "PASS" else "dim"


def _name(run: AbRun) -> str:
    return point_label(run.workload, run.run_name)


def _footer(result: AbResult) -> list[str]:
    plan, design = result.plan, result.plan.design
    compared = (
        f"base: {plan.base.label}; new: {plan.new.label}; {result.processes} processes, "
        f"{duration(result.seconds)}"
    )
    rule = (
        f"FAIL: slower by more than {design.margin:.1%} (randomization test over the order of "
        f"processes, family-wise error {design.level:.0%} over all looks); PASS: a slowdown of "
        f"{design.max_slowdown:.1%} is ruled out"
    )
    return [compared, rule, describe(dict(result.environment))]

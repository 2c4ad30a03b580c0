"""Report a comparison of saved files as text, Markdown, JSON and JUnit XML."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pytest_int8bench.gate.compare import Comparison, Side
from pytest_int8bench.gate.outcomes import (
    ACCURACY_FAILED,
    DISABLED,
    FAILED,
    IMPROVED,
    INCOMPARABLE,
    MISSING,
    NEW,
    OOM,
    PASSES,
    REGRESSES,
    SAME,
    SKIPPED,
    SUSPECTED,
    UNDECIDED,
    Change,
    Compared,
    RunChange,
)
from pytest_int8bench.gate.verdicts import VerdictChange
from pytest_int8bench.report.cells import value_text
from pytest_int8bench.report.junit import Case, case_status
from pytest_int8bench.report.tables import MISSING as NOTHING
from pytest_int8bench.report.tables import Grid, Page, finite
from pytest_int8bench.results.base import point_label
from pytest_int8bench.results.figures import METRICS, Figure
from pytest_int8bench.words import plural, some

SCHEMA = 1
_TITLE = "int8bench compare"
_NOTHING_COMPARED = "nothing was compared"
_HEADLINES = {0: "nothing regressed", 1: "REGRESSED", 2: "NOT COMPARED"}


def page(comparison: Comparison) -> Page:
    """Return the report of a comparison as a page."""
    grids = []
    benchmarks = tuple(run for run in comparison.runs if run.is_benchmark)
    if points := tuple(run for run in comparison.runs if not run.is_benchmark):
        grids.append(_runs(points, "run"))
    if benchmarks:
        grids.append(_runs(benchmarks, "benchmark"))
    if comparison.accuracy:
        grids.append(_verdicts(comparison.accuracy))
    return Page(
        title=_TITLE,
        headline=f"{_headline(comparison)} ({_counts(comparison)})",
        grids=grids,
        remarks=_remarks(comparison),
        footer=[
            f"base: {_side(comparison.base)}",
            f"new: {_side(comparison.new)}",
            *_rules(comparison),
        ],
    )


def _headline(comparison: Comparison) -> str:
    if comparison.exit_code == UNDECIDED and SUSPECTED in comparison.counts:
        return "SUSPECTED"
    return _HEADLINES[comparison.exit_code]


def to_dict(comparison: Comparison) -> dict[str, Any]:
    """Return the comparison as plain values, under ``int8bench_compare``."""
    values = finite(comparison)
    return {"int8bench_compare": {"schema": SCHEMA, "exit_code": comparison.exit_code, **values}}


def cases(comparison: Comparison) -> list[Case]:
    """Return one JUnit case for each run and verdict, and one for the fingerprint."""
    found = []
    for entry in (*comparison.runs, *comparison.accuracy):
        name = _name(entry)
        if isinstance(entry, VerdictChange):
            name = f"{name} {entry.metric}"
        is_skipped = entry.outcome in (MISSING, SKIPPED, DISABLED, NEW)
        status = case_status(entry.exit_code, is_skipped=is_skipped)
        message = f"{entry.outcome}: {entry.reason}" if entry.reason else entry.outcome
        found.append(Case(classname=entry.nodeid, name=name, status=status, message=message))
    differing = _differing(comparison.differences)
    found.append(
        Case(
            classname=_TITLE,
            name="fingerprint",
            status="error" if differing else "passed",
            message="; ".join(differing),
        )
    )
    if not comparison.compared:
        found.append(
            Case(classname=_TITLE, name="compared", status="error", message=_NOTHING_COMPARED)
        )
    return found


def _counts(comparison: Comparison) -> str:
    count = ", ".join(f"{number} {outcome}" for outcome, number in comparison.counts.items())
    text = f"{plural(len(comparison.runs), 'run')}: {count}" if comparison.runs else "no run"
    if comparison.accuracy:
        worse = sum(v.exit_code == REGRESSES for v in comparison.accuracy)
        text += f"; {plural(len(comparison.accuracy), 'verdict')}: {worse} regressed"
    return text


def _side(side: Side) -> str:
    commits = some(list(dict.fromkeys(commit[:10] for commit in side.commits)))
    dirty = ", uncommitted changes" if side.dirty else ""
    return f"{some(side.files)} ({commits}{dirty})"


def _rules(comparison: Comparison) -> list[str]:
    """Return a line for each judged metric with its limits and noise floors."""
    lines = []
    for metric in METRICS.values():
        changes = [c for run in comparison.runs if (c := run.change(metric.name)) is not None]
        judged = [change for change in changes if change.limit is not None]
        if not judged:
            continue
        limits = sorted({change.limit for change in judged if change.limit is not None})
        floors = sorted({round(change.floor, 4) for change in judged})
        how = "learned from the files" if any(c.learned for c in judged) else "as given"
        if all(change.floor == metric.floor for change in judged):
            how = "the default for few files"
        lines.append(
            f"{metric.option}: {_range(limits)}; noise floor between processes "
            f"{_range(floors)} ({how}){_shown_from(judged)}"
        )
    return lines


def _shown_from(judged: Sequence[Change]) -> str:
    """Describe the smallest growth that the comparison can detect, and what this assumes; empty if
    unknown."""
    limits = {c.shown_from for c in judged if c.shown_from is not None}
    shown = sorted({round(limit, 4) for limit in limits if math.isfinite(limit)})
    if not shown:
        return ""
    assumed = sorted({c.assumed for c in judged if c.assumed is not None} - {math.inf})
    why = f", assuming that processes differ by {_range(assumed)}" if assumed else ""
    return f"; regressions are detected from {_range(shown)} on{why}"


def _range(shares: list[float]) -> str:
    ends = dict.fromkeys(f"{share:.1%}" for share in (shares[0], shares[-1]))
    return " to ".join(ends)


def _differing(differences: Mapping[str, tuple[Any, Any]]) -> list[str]:
    return [f"{name}: {base} -> {new}" for name, (base, new) in differences.items()]


def _remarks(comparison: Comparison) -> list[str]:
    lines = [f"differs: {line}" for line in _differing(comparison.differences)]
    if comparison.differences:
        allow = " ".join(f"--allow {name}" for name in comparison.differences)
        lines.append(
            "results of different machines or software are not compared; to compare anyway: "
            f"{allow}"
        )
    lines += [f"differs, as allowed: {line}" for line in _differing(comparison.allowed)]
    if not comparison.compared:
        lines.append(f"{_NOTHING_COMPARED}: no run or verdict was measured on both sides")
    incomparable_everywhere = bool(comparison.differences)
    for run in sorted(comparison.runs, key=_badness):
        if run.outcome == INCOMPARABLE and incomparable_everywhere and not run.changes:
            continue  # the remark above covers all of them
        if run.reason is not None:
            lines.append(f"{run.outcome}: {_name(run)}: {run.reason}")
    for verdict in sorted(comparison.accuracy, key=_badness):
        if verdict.outcome == INCOMPARABLE and incomparable_everywhere:
            continue
        if verdict.reason is not None:
            lines.append(f"{verdict.outcome}: {_name(verdict)} {verdict.metric}: {verdict.reason}")
    return lines + [f"note: {note}" for note in comparison.notes]


def _badness(entry: Compared) -> int:
    """Return a key that sorts the worst entries first."""
    return (REGRESSES, UNDECIDED, PASSES).index(entry.exit_code)


def _name(entry: Compared) -> str:
    return point_label(entry.workload, entry.run_name)


def _runs(runs: tuple[RunChange, ...], what: str) -> Grid:
    figures = [
        figure
        for figure in METRICS.values()
        if figure.of_benchmarks == runs[0].is_benchmark and _has_column(figure, runs)
    ]
    return Grid(
        columns=[what, *(figure.header for figure in figures), "outcome"],
        rows=[
            [_name(run), *(_cell(run, figure) for figure in figures), run.outcome] for run in runs
        ],
        styles=[_style(run) for run in runs],
        name=what,
        left=("outcome",),
        first=[*(f.header for f in figures if f.leads), "outcome"],
    )


def _has_column(figure: Figure, runs: Sequence[RunChange]) -> bool:
    if figure.shown == "where judged":
        changes = (run.change(figure.name) for run in runs)
        return any(change is not None and change.limit is not None for change in changes)
    is_measured = any(figure.name in side for run in runs for side in (run.base, run.new))
    return figure.shown == "always" or is_measured


def _cell(run: RunChange, figure: Figure) -> str:
    base, new = (value_text(figure, side.get(figure.name)) for side in (run.base, run.new))
    if run.outcome == OOM and figure.shows_status:
        new = "OOM"
    text = NOTHING if base == new == NOTHING else f"{base} -> {new}"
    change = run.change(figure.name)
    # Growth refers to the cost; shown next to a rate, it would read as growth of the rate.
    is_shown = change is not None and not figure.higher_is_better
    return f"{text} ({change.growth:+.1%})" if change is not None and is_shown else text


def _style(entry: Compared) -> str | None:
    if entry.exit_code == REGRESSES or entry.outcome in (FAILED, ACCURACY_FAILED, OOM):
        return "red"
    if entry.exit_code != PASSES:
        return "yellow"
    return {IMPROVED: "green", SAME: None}.get(entry.outcome, "dim")


def _verdicts(verdicts: tuple[VerdictChange, ...]) -> Grid:
    columns: dict[str, Callable[[VerdictChange], str]] = {
        "accuracy": _name,
        "metric": lambda v: v.metric,
        "base": lambda v: v.base or NOTHING,
        "new": lambda v: (v.new or NOTHING) + ("*" if v.is_pipeline_check else ""),
        "outcome": lambda v: v.outcome,
    }
    return Grid(
        columns=[*columns],
        rows=[[show(verdict) for show in columns.values()] for verdict in verdicts],
        styles=[_style(verdict) for verdict in verdicts],
        name="accuracy",
        left=("metric", "base", "new", "outcome"),
        keys=("metric",),
        first=("outcome",),
    )

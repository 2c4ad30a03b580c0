"""Format a session's results for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pytest_int8bench.choices import precision
from pytest_int8bench.environment import describe
from pytest_int8bench.report.cells import figure_cell, score_text, status_text
from pytest_int8bench.report.remarks import (
    THROTTLED_MARK,
    remarks,
    short_rounds,
    status_remarks,
)
from pytest_int8bench.report.tables import MISSING, Grid, paragraphs, plain_grid
from pytest_int8bench.results.benchmarks import Benchmark, unsynchronized
from pytest_int8bench.results.figures import FIGURES, Figure
from pytest_int8bench.results.records import Result, Saved, Timed
from pytest_int8bench.results.verdicts import Accuracy, Sensitivity
from pytest_int8bench.words import plural

#: Appended to a verdict on a model with random weights.
_PIPELINE = "*"
PIPELINE_CHECK = (
    f"{_PIPELINE} pipeline check: the weights are random, so the verdict only shows that scoring "
    "works and never fails a test; see --int8-weights"
)


def render(saved: Saved, *, width: int | None, color: bool) -> str:
    """Return the tables, the remarks and a description of the machine as text.

    Args:
        saved: the results to show.
        width: columns of the terminal; None for as wide as the tables need.
        color: use ANSI colors.
    """
    measured = [r for r in saved.results if r.samples_per_s is not None or r.oom]
    timed = [benchmark for benchmark in saved.benchmarks if benchmark.call_time_s is not None]
    shown = [results_table(measured)] if measured else []
    shown += [benchmarks_table(timed)] if timed else []
    tables: list[tuple[str | None, Grid]] = [(None, table) for table in shown]
    if judged := [v for v in saved.accuracy if v.limit is not None]:
        tables.append((None, accuracy_table(judged)))
    tables += [
        (f"{scan.label}, {scan.samples:,} samples", sensitivity_table(scan))
        for scan in saved.sensitivity
    ]

    def fold(*texts: str, style: str | None = None) -> str:
        return paragraphs(texts, width=width, color=color, style=style)

    parts = []
    for title, table in tables:
        parts.append(fold(*([title] if title else [])) + table.text(width=width, color=color))
    text = "\n".join(parts)
    verdict_lines = [line for verdict in saved.accuracy for line in verdict_remarks(verdict)]
    if any(verdict.is_pipeline_check for verdict in saved.accuracy):
        text += fold(PIPELINE_CHECK)
    text += fold(*verdict_lines)
    lines: dict[str, None] = {}  # several tests of one point may report the same problem
    for result in saved.results:
        if result.reason not in verdict_lines:
            lines |= dict.fromkeys(status_remarks(result))
        lines |= dict.fromkeys(remarks(result))
    text += fold(*lines)
    disabled = [benchmark for benchmark in saved.benchmarks if benchmark.is_disabled]
    for benchmark in saved.benchmarks:
        text += fold(*(() if benchmark.is_disabled else status_remarks(benchmark)))
    if disabled:
        count = plural(len(disabled), "plain benchmark")
        text += fold(f"skipped: {count}: {disabled[0].reason}")
    if timer := unsynchronized(saved.benchmarks, saved.environment):
        text += fold(timer)
    if version := _olmoearth_version(measured):
        text += fold(version, style="dim")
    if short := short_rounds(saved.results):
        text += fold(short)
    return text + fold(describe(saved.environment), style="dim")


def _olmoearth_version(results: Sequence[Result]) -> str | None:
    """Return a line on the model version, which run names of OlmoEarth omit; None without such
    results."""
    ours = [result for result in results if result.workload == "olmoearth"]
    versions = sorted({str(v) for r in ours if (v := r.params.get("model_version"))})
    if not versions:
        return None
    tokens = {
        round(r.tokens_per_s / r.samples_per_s) for r in ours if r.tokens_per_s and r.samples_per_s
    }
    counts = f", {tokens.pop():,} tokens per sample" if len(tokens) == 1 else ""
    return f"OlmoEarth model version: {', '.join(versions)}{counts}"


def benchmarks_table(benchmarks: Sequence[Benchmark]) -> Grid:
    """Return a table of plain benchmarks."""
    figures = [f for f in FIGURES.values() if f.of_benchmarks and _has_column(f, benchmarks)]
    return plain_grid(
        ["benchmark", *(figure.header for figure in figures), "rounds", "calls/round"],
        [
            [
                benchmark.run_name,
                *(figure_cell(figure, benchmark) for figure in figures),
                *(
                    MISSING if n is None else f"{n:,}"
                    for n in (benchmark.rounds, benchmark.iterations)
                ),
            ]
            for benchmark in benchmarks
        ],
    )


def results_table(results: Sequence[Result]) -> Grid:
    """Return a table of points that were measured or ran out of memory."""
    figures = [f for f in FIGURES.values() if not f.of_benchmarks and _has_column(f, results)]
    has_workloads = {result.workload for result in results} != {"olmoearth"}
    names = ["workload", "run"] if has_workloads else ["run"]
    return Grid(
        columns=[*names, *(figure.header for figure in figures)],
        rows=[
            [
                *([result.workload] if has_workloads else []),
                result.run_name,
                *(_cell(figure, result) for figure in figures),
            ]
            for result in results
        ],
        styles=[None if result.status == "ok" else "red" for result in results],
        name="run",
        left=("workload", *(figure.header for figure in figures if figure.kind == "text")),
        keys=("workload",),
        first=[figure.header for figure in figures if figure.leads],
    )


def _has_column(figure: Figure, results: Sequence[Timed]) -> bool:
    if not figure.header or figure.shown == "where judged":
        return False
    return figure.shown == "always" or any(figure.of(result) is not None for result in results)


def _cell(figure: Figure, result: Result) -> str:
    if not figure.shows_status:
        return figure_cell(figure, result)
    if result.oom:
        return status_text(result)
    return figure_cell(figure, result) + (THROTTLED_MARK if result.throttled else "")


def accuracy_table(verdicts: Sequence[Accuracy]) -> Grid:
    """Return a table of verdicts on labelled samples."""
    candidates = {precision(verdict.params) for verdict in verdicts}
    columns: dict[str, Callable[[Accuracy], str]] = {
        "accuracy": lambda v: v.run_name,
        "metric": lambda v: v.metric,
        "samples": lambda v: f"{v.samples:,}",
        "baseline": lambda v: score_text(v.baseline),
        candidates.pop() if len(candidates) == 1 else "candidate": lambda v: score_text(
            v.candidate
        ),
        "drop [one-sided 95 %]": shown_drop,
        "worse/better": lambda v: f"{v.lost}/{v.gained}",
        "limit": lambda v: v.limit or MISSING,
        "verdict": lambda v: v.outcome + (_PIPELINE if v.is_pipeline_check else ""),
    }
    if {verdict.workload for verdict in verdicts} != {"olmoearth"}:
        columns = {"workload": lambda v: v.workload, **columns}
    return Grid(
        columns=[*columns],
        rows=[[show(v) for show in columns.values()] for v in verdicts],
        styles=[_style(v) for v in verdicts],
        name="accuracy",
        left=("workload", "metric", "verdict"),
        keys=("workload", "metric"),
        first=("drop [one-sided 95 %]", "limit", "verdict"),
    )


def _style(verdict: Accuracy) -> str | None:
    if verdict.is_pipeline_check:
        return "dim"
    return None if verdict.outcome == "PASS" else "red"


def shown_drop(verdict: Accuracy) -> str:
    """Return a verdict's drop with its bounds."""
    drop, low, high = (
        MISSING if value is None else f"{100 * value:.2f}"
        for value in (verdict.drop, verdict.drop_low, verdict.drop_high)
    )
    return MISSING if drop == MISSING else f"{drop}{verdict.drop_unit} [{low}, {high}]"


def verdict_remarks(verdict: Accuracy) -> list[str]:
    """Return the remarks on a verdict that are not in its row."""
    from pytest_int8bench.report.verdict_text import beside_row

    return beside_row(verdict)


def sensitivity_table(found: Sensitivity) -> Grid:
    """Return a table of the loss from quantizing each layer or block."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        f"{precision(found.params)} in one {found.by} alone": lambda row: str(row["name"]),
        "SQNR dB": lambda row: MISSING if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f}",
    }
    if found.metric is not None:
        columns[f"{found.metric} drop"] = lambda row: f"{100 * row['drop']:.2f}pp"
        columns["worse/better"] = lambda row: f"{row['lost']}/{row['gained']}"
    rows = [[show(row) for show in columns.values()] for row in found.layers]
    return plain_grid([*columns], rows)

"""Describe accuracy verdicts in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pytest_int8bench.choices import precision, takes_smoothquant
from pytest_int8bench.report.cells import score_text
from pytest_int8bench.report.tables import MISSING
from pytest_int8bench.results.verdicts import NO_LABELS, Accuracy

_CLOSE = "its outputs are close to the baseline's, which does not measure accuracy"


def message(verdicts: Sequence[Accuracy], *, remedied: bool) -> str:
    """Return the message of a failing test: for each verdict, a line and its figures, worst first.

    Args:
        verdicts: the verdicts that did not pass.
        remedied: whether ``--int8-remedy`` has already been tried.
    """
    lines: list[str] = []
    for verdict in sorted(verdicts, key=lambda v: v.outcome != "FAIL"):
        lines += describe(verdict)
    failed = [v for v in verdicts if v.outcome == "FAIL" and v.metric != NO_LABELS]
    if failed and not remedied:
        smoothing = "SmoothQuant, " if any(takes_smoothquant(v.params) for v in failed) else ""
        lines.append(f"--int8-remedy tries {smoothing}BF16 for the worst layers, and W8")
    if any(v.outcome == "INCONCLUSIVE" for v in verdicts):
        lines.append("--int8-inconclusive=warn makes inconclusive verdicts warnings, not failures")
    return "\n".join(lines)


def describe(verdict: Accuracy) -> list[str]:
    """Return a verdict as lines of text. The first line can stand alone."""
    name = verdict.label
    check = " (pipeline check: random weights)" if verdict.is_pipeline_check else ""
    if verdict.metric == NO_LABELS:
        why = verdict.reason or _CLOSE
        return [f"{verdict.outcome}: {name}: {why}", f"  {describe_distance(verdict)}"]
    drop, low, high = (
        MISSING if value is None else f"{100 * value:.2f}{verdict.drop_unit}"
        for value in (verdict.drop, verdict.drop_low, verdict.drop_high)
    )
    quantized = precision(verdict.params)
    moved = f"dropped by {drop} [{low}, {high}]"
    if (verdict.drop or 0) < 0:
        moved = f"rose by {drop.removeprefix('-')} (drop [{low}, {high}])"
    lines = [
        f"{verdict.outcome}: {name}: {verdict.metric} {moved}, limit {verdict.limit}{check}",
        (
            f"  {verdict.float_dtype} {score_text(verdict.baseline)}, "
            f"{quantized} {score_text(verdict.candidate)}, "
            f"{_counted(verdict)}: {verdict.lost} got worse, {verdict.gained} better "
            "(one-sided 95 % bounds)"
        ),
    ]
    if verdict.needed is not None and not verdict.is_pipeline_check:
        lines.append(f"  {_undecided(verdict)}")
    if verdict.reason and not (verdict.remedies or verdict.is_pipeline_check):
        lines.append(f"  {verdict.reason}")
    return [*lines, *describe_remedies(verdict.remedies)]


def beside_row(verdict: Accuracy) -> list[str]:
    """Return lines that supplement the row of a verdict in a table."""
    if verdict.is_pipeline_check or verdict.outcome == "PASS":
        return []
    if verdict.needed is not None:  # all other figures are in the row
        return [f"undecided: {verdict.label}: {verdict.metric}: {_undecided(verdict)}"]
    return describe(verdict)


def _counted(verdict: Accuracy) -> str:
    groups = "" if verdict.groups is None else f" in {verdict.groups} groups"
    return f"{verdict.samples} samples{groups}"


def _undecided(verdict: Accuracy) -> str:
    needed = verdict.needed or 0
    groups = ""
    if verdict.groups is not None:
        groups = f" in {math.ceil(needed * verdict.groups / verdict.samples):,} groups"
    return f"{_counted(verdict)} are too few to decide; about {needed:,}{groups} are needed"


def describe_remedies(tried: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return lines that list the remedies tried, and the configurations that passed."""
    lines = []
    for row in tried:
        name = f"{row['rung']} ({row['setting']})" if row["setting"] else row["rung"]
        if row["selection_drop"] is None:
            lines.append(f"  tried {name}: {row['problem']}")
            continue
        lines.append(
            f"  tried {name}: drop {row['selection_drop']:.2%} on "
            f"{row['selection_samples']} selection samples"
        )
        if row["outcome"] is None:
            if row["problem"]:
                lines.append(f"    {row['problem']}")
            continue
        lines.append(
            f"    {row['outcome']}: drop {row['drop']:.2%} [{_share(row.get('drop_low'))}, "
            f"{_share(row.get('drop_high'))}] on {row['samples']} other samples"
        )
        lines[-1] += f", {_cost(row)}" + (f"; {row['problem']}" if row["problem"] else "")
    passed = [row for row in tried if row["outcome"] == "PASS"]
    for row in passed:
        lines.append("  remedy:")
        lines += [f"    {line}".rstrip() for line in row["configuration"].splitlines()]
    if tried and not passed:
        lines.append("  remedy: none of these passes")
    return lines


def _share(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2%}"


def _cost(row: Mapping[str, Any]) -> str:
    if row.get("speedup") is None:
        return f"speed not measured: {row.get('speed_problem')}"
    low, high = row["speedup_low"], row["speedup_high"]
    return f"{row['speedup']:.2f}x [{low:.2f}, {high:.2f}] the speed of the baseline"


def describe_distance(verdict: Accuracy) -> str:
    """Return the figures of an output comparison, followed by its noise floor: the same figures
    without INT8."""
    found, floor = verdict.distance or {}, verdict.floor or {}
    formats: dict[str, tuple[str, Callable[[float], str]]] = {
        "cosine": ("cosine", lambda v: f"{v:.5f}"),
        "sqnr_db": ("SQNR", lambda v: f"{v:.1f} dB"),
        "top1_agreement": ("top-1 agreement", lambda v: f"{v:.1%}"),
        "knn_agreement": ("kNN agreement", lambda v: f"{v:.1%}"),
    }
    parts, floors = [], []
    for field, (name, show) in formats.items():
        value, against = found.get(field), floor.get(field)
        if value is not None:
            parts.append(f"{name} {show(value)}")
        elif field == "sqnr_db":
            parts.append("SQNR infinite (equal outputs)")
        else:
            continue
        floors.append("infinite" if against is None else show(against))
    floor_text = f" (without INT8: {', '.join(floors)})" if floors else ""
    return f"{', '.join(parts)}{floor_text}, {verdict.samples} samples"

"""Accuracy against throughput."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from pytest_int8bench.accuracy.limit import Limit
from pytest_int8bench.report.page import labels
from pytest_int8bench.report.page.charts import Pareto, Spot
from pytest_int8bench.report.page.groups import Params, Scope
from pytest_int8bench.report.page.model import Section, Titled
from pytest_int8bench.report.page.sources import Found
from pytest_int8bench.report.tables import number
from pytest_int8bench.report.terminal import PIPELINE_CHECK, accuracy_table, verdict_remarks
from pytest_int8bench.results.figures import FIGURES
from pytest_int8bench.results.records import Result
from pytest_int8bench.results.verdicts import Accuracy


def section(scopes: Sequence[Scope], verdicts: list[Found[Accuracy]]) -> Section | None:
    """Return the section of accuracy verdicts, or None without verdicts."""
    if not verdicts:
        return None
    judged = [found for found in verdicts if found.record.limit is not None]
    tables = []
    if judged:
        grid = accuracy_table([found.record for found in judged])
        tables.append(Titled(caption="Verdicts", grid=grid))
    remarks = [verdict_remarks(found.record) for found in verdicts]
    notes = ["\n".join(lines) for lines in remarks if lines]
    if any(found.record.is_pipeline_check for found in verdicts):
        notes.append(PIPELINE_CHECK)
    charts = _paretos(scopes, judged)
    drawn = {spot.name for chart in charts for spot in chart.spots}
    intro = (
        "Drop of the metric from the baseline on the same samples, with one-sided 95 % bounds. "
        "PASS: a drop above the limit is ruled out. FAIL: a drop within the limit is ruled out."
    )
    front = (
        "Up and left is better. The stepped line joins the Pareto-optimal points. Points that did "
        "not pass are hollow."
    )
    if judged and not drawn:
        notes.append("Not drawn against throughput: no point has both a verdict and a throughput.")
    return Section(
        id="accuracy",
        title="Accuracy",
        intro=(intro,) if judged else (),
        pictures=(front,) if charts else (),
        charts=tuple(charts),
        tables=tuple(tables),
        notes=tuple(notes),
    )


def _paretos(scopes: Sequence[Scope], judged: Sequence[Found[Accuracy]]) -> list[Pareto]:
    charts = []
    for scope in scopes:
        groups: dict[tuple[str, str], list[Accuracy]] = {}
        for found in judged:
            if (found.record.workload, found.device) == (scope.workload, scope.device):
                key = (found.record.metric, found.record.drop_unit)
                groups.setdefault(key, []).append(found.record)
        for index, ((metric, unit), group) in enumerate(groups.items(), start=1):
            spots = _spots(scope, group)
            if spots:
                charts.append(_pareto(scope, index, metric, unit, group, spots))
    return charts


def _pareto(
    scope: Scope,
    index: int,
    metric: str,
    unit: str,
    group: Sequence[Accuracy],
    spots: Sequence[Spot],
) -> Pareto:
    limits = {100 * Limit.parse(str(verdict.limit)).value for verdict in group}
    named = ", ".join(dict.fromkeys(str(verdict.limit) for verdict in group))
    parts = [f"{s.name}: {s.drop:.2f}{unit}, {number(s.rate)}/s, {s.verdict}" for s in spots]
    title = f"Accuracy drop against throughput: {metric}"
    return Pareto(
        id=f"pareto-{scope.id}-{index}",
        title=title + (scope.title.replace(": ", ", ", 1) if scope.title else ""),
        description=f"Limit {named}. {'; '.join(parts)}.",
        unit=FIGURES["samples_per_s"].unit,
        drop_unit=unit,
        limits=tuple(sorted(limits)),
        spots=tuple(spots),
    )


def _spots(scope: Scope, group: Sequence[Accuracy]) -> list[Spot]:
    """Return the judged points that were timed, and their baselines with a drop of 0."""
    timed = {r.run_name: (r, p, n) for r, p, n in scope.pick(labels.is_measured)}
    baselines: dict[str, list[tuple[Result, str]]] = {}
    for base, params, name in timed.values():
        if not params.get("int8_enabled"):
            baselines.setdefault(_without_int8(params), []).append((base, name))
    spots: dict[str, Spot] = {}
    for verdict in group:
        if verdict.run_name not in timed or verdict.drop is None:
            continue
        result, params, name = timed[verdict.run_name]
        rate = result.samples_per_s or 0.0
        for base, base_name in baselines.get(_without_int8(params), ()):
            spots[base_name] = Spot(
                name=base_name,
                style=0,
                drop=0.0,
                low=None,
                high=None,
                rate=base.samples_per_s or 0.0,
                verdict="baseline",
                best=False,
            )
        spots[name] = Spot(
            name=name,
            style=labels.style(params),
            drop=100 * verdict.drop,
            low=_percent(verdict.drop_low),
            high=_percent(verdict.drop_high),
            rate=rate,
            verdict=verdict.outcome + ("*" if verdict.is_pipeline_check else ""),
            best=False,
        )
    best = _unbeaten(list(spots.values()))
    return [dataclasses.replace(s, best=(s.drop, s.rate) in best) for s in spots.values()]


def _unbeaten(spots: Sequence[Spot]) -> set[tuple[float, float]]:
    """Return the drop and rate of each Pareto-optimal spot."""
    best: set[tuple[float, float]] = set()
    highest = -math.inf
    for drop, rate in sorted(
        {(s.drop, s.rate) for s in spots}, key=lambda pair: (pair[0], -pair[1])
    ):
        if rate > highest:
            highest = rate
            best.add((drop, rate))
    return best


def _percent(share: float | None) -> float | None:
    return None if share is None or not math.isfinite(share) else 100 * share


def _without_int8(params: Params) -> str:
    """Return a key that is the same for points that differ only in ``int8_*`` parameters."""
    return str(sorted((n, v) for n, v in params.items() if not n.startswith("int8_")))

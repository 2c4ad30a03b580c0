"""The section of throughput, with a chart for each swept axis."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from pytest_int8bench.report.cells import figure_interval
from pytest_int8bench.report.page import labels
from pytest_int8bench.report.page.charts import Lines, Point, Series, distinct
from pytest_int8bench.report.page.fitting import MOST_CHARTS
from pytest_int8bench.report.page.groups import Params, Results, Scope, note, with_sources
from pytest_int8bench.report.page.model import Section, Titled
from pytest_int8bench.report.remarks import (
    remarks,
    short_rounds,
    status_remarks,
    upper_bound_remarks,
)
from pytest_int8bench.report.tables import number
from pytest_int8bench.report.terminal import results_table
from pytest_int8bench.results.figures import FIGURES
from pytest_int8bench.results.records import Result

#: Maximum number of lines in one chart, so that readers can tell them apart.
_MOST_SERIES = 6
#: Maximum number of series in a chart by mode, where each series has one point.
_MOST_MODES = 24


def throughput(scopes: Sequence[Scope], results: Results, many: bool) -> Section | None:
    """Return the section of throughput, or None if no point was timed.

    Args:
        scopes: the points by workload and device.
        results: the same points, in the order of the table.
        many: whether there are several files, in which case the table names the file of each point.
    """
    shown = [found for found in results if labels.is_measured(found.record) or found.record.oom]
    if not shown:
        return None
    charts = [chart for scope in scopes for chart in _axes(scope)]
    noted = any(p.note and p.y for chart in charts for one in chart.series for p in one.points)
    notes = [line for found in shown for line in _other_remarks(found.record)]
    if (short := short_rounds([found.record for found in shown])) is not None:
        notes.append(short)
    grid = results_table([found.record for found in shown])
    return Section(
        id="throughput",
        title="Throughput",
        intro=(
            (
                "Samples per second at the median batch time. Intervals come from the median's "
                "standard error within one process and do not cover differences between processes."
            ),
        ),
        pictures=("Hollow: points that were timed but failed, or were throttled.",)
        if noted
        else (),
        charts=tuple(charts),
        tables=(Titled(caption="All points", grid=with_sources(grid, shown, many)),),
        notes=tuple(dict.fromkeys(notes)),
    )


def _other_remarks(result: Result) -> list[str]:
    elsewhere = upper_bound_remarks(result)  # the speedup section shows these
    lines = [line for line in remarks(result) if line not in elsewhere]
    return [*(status_remarks(result) if result.status == "ok" else []), *lines]


def _axes(scope: Scope) -> list[Lines]:
    """Return charts of throughput against each swept axis, or against the mode if nothing was
    swept."""
    rows = scope.pick(lambda r: labels.is_measured(r) or r.status in ("oom", "failed"))
    if not any(labels.is_measured(result) for result, _, _ in rows):
        return []
    axes = labels.differing([params for _, params, _ in rows])
    by_axis = [_axis(scope, axis, rows) for axis in axes]
    if sum(map(len, by_axis)) > MOST_CHARTS:  # only some will be drawn: mix the axes
        by_axis = [[c for c in charts if c] for charts in itertools.zip_longest(*by_axis)]
    return [chart for charts in by_axis for chart in charts] or _by_mode(scope, rows)


def _axis(scope: Scope, axis: str, rows: Sequence[tuple[Result, Params, str]]) -> list[Lines]:
    groups: dict[tuple[object, ...], list[tuple[Result, Params]]] = {}
    for result, params, _ in rows:
        if axis in params:
            rest = sorted((n, labels.shown_value(v)) for n, v in params.items() if n != axis)
            groups.setdefault((labels.test_of(result), *rest), []).append((result, params))
    kept = [
        group
        for group in groups.values()
        if len({params[axis] for r, params in group if labels.is_measured(r) or r.oom}) > 1
        and any(labels.is_measured(result) for result, _ in group)
    ]
    values = labels.sortable_values(params[axis] for group in kept for _, params in group)
    numeric = all(map(labels.is_number, values))
    kept.sort(key=lambda group: labels.order({**group[0][1], axis: 0}))
    chunks = [kept[i : i + _MOST_SERIES] for i in range(0, len(kept), _MOST_SERIES)]
    charts = []
    for index, chunk in enumerate(chunks, start=1):
        firsts = [group[0][1] for group in chunk]
        differing = [name for name in labels.differing(firsts) if name != axis]
        names = [labels.label(first, differing) for first in firsts]
        tests = [labels.test_of(group[0][0]) for group in chunk]
        if len(set(tests)) > 1:
            names = [f"{name} ({test})" for name, test in zip(names, tests, strict=True)]
        series = distinct(
            [
                Series(
                    name=name,
                    style=labels.style(group[0][1]),
                    points=tuple(_points(group, axis, values, numeric)),
                )
                for name, group in zip(names, chunk, strict=True)
            ]
        )
        part = f" ({index} of {len(chunks)})" if len(chunks) > 1 else ""
        title = f"Throughput against {labels.axis(axis)}{scope.title}{part}"
        charts.append(
            Lines(
                id=f"throughput-{scope.id}-{_slug(axis)}-{index}",
                title=title,
                description=_ends(series, labels.axis(axis)),
                unit=FIGURES["samples_per_s"].unit,
                x_label=labels.axis(axis),
                series=series,
                names=() if numeric else tuple(labels.shown_value(value) for value in values),
                joined=numeric,
            )
        )
    return charts


def _points(
    group: Sequence[tuple[Result, Params]], axis: str, values: Sequence[Any], numeric: bool
) -> Iterable[Point]:
    for result, params in sorted(group, key=lambda row: values.index(row[1][axis])):
        value = params[axis]
        x = float(value) if numeric else float(values.index(value))
        yield _point(result, x, labels.shown_value(value))


def _point(result: Result, x: float, x_shown: str) -> Point:
    low, high = figure_interval(FIGURES["samples_per_s"], result)
    return Point(
        name=result.label,
        x=x,
        x_shown=x_shown,
        y=result.samples_per_s,
        low=low,
        high=high,
        note=note(result),
    )


def _by_mode(scope: Scope, rows: Sequence[tuple[Result, Params, str]]) -> list[Lines]:
    chunks = [rows[i : i + _MOST_MODES] for i in range(0, len(rows), _MOST_MODES)]
    charts = []
    for part, chunk in enumerate(chunks, start=1):
        series = [
            Series(
                name=name,
                style=labels.style(params),
                points=(_point(result, float(index), name),),
            )
            for index, (result, params, name) in enumerate(chunk)
        ]
        of_all = f" ({part} of {len(chunks)})" if len(chunks) > 1 else ""
        charts.append(
            Lines(
                id=f"throughput-{scope.id}-mode" + (f"-{part}" if of_all else ""),
                title=f"Throughput by mode{scope.title}{of_all}",
                description=_ends(series, "mode"),
                unit=FIGURES["samples_per_s"].unit,
                x_label="mode",
                series=distinct(series),
                names=tuple(name for _, _, name in chunk),
                joined=False,
            )
        )
    return charts


def _ends(series: Sequence[Series], axis: str) -> str:
    """Describe in words the first and the last value of each line."""
    parts = []
    for one in series:
        known = [point for point in one.points if point.y is not None]
        text = f"{one.name}: {number(known[0].y)}" if known else f"{one.name}: none"
        if len(one.points) > 1 and known:
            text += f" at {axis} {known[0].x_shown}, {number(known[-1].y)} at {known[-1].x_shown}"
        lost = [f"{point.note} at {point.x_shown}" for point in one.points if point.y is None]
        parts.append(", ".join([text, *lost]))
    return "; ".join(parts) + "."


def _slug(text: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in text)

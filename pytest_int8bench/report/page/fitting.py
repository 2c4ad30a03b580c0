"""Keep a page readable, however many points it has: limit the size of charts and tables, and note
what is left out. The saved files have everything."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

from pytest_int8bench.report.page.charts import AnyChart, Bar, Bars, Pareto, Spot, Stack, Stacks
from pytest_int8bench.report.page.model import Section, Titled, View
from pytest_int8bench.report.tables import Grid
from pytest_int8bench.words import plural

#: Maximum number of rows per chart, and of charts per section.
MOST_BARS = 40
MOST_CHARTS = 24
#: Maximum number of cells per table, unless that would leave fewer than ``LEAST_ROWS`` rows.
MOST_CELLS = 20_000
LEAST_ROWS = 50
MOST_NOTES = 200

_T = TypeVar("_T")


def fitted(view: View) -> View:
    """Return the view cut to the limits, with notes in its sections on how much was left out."""
    return dataclasses.replace(view, sections=tuple(map(_fitted_section, view.sections)))


def _fitted_section(section: Section) -> Section:
    tables, left_out = [], []
    for titled in section.tables:
        grid, omitted = _fitted_grid(titled.grid)
        tables.append(Titled(caption=titled.caption, grid=grid))
        if omitted:
            left_out.append(
                f"{titled.caption}: {plural(omitted, 'more row')} not shown; int8bench show prints "
                "every row of a saved file."
            )
    if (more := len(section.charts) - MOST_CHARTS) > 0:
        left_out.append(f"{plural(more, 'more chart')} not drawn; the tables have the figures.")
    notes = section.notes[:MOST_NOTES]
    if more := len(section.notes) - len(notes):
        left_out.append(f"{plural(more, 'more remark')} not shown.")
    return dataclasses.replace(
        section,
        charts=tuple(map(_fitted_chart, section.charts[:MOST_CHARTS])),
        tables=tuple(tables),
        notes=(*notes, *left_out),
    )


def _fitted_grid(grid: Grid) -> tuple[Grid, int]:
    """Return a table that fits, and the number of rows left out. Highlighted rows take
    precedence."""
    most = max(MOST_CELLS // len(grid.columns), LEAST_ROWS)
    if len(grid.rows) <= most:
        return grid, 0
    places = range(len(grid.rows))
    kept = sorted(sorted(places, key=lambda place: grid.styles[place] is None)[:most])
    shorter = dataclasses.replace(
        grid,
        rows=[grid.rows[place] for place in kept],
        styles=[grid.styles[place] for place in kept],
    )
    return shorter, len(grid.rows) - len(kept)


def _fitted_chart(chart: AnyChart) -> AnyChart:
    """Return a chart with only its lowest and highest rows; in a Pareto chart, Pareto-optimal
    points take precedence. Line charts are returned unchanged, as they were split when they were
    built."""
    if isinstance(chart, Bars):
        bars = _ends(chart.bars, _length)
        return dataclasses.replace(chart, bars=bars, title=_title(chart, bars, chart.bars))
    if isinstance(chart, Stacks):
        stacks = _ends(chart.stacks, _total)
        return dataclasses.replace(chart, stacks=stacks, title=_title(chart, stacks, chart.stacks))
    if isinstance(chart, Pareto):
        spots = _best(chart.spots)
        return dataclasses.replace(chart, spots=spots, title=_title(chart, spots, chart.spots))
    return chart


def _title(chart: AnyChart, kept: Sequence[_T], rows: Sequence[_T]) -> str:
    if len(kept) == len(rows):
        return chart.title
    which = "best" if isinstance(chart, Pareto) else "lowest and highest"
    return f"{chart.title} (the {which} {len(kept)} of {len(rows):,} points)"


def _ends(rows: tuple[_T, ...], value: Callable[[_T], float]) -> tuple[_T, ...]:
    if len(rows) <= MOST_BARS:
        return rows
    places = sorted(range(len(rows)), key=lambda place: value(rows[place]))
    return tuple(rows[p] for p in sorted(places[: MOST_BARS // 2] + places[-MOST_BARS // 2 :]))


def _best(spots: tuple[Spot, ...]) -> tuple[Spot, ...]:
    if len(spots) <= MOST_BARS:
        return spots
    places = sorted(range(len(spots)), key=lambda place: (not spots[place].best, spots[place].drop))
    return tuple(spots[place] for place in sorted(places[:MOST_BARS]))


def _length(bar: Bar) -> float:
    return math.inf if bar.value is None else bar.value  # out of memory: longer than all others


def _total(stack: Stack) -> float:
    return sum(stack.values)

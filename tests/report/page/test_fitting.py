"""Pages stay readable with thousands of points, and say what they leave out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import pytest

from pytest_int8bench.params import RunParams
from pytest_int8bench.report.page import markdown
from pytest_int8bench.report.page.build import build
from pytest_int8bench.report.page.charts import Bar, Bars, Lines, Pareto, Spot, Stack, Stacks
from pytest_int8bench.report.page.fitting import MOST_BARS, MOST_CHARTS, MOST_NOTES, fitted
from pytest_int8bench.report.page.model import Section, Titled, View
from pytest_int8bench.report.page.sections.accuracy import _unbeaten
from pytest_int8bench.report.page.sources import sources
from pytest_int8bench.report.tables import Grid, plain_grid
from pytest_int8bench.results.base import Record
from toys.results import COVERAGE, faster, result, saved, verdict

TEXTS: dict[str, Any] = {"id": "c", "title": "T", "description": "d", "unit": "u"}


def fit(**parts: object) -> Section:
    section = Section(id="s", title="S", **parts)  # type: ignore[arg-type]
    view = fitted(View(title="t", subtitle="s", summary=(), sections=(section,)))
    assert fitted(view).sections[0].tables == view.sections[0].tables  # nothing more to take away
    return view.sections[0]


def bars(values: Sequence[float | None]) -> Bars:
    return Bars(
        **TEXTS, bars=tuple(Bar(name=f"b{i}", style=0, value=v) for i, v in enumerate(values))
    )


def test_small_sections_are_unchanged() -> None:
    grid = plain_grid(["name", "value"], [["a", "1"]] * 10_000)
    chart = bars([1.0] * MOST_BARS)
    section = fit(charts=(chart,), tables=(Titled(caption="T", grid=grid),), notes=("n",))
    assert section.charts == (chart,)
    assert section.tables[0].grid == grid
    assert section.notes == ("n",)


def test_long_table_reports_omitted_rows() -> None:
    grid = plain_grid(["name", "value"], [[str(i), "1"] for i in range(10_002)])
    section = fit(tables=(Titled(caption="Every point", grid=grid),))
    assert section.tables[0].grid.rows == grid.rows[:10_000]
    assert section.notes == (
        "Every point: 2 more rows not shown; int8bench show prints every row of a saved file.",
    )


def test_highlighted_rows_are_kept_in_order() -> None:
    rows = [[str(i), *[""] * 399] for i in range(100)]
    styles = ["bad" if i in (70, 99) else None for i in range(100)]
    grid = Grid(columns=[str(i) for i in range(400)], rows=rows, styles=styles, name="0", left=())
    kept = fit(tables=(Titled(caption="T", grid=grid),)).tables[0].grid
    assert [row[0] for row in kept.rows] == [*map(str, range(48)), "70", "99"]
    assert kept.styles == [*[None] * 48, "bad", "bad"]


def test_bars_keep_the_lowest_and_the_highest() -> None:
    values: list[float | None] = [float(i % 100) for i in range(100)]
    values[50] = None  # out of memory
    [chart] = fit(charts=(bars(values),)).charts
    assert isinstance(chart, Bars)
    assert [b.value for b in chart.bars] == [*values[:20], None, *values[81:]]
    assert chart.title == "T (the lowest and highest 40 of 100 points)"


def test_stacks_keep_the_shortest_and_the_longest() -> None:
    stacks = tuple(Stack(name=str(i), values=(float(i), 1.0)) for i in range(60))
    [chart] = fit(charts=(Stacks(**TEXTS, parts=("a", "b"), stacks=stacks),)).charts
    assert isinstance(chart, Stacks)
    assert chart.stacks == stacks[:20] + stacks[40:]


def spot(index: int, *, best: bool) -> Spot:
    return Spot(
        name=str(index), style=0, drop=float(-index), low=None, high=None, rate=1, verdict="PASS",
        best=best,
    )  # fmt: skip


def test_a_pareto_chart_keeps_optimal_points() -> None:
    spots = tuple(spot(i, best=i < 3) for i in range(60))
    [chart] = fit(charts=(Pareto(**TEXTS, drop_unit="%", limits=(1.0,), spots=spots),)).charts
    assert isinstance(chart, Pareto)
    assert chart.spots == spots[:3] + spots[23:]
    assert chart.title == "T (the best 40 of 60 points)"


def test_omitted_charts_and_remarks_are_counted() -> None:
    section = fit(charts=(bars([1.0]),) * (MOST_CHARTS + 2), notes=("n",) * (MOST_NOTES + 1))
    assert len(section.charts) == MOST_CHARTS
    assert section.notes[MOST_NOTES:] == (
        "2 more charts not drawn; the tables have the figures.",
        "1 more remark not shown.",
    )


@pytest.mark.parametrize("count", [1, 2, 30])
def test_pareto_optimal_spots(count: int) -> None:
    pairs = [((7 * i) % 5 / 4, (11 * i) % 7 / 3) for i in range(count)]
    spots = [
        Spot(name="", style=0, drop=d, low=None, high=None, rate=r, verdict="", best=False)
        for d, r in pairs
    ]
    expected = {
        (d, r)
        for d, r in pairs
        if not any(e <= d and s >= r and (e, s) != (d, r) for e, s in pairs)
    }
    assert _unbeaten(spots) == expected


def points(count: int) -> list[Record]:
    records: list[Record] = []
    for batch in range(1, count + 1):
        point = RunParams(batch_size=batch, int8_enabled=True, int8_mode="w8a8")
        records += [
            result(point.baseline(), 100.0 + batch),
            faster(point, 130.0 + batch, 1.3, coverage=COVERAGE),
            verdict(point, 0.001, "PASS"),
        ]
    return records


def test_a_thousand_points_fit_on_a_page() -> None:
    view = build(sources([("a.json", saved(*points(500)))]))
    for section in view.sections:
        assert len(section.charts) <= MOST_CHARTS
        for chart in section.charts:
            if not isinstance(chart, Lines):
                assert len(chart.grid().rows) <= MOST_BARS
    assert len(markdown.render(view)) < 10**6


def lines_run(records: list[Record]) -> int:
    """Return how many lines of this package run while a page of two files is built."""
    named = [(f"{i}.json", saved(*records, commit=str(i))) for i in range(2)]
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        if "pytest_int8bench" not in frame.f_code.co_filename:
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        build(sources(named))
    finally:
        sys.settrace(before)
    return count


def test_work_grows_linearly_with_points() -> None:
    assert lines_run(points(80)) < 2.2 * lines_run(points(40))


@pytest.mark.parametrize("limit", [4_000, 20_000, 100_000])
def test_oversized_markdown_says_what_it_omits(limit: int) -> None:
    view = build(sources([("a.json", saved(*points(400)))]))
    whole = markdown.render(view)
    assert len(whole.encode()) > 100_000
    text = markdown.render(view, limit_bytes=limit)
    assert limit / 2 < len(text.encode()) <= limit
    assert " rows are left out; the worst are shown first; int8bench show prints every row" in text
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        line for line in whole.splitlines() if line.startswith("#")
    ]
    assert markdown.render(view, limit_bytes=len(whole.encode())) == whole


def test_markdown_stays_under_the_limit_of_github() -> None:
    rows = [["x" * 900, str(number)] for number in range(2000)]
    section = Section(
        id="s",
        title="S",
        tables=tuple(Titled(caption=str(n), grid=plain_grid(["a", "b"], rows)) for n in range(2)),
        notes=("why " * 200,) * 150,
    )
    view = View(title="t", subtitle="s", summary=(), sections=(section,))
    text = markdown.render(view)
    assert 1_000_000 < len(text.encode()) <= 1 << 20
    assert " of 2,000 rows are left out" in text

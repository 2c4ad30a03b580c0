"""Charts as SVG are well-formed and named, and draw every figure in its place."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest

from pytest_int8bench.report.page.build import build
from pytest_int8bench.report.page.charts import (
    AnyChart,
    Bar,
    Bars,
    Lines,
    Mark,
    Point,
    Series,
    Stack,
    Stacks,
)
from pytest_int8bench.report.page.sources import sources
from pytest_int8bench.report.page.svg import DARK, LIGHT, draw
from toys.results import commits, everything

SVG = "{http://www.w3.org/2000/svg}"
XLINK = "{http://www.w3.org/1999/xlink}"


def line(*points: tuple[float, float | None], **values: Any) -> Lines:
    made = tuple(
        Point(name=f"run-{x:g}", x=x, x_shown=f"{x:g}", y=y, note="" if y else "OOM")
        for x, y in points
    )
    start: dict[str, Any] = {
        "id": "c",
        "title": "A <title>",
        "description": "What & how",
        "unit": "samples/s",
        "x_label": "batch",
        "series": (Series(name="W8A8", style=1, points=made),),
    }
    return Lines(**{**start, **values})


def positions(svg: str, fill: str = "s1") -> list[tuple[float, float]]:
    """Return the positions of the markers of a colour, except in the legend."""
    return [
        (float(use.get("x", "nan")), float(use.get("y", "nan")))
        for group in ElementTree.fromstring(svg).iter(f"{SVG}g")
        for use in group.findall(f"{SVG}use")
        if "clip-path" in group.attrib and f"fill: var(--{fill});" in use.get("style", "")
    ]


def lengths(svg: str, *fills: str) -> list[float]:
    """Return the widths of the bars of the colours, except in the legend."""
    paths = [p for p in ElementTree.fromstring(svg).iter(f"{SVG}path") if "clip-path" in p.attrib]
    wanted = tuple(f"fill: var(--{fill})" for fill in fills)
    found = []
    for path in paths:
        if path.get("style", "").startswith(wanted):
            xs = [float(x) for x in re.findall(r"[ML] ([-\d.]+)", path.get("d", ""))]
            found.append(max(xs) - min(xs))
    return found


def texts(svg: str) -> list[str]:
    return ["".join(t.itertext()) for t in ElementTree.fromstring(svg).iter(f"{SVG}text")]


CHARTS: list[AnyChart] = [
    chart
    for files in ([("one.json", everything())], commits())
    for section in build(sources(files)).sections
    for chart in section.charts
]


@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.id)
def test_a_picture_is_well_formed_and_named(chart: AnyChart) -> None:
    svg = draw(chart)
    root = ElementTree.fromstring(svg)
    assert (root[0].tag, root[0].text) == (f"{SVG}title", chart.title)
    assert (root[1].tag, root[1].text) == (f"{SVG}desc", chart.description)
    assert root.get("aria-labelledby") == f"{root[0].get('id')} {root[1].get('id')}"
    ids = {element.get("id") for element in root.iter()}
    used = {e.get(f"{XLINK}href", "").removeprefix("#") for e in root.iter(f"{SVG}use")}
    used |= set(re.findall(r"url\(#([^)]+)\)", svg))
    assert used <= ids


@pytest.mark.parametrize("chart", CHARTS[:4], ids=lambda chart: chart.id)
def test_every_color_is_a_page_variable(chart: AnyChart) -> None:
    colors = set(re.findall(r"#[0-9a-fA-F]{6}\b", draw(chart)))
    assert colors <= {"#000000"}  # of shapes reused with another colour


def test_markers_are_where_the_figures_say() -> None:
    [(x1, y1), (x2, y2), (x3, y3)] = positions(draw(line((1, 100.0), (8, 150.0), (64, 400.0))))
    assert x2 - x1 == pytest.approx(x3 - x2, rel=1e-3)  # powers of 8
    assert (y2 - y1) / (y3 - y1) == pytest.approx(50 / 300, rel=1e-3)


def test_an_axis_over_decades_is_logarithmic() -> None:
    [(_, y1), (_, y2), (_, y3)] = positions(draw(line((1, 1.0), (2, 10.0), (3, 100.0))))
    assert y2 - y1 == pytest.approx(y3 - y2, rel=1e-3)


def test_bars_are_as_long_as_their_figures() -> None:
    bars = tuple(Bar(name=f"b{value}", style=1, value=value) for value in (1.0, 2.5))
    first, second = lengths(
        draw(Bars(id="c", title="t", description="d", unit="s", bars=bars)), "s1"
    )
    assert second / first == pytest.approx(2.5, rel=1e-3)


@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.id)
def test_no_pattern_fills(chart: AnyChart) -> None:
    # When printing, browsers rasterize each pattern, which adds up to megabytes.
    svg = draw(chart)
    assert "<pattern" not in svg
    assert "<image" not in svg


def test_parts_are_numbered_in_their_bars_and_in_the_legend() -> None:
    values = (10.0, 30.0, 40.0, 20.0)
    stacks = (Stack(name="a", values=values), Stack(name="b", values=(0.0,) * 4))
    made = Stacks(
        id="c", title="t", description="d", unit="ms", parts=("p", "q", "r", "s"), stacks=stacks
    )
    svg = draw(made)
    shown = texts(svg)
    assert [text for text in shown if text in "1234"] == ["1", "2", "3", "4"]
    assert shown[-4:] == ["1 p", "2 q", "3 r", "4 s"]
    shares = [length for length in lengths(svg, "s1", "s2", "s3", "s0") if length]
    assert [share / sum(shares) for share in shares] == pytest.approx([0.1, 0.3, 0.4, 0.2])


def test_series_differ_in_more_than_color() -> None:
    points = line((1, 100.0), (2, 120.0)).series[0].points
    shapes = set()
    for style in range(8):
        svg = draw(line(series=(Series(name="s", style=style, points=points),)))
        [marker] = {
            use.get(f"{XLINK}href")
            for use in ElementTree.fromstring(svg).iter(f"{SVG}use")
            if f"fill: var(--s{style});" in use.get("style", "")
        }
        shapes.add(marker)
        assert f"stroke: var(--s{style})" in svg
    assert len(shapes) == 8
    assert "stroke-dasharray" in draw(line(series=(Series(name="s", style=0, points=points),)))


def test_styles_share_variables_and_repeat_no_color() -> None:
    assert LIGHT.keys() == DARK.keys()
    assert len(set(LIGHT.values())) == len(LIGHT)


def test_a_missing_value_is_marked_on_the_axis_with_its_reason() -> None:
    svg = draw(line((1, 100.0), (2, 120.0), (4, None)))
    assert len(positions(svg)) == 2
    crosses = re.findall(r'x="([\d.]+)" y="[\d.]+" style="fill: var\(--bad\)', svg)
    assert len(crosses) == 2  # the other one is in the legend
    assert float(crosses[0]) > positions(svg)[-1][0]
    assert "no value: OOM" in texts(svg)


def test_a_point_with_a_note_is_hollow() -> None:
    series = line((1, 100.0), (2, 120.0)).series[0]
    noted = replace(series, points=(series.points[0], replace(series.points[1], note="throttled")))
    svg = draw(line(series=(noted,)))
    assert positions(svg, "paper") == positions(svg)[1:]


def test_all_intervals_of_a_series_are_one_line() -> None:
    def lines(count: int) -> int:
        points = line(*((x, 100.0) for x in range(count))).series[0].points
        bounded = tuple(replace(point, low=90.0, high=110.0) for point in points)
        svg = draw(line(series=(Series(name="W8A8", style=1, points=bounded),)))
        return sum(path.count("M ") > 1 for path in re.findall(r' d="([^"]*)"', svg))

    assert lines(3) == lines(9) > 0


def test_a_change_is_marked_with_its_letter() -> None:
    marks = (Mark(x=0.5, letter="A", text="driver 1 → 2"),)
    svg = draw(line((0, 5.0), (1, 6.0), names=("a", "b"), marks=marks, from_zero=False))
    assert re.search(r">A</text>", svg)


def test_text_is_not_parsed_as_math() -> None:
    series = (Series(name="$x^2$ <b> 日本", style=1, points=(line((1, 2.0)).series[0].points)),) * 2
    assert "$x^2$ <b> 日本" in texts(draw(line(series=series)))


@pytest.mark.filterwarnings("error")
def test_user_matplotlibrc_is_ignored_and_unchanged() -> None:
    expected = draw(line((1, 2.0)))
    before = matplotlib.rcParams["font.size"]
    matplotlib.rcParams["font.size"] = 31.0
    try:
        assert draw(line((1, 2.0))) == expected
        assert matplotlib.rcParams["font.size"] == 31.0
    finally:
        matplotlib.rcParams["font.size"] = before

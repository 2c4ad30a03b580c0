"""Charts drawn as SVG, by matplotlib.

Colours are names of CSS variables, so that a page can be light or dark; a page that shows a
picture defines ``--ink``, ``--muted``, ``--line``, ``--paper``, ``--over`` and ``--s0`` … ``--s7``.
"""

from __future__ import annotations

import io
import re
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerPatch, update_from_first_child
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import Affine2D, Transform

from pytest_int8bench.report.charts import (
    AnyChart,
    Bar,
    Bars,
    Lines,
    Pareto,
    Point,
    Series,
    Stacks,
)
from pytest_int8bench.report.tables import number

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
_WIDTH_IN = 5.6
_STYLES = 8
# Stand-ins that occur nowhere else; matplotlib writes them in lower case.
_COLORS = {
    "ink": "#010a01",
    "muted": "#010a02",
    "line": "#010a03",
    "paper": "#010a04",
    "over": "#010a05",
    **{f"s{i}": f"#010b0{i}" for i in range(_STYLES)},
}
_INK, _MUTED, _LINE, _PAPER, _OVER = (
    _COLORS[name] for name in ("ink", "muted", "line", "paper", "over")
)
# Shapes besides colours, for eyes that see these alike and for paper. Bars have their names.
_MARKERS = "os^DvPX*"
_HATCHES = ("", "//", "..", "xx")
_RC: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "int8bench",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "text.color": _INK,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
}
#: From this ratio of the largest to the smallest on, an axis has powers of two or ten.
_LOG_X, _LOG_Y = 8, 20
_MOST_TICKS = 12
_ROW_COLUMNS = 60
_STACK_HEIGHT = 0.42
#: How far hatches lean in the height of a stack, and are apart, in percent of the axis: about 45
#: degrees and 6 points.
_LEAN, _HATCH_STEP = 3.6, 1.55
_LEGEND_COLUMNS = 58
#: The least that a y axis which does not start at 0 spans, so that noise does not fill it.
_LEAST_SPAN = 0.1


def draw(chart: AnyChart) -> str:
    """Return a chart as an ``svg`` element for a page, with a title, a description, and a tooltip
    for each figure."""
    with _settings():
        figure = Figure(figsize=(_WIDTH_IN, 3.4), layout="constrained")
        axes = figure.add_subplot()
        tips: dict[str, list[str]] = {}
        if isinstance(chart, Lines):
            _lines(axes, chart, tips)
        elif isinstance(chart, Bars):
            _bars(axes, chart, tips)
        elif isinstance(chart, Stacks):
            _stacks(axes, chart, tips)
        else:
            _pareto(axes, chart, tips)
        stream = io.StringIO()
        FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None, "Creator": None})  # type: ignore[no-untyped-call]
    return _inlined(stream.getvalue(), chart, tips)


@contextmanager
def _settings() -> Iterator[None]:
    # Whatever a user's matplotlibrc says. Text in scripts that the font lacks is measured by a box,
    # and shown in the reader's font.
    with matplotlib.style.context(["default", _RC]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _color(style: int) -> str:
    return _COLORS[f"s{style % _STYLES}"]


# -- lines ------------------------------------------------------------------------------------


def _lines(axes: Axes, chart: Lines, tips: dict[str, list[str]]) -> None:
    known = [p for series in chart.series for p in series.points if p.y is not None]
    for index, series in enumerate(chart.series):
        _one_line(axes, chart, series, f"{chart.id}-series-{index}", tips)
    if chart.reference is not None:
        axes.axhline(chart.reference, color=_MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
    _y_axis(axes, chart, known)
    lost = [p for series in chart.series for p in series.points if p.y is None]
    if lost:
        # On the axis itself, in no unit.
        axes.plot(
            [point.x for point in lost],
            [0.0] * len(lost),
            "x",
            color=_OVER,
            markersize=8,
            markeredgewidth=2,
            clip_on=False,
            transform=axes.get_xaxis_transform(),
            label="no figure: " + ", ".join(dict.fromkeys(point.note for point in lost)),
            gid=f"{chart.id}-lost",
            zorder=5,
        )
        tips[f"{chart.id}-lost"] = [f"{p.name}: {p.note}" for p in lost]
    axes.set_ylabel(chart.unit)
    axes.set_xlabel(chart.x_label)
    _x_axis(axes, chart)
    for mark in chart.marks:
        axes.axvline(mark.x, color=_OVER, linewidth=1.2, linestyle=(0, (1, 2)))
        _say_above(axes, mark.x, mark.letter, fontweight="bold")
    if len(chart.series) > 1 or lost:
        _legend(axes)


def _one_line(
    axes: Axes, chart: Lines, series: Series, gid: str, tips: dict[str, list[str]]
) -> None:
    color = _color(series.style)
    points = [point for point in series.points if point.y is not None]
    axes.plot(
        [point.x for point in points],
        [point.y or 0.0 for point in points],
        color=color,
        marker=_MARKERS[series.style % len(_MARKERS)],
        markersize=7,
        markeredgecolor=_PAPER,
        markeredgewidth=0.8,
        linewidth=1.8 if chart.joined else 0,
        label=textwrap.fill(series.name, _LEGEND_COLUMNS),
        gid=gid,
        zorder=4,
    )
    tips[gid] = [_tip(chart, point) for point in points]
    if noted := [point for point in points if point.note]:
        axes.plot(
            [point.x for point in noted],
            [point.y or 0.0 for point in noted],
            marker=_MARKERS[series.style % len(_MARKERS)],
            markersize=7,
            markerfacecolor=_PAPER,
            markeredgecolor=color,
            markeredgewidth=1.6,
            linewidth=0,
            gid=f"{gid}-noted",
            zorder=5,
        )
        tips[f"{gid}-noted"] = [_tip(chart, point) for point in noted]
    _whiskers(axes, [(p.x, p.low, p.high) for p in points], color)


def _tip(chart: Lines, point: Point) -> str:
    note = f" ({point.note})" if point.note else ""
    return f"{point.name}: {chart.shown(point)} {chart.unit}{note}"


def _whiskers(
    axes: Axes, intervals: Iterable[tuple[float, float | None, float | None]], color: str
) -> None:
    for x, low, high in intervals:
        if low is not None and high is not None:
            axes.plot([x, x], [low, high], color=color, linewidth=1.4, marker="_", markersize=7)


def _x_axis(axes: Axes, chart: Lines) -> None:
    points = [point for series in chart.series for point in series.points]
    if chart.names:
        places = range(0, len(chart.names), -(-len(chart.names) // _MOST_TICKS))
        labels = [textwrap.fill(chart.names[place], 18) for place in places]
        is_long = sum(max(map(len, label.splitlines())) + 1 for label in labels) > 52
        axes.set_xticks(list(places), labels)
        if is_long:
            axes.tick_params(axis="x", labelrotation=35)
            for text in axes.get_xticklabels():
                text.set(horizontalalignment="right", rotation_mode="anchor")
        axes.set_xlim(-0.5, len(chart.names) - 0.5)
        return
    xs = sorted({point.x for point in points})
    if xs[0] > 0 and xs[-1] / xs[0] >= _LOG_X:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(NullLocator())
    if len(xs) <= _MOST_TICKS:
        axes.xaxis.set_major_locator(FixedLocator(xs))
    shown = {point.x: point.x_shown for point in points}
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: shown.get(x, f"{x:g}")))
    if sum(len(shown[x]) + 1 for x in xs) > 52:
        axes.tick_params(axis="x", labelrotation=45)


def _y_axis(axes: Axes, chart: Lines, points: Sequence[Point]) -> None:
    ends = [v for p in points for v in (p.y, p.low, p.high) if v is not None]
    ends += [] if chart.reference is None else [chart.reference]
    low, high = min(ends), max(ends)
    if low > 0 and high / low > _LOG_Y:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
    elif chart.from_zero:
        axes.set_ylim(0, high * 1.06 or 1)
        axes.yaxis.set_major_locator(MaxNLocator(6))
    else:
        middle = (low + high) / 2
        span = max(1.2 * (high - low), _LEAST_SPAN * abs(middle))
        axes.set_ylim(middle - span / 2, middle + span / 2)
        axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _tick(y)))


def _tick(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


# -- bars -------------------------------------------------------------------------------------


def _bars(axes: Axes, chart: Bars, tips: dict[str, list[str]]) -> None:
    for row, bar in enumerate(chart.bars):
        gid = f"{chart.id}-bar-{row}"
        color = _color(bar.style)
        if bar.value is not None:
            axes.barh(
                row,
                bar.value,
                height=0.36,
                color=color,
                edgecolor=_PAPER,
            )
            axes.patches[-1].set_gid(gid)
            tips[gid] = [_bar_tip(chart, bar)]
        if bar.low is not None and bar.high is not None:
            axes.plot([bar.low, bar.high], [row, row], color=_INK, linewidth=1.4, marker="|")
        if bar.most is not None:
            gid += "-most"
            axes.plot(
                bar.most,
                row,
                "D",
                color=_PAPER,
                markeredgecolor=_INK,
                markersize=6,
                zorder=5,
                gid=gid,
            )
            tips[gid] = [
                f"{bar.name}: at most {chart.with_interval(bar.most, None, None)} {chart.unit}"
            ]
        note = f" ({bar.note})" if bar.note else ""
        shown = bar.note if bar.value is None else chart.shown(bar) + note
        _row_text(axes, row, bar.name, shown)
    _rows(axes, len(chart.bars), chart.unit)
    axes.set_xlim(min(0, axes.get_xlim()[0]), None)
    if chart.reference is not None:
        axes.axvline(chart.reference, color=_INK, linewidth=1.2, linestyle=(0, (4, 3)))


def _bar_tip(chart: Bars, bar: Bar) -> str:
    note = f" ({bar.note})" if bar.note else ""
    return f"{bar.name}: {chart.shown(bar)} {chart.unit}{note}"


def _stacks(axes: Axes, chart: Stacks, tips: dict[str, list[str]]) -> None:
    styles = (1, 2, 3, 0)
    for row, stack in enumerate(chart.stacks):
        total, begin = sum(stack.values), 0.0
        for index, (part, value) in enumerate(zip(chart.parts, stack.values, strict=True)):
            gid = f"{chart.id}-stack-{row}-{index}"
            share = 100 * value / total if total else 0.0
            axes.barh(
                row,
                share,
                left=begin,
                height=_STACK_HEIGHT,
                color=_color(styles[index % len(styles)]),
                edgecolor=_PAPER,
                linewidth=1,
                label=part if row == 0 else None,
            )
            axes.patches[-1].set_gid(gid)
            tips[gid] = [f"{stack.name}, {part}: {number(value)} {chart.unit} ({share:.0f}%)"]
            hatch = _HATCHES[index % len(_HATCHES)]
            if hatch:
                lines = _hatch(hatch, begin, begin + share, lean=_LEAN, step=_HATCH_STEP)
                place = Affine2D().translate(0, -0.5).scale(1, -_STACK_HEIGHT).translate(0, row)
                axes.add_patch(_drawn(lines, hatch, place))
                axes.patches[-1].set_gid(f"{gid}-hatch")
                tips[f"{gid}-hatch"] = tips[gid]
            begin += share
        _row_text(axes, row, stack.name, f"{number(total)} {chart.unit}")
    _rows(axes, len(chart.stacks), "% of the whole")
    axes.set_xlim(0, 100)
    _legend(axes, columns=2, keys=[_HatchedKey(hatch) for hatch in _HATCHES])


# Matplotlib's own hatches are patterns of SVG, and a browser that prints makes a large picture of
# each shape that has one.


def _hatch(hatch: str, left: float, right: float, *, lean: float, step: float) -> Path:
    """Return the lines or dots between two places of an axis, from 0 to 1 in height.

    Args:
        hatch: one of ``_HATCHES``.
        left: where it begins.
        right: where it ends.
        lean: how far a line goes to the right while it goes up.
        step: from one line to the next.
    """
    points = []
    for place in range(int((left - lean) // step), int(right // step) + 1):
        start = place * step
        if hatch == "..":  # a line without a length is drawn as a round dot
            dot = (start, 0.7 if place % 2 else 0.3)
            points += [dot, dot] if left + step / 4 < start < right - step / 4 else []
            continue
        xs = (max(left, start), min(right, start + lean))
        if xs[0] < xs[1]:
            ys = [(x - start) / lean for x in xs]
            points += zip(xs, ys, strict=True)
            points += zip(xs, (1 - y for y in ys), strict=True) if hatch == "xx" else []
    return Path(np.reshape(points, (-1, 2)), [Path.MOVETO, Path.LINETO] * (len(points) // 2))


def _drawn(lines: Path, hatch: str, place: Transform) -> PathPatch:
    return PathPatch(
        lines.transformed(place),
        fill=False,
        edgecolor=_PAPER,
        linewidth=2.0 if hatch == ".." else 0.8,
        capstyle="round",
    )


class _HatchedKey(HandlerPatch):
    """A part in the legend, hatched as in its bars."""

    def __init__(self, hatch: str) -> None:
        super().__init__(update_func=update_from_first_child)
        self._hatch = hatch

    def create_artists(
        self,
        legend: Any,
        orig_handle: Any,
        xdescent: float,
        ydescent: float,
        width: float,
        height: float,
        fontsize: float,
        trans: Any,
    ) -> list[Any]:
        """Return the box and its hatch."""
        size = (xdescent, ydescent, width, height)
        artists = [*super().create_artists(legend, orig_handle, *size, fontsize, trans)]
        if self._hatch:
            lines = _hatch(self._hatch, 0, width, lean=height, step=width / 4)
            place = Affine2D().scale(1, height).translate(-xdescent, -ydescent)
            artists.append(_drawn(lines, self._hatch, place))
            artists[-1].set_transform(trans)
        return artists


def _row_text(axes: Axes, row: int, name: str, shown: str) -> None:
    """Write a row's name and figure above it: names are long, and pages narrow."""
    place: dict[str, Any] = {
        "xycoords": axes.get_yaxis_transform(),
        "textcoords": "offset points",
        "va": "bottom",
    }
    room = max(_ROW_COLUMNS - len(shown), 20)
    short = name if len(name) <= room else name[: room - 1] + "…"
    axes.annotate(short, (0, row - 0.24), xytext=(2, 0), ha="left", **place)
    axes.annotate(shown, (1, row - 0.24), xytext=(-1, 0), ha="right", **place)


def _rows(axes: Axes, count: int, unit: str) -> None:
    axes.set_ylim(count - 0.5, -0.75)
    axes.set_yticks([])
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_color(_MUTED)
    axes.set_xlabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _tick(x)))
    axes.figure.set_size_inches(_WIDTH_IN, 0.85 + 0.46 * count)  # type: ignore[union-attr]


# -- accuracy against speed -------------------------------------------------------------------


def _pareto(axes: Axes, chart: Pareto, tips: dict[str, list[str]]) -> None:
    ends = [0.0, *chart.limits]
    for spot in chart.spots:
        ends += [v for v in (spot.drop, spot.low, spot.high) if v is not None]
    margin = 0.06 * (max(ends) - min(ends))
    left, right = min(ends) - margin, max(ends) + 2 * margin
    axes.set_xlim(left, right)
    most = max(spot.rate for spot in chart.spots)
    axes.set_ylim(0, 1.12 * most)
    axes.axvspan(min(chart.limits), right, color=_OVER, alpha=0.08, linewidth=0)
    for limit in chart.limits:
        axes.axvline(limit, color=_OVER, linewidth=1.6, linestyle=(0, (4, 3)))
        _say_above(axes, limit, f"limit {limit:g}{chart.drop_unit}")
    best = sorted((spot.drop, spot.rate) for spot in chart.spots if spot.best)
    axes.step(*zip(*best, strict=True), where="post", color=_MUTED, linewidth=1.2)
    styles = [spot.style for spot in chart.spots]
    numbered = len(set(styles)) < len(styles)
    for index, spot in enumerate(chart.spots):
        style = spot.style
        gid = f"{chart.id}-spot-{index}"
        color = _color(style)
        if spot.low is not None or spot.high is not None:
            span = (
                left if spot.low is None else spot.low,
                right if spot.high is None else spot.high,
            )
            axes.plot(span, [spot.rate] * 2, color=color, linewidth=1.4, marker="|")
        axes.plot(
            spot.drop,
            spot.rate,
            linewidth=0,
            marker=_MARKERS[style % len(_MARKERS)],
            color=color,
            markersize=9,
            markeredgecolor=color,
            markerfacecolor=color if spot.verdict in ("PASS", "baseline") else _PAPER,
            markeredgewidth=1.8,
            label=textwrap.fill(
                f"{f'{index + 1}  ' if numbered else ''}{spot.name}: {spot.verdict}",
                _LEGEND_COLUMNS,
            ),
            gid=gid,
            zorder=4,
        )
        if numbered:
            axes.annotate(
                str(index + 1),
                (spot.drop, spot.rate),
                xytext=(5, 5),
                textcoords="offset points",
                fontsize=9,
            )
        bounds = (
            "" if spot.low is None or spot.high is None else f" [{spot.low:.2f}, {spot.high:.2f}]"
        )
        tips[gid] = [
            (
                f"{spot.name}: drop {spot.drop:.2f}{chart.drop_unit}{bounds}, {number(spot.rate)} "
                f"{chart.unit}, {spot.verdict}"
            )
        ]
    axes.set_xlabel(f"drop of the metric ({chart.drop_unit})")
    axes.set_ylabel(chart.unit)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _tick(y)))
    _legend(axes)


def _say_above(axes: Axes, x: float, text: str, **style: Any) -> None:
    """Name a line across the axes, over its end."""
    axes.annotate(
        text,
        (x, 1),
        xycoords=axes.get_xaxis_transform(),
        xytext=(0, 2),
        textcoords="offset points",
        ha="center",
        va="bottom",
        color=_OVER,
        **style,
    )


def _legend(axes: Axes, columns: int | None = None, keys: Sequence[HandlerPatch] = ()) -> None:
    handles, names = axes.get_legend_handles_labels()
    is_short = sum(len(name) + 6 for name in names) <= _LEGEND_COLUMNS
    columns = columns or (len(names) if is_short else 1)
    figure: Any = axes.figure
    rows = (
        sum(1 + name.count("\n") for name in names) if columns == 1 else -(-len(names) // columns)
    )
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.22 * rows)
    figure.legend(
        handles,
        names,
        loc="outside upper left",
        ncols=columns,
        handler_map=dict(zip(handles, keys, strict=False)),
    )


# -- SVG --------------------------------------------------------------------------------------


def _inlined(text: str, chart: AnyChart, tips: dict[str, list[str]]) -> str:
    """Return the picture as an element of a page: without declarations and with ids of its own."""
    for name, value in _COLORS.items():
        text = text.replace(value, f"var(--{name})")
    root = ElementTree.fromstring(text)
    for unwanted in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(unwanted)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    for element in root.iter():
        for name, value in element.attrib.items():
            if name.endswith("href"):
                element.set(name, f"#{chart.id}-{value.removeprefix('#')}")
            elif "url(#" in value:
                element.set(name, value.replace("url(#", f"url(#{chart.id}-"))
        if (own := element.get("id")) is None:
            continue
        if own in tips:
            _add_tips(element, tips[own])
        if own in used:
            element.set("id", f"{chart.id}-{own}")
        elif own not in tips:
            del element.attrib["id"]
    box = [float(part) for part in root.get("viewBox", "").split()]
    root.attrib = {
        "viewBox": root.get("viewBox", ""),
        "width": f"{box[2]:g}",
        "height": f"{box[3]:g}",
        "role": "img",
        "aria-labelledby": f"{chart.id}-title {chart.id}-desc",
    }
    root.insert(0, _text_element("title", chart.title, id=f"{chart.id}-title"))
    root.insert(1, _text_element("desc", chart.description, id=f"{chart.id}-desc"))
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    return ElementTree.tostring(root, encoding="unicode")


def _add_tips(group: ElementTree.Element, tips: Sequence[str]) -> None:
    """Give each marker of a line, or a bar, its tooltip."""
    markers = list(group.iter(f"{{{_SVG}}}use"))
    targets = markers if len(markers) == len(tips) else [group]
    for target, tip in zip(targets, tips, strict=True):
        target.insert(0, _text_element("title", tip))


def _text_element(tag: str, text: str, **attributes: str) -> ElementTree.Element:
    element = ElementTree.Element(f"{{{_SVG}}}{tag}", attributes)
    element.text = text
    return element

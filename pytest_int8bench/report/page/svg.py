"""Draw charts as SVG elements with matplotlib."""

from __future__ import annotations

import io
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib.style
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from pytest_int8bench.report.page.charts import AnyChart, Bars, Lines, Pareto, Series, Spot, Stacks
from pytest_int8bench.report.tables import number


def _style(page: str, series: str) -> dict[str, str]:
    names = ("paper", "ink", "muted", "line", "panel", "link", "good", "bad", "fair")
    numbers = [f"s{index}" for index in range(8)]
    return dict(zip([*names, *numbers], [*page.split(), *series.split()], strict=True))


#: The light and the dark style: CSS variable -> color. Series use ``s0`` to ``s7``, which are close
#: to the Okabe-Ito palette; ``s0`` is the baseline.
LIGHT = _style(
    "#ffffff #1b2129 #5a6572 #dfe3e8 #f5f7f9 #0b5cad #0b6b3a #b3261e #8a5a00",
    "#5b6470 #0072b2 #c65102 #00795a #a8418f #8a6a00 #2b8fc7 #6b4fbb",
)
DARK = _style(
    "#14181d #e7ebef #a3adb8 #333b45 #1c2229 #7db8f2 #5fd39a #ff8a80 #f0c35a",
    "#aeb7c2 #56b4e9 #ff9a4d #35c79b #e58fce #e3c34a #9fd3f5 #b4a2f2",
)
#: Charts are drawn in the light style. Its colors are distinct, so each identifies a variable.
_VARIABLES = {color: f"var(--{name})" for name, color in LIGHT.items()}
#: Color, marker and line style of each ``Series.style``; no two series differ in color alone.
_SERIES: list[dict[str, Any]] = list(
    cycler(color=[LIGHT[f"s{index}"] for index in range(8)])
    + cycler(marker=list("os^DvPX<"))
    + cycler(linestyle=["--", "-", "-.", ":"] * 2)
)
_RC: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": LIGHT["muted"],
    "axes.labelcolor": LIGHT["ink"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LIGHT["line"],
    "lines.markersize": 7,
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "legend.handlelength": 3,
    "text.color": LIGHT["ink"],
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "xtick.labelcolor": LIGHT["ink"],
    "ytick.labelcolor": LIGHT["ink"],
}
_WIDTH_IN = 5.6
#: An axis is logarithmic if the ratio of its largest to its smallest value is at least this.
_LOG_X, _LOG_Y = 8, 20
_MOST_TICKS = 12
_ROW_COLUMNS = 60
_LEGEND_COLUMNS = 58
#: Smallest relative span of a y axis that does not start at 0, so that noise does not fill it.
_LEAST_SPAN = 0.1
#: Parts of a stack that are narrower than this many percent have no room for a number.
_LEAST_NUMBERED = 3


def draw(chart: AnyChart) -> str:
    """Return a chart as an ``svg`` element with a title and a description.

    Its colors are the CSS variables of ``LIGHT``, so a page can switch to ``DARK``.
    """
    with _settings(chart.id):
        figure = Figure(figsize=(_WIDTH_IN, 3.4), layout="constrained")
        axes = figure.add_subplot()
        if isinstance(chart, Lines):
            _lines(axes, chart)
        elif isinstance(chart, Bars):
            _bars(axes, chart)
        elif isinstance(chart, Stacks):
            _stacks(axes, chart)
        else:
            _pareto(axes, chart)
        stream = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(stream, metadata=metadata)  # type: ignore[no-untyped-call]
    return _element(stream.getvalue(), chart)


@contextmanager
def _settings(salt: str) -> Iterator[None]:
    # Ignore the user's matplotlibrc. The salt makes ids reproducible and unique on a page.
    # Matplotlib warns about characters that its font lacks, but browsers fall back to other fonts.
    rc = {**_RC, "svg.hashsalt": salt}
    with matplotlib.style.context(["default", rc]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _element(text: str, chart: AnyChart) -> str:
    """Convert Matplotlib's SVG file to an element with a title, and its colors to CSS variables."""
    text = text[text.index("<svg ") :]
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # unused, and repeated in every figure
    text = re.sub(r"#[0-9a-f]{6}(?=[;\"])", lambda m: _VARIABLES.get(m[0], m[0]), text)
    text = re.sub(r"\s*\n\s*", "\n", text)
    title, description = f"{chart.id}-title", f"{chart.id}-desc"
    head, shapes = text.split(">", 1)
    return (
        f'{head} role="img" aria-labelledby="{title} {description}">\n'
        f'<title id="{title}">{escape(chart.title)}</title>\n'
        f'<desc id="{description}">{escape(chart.description)}</desc>{shapes}'
    )


# -- lines ------------------------------------------------------------------------------------


def _lines(axes: Axes, chart: Lines) -> None:
    for series in chart.series:
        _one_line(axes, series, chart.joined)
    if chart.reference is not None:
        axes.axhline(chart.reference, color=LIGHT["muted"], linewidth=1.2, linestyle="--")
    _y_axis(axes, chart)
    lost = [p for series in chart.series for p in series.points if p.y is None]
    if lost:
        reasons = ", ".join(dict.fromkeys(point.note for point in lost))
        axes.plot(
            [point.x for point in lost],
            [0.0] * len(lost),
            "x",
            color=LIGHT["bad"],
            markersize=8,
            markeredgewidth=2,
            clip_on=False,
            transform=axes.get_xaxis_transform(),  # on the x axis, regardless of where y starts
            label=f"no value: {reasons}",
            zorder=5,
        )
    axes.set_ylabel(chart.unit)
    axes.set_xlabel(chart.x_label)
    if chart.names:
        _named_x_axis(axes, chart.names)
    else:
        _numeric_x_axis(axes, chart)
    for mark in chart.marks:
        axes.axvline(mark.x, color=LIGHT["bad"], linewidth=1.2, linestyle=":")
        _say_above(axes, mark.x, mark.letter, fontweight="bold")
    if len(chart.series) > 1 or lost:
        _legend(axes)


def _one_line(axes: Axes, series: Series, joined: bool) -> None:
    style = dict(_SERIES[series.style % len(_SERIES)])
    if not joined:
        style["linestyle"] = "none"
    points = [point for point in series.points if point.y is not None]
    axes.plot(
        [point.x for point in points],
        [point.y or 0.0 for point in points],
        **style,
        markeredgecolor=LIGHT["paper"],
        markeredgewidth=0.8,
        linewidth=1.8,
        label=textwrap.fill(series.name, _LEGEND_COLUMNS),
        zorder=4,
    )
    noted = [point for point in points if point.note]  # hollow
    axes.plot(
        [point.x for point in noted],
        [point.y or 0.0 for point in noted],
        **{**style, "linestyle": "none"},
        markerfacecolor=LIGHT["paper"],
        markeredgewidth=1.6,
        zorder=5,
    )
    # Draw all intervals as one line with gaps, as each line costs Matplotlib milliseconds.
    spans = [(p.x, p.low, p.high) for p in points if p.low is not None and p.high is not None]
    xs = [end for x, _, _ in spans for end in (x, x, np.nan)]
    ys = [end for _, low, high in spans for end in (low, high, np.nan)]
    axes.plot(xs, ys, color=style["color"], linewidth=1.4, marker="_")


def _named_x_axis(axes: Axes, names: Sequence[str]) -> None:
    places = range(0, len(names), -(-len(names) // _MOST_TICKS))
    labels = [textwrap.fill(names[place], 18) for place in places]
    axes.set_xticks(list(places), labels)
    if sum(max(map(len, label.splitlines())) + 1 for label in labels) > 52:
        axes.tick_params(axis="x", labelrotation=35)
        for text in axes.get_xticklabels():
            text.set(horizontalalignment="right", rotation_mode="anchor")
    axes.set_xlim(-0.5, len(names) - 0.5)


def _numeric_x_axis(axes: Axes, chart: Lines) -> None:
    shown = {point.x: point.x_shown for series in chart.series for point in series.points}
    xs = sorted(shown)
    if xs[0] > 0 and xs[-1] / xs[0] >= _LOG_X:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(NullLocator())
    if len(xs) <= _MOST_TICKS:
        axes.xaxis.set_major_locator(FixedLocator(xs))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: shown.get(x, f"{x:g}")))
    if sum(len(shown[x]) + 1 for x in xs) > 52:
        axes.tick_params(axis="x", labelrotation=45)


def _y_axis(axes: Axes, chart: Lines) -> None:
    points = [p for series in chart.series for p in series.points if p.y is not None]
    ends = [v for p in points for v in (p.y, p.low, p.high) if v is not None]
    ends += [] if chart.reference is None else [chart.reference]
    low, high = min(ends), max(ends)
    if low > 0 and high / low > _LOG_Y:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(_tick)
        return
    _ticks(axes.yaxis)
    if chart.from_zero:
        axes.set_ylim(0, high * 1.06 or 1)
    else:
        middle = (low + high) / 2
        span = max(1.2 * (high - low), _LEAST_SPAN * abs(middle))
        axes.set_ylim(middle - span / 2, middle + span / 2)


# -- bars -------------------------------------------------------------------------------------


def _bars(axes: Axes, chart: Bars) -> None:
    for row, bar in enumerate(chart.bars):
        if bar.value is not None:
            color = _SERIES[bar.style % len(_SERIES)]["color"]
            axes.barh(row, bar.value, height=0.36, color=color)
        if bar.low is not None and bar.high is not None:
            ends = [bar.low, bar.high]
            axes.plot(ends, [row, row], color=LIGHT["ink"], linewidth=1.4, marker="|")
        if bar.most is not None:
            colors: dict[str, Any] = {"color": LIGHT["paper"], "markeredgecolor": LIGHT["ink"]}
            axes.plot(bar.most, row, "D", **colors, markersize=6, zorder=5)
        note = f" ({bar.note})" if bar.note else ""
        shown = bar.note if bar.value is None else chart.shown(bar) + note
        _row_text(axes, row, bar.name, shown)
    _rows(axes, len(chart.bars), chart.unit)
    axes.set_xlim(min(0, axes.get_xlim()[0]), None)
    if chart.reference is not None:
        axes.axvline(chart.reference, color=LIGHT["ink"], linewidth=1.2, linestyle="--")


def _stacks(axes: Axes, chart: Stacks) -> None:
    """Draw the share of each part, numbered as in the legend."""
    styles = (1, 2, 3, 0)
    values = np.array([stack.values for stack in chart.stacks], dtype=float)
    totals = values.sum(axis=1)
    shares = 100 * values / np.where(totals == 0, 1, totals)[:, None]
    begins = shares.cumsum(axis=1) - shares
    for index, part in enumerate(chart.parts):
        bars = axes.barh(
            range(len(chart.stacks)),
            shares[:, index],
            left=begins[:, index],
            height=0.42,
            color=_SERIES[styles[index % len(styles)]]["color"],
            edgecolor=LIGHT["paper"],
            label=f"{index + 1} {part}",
        )
        numbers = [str(index + 1) if s >= _LEAST_NUMBERED else "" for s in shares[:, index]]
        axes.bar_label(bars, numbers, label_type="center", color=LIGHT["paper"], fontsize=9)
    for row, stack in enumerate(chart.stacks):
        _row_text(axes, row, stack.name, f"{number(totals[row])} {chart.unit}")
    _rows(axes, len(chart.stacks), "% of the total")
    axes.set_xlim(0, 100)
    _legend(axes, columns=2)


def _row_text(axes: Axes, row: int, name: str, shown: str) -> None:
    """Write a row's name and figure above its bar; beside it, long names would not fit."""
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
    axes.set_xlabel(unit)
    _ticks(axes.xaxis)
    axes.figure.set_size_inches(_WIDTH_IN, 0.85 + 0.46 * count)  # type: ignore[union-attr]


# -- accuracy against speed -------------------------------------------------------------------


def _pareto(axes: Axes, chart: Pareto) -> None:
    ends = [0.0, *chart.limits]
    for spot in chart.spots:
        ends += [v for v in (spot.drop, spot.low, spot.high) if v is not None]
    margin = 0.06 * (max(ends) - min(ends))
    left, right = min(ends) - margin, max(ends) + 2 * margin
    axes.set_xlim(left, right)
    axes.set_ylim(0, 1.12 * max(spot.rate for spot in chart.spots))
    axes.axvspan(min(chart.limits), right, color=LIGHT["bad"], alpha=0.08, linewidth=0)
    for limit in chart.limits:
        axes.axvline(limit, color=LIGHT["bad"], linewidth=1.6, linestyle="--")
        _say_above(axes, limit, f"limit {limit:g}{chart.drop_unit}")
    best = sorted((spot.drop, spot.rate) for spot in chart.spots if spot.best)
    axes.step(*zip(*best, strict=True), where="post", color=LIGHT["muted"], linewidth=1.2)
    styles = [spot.style for spot in chart.spots]
    numbered = len(set(styles)) < len(styles)
    for index, spot in enumerate(chart.spots, start=1):
        _spot(axes, spot, str(index) if numbered else "")
    axes.set_xlabel(f"drop of the metric ({chart.drop_unit})")
    axes.set_ylabel(chart.unit)
    _ticks(axes.yaxis)
    _legend(axes)


def _spot(axes: Axes, spot: Spot, key: str) -> None:
    style = {**_SERIES[spot.style % len(_SERIES)], "linestyle": "none"}
    if spot.low is not None or spot.high is not None:
        left, right = axes.get_xlim()
        ends = (left if spot.low is None else spot.low, right if spot.high is None else spot.high)
        axes.plot(ends, [spot.rate] * 2, color=style["color"], linewidth=1.4, marker="|")
    passed = spot.verdict in ("PASS", "baseline")
    axes.plot(
        spot.drop,
        spot.rate,
        **style,
        markersize=9,
        markerfacecolor=style["color"] if passed else LIGHT["paper"],
        markeredgewidth=1.8,
        label=textwrap.fill(f"{key} {spot.name}: {spot.verdict}".strip(), _LEGEND_COLUMNS),
        zorder=4,
    )
    offset: dict[str, Any] = {"xytext": (5, 5), "textcoords": "offset points", "fontsize": 9}
    axes.annotate(key, (spot.drop, spot.rate), **offset)


# -- shared by all charts ---------------------------------------------------------------------


def _ticks(axis: Any) -> None:
    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(_tick)


def _tick(value: float, _: object) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def _say_above(axes: Axes, x: float, text: str, **style: Any) -> None:
    """Write the name of a vertical line above the axes."""
    axes.annotate(
        text,
        (x, 1),
        xycoords=axes.get_xaxis_transform(),
        xytext=(0, 2),
        textcoords="offset points",
        ha="center",
        va="bottom",
        color=LIGHT["bad"],
        **style,
    )


def _legend(axes: Axes, columns: int | None = None) -> None:
    """Put the legend above the axes, and make the figure taller to fit it."""
    handles, names = axes.get_legend_handles_labels()
    if columns is None:
        is_short = sum(len(name) + 7 for name in names) <= _LEGEND_COLUMNS
        columns = len(names) if is_short else 1
    lines = sum(1 + name.count("\n") for name in names) if columns == 1 else len(names) / columns
    figure: Any = axes.figure
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.22 * np.ceil(lines))
    figure.legend(handles, names, loc="outside upper left", ncols=columns)

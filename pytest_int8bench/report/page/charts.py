"""Charts as data. Each can also return its figures as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pytest_int8bench.report.tables import MISSING, Grid, number, plain_grid


@dataclass(frozen=True, kw_only=True)
class Point:
    """One figure of a chart. Values are in the chart's units."""

    name: str
    """Run name."""
    x: float
    x_shown: str
    """``x`` as shown to readers: ``128``, ``reduce-overhead`` or a commit."""
    y: float | None
    """None for a point without a figure; ``note`` says why."""
    low: float | None = None
    """Lower end of the interval of ``y``; None without an interval."""
    high: float | None = None
    note: str = ""
    """A remark such as ``OOM`` or ``accuracy-failed``."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """The points of one line."""

    name: str
    style: int
    """Index of the color and the marker; the baseline has 0."""
    points: tuple[Point, ...]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Base class of all charts."""

    id: str
    """Unique in the report."""
    title: str
    description: str
    """Alternative text for readers who cannot see the chart."""
    unit: str
    """Unit of the figures, such as ``samples/s``."""
    decimals: int | None = None
    """Decimal places of the figures; None for at least three significant digits."""

    def with_interval(self, value: float | None, low: float | None, high: float | None) -> str:
        """Return a figure with its interval, if it has one."""
        shown, *ends = (self._number(figure) for figure in (value, low, high))
        if value is None or low is None or high is None:
            return shown
        return f"{shown} [{', '.join(ends)}]"

    def _number(self, value: float | None) -> str:
        if value is None or self.decimals is None:
            return number(value)
        return f"{value:.{self.decimals}f}"


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A change between two positions on the x axis."""

    x: float
    letter: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Lines(Chart):
    """Figures against an axis."""

    x_label: str
    series: tuple[Series, ...]
    names: tuple[str, ...] = ()
    """Names of the positions 0, 1, 2 … of the x axis; empty for a numeric axis."""
    joined: bool = True
    """Whether a line joins the points of a series, which makes sense only if the order of x
    does."""
    from_zero: bool = True
    """Whether the y axis starts at 0."""
    reference: float | None = None
    """Position of a horizontal line."""
    marks: tuple[Mark, ...] = ()

    def shown(self, point: Point) -> str:
        """Return a point's figure with its interval."""
        return self.with_interval(point.y, point.low, point.high)

    def grid(self) -> Grid:
        """Return the figures as a table."""
        rows = [
            (series.name, point.x_shown, self.shown(point), point.note or MISSING)
            for series in self.series
            for point in series.points
        ]
        return plain_grid(
            ["series", self.x_label, f"{self.unit} [95 %]", "note"], rows, left=["note"]
        )


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One row of a bar chart."""

    name: str
    style: int
    value: float | None
    low: float | None = None
    high: float | None = None
    most: float | None = None
    """Upper bound of the value."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Bars(Chart):
    """Horizontal bars that start at 0, one figure per row."""

    bars: tuple[Bar, ...]
    reference: float | None = None
    """Position of a vertical line."""

    def shown(self, bar: Bar) -> str:
        """Return a bar's figure with its interval."""
        return self.with_interval(bar.value, bar.low, bar.high)

    def grid(self) -> Grid:
        """Return the figures as a table."""
        columns = ["name", self.unit + (" [95 %]" if self._has("low") else "")]
        has_most = self._has("most")
        columns += ["upper bound"] * has_most + ["note"] * self._has("note")
        rows = []
        for bar in self.bars:
            row = [bar.name, self.shown(bar)]
            row += [self._number(bar.most)] if has_most else []
            rows.append(row + ([bar.note or MISSING] if self._has("note") else []))
        return plain_grid(columns, rows, left=["note"])

    def _has(self, field: str) -> bool:
        return any(getattr(bar, field) not in (None, "") for bar in self.bars)


@dataclass(frozen=True, kw_only=True)
class Stack:
    """One row of a chart of parts."""

    name: str
    values: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Stacks(Chart):
    """Stacked bars: rows of parts that add up to a whole."""

    parts: tuple[str, ...]
    stacks: tuple[Stack, ...]

    def grid(self) -> Grid:
        """Return the figures as a table."""
        columns = ["name", *(f"{part} ({self.unit})" for part in self.parts), "total"]
        rows = []
        for stack in self.stacks:
            total = sum(stack.values)
            cells = [f"{number(v)} ({v / total:.0%})" if total else number(v) for v in stack.values]
            rows.append([stack.name, *cells, number(total)])
        return plain_grid(columns, rows, left=[])


@dataclass(frozen=True, kw_only=True)
class Spot:
    """A configuration with its accuracy and speed."""

    name: str
    style: int
    drop: float
    """In percent or percentage points."""
    low: float | None
    """One-sided 95 % lower bound of the drop; None if there is none."""
    high: float | None
    rate: float
    """Throughput."""
    verdict: str
    best: bool
    """Whether it is Pareto-optimal: no other configuration is at least as accurate and as fast, and
    better in one of the two."""


@dataclass(frozen=True, kw_only=True)
class Pareto(Chart):
    """Accuracy drop against throughput."""

    drop_unit: str
    """``%`` of the baseline's metric, or ``pp``."""
    limits: tuple[float, ...]
    """Largest drops that pass, in ``drop_unit``."""
    spots: tuple[Spot, ...]

    def grid(self) -> Grid:
        """Return the figures as a table."""
        columns = [
            "name",
            f"drop {self.drop_unit} [one-sided 95 %]",
            self.unit,
            "verdict",
            "Pareto-optimal",
        ]
        rows = []
        for spot in self.spots:
            bounds = "" if spot.low is None else f" [{_bound(spot.low)}, {_bound(spot.high)}]"
            cells = [spot.name, f"{spot.drop:.2f}{bounds}", number(spot.rate), spot.verdict]
            rows.append([*cells, "yes" if spot.best else "no"])
        return plain_grid(columns, rows, left=columns[-2:])


AnyChart = Lines | Bars | Stacks | Pareto


def _bound(value: float | None) -> str:
    return "no bound" if value is None else f"{value:.2f}"


def distinct(series: Sequence[Series]) -> tuple[Series, ...]:
    """Return the series with distinct styles, keeping the style of each mode if these already
    differ."""
    if len({one.style for one in series}) == len(series):
        return tuple(series)
    return tuple(
        Series(name=one.name, style=index, points=one.points) for index, one in enumerate(series)
    )

"""Charts as data: what is drawn, and the table that says the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pytest_int8bench.report.tables import MISSING, Grid, number


@dataclass(frozen=True, kw_only=True)
class Point:
    """One figure of a chart. Values are in the chart's units."""

    name: str
    """The run it is of."""
    x: float
    x_shown: str
    """``x`` in words: ``128``, ``reduce-overhead``, a commit."""
    y: float | None
    """None where there is no figure: ``note`` says why."""
    low: float | None = None
    """Ends of the interval of ``y``; None where there is none."""
    high: float | None = None
    note: str = ""
    """What the figure's reader should know: ``OOM``, ``accuracy-failed``."""

    @property
    def shown(self) -> str:
        """``y`` with its interval."""
        return with_interval(self.y, self.low, self.high)


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points that belong together."""

    name: str
    style: int
    """Number of the colour and the marker; 0 is the baseline's."""
    points: tuple[Point, ...]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What all charts have."""

    id: str
    """Unique in the report."""
    title: str
    description: str
    """What is to be seen, for those who do not see it."""
    unit: str
    """Of the figures: ``samples/s``."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A change between two places of the x axis."""

    x: float
    letter: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Lines(Chart):
    """Figures against an axis."""

    x_label: str
    series: tuple[Series, ...]
    names: tuple[str, ...] = ()
    """What the places 0, 1, 2 … of the x axis are called; empty for an axis of numbers."""
    joined: bool = True
    """Points of a series are joined: the order of the places means something."""
    from_zero: bool = True
    """The y axis starts at 0."""
    reference: float | None = None
    """Horizontal line."""
    marks: tuple[Mark, ...] = ()

    def grid(self) -> Grid:
        """Return the figures as a table."""
        rows = [
            (series.name, point.x_shown, point.shown, point.note or MISSING)
            for series in self.series
            for point in series.points
        ]
        return _grid(["series", self.x_label, f"{self.unit} [95 %]", "note"], rows, ["note"])


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One row of a bar chart."""

    name: str
    style: int
    value: float | None
    low: float | None = None
    high: float | None = None
    most: float | None = None
    """What the value could be at most."""
    note: str = ""

    @property
    def shown(self) -> str:
        """The value with its interval."""
        return with_interval(self.value, self.low, self.high)


@dataclass(frozen=True, kw_only=True)
class Bars(Chart):
    """Rows of one figure each, from 0."""

    bars: tuple[Bar, ...]
    reference: float | None = None
    """Vertical line."""

    def grid(self) -> Grid:
        """Return the figures as a table."""
        columns = ["name", self.unit + (" [95 %]" if self._has("low") else "")]
        has_most = self._has("most")
        columns += [*(["at most"] if has_most else []), *(["note"] if self._has("note") else [])]
        rows = []
        for bar in self.bars:
            row = [bar.name, bar.shown]
            row += [number(bar.most)] if has_most else []
            rows.append(row + ([bar.note or MISSING] if self._has("note") else []))
        return _grid(columns, rows, ["note"])

    def _has(self, field: str) -> bool:
        return any(getattr(bar, field) not in (None, "") for bar in self.bars)


@dataclass(frozen=True, kw_only=True)
class Stack:
    """One row of a chart of parts."""

    name: str
    values: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Stacks(Chart):
    """Rows of parts that add up to a whole."""

    parts: tuple[str, ...]
    stacks: tuple[Stack, ...]

    def grid(self) -> Grid:
        """Return the figures as a table."""
        columns = ["name", *(f"{part} ({self.unit})" for part in self.parts), "together"]
        rows = []
        for stack in self.stacks:
            total = sum(stack.values)
            cells = [f"{number(v)} ({v / total:.0%})" if total else number(v) for v in stack.values]
            rows.append([stack.name, *cells, number(total)])
        return _grid(columns, rows, [])


@dataclass(frozen=True, kw_only=True)
class Spot:
    """A configuration between accuracy and speed."""

    name: str
    style: int
    drop: float
    """In percent or points."""
    low: float | None
    """One-sided 95 % bounds of the drop; None where there is none."""
    high: float | None
    rate: float
    """Throughput."""
    verdict: str
    best: bool
    """No other one is both at least as accurate and as fast, and better in one of them."""


@dataclass(frozen=True, kw_only=True)
class Pareto(Chart):
    """Accuracy drop against throughput."""

    drop_unit: str
    """``%`` of the baseline's metric, or ``pp``."""
    limits: tuple[float, ...]
    """Largest drops that passed, in ``drop_unit``."""
    spots: tuple[Spot, ...]

    def grid(self) -> Grid:
        """Return the figures as a table."""
        columns = [
            "name",
            f"drop {self.drop_unit} [one-sided 95 %]",
            self.unit,
            "verdict",
            "not beaten",
        ]
        rows = []
        for spot in self.spots:
            bounds = "" if spot.low is None else f" [{_bound(spot.low)}, {_bound(spot.high)}]"
            cells = [spot.name, f"{spot.drop:.2f}{bounds}", number(spot.rate), spot.verdict]
            rows.append([*cells, "yes" if spot.best else "no"])
        return _grid(columns, rows, ["verdict", "not beaten"])


AnyChart = Lines | Bars | Stacks | Pareto


def with_interval(value: float | None, low: float | None, high: float | None) -> str:
    """Return a figure with its interval, if it has one."""
    if value is None or low is None or high is None:
        return number(value)
    return f"{number(value)} [{number(low)}, {number(high)}]"


def _bound(value: float | None) -> str:
    return "no bound" if value is None else f"{value:.2f}"


def _grid(columns: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str]) -> Grid:
    return Grid(
        columns=columns,
        rows=rows,
        styles=[None] * len(rows),
        name=columns[0],
        left=left,
    )

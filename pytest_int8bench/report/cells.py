"""Figures of results as cells of tables."""

from __future__ import annotations

from typing import Any

from pytest_int8bench.report.tables import MISSING, number
from pytest_int8bench.results.figures import FIGURES, Figure
from pytest_int8bench.results.records import Result, Timed

#: Standard errors on each side of a 95 % interval.
_WIDTH = 1.96


def value_text(figure: Figure, value: Any) -> str:
    """Return a value as the figure is written; a dash for nothing."""
    if value is None or value == "":
        return MISSING
    if figure.kind == "text":
        return str(value)
    if figure.kind == "time":
        return time_text(value)
    scaled = figure.scaled(value)
    if figure.kind == "share":
        return "<1%" if 0 < scaled < 0.005 else f"{scaled:.0%}"
    return f"{scaled:.2f}x" if figure.kind == "ratio" else number(scaled)


def time_text(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        if seconds * factor >= 1:
            return f"{number(seconds * factor)} {unit}"
    return f"{number(seconds * 1e9)} ns"


def figure_text(figure: Figure, result: Timed) -> str:
    """Return the figure of a result with its interval; a dash where it was not measured."""
    text = value_text(figure, figure.of(result))
    if text == MISSING or figure.interval is None:
        return text
    low, high = figure_interval(figure, result)
    if low is None or high is None:
        return f"{text} {figure.no_interval}".rstrip()
    ends = (value_text(figure, end).removesuffix("x") for end in (low, high))
    return f"{text} [{', '.join(ends)}]"


def figure_interval(figure: Figure, result: Timed) -> tuple[float | None, float | None]:
    """Return the ends of the 95 % interval of a figure, as saved or, within its process, from its
    standard error; Nones where that is not known."""
    if figure.interval is not None:
        low, high = (getattr(result, name) for name in figure.interval)
        return low, high
    value = figure.of(result)
    error = getattr(result, figure.standard_error) if figure.standard_error else None
    if value is None or error is None or not 0 <= _WIDTH * error < 1:
        return None, None
    if figure.higher_is_better:  # a rate: one over the time that the error is of
        return value / (1 + _WIDTH * error), value / (1 - _WIDTH * error)
    return value * (1 - _WIDTH * error), value * (1 + _WIDTH * error)


def figure_cell(figure: Figure, result: Timed) -> str:
    """Return the figure of a result with its interval and mark."""
    text = figure_text(figure, result)
    return text if text == MISSING or figure.mark is None else text + figure.mark(result)


def shown_speedup(result: Result) -> str:
    """Return a speedup with its interval."""
    return figure_cell(FIGURES["speedup"], result)


def status_text(result: Timed) -> str:
    """Return the status of a point as people write it."""
    return "OOM" if result.oom else result.status


def score_text(value: float | None) -> str:
    """Return a metric as it is written; a dash where it is not known."""
    return MISSING if value is None else f"{value:.4f}"

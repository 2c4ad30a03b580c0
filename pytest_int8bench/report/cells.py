"""Format figures of results as table cells."""

from __future__ import annotations

from typing import Any

from pytest_int8bench.report.tables import MISSING, number
from pytest_int8bench.results.figures import FIGURES, Figure
from pytest_int8bench.results.records import Result, Timed

#: Half-width of a 95 % interval, in standard errors.
_HALF_WIDTH = 1.96


def value_text(figure: Figure, value: Any) -> str:
    """Return a value in the figure's notation, or a dash for None."""
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
    """Format a time in the most readable unit, from s to ns."""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        if seconds * factor >= 1:
            return f"{number(seconds * factor)} {unit}"
    return f"{number(seconds * 1e9)} ns"


def figure_text(figure: Figure, result: Timed) -> str:
    """Return a result's figure with its interval, or a dash if it was not measured."""
    text = value_text(figure, figure.of(result))
    if text == MISSING or figure.interval is None:
        return text
    low, high = figure_interval(figure, result)
    if low is None or high is None:
        return f"{text} {figure.no_interval}".rstrip()
    ends = (value_text(figure, end).removesuffix("x") for end in (low, high))
    return f"{text} [{', '.join(ends)}]"


def figure_interval(figure: Figure, result: Timed) -> tuple[float | None, float | None]:
    """Return the ends of a figure's 95 % interval, or two Nones if it is unknown.

    Figures without a saved interval get one from the standard error within their process.
    """
    if figure.interval is not None:
        low, high = (getattr(result, name) for name in figure.interval)
        return low, high
    value = figure.of(result)
    error = getattr(result, figure.standard_error) if figure.standard_error else None
    if value is None or error is None or not 0 <= _HALF_WIDTH * error < 1:
        return None, None
    low, high = 1 - _HALF_WIDTH * error, 1 + _HALF_WIDTH * error
    if figure.higher_is_better:  # a rate; the saved standard error is that of the time
        return value / high, value / low
    return value * low, value * high


def figure_cell(figure: Figure, result: Timed) -> str:
    """Return a result's figure with its interval and mark."""
    text = figure_text(figure, result)
    return text if text == MISSING or figure.mark is None else text + figure.mark(result)


def shown_speedup(result: Result) -> str:
    """Return a result's speedup with its interval."""
    return figure_cell(FIGURES["speedup"], result)


def status_text(result: Timed) -> str:
    """Return a human-readable status: ``OOM`` instead of ``oom``."""
    return "OOM" if result.oom else result.status


def score_text(value: float | None) -> str:
    """Return a metric with four decimals, or a dash for None."""
    return MISSING if value is None else f"{value:.4f}"

"""Intervals of figures that are saved without one."""

from __future__ import annotations

from pytest_int8bench.results import Result

#: Standard errors on each side of a 95 % interval.
_WIDTH = 1.96


def rate_interval(result: Result) -> tuple[float | None, float | None]:
    """Return the 95 % interval of ``samples_per_s`` within its process, from the standard error
    of the median batch time; Nones where that is not known."""
    rate, error = result.samples_per_s, result.batch_time_standard_error
    if rate is None or error is None or not 0 <= _WIDTH * error < 1:
        return None, None
    return rate / (1 + _WIDTH * error), rate / (1 - _WIDTH * error)

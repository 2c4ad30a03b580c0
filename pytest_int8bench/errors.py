"""Errors that say in one line what to do."""

from __future__ import annotations


class ClearError(Exception):
    """The message says it all: pytest shows it without a traceback of this package."""


class AccuracyError(ClearError, AssertionError):
    """A candidate lost too much, or it cannot be excluded that it did."""


class UndecidedError(AccuracyError):
    """Too few samples to tell whether a candidate lost too much: nothing is shown against it, and
    what was measured of it stands."""


class WorkloadError(ClearError, ValueError):
    """A workload that does not give what it must."""


def first_line(error: BaseException) -> str:
    """Return the first line of a message of another library, without the pages of advice after
    it; the error's name where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else repr(error)


class QuantizationError(ClearError, ValueError):
    """Nothing could be quantized, or a layer could not."""

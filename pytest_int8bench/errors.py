"""Errors whose one-line message tells the user what to do."""

from __future__ import annotations


class ClearError(Exception):
    """An error that pytest shows without a traceback, because its message is sufficient."""


class AccuracyError(ClearError, AssertionError):
    """A candidate lost too much accuracy, or such a loss could not be ruled out."""


class UndecidedError(AccuracyError):
    """There are too few samples to decide whether a candidate lost too much accuracy; its
    measurements remain valid."""


class WorkloadError(ClearError, ValueError):
    """A workload does not return what it must."""


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error message, or the error's name if the message
    is empty; such messages may continue with pages of advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else repr(error)


class QuantizationError(ClearError, ValueError):
    """A layer, or the whole model, could not be quantized."""

"""Errors that say in one line what to do."""

from __future__ import annotations


class ClearError(Exception):
    """The message says it all: pytest shows it without a traceback of this package."""


class WorkloadError(ClearError, ValueError):
    """A workload that does not give what it must."""

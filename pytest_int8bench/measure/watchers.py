"""Tracers and profilers that are active beside a clock and cannot be taken away."""

from __future__ import annotations

from pytest_int8bench.clock import lasting_tracers
from pytest_int8bench.compiler.torch_workarounds.eager import active_watchers


def active_tracers() -> list[str]:
    """Return what slows down this process while a clock runs."""
    return [*lasting_tracers(), *active_watchers()]


def tracer_remark() -> str | None:
    """Return what the reader of a time should know, or None."""
    found = active_tracers()
    return f"timed beside {', '.join(found)}: the times include what that costs" if found else None

"""Report tracers and profilers that are active during a timing and cannot be paused."""

from __future__ import annotations

from pytest_int8bench.clock import lasting_tracers
from pytest_int8bench.compiler.torch_workarounds.eager import active_watchers


def active_tracers() -> list[str]:
    """Return the names of tools that slow down this process during a timing."""
    return [*lasting_tracers(), *active_watchers()]


def tracer_remark() -> str | None:
    """Return a remark on such tools, or None."""
    found = active_tracers()
    return f"timed with {', '.join(found)} active; times include the overhead" if found else None

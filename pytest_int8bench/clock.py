"""Clocks for measurements. Imports nothing heavy, so that pytest markers can refer to it."""

from __future__ import annotations

import os
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Tool ids of ``sys.monitoring`` (Python 3.12 and later).
_MONITORING_TOOLS = range(6)


def synchronize() -> None:
    """Wait until the current CUDA device is idle; do nothing without CUDA."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def synchronized_perf_counter() -> float:
    """Return ``time.perf_counter()`` in seconds after all submitted device work is done.

    A host clock alone shows when kernels are submitted, not when they end.
    """
    synchronize()
    return time.perf_counter()


@contextmanager
def untraced() -> Iterator[None]:
    """Pause Python tracers and profilers while a clock runs.

    Coverage, debuggers and profilers trace each line or call, which slows down Python code, such
    as an eager model, but not kernels. This pauses tools that use ``sys.settrace``,
    ``sys.setprofile`` or ``sys.monitoring``, in this thread and in threads started meanwhile.
    """
    tools = _pause_monitoring()
    tracer, profiler = sys.gettrace(), sys.getprofile()
    thread_tracer, thread_profiler = threading.gettrace(), threading.getprofile()
    threading.settrace(None)
    threading.setprofile(None)
    if _comes_back(profiler):
        _stop_profiler(profiler)
    if callable(tracer):
        sys.settrace(None)
    try:
        yield
    finally:
        if callable(tracer):
            sys.settrace(tracer)
        if _comes_back(profiler):
            _start_profiler(profiler)
        threading.settrace(thread_tracer)
        threading.setprofile(thread_profiler)
        _resume_monitoring(tools)


def _comes_back(profiler: Any) -> bool:
    """Return whether a profiler can be restored once removed; one written in C may not be."""
    return callable(profiler) or (hasattr(profiler, "enable") and hasattr(profiler, "disable"))


def _stop_profiler(profiler: Any) -> None:
    if callable(profiler):
        sys.setprofile(None)
    else:  # cProfile, up to Python 3.11: written in C
        profiler.disable()


def _start_profiler(profiler: Any) -> None:
    if callable(profiler):
        sys.setprofile(profiler)
    else:
        profiler.enable()


def _pause_monitoring() -> list[tuple[int, int, dict[int, Any]]]:
    """Remove the events and callbacks of each tool, and return them.

    Callbacks are removed too, because events may be set for single functions, which cannot be
    listed.
    """
    monitoring: Any = getattr(sys, "monitoring", None)
    if monitoring is None:
        return []
    single = [event for event in vars(monitoring.events).values() if event.bit_count() == 1]
    paused = []
    for tool in _MONITORING_TOOLS:
        if monitoring.get_tool(tool) is None:
            continue
        events = monitoring.get_events(tool)
        monitoring.set_events(tool, 0)
        callbacks = {event: monitoring.register_callback(tool, event, None) for event in single}
        paused.append((tool, events, callbacks))
    return paused


def _resume_monitoring(paused: list[tuple[int, int, dict[int, Any]]]) -> None:
    monitoring: Any = getattr(sys, "monitoring", None)
    for tool, events, callbacks in paused:
        if monitoring.get_tool(tool) is None:  # the tool has ended meanwhile
            continue
        for event, callback in callbacks.items():
            if callback is not None:
                monitoring.register_callback(tool, event, callback)
        monitoring.set_events(tool, events)


def lasting_tracers() -> list[str]:
    """Return the names of tools that slow down this process or each kernel launch and cannot be
    paused."""
    found = ["tracemalloc"] if tracemalloc.is_tracing() else []
    tracer, profiler = sys.gettrace(), sys.getprofile()
    if tracer is not None and not callable(tracer):
        found.append(type(tracer).__name__)
    if profiler is not None and not _comes_back(profiler):
        found.append(type(profiler).__name__)
    yappi = sys.modules.get("yappi")  # written in C; sys does not show it
    found += ["yappi"] if yappi is not None and yappi.is_running() else []
    found += ["Python's development mode"] if sys.flags.dev_mode else []
    # Set by Nsight Systems and Compute, and by compute-sanitizer.
    found += ["CUDA_INJECTION64_PATH"] if os.environ.get("CUDA_INJECTION64_PATH") else []
    if os.environ.get("CUDA_LAUNCH_BLOCKING", "0") not in ("", "0"):
        found.append("CUDA_LAUNCH_BLOCKING")
    return found

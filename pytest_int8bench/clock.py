"""The clock of a measurement. Imports nothing heavy, so that pytest markers may name it."""

from __future__ import annotations

import os
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Numbers that tools may register under with ``sys.monitoring``, since Python 3.12.
_MONITORING_TOOLS = range(6)


def synchronize() -> None:
    """Wait until the current CUDA device has done all its work; nothing without CUDA."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def synchronized_perf_counter() -> float:
    """Seconds of ``time.perf_counter`` after all submitted device work is done.

    A host clock alone sees when kernels are submitted, not when they end.
    """
    synchronize()
    return time.perf_counter()


@contextmanager
def untraced() -> Iterator[None]:
    """Take tracers and profilers of Python away while a clock runs, and put them back after it.

    Coverage, debuggers and profilers trace each line or call of this process, which slows down
    what runs in Python, such as an eager model, and leaves kernels as they are. Found are those
    that use ``sys.settrace``, ``sys.setprofile`` or ``sys.monitoring``, in this thread and in
    threads that are started meanwhile.
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
    """Return whether a profiler can be put back once it is taken away; one that is written in C may
    not be."""
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
    """Take away the events and callbacks of each tool, and return them.

    The callbacks too: events may also be set for single functions, which cannot be listed.
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
        if monitoring.get_tool(tool) is None:  # it has ended meanwhile
            continue
        for event, callback in callbacks.items():
            if callback is not None:
                monitoring.register_callback(tool, event, callback)
        monitoring.set_events(tool, events)


def lasting_tracers() -> list[str]:
    """Return what slows down this process, or each launch of a kernel, and cannot be taken away
    for a while."""
    found = ["tracemalloc"] if tracemalloc.is_tracing() else []
    tracer, profiler = sys.gettrace(), sys.getprofile()
    if tracer is not None and not callable(tracer):
        found.append(type(tracer).__name__)
    if profiler is not None and not _comes_back(profiler):
        found.append(type(profiler).__name__)
    yappi = sys.modules.get("yappi")  # written in C, and seen by nothing else
    found += ["yappi"] if yappi is not None and yappi.is_running() else []
    found += ["Python's development mode"] if sys.flags.dev_mode else []
    # Set by Nsight Systems and Compute, and by compute-sanitizer.
    found += ["CUDA_INJECTION64_PATH"] if os.environ.get("CUDA_INJECTION64_PATH") else []
    if os.environ.get("CUDA_LAUNCH_BLOCKING", "0") not in ("", "0"):
        found.append("CUDA_LAUNCH_BLOCKING")
    return found

"""Test the clock of measurements."""

from __future__ import annotations

import cProfile
import itertools
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_int8bench import clock


def fake_torch(monkeypatch: pytest.MonkeyPatch, *, initialized: bool) -> list[str]:
    """Install a fake torch that records synchronization."""
    events: list[str] = []
    cuda = SimpleNamespace(
        is_initialized=lambda: initialized, synchronize=lambda: events.append("synchronize")
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    return events


def test_clock_is_monotonic() -> None:
    readings = [clock.synchronized_perf_counter() for _ in range(1000)]
    assert all(later >= earlier for earlier, later in itertools.pairwise(readings))
    assert readings[-1] > readings[0]


def test_synchronizes_before_reading_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    events = fake_torch(monkeypatch, initialized=True)

    def perf_counter() -> float:
        events.append("read")
        return 2.5

    monkeypatch.setattr(clock.time, "perf_counter", perf_counter)
    assert clock.synchronized_perf_counter() == 2.5
    assert events == ["synchronize", "read"]


def test_clock_does_not_initialize_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    events = fake_torch(monkeypatch, initialized=False)
    clock.synchronized_perf_counter()
    assert events == []


def test_does_not_synchronize_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    clock.synchronized_perf_counter()
    assert "torch" not in sys.modules


def test_clock_loads_no_heavy_libraries() -> None:
    code = (
        "import sys; from pytest_int8bench.clock import synchronized_perf_counter as read; read();"
        "print([m for m in ('torch', 'numpy', 'pytest') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# -- tracers and profilers ----------------------------------------------------------------------


def traced_work() -> int:
    return sum(abs(number) for number in range(3))


def under_the_clock() -> None:
    with clock.untraced():
        traced_work()


@pytest.fixture
def seen() -> Iterator[list[str]]:
    """Return the functions that a tracer was called for, and check that tracers are restored."""
    before = sys.gettrace(), sys.getprofile(), threading.gettrace(), threading.getprofile()
    found: list[str] = []
    yield found
    sys.settrace(before[0])
    sys.setprofile(before[1])
    threading.settrace(before[2])  # type: ignore[arg-type]
    threading.setprofile(before[3])  # type: ignore[arg-type]


@pytest.mark.parametrize("install", ["settrace", "setprofile"])
@pytest.mark.parametrize("module", [sys, threading])
def test_removes_python_tracers_during_timing(seen: list[str], module: Any, install: str) -> None:
    def trace(frame: Any, event: str, argument: Any) -> Any:
        seen.append(frame.f_code.co_name)
        return trace

    def in_thread() -> None:
        thread = threading.Thread(target=traced_work)
        thread.start()
        thread.join()

    work = traced_work if module is sys else in_thread
    getattr(module, install)(trace)
    with clock.untraced():
        work()
        with clock.untraced():  # nested
            work()
        work()
    assert "traced_work" not in seen
    work()
    assert "traced_work" in seen
    assert getattr(module, install.replace("set", "get"))() is trace


def test_restores_tracers_after_an_error(seen: list[str]) -> None:
    def trace(frame: Any, event: str, argument: Any) -> None:
        seen.append(event)

    sys.settrace(trace)
    with pytest.raises(ZeroDivisionError), clock.untraced():
        _ = 1 / 0
    assert sys.gettrace() is trace


def test_removes_cprofile_during_timing() -> None:
    profiler = cProfile.Profile()
    profiler.enable()
    under_the_clock()
    traced_work()
    profiler.disable()
    calls = {
        row.code.co_name: row.callcount for row in profiler.getstats() if row.code != str(row.code)
    }
    assert calls["traced_work"] == 1


@pytest.mark.skipif(not hasattr(sys, "monitoring"), reason="since Python 3.12")
@pytest.mark.parametrize("local", [False, True])
def test_removes_monitoring_during_timing(local: bool) -> None:
    monitoring: Any = sys.monitoring  # type: ignore[attr-defined]
    events = monitoring.events
    found: list[str] = []
    tool = next(number for number in range(6) if monitoring.get_tool(number) is None)
    monitoring.use_tool_id(tool, "a tool")
    try:
        monitoring.register_callback(
            tool, events.PY_START, lambda code, _: found.append(code.co_name)
        )
        if local:
            monitoring.set_local_events(tool, traced_work.__code__, events.PY_START)
        else:
            monitoring.set_events(tool, events.PY_START)
        under_the_clock()
        assert "traced_work" not in found
        traced_work()
        assert "traced_work" in found
        assert monitoring.get_events(tool) == (0 if local else events.PY_START)
    finally:
        monitoring.free_tool_id(tool)


class FakeMonitoring:
    """``sys.monitoring`` for Python 3.11, with one tool."""

    events = SimpleNamespace(NO_EVENTS=0, CALL=16, LINE=32, BRANCH=48)

    def __init__(self) -> None:
        self.tools = {3: "coverage"}
        self.active = {3: 32}
        self.callbacks: dict[tuple[int, int], Any] = {(3, 32): "line"}

    def get_tool(self, tool: int) -> str | None:
        return self.tools.get(tool)

    def get_events(self, tool: int) -> int:
        return self.active[tool]

    def set_events(self, tool: int, events: int) -> None:
        self.active[tool] = events

    def register_callback(self, tool: int, event: int, callback: Any) -> Any:
        assert event.bit_count() == 1
        before = self.callbacks.pop((tool, event), None)
        if callback is not None:
            self.callbacks[tool, event] = callback
        return before


def test_restores_monitoring_events_and_callbacks(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeMonitoring()
    monkeypatch.setattr(sys, "monitoring", fake, raising=False)
    with clock.untraced():
        assert (fake.active, fake.callbacks) == ({3: 0}, {})
    assert (fake.active, fake.callbacks) == ({3: 32}, {(3, 32): "line"})
    with clock.untraced():
        fake.tools.clear()  # the tool ends
    assert fake.active == {3: 0}


class OfC:
    """A profiler that only C code can start."""


def test_keeps_profiler_that_cannot_be_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "getprofile", OfC)
    monkeypatch.setattr(sys, "setprofile", lambda profiler: pytest.fail("taken away"))
    with clock.untraced():
        pass


def test_names_tracers_that_cannot_be_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_INJECTION64_PATH", raising=False)
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "0")
    before = clock.lasting_tracers()
    monkeypatch.setattr(sys, "getprofile", OfC)
    monkeypatch.setitem(sys.modules, "yappi", SimpleNamespace(is_running=lambda: True))
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    monkeypatch.setenv("CUDA_INJECTION64_PATH", "/opt/nsys.so")
    tracemalloc.start()
    try:
        found = clock.lasting_tracers()
    finally:
        tracemalloc.stop()
    assert set(found) - set(before) == {
        *("tracemalloc", "OfC", "yappi"),
        *("CUDA_INJECTION64_PATH", "CUDA_LAUNCH_BLOCKING"),
    }

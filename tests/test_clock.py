"""The clock of a measurement."""

from __future__ import annotations

import itertools
import subprocess
import sys
from types import SimpleNamespace

import pytest

from pytest_int8bench import clock


def fake_torch(monkeypatch: pytest.MonkeyPatch, *, initialized: bool) -> list[str]:
    """Put a torch in place that notes when it is waited for."""
    events: list[str] = []
    cuda = SimpleNamespace(
        is_initialized=lambda: initialized, synchronize=lambda: events.append("synchronize")
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    return events


def test_readings_do_not_go_back() -> None:
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


def test_cuda_is_not_initialized_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    events = fake_torch(monkeypatch, initialized=False)
    clock.synchronized_perf_counter()
    assert events == []


def test_nothing_to_wait_for_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    clock.synchronized_perf_counter()
    assert "torch" not in sys.modules


def test_the_clock_loads_nothing_heavy() -> None:
    code = (
        "import sys; from pytest_int8bench.clock import synchronized_perf_counter as read; read();"
        "print([m for m in ('torch', 'numpy', 'pytest') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"

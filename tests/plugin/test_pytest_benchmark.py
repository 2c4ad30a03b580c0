"""Test the rounds that pytest-benchmark times."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from pytest_int8bench.clock import synchronized_perf_counter
from pytest_int8bench.measure.timing import Plan
from pytest_int8bench.plugin.pytest_benchmark import Benchmark


class Prepared:
    """A run that records when it is prepared, called and traced."""

    most_calls = 3

    def __init__(self) -> None:
        self.log: list[Any] = []

    def prepare(self, calls: int) -> None:
        self.log.append(f"prepare {calls}")

    def __call__(self) -> None:
        self.log.append(sys.gettrace())


def fake_fixture() -> Any:
    def pedantic(
        run: Callable[[], object], rounds: int, iterations: int, teardown: Callable[[], object]
    ) -> None:
        for _ in range(rounds):
            for _ in range(iterations):
                run()
            teardown()

    data = SimpleNamespace(data=[0.5, 0.25])
    options = {"timer": synchronized_perf_counter}
    return SimpleNamespace(pedantic=pedantic, stats=SimpleNamespace(options=options, stats=data))


def test_prepares_each_round_without_tracing() -> None:
    def trace(frame: Any, event: str, argument: Any) -> None:
        return None

    run, before = Prepared(), sys.gettrace()
    sys.settrace(trace)
    try:
        times = Benchmark(fake_fixture()).time_rounds(run, Plan(rounds=2, iterations=3))
        assert sys.gettrace() is trace
    finally:
        sys.settrace(before)
    assert times == [0.5, 0.25]
    assert run.log == ["prepare 3", *[None] * 3, "prepare 3", *[None] * 3, "prepare 3"]

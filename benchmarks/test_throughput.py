"""Measure the throughput of OlmoEarth encoders: ``pytest benchmarks --int8-mode=w8a8``."""

from __future__ import annotations

from collections.abc import Callable

from pytest_int8bench.results.records import Result


def test_throughput(int8_throughput: Callable[[], Result]) -> None:
    result = int8_throughput()
    assert result.oom or result.samples_per_s > 0

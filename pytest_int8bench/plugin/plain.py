"""Record plain benchmarks, which use only pytest-benchmark's ``benchmark`` fixture."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator

import pytest

from pytest_int8bench.errors import ClearError
from pytest_int8bench.plugin.points import is_plain
from pytest_int8bench.plugin.pytest_benchmark import (
    DISABLED,
    is_disabled,
    leave_out,
    timing_of,
)
from pytest_int8bench.plugin.recorder import Recorder
from pytest_int8bench.plugin.state import recorder_of
from pytest_int8bench.results.base import NOT_MEASURED
from pytest_int8bench.results.benchmarks import Benchmark


class PlainBenchmarks:
    """Records the timing of each plain benchmark. Registered only in sessions that need them."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        # Not guarded: an error raised here fails the test.
        result = yield
        if is_plain(item):
            _record_timing(recorder_of(item.config), item)
        return result


def _record_timing(recorder: Recorder, item: pytest.Item) -> None:
    """Record the timing of a test, and compare the timing with the files of ``--int8-compare``.

    Raises:
        ClearError: if the timing is worse or cannot be compared.
    """
    found: Benchmark | None = None
    with recorder.guard("recording"):
        if (timing := timing_of(recorder.config, item.nodeid)) is not None:
            found = Benchmark.from_timing(timing)
        elif is_disabled(item):
            reason = f"{NOT_MEASURED}: {DISABLED}"
            found = Benchmark.of(item.nodeid, status="skipped", reason=reason)
        if found is not None:
            recorder.record(found)
    gate = recorder.session.gate
    if found is not None and found.status == "ok" and gate is not None:
        try:
            gate.judge(found, recorder.environment())
        except ClearError:
            leave_out(recorder.config, item.nodeid)  # it must not become a baseline
            raise


def record_failure(recorder: Recorder, nodeid: str, status: str, reason: str) -> None:
    """Record a test that failed or was skipped, along with its timing if one had been recorded."""
    timed = [record for record in recorder.records_of(nodeid) if isinstance(record, Benchmark)]
    record = timed[-1] if timed else Benchmark.of(nodeid)
    recorder.record(dataclasses.replace(record, status=status, reason=reason))

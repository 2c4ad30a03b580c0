"""Compare the plugin's batch times with two other ways to time the same model.

    python benchmarks/check_timing.py [pytest options]

After each measured point, the script times the same compiled model with a bare loop (synchronize,
N batches, synchronize) and with ``torch.utils.benchmark.Timer``. Each difference is the median over
alternating repetitions, so that clock drift does not cause one. The script exits with 1 if a
difference is over 1 %.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.benchmark import Timer

from pytest_int8bench.clock import synchronize, synchronized_perf_counter
from pytest_int8bench.environment import describe, fingerprint
from pytest_int8bench.measure.timing import pilot, summarize, time_block
from pytest_int8bench.plugin.state import recorder_of

LIMIT = 0.01
REPETITIONS = 3
#: Length of each bare loop and of each measurement with ``torch.utils.benchmark.Timer``.
SECONDS = 2.0


class Check:
    """Plugin that times each model again after its test."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, float, float]] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        recorder = recorder_of(item.config)
        results = recorder.journal.results if recorder.journal else []
        if not results or results[-1].nodeid != item.nodeid or results[-1].batch_time_s is None:
            return
        model = recorder.session.pool().get(
            item.funcargs["int8_workload"], item.funcargs["int8_params"]
        )
        count = max(10, math.ceil(SECONDS / results[-1].batch_time_s))
        plugin, loop, timer = [], [], []
        with model.compiled.entered():
            for _ in range(REPETITIONS):
                plugin.append(_plugin_time(model.run, model.params.benchmark_interval_s))
                loop.append(_bare_loop(model.run, count))
                timer.append(_torch_timer(model.run, count))
        vs_loop = statistics.median(p / x - 1 for p, x in zip(plugin, loop, strict=True))
        vs_timer = statistics.median(p / x - 1 for p, x in zip(plugin, timer, strict=True))
        self.rows.append((results[-1].run_name, statistics.median(plugin), vs_loop, vs_timer))


def _plugin_time(run: Any, interval_s: float) -> float:
    """Time a model the way the plugin does."""
    plan = pilot(run, synchronized_perf_counter, interval_s=interval_s, min_batches=10)
    rounds = range(plan.rounds)
    times = [time_block(run, synchronized_perf_counter, plan.iterations) for _ in rounds]
    return summarize(times).median_s


def _bare_loop(run: Any, count: int) -> float:
    synchronize()
    start = time.perf_counter()
    for _ in range(count):
        run()
    synchronize()
    return (time.perf_counter() - start) / count


def _torch_timer(run: Any, count: int) -> float:
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return float(timer.timeit(count).median)


def main() -> int:
    check = Check()
    here = Path(__file__).parent
    code = pytest.main([str(here / "test_throughput.py"), *sys.argv[1:]], plugins=[check])
    if code != pytest.ExitCode.OK or not check.rows:
        return int(code) or 1
    print(describe(fingerprint(here)))
    print(f"{'ms/batch':>10} {'vs loop':>9} {'vs Timer':>9}  run")
    for name, seconds, vs_loop, vs_timer in check.rows:
        print(f"{seconds * 1e3:10.3f} {vs_loop:+9.2%} {vs_timer:+9.2%}  {name}")
    return int(any(max(abs(a), abs(b)) > LIMIT for _, _, a, b in check.rows))


if __name__ == "__main__":
    sys.exit(main())

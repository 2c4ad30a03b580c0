"""Compare the batch time that the plugin reports with two other ways to time the same model.

    python benchmarks/check_timing.py [pytest options]

After each measured point, the very same compiled model is timed by a bare loop (synchronize, N
batches, synchronize) and by ``torch.utils.benchmark.Timer``. The difference is the median over
alternating repetitions, so that a drifting clock does not look like one. Exits with 1 if a
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
#: Seconds of a bare loop, and of ``torch.utils.benchmark.Timer``.
SECONDS = 2.0


class Check:
    """Times each model again when its test is over."""

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
        product, loop, timer = [], [], []
        with model.compiled.entered():
            for _ in range(REPETITIONS):
                product.append(_product(model.run, model.params.benchmark_interval_s))
                loop.append(_bare_loop(model.run, count))
                timer.append(_torch_timer(model.run, count))
        reported = statistics.median(product)
        off_loop = statistics.median(p / x - 1 for p, x in zip(product, loop, strict=True))
        off_timer = statistics.median(p / x - 1 for p, x in zip(product, timer, strict=True))
        self.rows.append((results[-1].run_name, reported, off_loop, off_timer))


def _product(run: Any, interval_s: float) -> float:
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
    for name, seconds, off_loop, off_timer in check.rows:
        print(f"{seconds * 1e3:10.3f} {off_loop:+9.2%} {off_timer:+9.2%}  {name}")
    return int(any(max(abs(a), abs(b)) > LIMIT for _, _, a, b in check.rows))


if __name__ == "__main__":
    sys.exit(main())

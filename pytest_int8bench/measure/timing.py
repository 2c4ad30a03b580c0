"""Time a batch: warm-up, pilot, number of rounds, and summary.

This module is independent of pytest. A ``run`` is a callable without arguments that submits one
batch; a ``timer`` waits for all submitted work and returns seconds
(:func:`pytest_int8bench.clock.synchronized_perf_counter`).
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from pytest_int8bench.clock import untraced
from pytest_int8bench.errors import ClearError
from pytest_int8bench.results.parts import Timing

Run = Callable[[], object]
Timer = Callable[[], float]

#: Largest fraction of a round that its two synchronizations may cost.
MAX_SYNC_SHARE = 0.001
#: At this length or more, the slowest measured synchronization (3.7 ms) is negligible.
LONG_BATCH_S = 1.0
#: Target for the standard error of the median, relative to the median.
TARGET_STANDARD_ERROR = 0.005
#: Warm-up ends when the medians of two successive windows of calls differ by less than this.
STEADY_CHANGE = 0.02
STEADY_WINDOW = 3
#: Fraction of the interval for a pilot, and its fewest and most rounds.
PILOT_SHARE = 0.1
MIN_PILOT_ROUNDS, MAX_PILOT_ROUNDS = 3, 50
#: Largest fraction of the interval for one round.
MAX_ROUND_PART = 10
#: Fewest rounds, and seconds if the interval allows: a pilot may show too little variation.
MIN_ROUNDS = 5
CALM_ROUNDS, CALM_S = 20, 1.0
# The standard error of the median of n normal values is sqrt(pi/2) sigma / sqrt(n).
_MEDIAN_EFFICIENCY = math.sqrt(math.pi / 2)


class ClockError(ClearError, RuntimeError):
    """The timer used is not the one that waits for the device."""


@dataclass(frozen=True)
class WarmUp:
    """The calls and time until batch times were steady."""

    calls: int
    seconds: float
    steady: bool
    """False if time ran out first."""


@dataclass(frozen=True)
class Plan:
    """The number of rounds and of batches per round."""

    rounds: int
    iterations: int
    """Batches per round."""
    synchronization_share: float | None = None
    """Estimated fraction of a round that its two synchronizations cost; None if a batch is so long
    that it is negligible."""


@runtime_checkable
class Prepared(Protocol):
    """A run that must prepare each call before the clock starts."""

    @property
    def most_calls(self) -> int | None:
        """Calls that can be prepared at once; None for any number."""
        ...

    def prepare(self, calls: int) -> None:
        """Prepare the next calls."""
        ...


def prepare(run: Run, calls: int) -> None:
    """Prepare the next ``calls`` calls of ``run``, if it needs preparation."""
    if isinstance(run, Prepared):
        run.prepare(calls)


def most_calls(run: Run) -> int | None:
    """Return the most consecutive calls of ``run`` that can be timed; None for any number."""
    return run.most_calls if isinstance(run, Prepared) else None


def time_once(run: Run, timer: Timer) -> float:
    """Return the seconds of one batch."""
    return time_block(run, timer, 1)


def time_block(run: Run, timer: Timer, iterations: int) -> float:
    """Return the seconds per batch of ``iterations`` batches."""
    prepare(run, iterations)
    with untraced():
        start = timer()
        for _ in range(iterations):
            run()
        return (timer() - start) / iterations


def warm_up(run: Run, timer: Timer, *, max_s: float) -> WarmUp:
    """Run batches until their times are steady, for at most ``max_s`` seconds.

    At least two windows of three calls run, however long they take: CUDA graphs are recorded at the
    second call and first replayed at the third.
    """
    times: list[float] = []
    spent = 0.0
    while True:
        times.append(time_once(run, timer))
        spent += times[-1]
        if len(times) < 2 * STEADY_WINDOW:
            continue
        before = statistics.median(times[-2 * STEADY_WINDOW : -STEADY_WINDOW])
        after = statistics.median(times[-STEADY_WINDOW:])
        if abs(after - before) <= STEADY_CHANGE * before:
            return WarmUp(len(times), spent, steady=True)
        if spent >= max_s:
            return WarmUp(len(times), spent, steady=False)


def time_singly(run: Run, timer: Timer) -> list[float]:
    """Return the seconds of two batches, timed separately."""
    return [time_once(run, timer) for _ in range(2)]


def synchronization_cost(run: Run, timer: Timer, singles: list[float]) -> tuple[float, float]:
    """Return the seconds of one batch in a full pipeline, and the cost of a synchronization.

    Args:
        run: submits one batch.
        timer: waits for the device.
        singles: times from :func:`time_singly`; a third one is appended.

    After a synchronization, the device idles until the host has submitted the next kernels. In a
    running pipeline, the host is ahead and hides that time. With torchao's INT8 weights, it was
    3.7 ms per batch (H200, torch 2.11), so the cost is not just that of reading the clock.
    """
    single = min(singles)
    count = min(max(math.ceil(0.2 / max(single, 1e-9)), 2), 50, most_calls(run) or 50)
    if count == 1:  # only one copy of the inputs fits, so the pipeline never fills
        reading = [timer() for _ in range(3)]
        return max(single, 1e-9), min(b - a for a, b in itertools.pairwise(reading))
    block = time_block(run, timer, count) * count
    # Time one more, so that a stall before the block is not taken for a synchronization's cost.
    singles.append(time_once(run, timer))
    single = min(singles)
    added_s = max((count * single - block) / (count - 1), 0.0)
    reading = [timer() for _ in range(3)]
    read_s = min(b - a for a, b in itertools.pairwise(reading))
    return max((block - added_s) / count, 1e-9), max(added_s / 2, read_s)


def pilot(run: Run, timer: Timer, *, interval_s: float, min_batches: int) -> Plan:
    """Time some rounds and plan the measurement; see :func:`plan`."""
    singles = time_singly(run, timer)
    if min(singles) >= LONG_BATCH_S and interval_s / min(singles) <= min_batches:
        # The number of rounds is fixed, so a pilot cannot change it.
        return Plan(rounds=max(min_batches, MIN_ROUNDS), iterations=1)
    batch_s, sync_s = synchronization_cost(run, timer, singles)
    most = most_calls(run)
    iterations = iterations_for(batch_s, sync_s, max_round_s=interval_s / MAX_ROUND_PART, most=most)
    times = singles if iterations == 1 else []
    spent = sum(times)
    while len(times) < MIN_PILOT_ROUNDS or (
        len(times) < MAX_PILOT_ROUNDS and spent < PILOT_SHARE * interval_s
    ):
        times.append(time_block(run, timer, iterations))
        spent += times[-1] * iterations
    return plan(times, sync_s=sync_s, interval_s=interval_s, min_batches=min_batches, most=most)


def iterations_for(
    batch_s: float, sync_s: float, *, max_round_s: float = math.inf, most: int | None = None
) -> int:
    """Return the batches per round that keep its two synchronizations under 0.1 % of it, limited to
    ``max_round_s`` and ``most``."""
    batch_s = max(batch_s, 1e-9)
    wanted = math.ceil(2 * sync_s / (MAX_SYNC_SHARE * batch_s))
    fitting = wanted if math.isinf(max_round_s) else math.floor(max_round_s / batch_s)
    return max(1, min(wanted, fitting, wanted if most is None else most))


def plan(
    times: Sequence[float],
    *,
    sync_s: float,
    interval_s: float,
    min_batches: int,
    most: int | None = None,
) -> Plan:
    """Plan a measurement from pilot times.

    Args:
        times: seconds per batch of the pilot's rounds.
        sync_s: seconds that one synchronization adds.
        interval_s: seconds that all rounds together may take.
        min_batches: fewest batches to run, even if they take longer than ``interval_s``.
        most: most batches per round.

    Returns:
        Iterations that keep the synchronizations of a round under 0.1 % of it (if ten such rounds
        fit into ``interval_s``), and rounds that bring the standard error of the median under
        0.5 % (if ``interval_s`` allows).
    """
    median = statistics.median(times)
    iterations = iterations_for(median, sync_s, max_round_s=interval_s / MAX_ROUND_PART, most=most)
    wanted = math.ceil((_MEDIAN_EFFICIENCY * spread(times) / TARGET_STANDARD_ERROR) ** 2)
    round_s = iterations * max(median, 1e-9)
    affordable = math.floor(interval_s / round_s)
    at_least = math.ceil(min_batches / iterations)
    rounds = max(wanted, CALM_ROUNDS, math.ceil(CALM_S / round_s))
    return Plan(
        rounds=max(min(rounds, affordable), at_least, MIN_ROUNDS),
        iterations=iterations,
        synchronization_share=2 * sync_s / round_s,
    )


def spread(times: Sequence[float]) -> float:
    """Return the standard deviation of ``times`` relative to their median, estimated from the
    median absolute deviation so that one disturbed round has no effect."""
    median = statistics.median(times)
    deviation = statistics.median(abs(t - median) for t in times)
    return 1.4826 * deviation / max(median, 1e-9)


def summarize(round_times: Sequence[float]) -> Timing:
    """Summarize seconds per batch, one value per round."""
    return Timing(
        median_s=statistics.median(round_times),
        mean_s=statistics.fmean(round_times),
        p95_s=float(np.percentile(round_times, 95)),
        min_s=min(round_times),
        standard_error=_MEDIAN_EFFICIENCY * spread(round_times) / math.sqrt(len(round_times)),
    )

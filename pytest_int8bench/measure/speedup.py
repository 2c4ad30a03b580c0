"""Measure the speedup of a candidate in alternating blocks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from pytest_int8bench.measure.timing import (
    Run,
    Timer,
    iterations_for,
    most_calls,
    synchronization_cost,
    time_block,
    time_singly,
)

MIN_PAIRS, MAX_PAIRS = 6, 40


@dataclass(frozen=True)
class Speedup:
    """How many times faster the candidate is: median ratio of alternating blocks."""

    ratio: float
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end of the 95 % interval."""
    pairs: int


def measure_speedup(baseline: Run, candidate: Run, timer: Timer, *, interval_s: float) -> Speedup:
    """Alternate blocks of ``baseline`` and ``candidate`` and compare them; see :func:`alternate`.

    Args:
        baseline: one batch of the baseline.
        candidate: one batch of the candidate.
        timer: a timer that waits for the device.
        interval_s: seconds that all pairs together may take, down to six pairs.

    Returns:
        The median of the pairs' ratios, with its 95 % confidence interval. The interval holds for
        this process and does not include variation between processes.
    """
    pairs = alternate(baseline, candidate, timer, interval_s=interval_s)
    ratios = [first / second for first, second in pairs]
    return Speedup(*median_and_interval(ratios), len(pairs))


def median_and_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median of at least six ``values``, and the ends of its exact distribution-free
    95 % interval (``scipy.stats.quantile_test``)."""
    from scipy.stats import quantile_test  # takes over a second to import

    interval = quantile_test(values, p=0.5).confidence_interval(0.95)
    return statistics.median(values), float(interval.low), float(interval.high)


def alternate(
    first: Run, second: Run, timer: Timer, *, interval_s: float
) -> list[tuple[float, float]]:
    """Run alternating blocks of ``first`` and ``second``.

    The order within a pair alternates too, so that drift cancels. Both must be compiled.

    Returns:
        Seconds per batch of both, one pair per block; at least six pairs, even if they take longer
        than ``interval_s``.
    """
    runs = (first, second)
    singles = [time_singly(run, timer) for run in runs]
    both_s = sum(map(min, singles))
    fitting, wanted = math.floor(interval_s / MIN_PAIRS / both_s), 1
    if fitting > 1:
        costs = [synchronization_cost(run, timer, s) for run, s in zip(runs, singles, strict=True)]
        both_s = sum(batch_s for batch_s, _ in costs)
        fitting = math.floor(interval_s / MIN_PAIRS / both_s)
        # Both sides must average over equally many batches: skewed times give means with different
        # medians otherwise.
        wanted = max(iterations_for(batch_s, sync_s) for batch_s, sync_s in costs)
    prepared = [most for run in runs if (most := most_calls(run)) is not None]
    iterations = max(1, min(wanted, fitting, *prepared))
    pair_s = iterations * both_s
    count = min(max(math.floor(interval_s / pair_s), MIN_PAIRS), MAX_PAIRS)
    count += count % 2
    pairs = []
    for index in range(count):
        order = (0, 1) if index % 2 == 0 else (1, 0)
        block = {side: time_block(runs[side], timer, iterations) for side in order}
        pairs.append((block[0], block[1]))
    return pairs

"""Estimate noise floors: differences that repeated runs of the same code show."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from pytest_int8bench.gate.limits import Rules
from pytest_int8bench.gate.outcomes import Identity
from pytest_int8bench.results.figures import METRICS, Figure
from pytest_int8bench.results.records import Result

_LEVEL = 0.05
#: Floors that are learned are not below this: files hold rounded figures.
_LEAST_FLOOR = 0.001
#: Logs of absurd files, whose exponential would not be finite.
_WIDEST = 100.0


# -- noise ----------------------------------------------------------------------------------


class NoiseFloors:
    """Noise between processes, for each metric, from what the files of a side differ by.

    The standard deviation of the log values inside a side is pooled over all runs of a metric; a
    run that is noisier than that has its own. The floor is the half-width of the two-sided 95 %
    interval (Student's t) of the difference of both sides' means.
    """

    def __init__(
        self,
        base: Mapping[Identity, list[Result]],
        new: Mapping[Identity, list[Result]],
        rules: Rules,
    ) -> None:
        self._rules = rules
        self._pooled: dict[str, tuple[float, int]] = {}
        for metric in METRICS.values():
            parts = [
                _scatter(values)
                for side in (base, new)
                for results in side.values()
                if len(values := metric_values(usable_results(results), metric)) > 1
            ]
            freedom = sum(freedom for _, freedom in parts)
            if freedom:
                self._pooled[metric.name] = (sum(squares for squares, _ in parts), freedom)

    def floor(
        self, metric: Figure, base: Sequence[float], new: Sequence[float]
    ) -> tuple[float, bool]:
        """Return the floor for a run with these values, and whether it was learned."""
        if metric.name in self._rules.floors:
            return self._rules.floors[metric.name], False
        if metric.name not in self._pooled:
            return metric.floor, False
        from scipy.stats import t

        squares, freedom = self._pooled[metric.name]
        own = [_scatter(values) for values in (base, new) if len(values) > 1]
        own_freedom = sum(part for _, part in own)
        own_variance = sum(part for part, _ in own) / own_freedom if own_freedom else 0.0
        deviation = math.sqrt(max(squares / freedom, own_variance))
        width = float(t.ppf(1 - _LEVEL / 2, freedom)) * deviation
        width *= math.sqrt(1 / len(base) + 1 / len(new))
        return max(math.expm1(min(width, _WIDEST)), _LEAST_FLOOR), True


def _scatter(values: Sequence[float]) -> tuple[float, int]:
    """Return the sum of squares of the logs around their mean, and its degrees of freedom."""
    logs = [math.log(value) for value in values]
    mean = statistics.fmean(logs)
    return sum((log - mean) ** 2 for log in logs), len(logs) - 1


def metric_values(results: Iterable[Result], metric: Figure) -> list[float]:
    """Return the values of a metric; those not above 0 have no relative growth."""
    found = (metric.of(result) for result in results)
    return [float(value) for value in found if value is not None and value > 0]


def usable_results(results: Iterable[Result]) -> list[Result]:
    """Return what was measured; throttled ones only where there are no others."""
    measured = [result for result in results if result.status == "ok" and result.batch_time_s]
    return [result for result in measured if not result.throttled] or measured

"""Say which growths saved files can show, by the noise between processes.

A file is one process. The test compares the means of the logs of both sides: unchanged code gives a
difference of 0, with the noise of a process times ``sqrt(1 / files + 1 / files)``. All metrics of
all runs that are judged are one family, corrected by Holm, so that unchanged code regresses in at
most 5 % of comparisons.

How noisy processes are is seen where a side has several files: the standard deviation of the logs
inside the sides, of the run or pooled over all runs, whichever is larger. With few files it cannot
be trusted: clocks that have two states can be in one of them in all files of a side, and look as
steady as can be. Then processes are assumed to differ by no less than ``Figure.spread``, times with
tails for outliers, and, where the rounds of a process do not settle its figure, by its standard
error in addition (``Figure.standard_error``). So are those whose times are the same in all files,
as of copies. No floor is learned from few files: a growth over the limit is at least suspected.

Against outliers: where the files show some, a growth must exceed the largest in addition, and one
that is seen without them is at least suspected. Other load slows some rounds of a process and
seldom all, so that where one process may decide, its fastest rounds must have grown, too.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pytest_int8bench.gate.limits import Rules
from pytest_int8bench.gate.outcomes import Identity
from pytest_int8bench.results.figures import METRICS, Figure
from pytest_int8bench.results.records import Timed

#: Family-wise error of "regressed", for code that did not change.
LEVEL = 0.05
#: Floors that are learned are not below this: files hold rounded figures.
_LEAST_FLOOR = 0.001
#: Logs of absurd files, whose exponential would not be finite.
_WIDEST = 100.0
#: Fewer degrees of freedom would ask for growths that nobody would miss.
_LEAST_FREEDOM = 4
#: Degrees of freedom of Student's t for times whose noise is assumed, at the same variance: among
#: many runs, one is an outlier.
_TAILS = 5
_TAILS_SCALE = math.sqrt(_TAILS / (_TAILS - 2))


@dataclass(frozen=True, kw_only=True)
class Noise:
    """What the noise allows to be said of one metric of one run."""

    floor: float
    """Growth, relative, that is no difference."""
    learned: bool
    """The floor comes from the scatter of the files."""
    shown_from: float | None = None
    """Growth from which on the files show a regression. None where the floor was given."""
    assumed: float | None = None
    """Standard deviation between processes that was assumed; None where the files show it, or show
    a larger one; infinite where a process says nothing about its own noise."""
    files_needed: int | None = None
    """Files of the base that would show the noise; None where there are enough."""
    is_shown: bool = True
    """This growth is shown, at the family's level."""
    fastest: float | None = None
    """Growth of the fastest rounds, where it must be over the limit, too."""
    outlier: float | None = None
    """How much slower a process was than others of its side, where that is part of
    ``shown_from``."""
    doubt: tuple[float, str] | None = None
    """A growth that the typical figures may hide, and where it is seen."""

    def hides_growth(self, growth: float, limit: float) -> bool:
        """Return whether one over the limit is seen, where the typical figures grew by less."""
        is_seen = self.doubt is not None and self.doubt[0] > max(limit, growth)
        return is_seen and growth <= max(limit, self.floor)


class _Sample(NamedTuple):
    """The logs of one metric of one run: those of the cost, that is."""

    base: list[float]
    new: list[float]
    is_judged: bool
    error: float
    """The largest standard error of a process's own figure."""
    fastest: float | None
    """Difference of the logs of the fastest rounds; None where it is not known."""

    @property
    def scatter(self) -> tuple[float, int]:
        """Sum of squares around the mean of each side, and its degrees of freedom."""
        squares = sum(_squares(side) for side in (self.base, self.new))
        return squares, sum(max(len(side) - 1, 0) for side in (self.base, self.new))

    @property
    def outlier(self) -> float:
        """By how much a process exceeds the mean of the others of its side at most."""
        sides = [side for side in (self.base, self.new) if len(side) > 1]
        over = ((max(s) - statistics.fmean(s)) * len(s) / (len(s) - 1) for s in sides)
        return max(over, default=0.0)


def _squares(logs: Sequence[float]) -> float:
    if len(logs) < 2:
        return 0.0
    mean = statistics.fmean(logs)
    return sum((log - mean) ** 2 for log in logs)


class NoiseFloors:
    """Noise between processes, for each metric of each run of two sides."""

    def __init__(
        self,
        base: Mapping[Identity, list[Timed]],
        new: Mapping[Identity, list[Timed]],
        rules: Rules,
    ) -> None:
        self._found: dict[tuple[Identity, str], Noise] = {}
        samples: dict[tuple[Identity, str], _Sample] = {}
        for identity in dict.fromkeys((*base, *new)):
            sides = [usable_results(side.get(identity, ())) for side in (base, new)]
            for metric in METRICS.values():
                values = [metric_values(side, metric) for side in sides]
                if not any(values):
                    continue
                known = next(iter(sides[0] or sides[1]))
                limit = rules.limit(metric.name, known.run_name, known.nodeid)
                is_judged = limit is not None and metric.name not in rules.floors
                sign = -1 if metric.higher_is_better else 1
                before, after = ([sign * math.log(value) for value in side] for side in values)
                error = max(standard_error(record, metric) for side in sides for record in side)
                samples[identity, metric.name] = _Sample(
                    before, after, is_judged, error, _fastest(metric, *sides)
                )
        self._judge(samples, rules)

    def of(self, identity: Identity, metric: Figure) -> Noise:
        """Return the noise of a metric that both sides have."""
        return self._found[identity, metric.name]

    def _judge(self, samples: Mapping[tuple[Identity, str], _Sample], rules: Rules) -> None:
        pooled = {name: _pooled(samples, name) for name in METRICS}
        outliers: dict[str, float] = {}
        for (_, name), sample in samples.items():
            outliers[name] = max(outliers.get(name, 0.0), sample.outlier)
        # Runs of the base count in the family before they are measured, as in a session of pytest.
        family = max(sum(sample.is_judged and bool(sample.base) for sample in samples.values()), 1)
        tests = {
            key: _Test(METRICS[key[1]], sample, pooled[key[1]], outliers[key[1]], LEVEL / family)
            for key, sample in samples.items()
            if sample.base and sample.new
        }
        judged = [key for key in tests if samples[key].is_judged]
        is_shown = dict(zip(judged, _holm([tests[key].p for key in judged], family), strict=True))
        left = LEVEL / max(family - sum(is_shown.values()), 1)
        for key, test in tests.items():
            if (given := rules.floors.get(key[1])) is not None:
                self._found[key] = Noise(floor=given, learned=False)
                continue
            self._found[key] = test.noise(left, is_shown=is_shown.get(key, False))


def _pooled(samples: Mapping[tuple[Identity, str], _Sample], name: str) -> tuple[float, int]:
    """Return the scatter of a metric inside the sides of all runs, as that of a sample."""
    parts = [sample.scatter for (_, metric), sample in samples.items() if metric == name]
    return sum(squares for squares, _ in parts), sum(freedom for _, freedom in parts)


def _deviation(squares: float, freedom: int) -> float:
    return math.sqrt(max(squares, 0.0) / freedom) if freedom else 0.0


class _Test:
    """One-sided test of one metric of one run: did its cost grow?

    With four degrees of freedom or more it is a t test: for one new file, that is the prediction
    interval of the base's scatter. Where the files are too few to show the noise, the growth must
    exceed what processes that differ by ``Figure.spread`` would show, too. There, and of one new
    process, so must the growth of the fastest rounds. A process that would be shown to be slower
    than others of its own side is an outlier, and a growth must exceed it by as much.
    """

    def __init__(
        self,
        metric: Figure,
        sample: _Sample,
        pooled: tuple[float, int],
        outlier: float,
        level: float,
    ) -> None:
        self._metric = metric
        self._sample = sample
        squares, self._freedom = sample.scatter
        self._seen = max(_deviation(squares, self._freedom), _deviation(*pooled))
        self._others = _deviation(pooled[0] - squares, pooled[1] - self._freedom)
        self._files = len(sample.base), len(sample.new)
        self._error = math.sqrt(1 / self._files[0] + 1 / self._files[1])
        self._difference = statistics.fmean(sample.new) - statistics.fmean(sample.base)
        self._is_few = not shows_noise(*self._files)
        can_be_disturbed = self._is_few or self._files[1] == 1
        self._fastest = sample.fastest if can_be_disturbed else None
        certain = self._difference if self._fastest is None else self._fastest
        self._certain = min(self._difference, certain)
        # The same times in all files are copies, or rounded: they show no noise.
        self._is_assumed = self._is_few or (metric.depends_on_clocks and not self._seen)
        self._least = math.hypot(metric.assumed_spread, sample.error)
        self._assumed = max(self._least, self._seen)
        is_outlier = outlier > 0 and outlier > max(self._reach(level), self._wide(level))
        self._outlier = outlier if is_outlier else 0.0

    @property
    def p(self) -> float:
        """Of H0: the cost did not grow."""
        growth = (self._certain - self._outlier) / self._error
        p = 0.0 if growth > 0 else 1.0
        if self._freedom >= _LEAST_FREEDOM and self._seen:
            p = float(_special().stdtr(self._freedom, -growth / self._seen))
        if self._is_assumed:
            p = max(p, self._tail(growth / self._assumed))
        return p

    def noise(self, level: float, *, is_shown: bool) -> Noise:
        """Return what the noise allows to be said, at the level that is left for this test."""
        floor = self._metric.floor
        learned = not self._is_few
        if learned:
            normal = -float(_special().ndtri(level)) * self._error
            floor = max(_share(normal * self._seen), _LEAST_FLOOR)
        reach, wide = self._reach(level), self._wide(level)
        is_binding = self._is_assumed and self._assumed > self._seen and wide > reach
        shown_from = max(reach, wide) + self._outlier
        return Noise(
            floor=floor,
            learned=learned,
            shown_from=max(_share(shown_from), floor),
            assumed=self._assumed if is_binding else None,
            files_needed=files_needed(self._files[1]) if self._is_few else None,
            is_shown=is_shown,
            fastest=None if self._fastest is None else _share(self._fastest),
            outlier=_share(self._outlier) if self._outlier else None,
            doubt=self._doubt(level),
        )

    def _reach(self, level: float) -> float:
        """Return the growth that the scatter of the files shows."""
        if self._freedom < _LEAST_FREEDOM:
            return 0.0
        return -float(_special().stdtrit(self._freedom, level)) * self._error * self._seen

    def _wide(self, level: float) -> float:
        """Return the growth that is shown by what is assumed, 0 where nothing is."""
        return self._quantile(level) * self._error * self._assumed if self._is_assumed else 0.0

    def _doubt(self, level: float) -> tuple[float, str] | None:
        """Return the largest growth that outliers hide."""
        base, new = self._sample.base, self._sample.new
        found = []
        beyond = self._quantile(level) * self._least * self._error
        if self._fastest is not None and self._fastest > beyond:
            found.append((_share(self._fastest), "by the fastest rounds"))
        calm = self._without_outlier(base, new, level), self._without_outlier(new, base, level)
        if calm != (base, new):
            growth = _share(statistics.fmean(calm[1]) - statistics.fmean(calm[0]))
            found.append((growth, "without the slowest file of a side"))
        return max(found, default=None)

    def _without_outlier(self, side: list[float], other: list[float], level: float) -> list[float]:
        """Return a side without its slowest process, if that differs from the others by more than
        they do."""
        rest = sorted(side)[:-1]
        if not rest:
            return side
        freedom = len(rest) + len(other) - 2
        spread = max(_deviation(_squares(rest) + _squares(other), freedom), self._others)
        beyond = self._quantile(level) * max(self._least, spread)
        if not self._is_assumed:
            beyond = -float(_special().stdtrit(freedom, level)) * spread
        over = max(side) - statistics.fmean(rest)
        return rest if over > beyond * math.sqrt(1 + 1 / len(rest)) else side

    def _tail(self, deviations: float) -> float:
        """Return the probability that assumed noise exceeds so many standard deviations."""
        p = float(_special().ndtr(-deviations))
        if not self._metric.is_time_of_batch:
            return p
        return max(p, float(_special().stdtr(_TAILS, -deviations * _TAILS_SCALE)))

    def _quantile(self, level: float) -> float:
        """Return the standard deviations that assumed noise exceeds with that probability."""
        return _quantile(level, has_tails=self._metric.is_time_of_batch)


@functools.cache
def _special() -> Any:
    """Return scipy's special functions, imported when the first noise is judged."""
    from scipy import special

    return special


@functools.lru_cache(maxsize=1024)
def _quantile(level: float, *, has_tails: bool) -> float:
    deviations = -float(_special().ndtri(level))
    if not has_tails:
        return deviations
    return max(deviations, -float(_special().stdtrit(_TAILS, level)) / _TAILS_SCALE)


def _fastest(metric: Figure, base: Sequence[Timed], new: Sequence[Timed]) -> float | None:
    """Return the difference of the logs of the fastest rounds, where all processes know theirs."""
    if not metric.is_time_of_batch:
        return None
    sides = [[record.fastest_s for record in side] for side in (base, new)]
    if not all(side and all(side) for side in sides):
        return None
    before, after = (statistics.fmean(math.log(s) for s in side if s) for side in sides)
    return after - before


def _share(log: float) -> float:
    return log if log == math.inf else math.expm1(min(log, _WIDEST))


@functools.lru_cache(maxsize=1024)
def shows_noise(base: int, new: int) -> bool:
    """Return whether so many files show the noise between processes without an assumption.

    If processes have two states, all files of the base can be in one of them and all new ones in
    the other: the files look steady, and the difference real. However often each state is, that has
    a probability of at most ``base ** base * new ** new / files ** files``. It must be under the
    level, as it is from 7 and 1, 4 and 2, or 3 and 3 files on.
    """
    files = base + new
    chance = math.exp(base * math.log(base / files) + new * math.log(new / files))
    return files - 2 >= _LEAST_FREEDOM and chance <= LEVEL


@functools.lru_cache(maxsize=1024)
def files_needed(new: int) -> int:
    """Return how many files of the base show the noise, with so many new ones."""
    return next(base for base in itertools.count(1) if shows_noise(base, new))


def _holm(p: Sequence[float], family: int) -> list[bool]:
    """Return which hypotheses are rejected, with a family-wise error of ``LEVEL`` however the tests
    depend on each other.

    Holm, Scandinavian Journal of Statistics 6, 1979, 65-70: the i-th smallest of the p-values times
    the number of hypotheses less i - 1, until one is over the level.
    """
    rejected = [False] * len(p)
    for place, index in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        if p[index] * (family - place) > LEVEL:
            break
        rejected[index] = True
    return rejected


def standard_error(record: Timed, metric: Figure) -> float:
    """Return the relative standard error of a figure of one process. Where it is not known, it is
    infinite for plain benchmarks, and 0 for points, which are measured until it is small."""
    error = getattr(record, metric.standard_error, None) if metric.standard_error else None
    if error is None:
        return math.inf if metric.of_benchmarks else 0.0
    return float(error)


def metric_values(results: Iterable[Timed], metric: Figure) -> list[float]:
    """Return the values of a metric; those not above 0 have no relative growth."""
    found = (metric.of(result) for result in results)
    return [float(value) for value in found if value is not None and value > 0]


def typical(values: Sequence[float]) -> float:
    """Return the geometric mean, the mean of the logs."""
    if min(values) == max(values):
        return values[0]  # as it was measured, without rounding
    return math.exp(statistics.fmean(math.log(value) for value in values))


def usable_results(results: Iterable[Timed]) -> list[Timed]:
    """Return what was measured; throttled ones only where there are no others."""
    measured = [result for result in results if result.status == "ok" and result.median_s]
    return [result for result in measured if not result.throttled] or measured

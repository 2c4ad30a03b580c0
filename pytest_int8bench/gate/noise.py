"""Decide which growths saved files can show, given the noise between processes.

Each file comes from one process. The test compares the mean logarithms of both sides: for unchanged
code their difference is 0, with the noise of one process times ``sqrt(1 / files + 1 / files)``. All
judged metrics of all runs form one family, corrected by Holm, so that unchanged code regresses in
at most 5 % of comparisons.

The noise of a process is learned from sides with several files: it is the standard deviation of the
logarithms within the sides, of the run or pooled over all runs, whichever is larger. With few files
it cannot be trusted: clocks with two states can be in the same state in all files of a side and
look perfectly steady. Processes are then assumed to differ by at least ``Figure.spread``, times to
have heavy tails, and the standard error of a process's own figure is added if its rounds do not
settle it (``Figure.standard_error``). The same applies if the times are equal in all files, such as
copies. No floor is learned from few files: a growth over the limit is at least suspected.

Two rules guard against outliers. If the files show one, a growth must exceed it as well, and a
growth that appears only without it is at least suspected. And because other load slows down some
rounds of a process but rarely all of them, the fastest rounds must have grown too if a single
process can decide.
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
#: Learned floors are at least this, because files contain rounded figures.
_LEAST_FLOOR = 0.001
#: Largest log whose exponential is taken; absurd files would overflow.
_WIDEST = 100.0
#: With fewer degrees of freedom, only enormous growths could be shown.
_LEAST_FREEDOM = 4
#: Degrees of freedom of Student's t for times with assumed noise, scaled to the same variance:
#: among many runs, one is an outlier.
_TAILS = 5
_TAILS_SCALE = math.sqrt(_TAILS / (_TAILS - 2))


@dataclass(frozen=True, kw_only=True)
class Noise:
    """The noise of one metric of one run, and what it shows."""

    floor: float
    """Relative growth up to which both sides count as equal."""
    learned: bool
    """Whether the floor was learned from the scatter of the files."""
    shown_from: float | None = None
    """Growth from which the files show a regression; None if the floor was given."""
    assumed: float | None = None
    """Assumed standard deviation between processes; None if the files show a larger one or enough
    of them exist; infinite if a process says nothing about its own noise."""
    files_needed: int | None = None
    """Number of base files that would show the noise; None if there are enough."""
    is_shown: bool = True
    """Whether this growth is shown, at the family's level."""
    fastest: float | None = None
    """Growth of the fastest rounds, if that must exceed the limit too."""
    outlier: float | None = None
    """How much slower a process was than others of its side, if ``shown_from`` includes it."""
    doubt: tuple[float, str] | None = None
    """A growth that the typical figures may hide, and where it shows."""

    def hides_growth(self, growth: float, limit: float) -> bool:
        """Return whether a growth over the limit shows although the typical figures grew by
        less."""
        is_seen = self.doubt is not None and self.doubt[0] > max(limit, growth)
        return is_seen and growth <= max(limit, self.floor)


class _Sample(NamedTuple):
    """The logarithms of one metric of one run, as costs (higher is worse)."""

    base: list[float]
    new: list[float]
    is_judged: bool
    error: float
    """Largest standard error of a process's own figure."""
    fastest: float | None
    """Difference of the logs of the fastest rounds; None if unknown."""

    @property
    def scatter(self) -> tuple[float, int]:
        """Sum of squares around the mean of each side, and the degrees of freedom."""
        squares = sum(_squares(side) for side in (self.base, self.new))
        return squares, sum(max(len(side) - 1, 0) for side in (self.base, self.new))

    @property
    def outlier(self) -> float:
        """Largest excess of a process over the mean of the others of its side."""
        sides = [side for side in (self.base, self.new) if len(side) > 1]
        over = ((max(s) - statistics.fmean(s)) * len(s) / (len(s) - 1) for s in sides)
        return max(over, default=0.0)


def _squares(logs: Sequence[float]) -> float:
    if len(logs) < 2:
        return 0.0
    mean = statistics.fmean(logs)
    return sum((log - mean) ** 2 for log in logs)


class NoiseFloors:
    """The noise between processes for each metric of each run of two sides."""

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
        """Return the noise of a metric that both sides measured."""
        return self._found[identity, metric.name]

    def _judge(self, samples: Mapping[tuple[Identity, str], _Sample], rules: Rules) -> None:
        pooled = {name: _pooled(samples, name) for name in METRICS}
        outliers: dict[str, float] = {}
        for (_, name), sample in samples.items():
            outliers[name] = max(outliers.get(name, 0.0), sample.outlier)
        # In a pytest session, base runs count in the family before they are measured.
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
    """Return a metric's scatter pooled over all runs, as ``_Sample.scatter``."""
    parts = [sample.scatter for (_, metric), sample in samples.items() if metric == name]
    return sum(squares for squares, _ in parts), sum(freedom for _, freedom in parts)


def _deviation(squares: float, freedom: int) -> float:
    return math.sqrt(max(squares, 0.0) / freedom) if freedom else 0.0


class _Test:
    """One-sided test of one metric of one run: did its cost grow?

    With at least four degrees of freedom it is a t test; for one new file, this is the prediction
    interval from the base's scatter. If the files are too few to show the noise, the growth must
    also exceed what processes that differ by ``Figure.spread`` would show. In that case, and for a
    single new process, the fastest rounds must have grown too. A process that would count as slower
    than the others of its own side is an outlier, and a growth must exceed that outlier as well.
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
        # Equal times in all files are copies or rounded, and show no noise.
        self._is_assumed = self._is_few or (metric.depends_on_clocks and not self._seen)
        self._least = math.hypot(metric.assumed_spread, sample.error)
        self._assumed = max(self._least, self._seen)
        is_outlier = outlier > 0 and outlier > max(self._reach(level), self._wide(level))
        self._outlier = outlier if is_outlier else 0.0

    @property
    def p(self) -> float:
        """p-value of the null hypothesis that the cost did not grow."""
        growth = (self._certain - self._outlier) / self._error
        p = 0.0 if growth > 0 else 1.0
        if self._freedom >= _LEAST_FREEDOM and self._seen:
            p = float(_special().stdtr(self._freedom, -growth / self._seen))
        if self._is_assumed:
            p = max(p, self._tail(growth / self._assumed))
        return p

    def noise(self, level: float, *, is_shown: bool) -> Noise:
        """Return the noise of this metric, at the level left for this test."""
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
        """Return the smallest log growth that the files' own scatter shows."""
        if self._freedom < _LEAST_FREEDOM:
            return 0.0
        return -float(_special().stdtrit(self._freedom, level)) * self._error * self._seen

    def _wide(self, level: float) -> float:
        """Return the smallest log growth shown under the assumed noise, 0 if none is assumed."""
        return self._quantile(level) * self._error * self._assumed if self._is_assumed else 0.0

    def _doubt(self, level: float) -> tuple[float, str] | None:
        """Return the largest growth that outliers may hide, and where it shows."""
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
        """Return a side without its slowest process if that one is an outlier."""
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
        """Return the probability that assumed noise exceeds this many standard deviations."""
        p = float(_special().ndtr(-deviations))
        if not self._metric.is_time_of_batch:
            return p
        return max(p, float(_special().stdtr(_TAILS, -deviations * _TAILS_SCALE)))

    def _quantile(self, level: float) -> float:
        """Return how many standard deviations assumed noise exceeds with probability ``level``."""
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
    """Return the difference of the logs of the fastest rounds, or None if a process lacks its
    own."""
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
    """Return whether this many files show the noise between processes without an assumption.

    If processes have two states, all base files can be in one of them and all new files in the
    other, which looks like a steady, real difference. Whatever the probabilities of the states,
    this happens with a probability of at most ``base ** base * new ** new / files ** files``. It
    must be below the level, which holds from 7 and 1, 4 and 2, or 3 and 3 files.
    """
    files = base + new
    chance = math.exp(base * math.log(base / files) + new * math.log(new / files))
    return files - 2 >= _LEAST_FREEDOM and chance <= LEVEL


@functools.lru_cache(maxsize=1024)
def files_needed(new: int) -> int:
    """Return how many base files show the noise, given the number of new files."""
    return next(base for base in itertools.count(1) if shows_noise(base, new))


def _holm(p: Sequence[float], family: int) -> list[bool]:
    """Return which hypotheses are rejected at a family-wise error of ``LEVEL``, under any
    dependence.

    Holm, Scandinavian Journal of Statistics 6, 1979, 65-70: the i-th smallest p-value is multiplied
    by the number of hypotheses minus i - 1, until the product exceeds the level.
    """
    rejected = [False] * len(p)
    for place, index in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        if p[index] * (family - place) > LEVEL:
            break
        rejected[index] = True
    return rejected


def standard_error(record: Timed, metric: Figure) -> float:
    """Return the relative standard error of a figure of one process.

    If it is unknown, it is infinite for plain benchmarks and 0 for points, which are measured until
    it is small.
    """
    error = getattr(record, metric.standard_error, None) if metric.standard_error else None
    if error is None:
        return math.inf if metric.of_benchmarks else 0.0
    return float(error)


def metric_values(results: Iterable[Timed], metric: Figure) -> list[float]:
    """Return the positive values of a metric; others have no relative growth."""
    found = (metric.of(result) for result in results)
    return [float(value) for value in found if value is not None and value > 0]


def typical(values: Sequence[float]) -> float:
    """Return the geometric mean."""
    if min(values) == max(values):
        return values[0]  # exactly as measured
    return math.exp(statistics.fmean(math.log(value) for value in values))


def usable_results(results: Iterable[Timed]) -> list[Timed]:
    """Return measured results; throttled ones only if there are no others."""
    measured = [result for result in results if result.status == "ok" and result.median_s]
    return [result for result in measured if not result.throttled] or measured

"""Plan how many processes an A/B measures, so that it finds the slowdown that it must.

One process measures all runs of one revision and gives one median batch time each. The process is
the sampling unit: times within a process share its memory layout, its clocks and its luck.

Screening measures both revisions in blocks of two processes, base first and new first in turn. It
clears runs, and flags all others. The verdict stage measures the flagged runs again, in blocks of
three, the new revision between two processes of the base: a linear drift cancels within a block,
and the two of the base are the control. Its data are fresh, so choosing runs by screening is not
multiple testing: Holm's correction counts the flagged runs only.

:mod:`pytest_int8bench.gate.ab.judging` decides from the times.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass

from pytest_int8bench.errors import ClearError
from pytest_int8bench.words import plural

#: How often a slowdown that must be found is to be found.
POWER = 0.9
#: More blocks are not asked for.
MOST_BLOCKS = 1000
#: Log ratios this close are equal: the rest is rounding, as with the times of a fake clock.
ROUNDING = 1e-12
#: Noncentrality beyond which SciPy gives NaN, far beyond a power of 0 or 1.
FARTHEST = 1e8
#: Variance of a block's log ratio, in those of a process: that of new / base, and that of the new
#: revision to the mean of two of the base.
SCREENING_VARIANCE = 2.0
VERDICT_VARIANCE = 1.5


class DesignError(ClearError, ValueError):
    """A design that is none, or that would not find what it must."""


@dataclass(frozen=True, kw_only=True)
class Design:
    """How many processes are measured, and what is decided from them. Shares, not percentages.

    Raises:
        DesignError: one line, naming field, rule and value.
    """

    margin: float = 0.01
    """Slowdown, the relative growth of time, that is never a ``FAIL``."""
    max_slowdown: float = 0.05
    """Slowdown that must be found. A ``PASS`` excludes it."""
    level: float = 0.05
    """Family-wise error of ``FAIL``, and the level of each one-sided bound."""
    screening_blocks: int = 4
    """Blocks of two processes.

    Few of them miss little: whatever their number and the noise, a run slower by
    ``max_slowdown`` is cleared with a probability of ``level`` at most, since a cleared run's
    bound excludes it, and with less than 1 in 10,000 at the default noise. Few of them flag more
    unchanged runs, which costs time in the verdict stage and nothing else: with 2, 3 and 4 blocks
    51, 13 and 8 % of them at a noise of 1 %, and 1, 0 and 0 % at 0.3 %. So :meth:`check` refuses
    no number; even ones cancel a linear drift.
    """
    verdict_blocks: int = 6
    """Blocks of three processes."""
    noise: float = 0.01
    """Standard deviation between processes, relative, that the design is planned for."""

    def __post_init__(self) -> None:
        if not 0 <= self.margin < self.max_slowdown < math.inf:
            raise DesignError(
                "margin must be at least 0 and under max_slowdown, "
                f"got {self.margin:g} with a max_slowdown of {self.max_slowdown:g}"
            )
        if not 0 < self.level < 0.5:
            raise DesignError(f"level must be over 0 and under 0.5, got {self.level:g}")
        for name in ("screening_blocks", "verdict_blocks"):
            if (blocks := getattr(self, name)) < 2:
                raise DesignError(f"{name} must be at least 2, got {blocks}")
        if not 0 < self.noise < math.inf:
            raise DesignError(f"noise must be over 0 and finite, got {self.noise:g}")

    def power(self, runs: int) -> float:
        """Probability that the verdict stage finds one run that is slower by ``max_slowdown``.

        That is the power of Holm's first step, at ``level / runs``, from the noncentral t
        distribution; his later steps, at higher levels, have more. A block's log ratio has 1.5
        times the variance of a process. Runs that screening clears wrongly, ``level`` at most, do
        not count.

        Args:
            runs: how many are flagged; all of them is the worst case.
        """
        return _power(self._gap, self._spread, self._first_step(runs), self.verdict_blocks)

    def blocks_needed(self, runs: int, *, power: float = POWER) -> int | None:
        """The fewest ``verdict_blocks`` that have the power, whatever this design has; ``None`` if
        they are over a thousand."""
        return fewest_blocks([(self._gap, self._first_step(runs))], self._spread, power=power)

    def check(self, runs: int) -> None:
        """Refuse a verdict stage that finds the slowdown that it must in less than 90 %.

        Raises:
            DesignError: one line, with the blocks that are needed.
        """
        power = self.power(runs)
        if power >= POWER:
            return
        raise DesignError(
            f"with {self.verdict_blocks} verdict blocks a slowdown of "
            f"{percent(self.max_slowdown)} would be found with a probability of "
            f"{math.floor(100 * power)}% only ({plural(runs, 'run')}, noise {percent(self.noise)} "
            f"between processes): {count_blocks(self.blocks_needed(runs))} are needed for "
            f"{percent(POWER)}"
        )

    @property
    def _gap(self) -> float:
        return math.log1p(self.max_slowdown) - math.log1p(self.margin)

    @property
    def _spread(self) -> float:
        return math.sqrt(VERDICT_VARIANCE) * self.noise

    def _first_step(self, runs: int) -> float:
        if runs < 1:
            raise DesignError(f"runs must be at least 1, got {runs}")
        return self.level / runs


def fewest_blocks(
    tests: list[tuple[float, float]], spread: float, *, power: float = POWER
) -> int | None:
    """Return the fewest blocks with which one of the tests, each by its gap and level, has the
    power; ``None`` if they are over a thousand."""

    def enough(blocks: int) -> bool:
        return any(_power(gap, spread, level, blocks) >= power for gap, level in tests)

    numbers = range(2, MOST_BLOCKS + 1)
    fewest = bisect_left(numbers, True, key=enough)  # the power grows with the blocks
    return numbers[fewest] if fewest < len(numbers) else None


def _power(gap: float, spread: float, level: float, blocks: int) -> float:
    """Probability that a one-sided t test excludes what is off the true mean by ``gap``."""
    from scipy import stats

    noncentrality = gap / max(spread, ROUNDING) * math.sqrt(blocks)
    noncentrality = min(max(noncentrality, -FARTHEST), FARTHEST)
    return float(stats.nct.sf(critical(level, blocks), blocks - 1, noncentrality))


def critical(level: float, blocks: int) -> float:
    """Return the value that a t statistic of so many blocks exceeds with probability ``level``."""
    from scipy import special

    return -float(special.stdtrit(blocks - 1, level))


def percent(share: float) -> str:
    """Return a share as people read it, such as ``5%``."""
    return f"{100 * share:.3g}%"


def count_blocks(needed: int | None) -> str:
    """Return ``6 blocks``; ``None`` is more than are ever asked for."""
    return f"over {MOST_BLOCKS} blocks" if needed is None else f"{needed} blocks"

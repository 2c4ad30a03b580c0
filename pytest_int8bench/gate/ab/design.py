"""Plan how many processes an A/B measures, so that it finds the slowdown that it must.

One process measures all runs of one revision and gives one median batch time each. The process is
the sampling unit: times within a process share its memory layout, its clocks and its luck.

Screening measures both revisions in blocks of two processes, AB BA or BA AB. It clears runs, and
flags all others. The verdict stage measures the flagged runs again, in blocks of four: two
processes of each revision, in an order that is drawn at random, from which
:mod:`pytest_int8bench.gate.ab.randomization` tests. Its data are fresh, so choosing runs by
screening is not multiple testing: the flagged runs are the family.

The verdict stage is looked at up to three times, after a third, two thirds and all of its blocks,
and ends when every run is decided. :func:`spend` divides the level among the looks.

:mod:`pytest_int8bench.gate.ab.judging` decides from the times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
#: Variance of a screening block's log ratio, new / base, in those of a process.
SCREENING_VARIANCE = 2.0
#: Orders that a verdict block can have.
ORDERS_PER_BLOCK = 6
#: Blocks up to which all orders are looked at; with more, a sample of them.
ENUMERATED_BLOCKS = 4


class DesignError(ClearError, ValueError):
    """A design that is none, or that would not find what it must."""


@dataclass(frozen=True, kw_only=True)
class Design:
    """Number of processes to measure, and the rule that decides. Shares, not percentages.

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
    """Most blocks of four processes; a clear case takes a third of them."""
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
            if blocks > MOST_BLOCKS:
                raise DesignError(f"{name} must be at most {MOST_BLOCKS}, got {blocks:.4g}")
        if not 0 < self.noise < math.inf:
            raise DesignError(f"noise must be over 0 and finite, got {self.noise:g}")

    @property
    def looks(self) -> tuple[int, ...]:
        """Numbers of blocks after which the verdict stage is looked at."""
        return looks(self.verdict_blocks)

    def power(self, runs: int) -> float:
        """Probability that the verdict stage finds one run that is slower by ``max_slowdown``.

        It is approximated by that of the best look alone, for a t test of all processes at the
        look's level divided by the runs. Runs that screening clears wrongly, ``level`` at most, do
        not count.

        Args:
            runs: how many are flagged; all of them is the worst case.
        """
        return _power([(self._gap, _count(runs))], self.noise, self.level, [self.verdict_blocks])[0]

    def blocks_needed(self, runs: int, *, power: float = POWER) -> int | None:
        """The fewest ``verdict_blocks`` that have the power, whatever this design has; ``None`` if
        they are over a thousand."""
        return fewest_blocks([(self._gap, _count(runs))], self.noise, self.level, power=power)

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


def _count(runs: int) -> int:
    if runs < 1:
        raise DesignError(f"runs must be at least 1, got {runs}")
    return runs


# -- looks ----------------------------------------------------------------------------------


def looks(blocks: int) -> tuple[int, ...]:
    """Return after how many blocks a verdict stage is looked at: a third, two thirds, and all of
    them, and two at least."""
    return tuple(sorted({max(2, math.ceil(blocks * part / 3)) for part in (1, 2, 3)}))


def spend(level: float, blocks: int, seen: Sequence[int]) -> list[float]:
    """Return the level of each look; together they are no more than ``level``.

    Up to a look, the root of its share of the blocks is spent, so that the first look at 2 of 6
    blocks can decide: one of 36 orders is 2.8 %. What a look cannot use, since p-values are
    multiples of one order, is left to the next one (Bonferroni over looks, with the spending
    function of Kim and DeMets 1987 with the exponent 1/2).

    Args:
        level: of all looks together.
        blocks: planned for the whole stage.
        seen: blocks that were there at each look. The last one of a stage that ended early may
            stand as if all were.
    """
    levels: list[float] = []
    for planned, there in zip(looks(blocks), seen, strict=False):
        left = level * math.sqrt(planned / blocks) - sum(levels)
        levels.append(attainable(left, there))
    return levels


def attainable(level: float, blocks: int) -> float:
    """Return the largest p-value of so many blocks that is no more than ``level``."""
    if blocks > ENUMERATED_BLOCKS:
        return level
    orders: int = ORDERS_PER_BLOCK**blocks
    return math.floor(level * orders * (1 + ROUNDING)) / orders


# -- power ----------------------------------------------------------------------------------


def fewest_blocks(
    tests: Sequence[tuple[float, int]], noise: float, level: float, *, power: float = POWER
) -> int | None:
    """Return the fewest blocks with which one of the tests, each by its gap and the number of runs
    that share its level, has the power; ``None`` if they are over a thousand."""
    numbers = range(2, MOST_BLOCKS + 1)
    found = _power(tests, noise, level, numbers)
    return next((blocks for blocks, one in zip(numbers, found, strict=True) if one >= power), None)


def _power(
    tests: Sequence[tuple[float, int]], noise: float, level: float, numbers: Sequence[int]
) -> list[float]:
    """Return for each number of blocks the probability that the best look of the best test excludes
    what is off the true mean by its gap."""
    import numpy as np
    from scipy import special, stats

    found = np.zeros((len(numbers), 3))
    for row, blocks in enumerate(numbers):
        found[row, : len(looks(blocks))] = looks(blocks)
    levels = np.zeros_like(found)
    for row, blocks in enumerate(numbers):
        spent = spend(level, blocks, looks(blocks))
        levels[row, : len(spent)] = spent
    is_look = levels > 0
    blocks_at, level_at = found[is_look], levels[is_look]
    freedom = 3 * blocks_at - 1  # four processes a block, less its own level; less the slowdown
    best = np.zeros_like(blocks_at)
    for gap, runs in tests:
        noncentrality = gap / max(noise, ROUNDING) * np.sqrt(blocks_at)
        noncentrality = np.clip(noncentrality, -FARTHEST, FARTHEST)
        reach = -special.stdtrit(freedom, level_at / runs)
        best = np.maximum(best, stats.nct.sf(reach, freedom, noncentrality))
    powers = np.zeros_like(found)
    powers[is_look] = best
    return [float(power) for power in powers.max(axis=1)]


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

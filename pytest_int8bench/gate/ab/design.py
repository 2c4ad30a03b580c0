"""Plan how many processes an A/B comparison measures to reach its power.

One process measures all runs of one revision and yields one median batch time for each. The process
is the sampling unit, because times within a process share its memory layout and clocks.

Screening measures both revisions in blocks of two processes, AB BA or BA AB, and clears or flags
each run. The verdict stage measures the flagged runs again in blocks of four, two processes of each
revision in random order, which :mod:`pytest_int8bench.gate.ab.randomization` tests. Because these
data are fresh, selecting runs by screening is not multiple testing: only the flagged runs form the
family.

The verdict stage has up to three looks, after a third, two thirds and all of its blocks, and ends
when every run is decided. :func:`spend` divides the significance level among the looks.

:mod:`pytest_int8bench.gate.ab.judging` decides from the times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pytest_int8bench.errors import ClearError
from pytest_int8bench.words import plural

#: Required probability of detecting a slowdown of ``max_slowdown``.
POWER = 0.9
MOST_BLOCKS = 1000
#: Log ratios closer than this are equal: the difference is rounding, as with a fake clock.
ROUNDING = 1e-12
#: SciPy returns NaN beyond this noncentrality, where the power is 0 or 1 anyway.
MAX_NONCENTRALITY = 1e8
#: Variance of a screening block's log ratio, new / base, relative to the variance of a process.
SCREENING_VARIANCE = 2.0
#: Possible orders of a verdict block.
ORDERS_PER_BLOCK = 6
#: Up to this number of blocks, the test enumerates all orders; with more blocks, it samples them.
ENUMERATED_BLOCKS = 4


class DesignError(ClearError, ValueError):
    """Raised for an invalid design, or one with too little power."""


@dataclass(frozen=True, kw_only=True)
class Design:
    """Number of processes and decision rule of an A/B comparison. Values are shares, not percent.

    Raises:
        DesignError: naming the field, the rule and the value.
    """

    margin: float = 0.01
    """Tolerated slowdown (relative increase in time), which never leads to a ``FAIL``."""
    max_slowdown: float = 0.05
    """Slowdown that must be detected; a ``PASS`` rules it out."""
    level: float = 0.05
    """Family-wise error rate of ``FAIL``, and the level of each one-sided bound."""
    screening_blocks: int = 4
    """Blocks of two processes.

    A small number misses little. Whatever the number and the noise, a run slower by
    ``max_slowdown`` is cleared with a probability of at most ``level``, because a cleared run's
    bound excludes it; at the default noise, the probability is below 1 in 10,000. A small number
    only flags more unchanged runs, which costs time in the verdict stage: 2, 3 and 4 blocks flag
    51, 13 and 8 % of them at a noise of 1 %, and 1, 0 and 0 % at 0.3 %. :meth:`check` therefore
    accepts any number. An even number cancels a linear drift.
    """
    verdict_blocks: int = 6
    """Maximum number of blocks of four processes; clear cases need a third of them."""
    noise: float = 0.01
    """Assumed relative standard deviation between processes."""

    def __post_init__(self) -> None:
        if not 0 <= self.margin < self.max_slowdown < math.inf:
            raise DesignError(
                "margin must be at least 0 and less than max_slowdown, "
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
        """Numbers of blocks after which the verdict stage decides."""
        return looks(self.verdict_blocks)

    def power(self, runs: int) -> float:
        """Return the probability that the verdict stage detects one run slower by ``max_slowdown``.

        It is approximated by a t test of all processes at the best look, at this look's level
        divided by the number of runs. Runs that screening clears wrongly (at most ``level``) are
        not included.

        Args:
            runs: number of flagged runs; all runs are the worst case.
        """
        return _power([(self._gap, _count(runs))], self.noise, self.level, [self.verdict_blocks])[0]

    def blocks_needed(self, runs: int, *, power: float = POWER) -> int | None:
        """Return the fewest ``verdict_blocks`` with this power; None if over a thousand."""
        return fewest_blocks([(self._gap, _count(runs))], self.noise, self.level, power=power)

    def check(self, runs: int) -> None:
        """Refuse a verdict stage with a power below 90 %.

        Raises:
            DesignError: with the number of blocks needed.
        """
        power = self.power(runs)
        if power >= POWER:
            return
        raise DesignError(
            f"{self.verdict_blocks} verdict blocks detect a slowdown of "
            f"{percent(self.max_slowdown)} with a probability of only "
            f"{math.floor(100 * power)}% ({plural(runs, 'run')}, noise {percent(self.noise)} "
            f"between processes); {percent(POWER)} needs "
            f"{count_blocks(self.blocks_needed(runs))}"
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
    """Return the numbers of blocks after which a verdict stage decides: a third, two thirds, and
    all of them, each at least two."""
    return tuple(sorted({max(2, math.ceil(blocks * part / 3)) for part in (1, 2, 3)}))


def spend(level: float, blocks: int, measured: Sequence[int]) -> list[float]:
    """Return the significance level of each look; their sum is at most ``level``.

    The level spent up to a look is proportional to the square root of its share of the blocks
    (Bonferroni over looks, with the spending function of Kim and DeMets 1987 and exponent 1/2), so
    that a first look at 2 of 6 blocks can decide: one of 36 orders is 2.8 %. P-values are multiples
    of one order's probability; the part of a level that a look cannot use goes to the next.

    Args:
        level: significance level of all looks together.
        blocks: planned blocks of the whole stage.
        measured: blocks measured at each look. The last look of a stage that ended early may count
            as if all blocks were measured.
    """
    levels: list[float] = []
    for planned, at_look in zip(looks(blocks), measured, strict=False):
        left = level * math.sqrt(planned / blocks) - sum(levels)
        levels.append(attainable(left, at_look))
    return levels


def attainable(level: float, blocks: int) -> float:
    """Return the largest possible p-value of at most ``level`` with this number of blocks."""
    if blocks > ENUMERATED_BLOCKS:
        return level
    orders: int = ORDERS_PER_BLOCK**blocks
    return math.floor(level * orders * (1 + ROUNDING)) / orders


# -- power ----------------------------------------------------------------------------------


def fewest_blocks(
    tests: Sequence[tuple[float, int]], noise: float, level: float, *, power: float = POWER
) -> int | None:
    """Return the fewest blocks with which one of the tests has this power; None if over a thousand.

    A test is its gap (log ratio) and the number of runs that share the level.
    """
    numbers = range(2, MOST_BLOCKS + 1)
    found = _power(tests, noise, level, numbers)
    return next((blocks for blocks, one in zip(numbers, found, strict=True) if one >= power), None)


def _power(
    tests: Sequence[tuple[float, int]], noise: float, level: float, numbers: Sequence[int]
) -> list[float]:
    """Return, for each number of blocks, the probability that the best look of the best test
    rejects a hypothesis that differs from the true mean by the test's gap."""
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
    freedom = 3 * blocks_at - 1  # four processes per block, minus one mean each and the slowdown
    best = np.zeros_like(blocks_at)
    for gap, runs in tests:
        noncentrality = gap / max(noise, ROUNDING) * np.sqrt(blocks_at)
        noncentrality = np.clip(noncentrality, -MAX_NONCENTRALITY, MAX_NONCENTRALITY)
        thresholds = -special.stdtrit(freedom, level_at / runs)
        best = np.maximum(best, stats.nct.sf(thresholds, freedom, noncentrality))
    powers = np.zeros_like(found)
    powers[is_look] = best
    return [float(power) for power in powers.max(axis=1)]


def critical(level: float, blocks: int) -> float:
    """Return the critical value of a one-sided t test of ``blocks`` values."""
    from scipy import special

    return -float(special.stdtrit(blocks - 1, level))


def percent(share: float) -> str:
    """Format a share as a percentage, such as ``5%``."""
    return f"{100 * share:.3g}%"


def count_blocks(needed: int | None) -> str:
    """Format a number of blocks; ``None`` means more than ``MOST_BLOCKS``."""
    return f"over {MOST_BLOCKS} blocks" if needed is None else f"{needed} blocks"

"""Whether a new revision is slower than its base, from processes measured in alternation.

One process measures all runs of one revision and gives one median batch time each. The process is
the sampling unit: times within a process share its memory layout, its clocks and its luck.

Screening measures both revisions in blocks of two processes, base first and new first in turn. It
clears runs, and flags all others. The verdict stage measures the flagged runs afresh in blocks of
three, the new revision between two processes of the base: a linear drift cancels within a block,
and the two of the base are the control. Since its data are fresh, what screening chose is no
multiple testing: Holm's correction counts the flagged runs only.

All is reckoned in log ratios, new to base, one for each block, by one-sided t tests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pytest_int8bench.errors import ClearError

Outcome = Literal["FAIL", "PASS", "INCONCLUSIVE"]
Floats = NDArray[np.float64]

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
        times the variance of a process. What screening clears wrongly, ``level`` at most, is not
        reckoned in.

        Args:
            runs: how many are flagged; all of them is the worst case.
        """
        return _power(self._gap, self._spread, self._first_step(runs), self.verdict_blocks)

    def blocks_needed(self, runs: int, *, power: float = POWER) -> int:
        """The fewest ``verdict_blocks`` that have the power, whatever this design has.

        Raises:
            DesignError: one line, if they are over a thousand.
        """
        needed = _fewest([(self._gap, self._first_step(runs))], self._spread, power=power)
        if needed is None:
            raise DesignError(
                f"over {MOST_BLOCKS} verdict blocks are needed to find a slowdown of "
                f"{_percent(self.max_slowdown)} with a probability of {_percent(power)} "
                f"({self._conditions(runs)})"
            )
        return needed

    def check(self, runs: int) -> None:
        """Refuse a verdict stage that finds the slowdown that it must in less than 90 %.

        Raises:
            DesignError: one line, with the blocks that are needed.
        """
        power = self.power(runs)
        if power >= POWER:
            return
        needed = _fewest([(self._gap, self._first_step(runs))], self._spread)
        raise DesignError(
            f"with {self.verdict_blocks} verdict blocks a slowdown of "
            f"{_percent(self.max_slowdown)} would be found with a probability of "
            f"{math.floor(100 * power)}% only ({self._conditions(runs)}): "
            f"{_blocks(needed)} are needed for {_percent(POWER)}"
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

    def _conditions(self, runs: int) -> str:
        return f"{_runs(runs)}, noise {_percent(self.noise)} between processes"


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What the blocks of one run say. Shares, not percentages."""

    slowdown: float
    """Geometric mean of the ratios of time, less 1. Negative if it got faster."""
    low: float
    """One-sided bounds of the slowdown, each at the level of the design; those of a control at
    half of it."""
    high: float
    noise: float
    """Standard deviation between processes, as estimated from the blocks."""
    blocks: int


@dataclass(frozen=True, kw_only=True)
class Screened:
    """One run after screening."""

    estimate: Estimate | None
    """``None`` with fewer than two blocks."""
    flagged: bool
    """Whether it needs a verdict. A run that does not is a ``PASS``."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One run after the verdict stage."""

    outcome: Outcome
    estimate: Estimate | None
    """``None`` with fewer than two blocks. Its lower bound knows nothing of the other runs, so it
    can lie over the margin where ``p_holm`` does not show it."""
    p: float
    """Of H0: it is slower by no more than the margin. 1 with fewer than two blocks."""
    p_holm: float
    """The same, adjusted for all runs that were judged together."""
    control: Estimate | None
    """The base's second process of each block against its first; ``None`` as above."""
    reason: str | None
    """Why it is ``INCONCLUSIVE``, in one line."""
    blocks_needed: int | None
    """Blocks with which a slowdown as seen would be decided in 90 %, at the noise seen. ``None``
    if they are over a thousand, or if more blocks are not what is missing."""


def screen(base: ArrayLike, new: ArrayLike, design: Design) -> list[Screened]:
    """Flag the runs that need a verdict.

    Flagged is a run whose mean is over the margin, or whose upper bound does not exclude
    ``max_slowdown``, or that has fewer than two blocks.

    Args:
        base: seconds, of shape (runs, blocks).
        new: seconds, of the same shape.
        design: its levels and limits. There may be fewer blocks than planned: what there is
            counts.

    Raises:
        ValueError: one line, if the times are not positive and finite, or differ in shape.
    """
    before, after = _logs(base=base, new=new)
    if before.shape[1] < 2:
        return [Screened(estimate=None, flagged=True) for _ in before]
    ratios = _Ratios(after - before, SCREENING_VARIANCE)
    over = ratios.mean > math.log1p(design.margin) + ROUNDING
    flagged = over | (ratios.high(design.level) >= math.log1p(design.max_slowdown))
    return [
        Screened(estimate=estimate, flagged=bool(flag))
        for estimate, flag in zip(ratios.estimates(design.level), flagged, strict=True)
    ]


def judge(base: ArrayLike, new: ArrayLike, base_again: ArrayLike, design: Design) -> list[Judged]:
    """Judge the runs that screening flagged, from fresh blocks of base, new and base again.

    ``FAIL`` if a slowdown within the margin is excluded, the runs given being one family.
    ``PASS`` if it is not, but ``max_slowdown`` is. ``INCONCLUSIVE`` if neither is, with fewer
    than two blocks, or if the base differs from itself by more than the margin: whatever moved it
    may have moved the new revision, so that nothing is said about that.

    The control is tested in both directions at half the level, and not corrected for the number
    of runs. That is the cautious side: a correction would call fewer machines unsteady, and so
    let more verdicts stand.

    Args:
        base: seconds, of shape (runs, blocks).
        new: seconds, of the same shape.
        base_again: seconds of the base's second process of each block, of the same shape.
        design: its levels and limits. There may be fewer blocks than planned, since blocks can
            have been dropped: it is judged by those that there are.

    Raises:
        ValueError: one line, if the times are not positive and finite, or differ in shape.
    """
    before, between, after = _logs(base=base, new=new, base_again=base_again)
    runs, blocks = before.shape
    if blocks < 2:
        return [_too_few(blocks, design) for _ in range(runs)]
    ratios = _Ratios(between - (before + after) / 2, VERDICT_VARIANCE)
    control = _Ratios(after - before, SCREENING_VARIANCE)
    margin = math.log1p(design.margin)
    p = ratios.p_over(margin)
    p_holm = holm(p)
    differs = control.low(design.level / 2) > margin + ROUNDING
    differs |= control.high(design.level / 2) < -margin - ROUNDING
    shown = p_holm <= design.level
    excluded = ratios.high(design.level) < math.log1p(design.max_slowdown)

    estimates = ratios.estimates(design.level)
    controls = control.estimates(design.level / 2)
    judged = []
    for run in range(runs):
        outcome: Outcome = "INCONCLUSIVE"
        reason, needed = None, None
        if differs[run]:
            reason = (
                f"base differs from itself by {_interval(controls[run])}: "
                "the machine was not steady"
            )
        elif shown[run]:
            outcome = "FAIL"
        elif excluded[run]:
            outcome = "PASS"
        else:
            mean, spread = float(ratios.mean[run]), float(ratios.spread[run])
            needed = _would_decide(mean, spread, runs, design)
            reason = (
                f"a slowdown of {_interval(estimates[run])} is neither shown to be over "
                f"{_percent(design.margin)} (p {p_holm[run]:.2g} for {_runs(runs)}) nor under "
                f"{_percent(design.max_slowdown)}: at the noise seen "
                f"({100 * estimates[run].noise:.1f}%) {_blocks(needed)} would decide"
            )
        judged.append(
            Judged(
                outcome=outcome,
                estimate=estimates[run],
                p=float(p[run]),
                p_holm=float(p_holm[run]),
                control=controls[run],
                reason=reason,
                blocks_needed=needed,
            )
        )
    return judged


def holm(p: ArrayLike) -> Floats:
    """Adjusted p-values: those at most ``level`` are rejected, with a family-wise error of
    ``level`` however the tests depend on each other.

    Holm, Scandinavian Journal of Statistics 6, 1979, 65-70: the i-th smallest of m p-values times
    m - i + 1, and no less than those before it.
    """
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values)
    factors = np.arange(len(values), 0, -1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * values[order]), 1.0)
    return adjusted


# --- Log ratios ---


class _Ratios:
    """Means of log ratios, what bounds them, and t tests of them; one of each for every run.

    Args:
        ratios: of shape (runs, blocks), with two blocks or more.
        variance: of one of them, in variances of a process.
    """

    def __init__(self, ratios: Floats, variance: float) -> None:
        self._blocks = ratios.shape[1]
        self._variance = variance
        self.mean: Floats = ratios.mean(axis=1)
        spread = ratios.std(axis=1, ddof=1)
        self.spread: Floats = np.where(spread > ROUNDING, spread, 0.0)
        self._error = self.spread / math.sqrt(self._blocks)

    def low(self, level: float) -> Floats:
        return self.mean - self._reach(level)

    def high(self, level: float) -> Floats:
        return self.mean + self._reach(level)

    def _reach(self, level: float) -> Floats:
        reach: Floats = _critical(level, self._blocks) * self._error
        return reach

    def p_over(self, limit: float) -> Floats:
        """p-values of H0: the true mean is ``limit`` or less. Without any noise 0 or 1."""
        from scipy import special

        excess = self.mean - limit
        without_noise = np.where(excess > ROUNDING, math.inf, -math.inf)
        t = np.divide(excess, self._error, out=without_noise, where=self._error > 0)
        p: Floats = special.stdtr(self._blocks - 1, -t)
        return p

    def estimates(self, level: float) -> list[Estimate]:
        with np.errstate(over="ignore"):  # two blocks can leave any slowdown possible
            columns = np.expm1([self.mean, self.low(level), self.high(level)])
        noise = self.spread / math.sqrt(self._variance)
        return [
            Estimate(slowdown=slowdown, low=low, high=high, noise=noise, blocks=self._blocks)
            for slowdown, low, high, noise in zip(*columns.tolist(), noise.tolist(), strict=True)
        ]


def _logs(**times: ArrayLike) -> list[Floats]:
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in times.items()}
    shape = arrays["base"].shape
    for name, array in arrays.items():
        if array.ndim != 2:
            raise ValueError(f"{name} must have the shape (runs, blocks), got {array.shape}")
        if array.shape != shape:
            raise ValueError(f"{name} must have the shape of base, {shape}, got {array.shape}")
        if bad := array.size - int((np.isfinite(array) & (array > 0)).sum()):
            raise ValueError(f"{name} must be positive, finite seconds: {bad} are not")
    return [np.log(array) for array in arrays.values()]


# --- Blocks needed ---


def _too_few(blocks: int, design: Design) -> Judged:
    return Judged(
        outcome="INCONCLUSIVE",
        estimate=None,
        p=1.0,
        p_holm=1.0,
        control=None,
        reason=f"only {blocks} of {design.verdict_blocks} blocks",
        blocks_needed=design.verdict_blocks,
    )


def _would_decide(mean: float, spread: float, runs: int, design: Design) -> int | None:
    """Blocks with which a true mean as seen is shown to be over the margin, be there as many runs,
    or under ``max_slowdown``, whichever takes fewer."""
    to_fail = (mean - math.log1p(design.margin), design.level / runs)
    to_pass = (math.log1p(design.max_slowdown) - mean, design.level)
    return _fewest([to_fail, to_pass], spread)


def _fewest(tests: list[tuple[float, float]], spread: float, *, power: float = POWER) -> int | None:
    """The fewest blocks with which one of the tests, each by its gap and level, has the power."""

    def enough(blocks: int) -> bool:
        return any(_power(gap, spread, level, blocks) >= power for gap, level in tests)

    # The power grows with the blocks.
    low, high = 1, MOST_BLOCKS + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high if high <= MOST_BLOCKS else None


def _power(gap: float, spread: float, level: float, blocks: int) -> float:
    """Probability that a one-sided t test excludes what is off the true mean by ``gap``."""
    from scipy import stats

    noncentrality = gap / max(spread, ROUNDING) * math.sqrt(blocks)
    noncentrality = min(max(noncentrality, -FARTHEST), FARTHEST)
    return float(stats.nct.sf(_critical(level, blocks), blocks - 1, noncentrality))


def _critical(level: float, blocks: int) -> float:
    """Value that a t statistic of so many blocks exceeds with probability ``level``."""
    from scipy import special

    return -float(special.stdtrit(blocks - 1, level))


# --- Texts ---


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _interval(estimate: Estimate) -> str:
    slowdown, low, high = (100 * x for x in (estimate.slowdown, estimate.low, estimate.high))
    return f"{slowdown:.1f}% [{low:.1f}, {high:.1f}]"


def _runs(runs: int) -> str:
    return "1 run" if runs == 1 else f"{runs} runs"


def _blocks(needed: int | None) -> str:
    return f"over {MOST_BLOCKS} blocks" if needed is None else f"{needed} blocks"

"""Decide whether a revision is slower than its base, from processes measured in alternation.

Everything is computed from log ratios of new to base, one for each block, by one-sided t tests.
:mod:`pytest_int8bench.gate.ab.design` says which blocks there are, and how many.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pytest_int8bench.gate.ab.design import (
    ROUNDING,
    SCREENING_VARIANCE,
    VERDICT_VARIANCE,
    Design,
    count_blocks,
    critical,
    fewest_blocks,
    percent,
)
from pytest_int8bench.words import plural

Outcome = Literal["FAIL", "PASS", "INCONCLUSIVE"]
Floats = NDArray[np.float64]


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
    p = ratios.p_over(math.log1p(design.margin))
    p_holm = holm(p)
    is_unsteady = _is_unsteady(control, design)
    is_excluded = ratios.high(design.level) < math.log1p(design.max_slowdown)
    estimates = ratios.estimates(design.level)
    controls = control.estimates(design.level / 2)

    judged = []
    for run in range(runs):
        outcome: Outcome = "INCONCLUSIVE"
        reason, needed = None, None
        if is_unsteady[run]:
            shown = _interval(controls[run])
            reason = f"base differs from itself by {shown}: the machine was not steady"
        elif p_holm[run] <= design.level:
            outcome = "FAIL"
        elif is_excluded[run]:
            outcome = "PASS"
        else:
            needed = _would_decide(float(ratios.mean[run]), float(ratios.spread[run]), runs, design)
            reason = _undecided(estimates[run], float(p_holm[run]), runs, needed, design)
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


def _is_unsteady(control: _Ratios, design: Design) -> NDArray[np.bool_]:
    """Return for each run whether the base differs from itself by more than the margin.

    The control is tested in both directions at half the level, and not corrected for the number
    of runs. That is the cautious side: a correction would call fewer machines unsteady, and so
    let more verdicts stand.
    """
    limit = math.log1p(design.margin) + ROUNDING
    slower, faster = control.low(design.level / 2) > limit, control.high(design.level / 2) < -limit
    return np.logical_or(slower, faster)


def holm(p: ArrayLike) -> Floats:
    """Return adjusted p-values: those at most ``level`` are rejected, with a family-wise error of
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
        reach: Floats = critical(level, self._blocks) * self._error
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


# --- Texts, and blocks needed ---


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
    """Return the blocks with which a true mean as seen is shown to be over the margin, with so many
    runs, or under ``max_slowdown``, whichever takes fewer."""
    to_fail = (mean - math.log1p(design.margin), design.level / runs)
    to_pass = (math.log1p(design.max_slowdown) - mean, design.level)
    return fewest_blocks([to_fail, to_pass], spread)


def _undecided(
    estimate: Estimate, p_holm: float, runs: int, needed: int | None, design: Design
) -> str:
    return (
        f"a slowdown of {_interval(estimate)} is neither shown to be over "
        f"{percent(design.margin)} (p {p_holm:.2g} for {plural(runs, 'run')}) nor under "
        f"{percent(design.max_slowdown)}: at the noise seen "
        f"({100 * estimate.noise:.1f}%) {count_blocks(needed)} would decide"
    )


def _interval(estimate: Estimate) -> str:
    slowdown, low, high = (100 * x for x in (estimate.slowdown, estimate.low, estimate.high))
    return f"{slowdown:.1f}% [{low:.1f}, {high:.1f}]"

"""Decide whether a revision is slower than its base, from interleaved processes.

Screening and the control use one-sided t tests of log ratios, one per block. Verdicts use the tests
of :mod:`pytest_int8bench.gate.ab.randomization`. :mod:`pytest_int8bench.gate.ab.design` defines the
blocks and their number.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pytest_int8bench.gate.ab.design import (
    ROUNDING,
    SCREENING_VARIANCE,
    Design,
    count_blocks,
    critical,
    fewest_blocks,
    percent,
)
from pytest_int8bench.gate.ab.randomization import bounds, center, p_faster, p_slower_of_family
from pytest_int8bench.words import plural

Outcome = Literal["FAIL", "PASS", "INCONCLUSIVE"]
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Estimated slowdown of one run. Values are shares, not percent."""

    slowdown: float
    """Ratio of the times minus 1; negative if the run got faster. In screening, it comes from the
    geometric mean over blocks, in the verdict stage from an estimate that is robust to outliers."""
    low: float
    """One-sided lower bound of the slowdown, at the design's level; at half that level for a
    control, and at the level of the last look in the verdict stage."""
    high: float
    """One-sided upper bound, at the same level."""
    noise: float
    """Standard deviation between processes, estimated from the blocks."""
    blocks: int


@dataclass(frozen=True, kw_only=True)
class Screened:
    """Result of screening one run."""

    estimate: Estimate | None
    """None for fewer than two blocks."""
    flagged: bool
    """Whether the run needs a verdict; otherwise it is a ``PASS``."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Verdict on one run."""

    outcome: Outcome
    estimate: Estimate | None
    """None for fewer than two blocks. Its lower bound is not adjusted for the other runs, so it can
    exceed the margin although ``p_holm`` is not significant."""
    p: float
    """p-value of H0: the run is slower by at most the margin. 1 for fewer than two blocks."""
    p_holm: float
    """``p`` adjusted for all runs that were judged together, by the maximum statistic over them.
    (Saved files keep the name of Holm's correction, which was used before.)"""
    control: Estimate | None
    """The base's second process of each block against its first; None for fewer than two blocks."""
    reason: str | None
    """Why the run is ``INCONCLUSIVE``, in one line."""
    blocks_needed: int | None
    """Blocks that would decide the observed slowdown with a probability of 90 %, at the observed
    noise. None if over a thousand, or if more blocks would not help."""


def screen(base: ArrayLike, new: ArrayLike, design: Design) -> list[Screened]:
    """Flag the runs that need a verdict.

    A run is flagged if its mean exceeds the margin, if its upper bound does not exclude
    ``max_slowdown``, or if it has fewer than two blocks.

    Args:
        base: the base's times in seconds, of shape (runs, blocks).
        new: the new revision's times in seconds, of the same shape.
        design: levels and limits. There may be fewer blocks than it plans.

    Raises:
        ValueError: if the times are not positive and finite, or differ in shape.
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


def judge(
    times: ArrayLike,
    is_new: ArrayLike,
    design: Design,
    *,
    scale: ArrayLike = 1.0,
    level: float | None = None,
    is_last: bool = True,
) -> list[Judged]:
    """Judge the runs that screening flagged, from fresh blocks of four processes.

    A run is a ``FAIL`` if a slowdown within the margin is ruled out, with all given runs as one
    family. Otherwise it is a ``PASS`` if ``max_slowdown`` is ruled out; before the last look, only
    if its estimate is also within the margin, so that more blocks can detect a smaller slowdown.
    All other runs are ``INCONCLUSIVE``, as are runs with fewer than two blocks. So are runs whose
    base differs from itself by more than the margin, because what disturbed the base may also have
    disturbed the new revision.

    Args:
        times: seconds, of shape (runs, blocks, 4), in the order in which the processes ran.
        is_new: whether a process is the new revision's (two in each block), of shape (blocks, 4).
        design: levels and limits. Blocks may be dropped, so there can be fewer than it plans.
        scale: noise of each run, estimated from other data; see :func:`scales`.
        level: significance level of this look; the design's level by default.
        is_last: whether this is the last look.

    Raises:
        ValueError: if the times are not positive and finite, or the shapes do not match.
    """
    logs, labels = _blocks_of_four(times, is_new)
    runs, blocks = logs.shape[:2]
    if blocks < 2 or not runs:
        return [too_few_blocks(blocks, design) for _ in range(runs)]
    level = design.level if level is None else level
    decided = decide(logs, labels, design, level, np.asarray(scale, float), is_last=is_last)
    controls = _control(logs, labels).estimates(design.level / 2)
    # A look without new blocks may have no level left.
    estimates, centers = _estimates(logs, labels, level or design.level)
    judged = []
    for run, outcome in enumerate(decided.outcomes.tolist()):
        reason, needed = None, None
        if decided.is_unstable[run]:
            shown = _interval(controls[run])
            reason = f"the base differs from itself by {shown}: the machine was not steady"
        elif outcome == "INCONCLUSIVE":
            noise, p_holm = estimates[run].noise, float(decided.p_holm[run])
            needed = _blocks_to_decide(float(centers[run]), noise, runs, design)
            reason = _undecided_reason(estimates[run], p_holm, runs, needed, design)
        judged.append(
            Judged(
                outcome=outcome,
                estimate=estimates[run],
                p=float(decided.p[run]),
                p_holm=float(decided.p_holm[run]),
                control=controls[run],
                reason=reason,
                blocks_needed=needed,
            )
        )
    return judged


@dataclass(frozen=True)
class Decided:
    """Outcomes of one look and the statistics that led to them, one entry per run."""

    outcomes: NDArray[np.str_]
    p: Floats
    p_holm: Floats
    is_unstable: NDArray[np.bool_]


def scales(screened: Sequence[Screened]) -> list[float]:
    """Return the noise of each run in screening, at least the median over all runs.

    The minimum guards against blocks that are close to each other by chance.
    """
    noises = [run.estimate.noise if run.estimate is not None else 0.0 for run in screened]
    middle = max(statistics.median(noises), ROUNDING) if noises else 1.0
    return [max(noise, middle) for noise in noises]


def decide(
    logs: Floats,
    is_new: NDArray[np.bool_],
    design: Design,
    level: float,
    scale: Floats | float = 1.0,
    *,
    is_last: bool,
) -> Decided:
    """Decide each run, from log times of shape (..., runs, blocks, 4)."""
    margin, most = math.log1p(design.margin), math.log1p(design.max_slowdown)
    p, p_holm = p_slower_of_family(logs, is_new, margin, scale)
    is_excluded = p_faster(logs, is_new, most) <= level * (1 + ROUNDING)
    if not is_last:
        is_excluded &= center(logs, is_new) <= margin + ROUNDING
    is_unstable = _is_unstable(_control(logs, is_new), design)
    is_slower = p_holm <= level * (1 + ROUNDING)
    outcomes = np.select(
        [is_unstable, is_slower, is_excluded], ["INCONCLUSIVE", "FAIL", "PASS"], "INCONCLUSIVE"
    )
    return Decided(outcomes, p, p_holm, is_unstable)


def _control(logs: Floats, is_new: NDArray[np.bool_]) -> _Ratios:
    """Return the log ratios of the base's second process of each block to its first."""
    places = np.argsort(is_new, axis=-1, kind="stable")[..., None, :, :2]
    base = np.take_along_axis(logs, np.broadcast_to(places, (*logs.shape[:-1], 2)), -1)
    return _Ratios(base[..., 1] - base[..., 0], SCREENING_VARIANCE)


def _is_unstable(control: _Ratios, design: Design) -> NDArray[np.bool_]:
    """Return whether each run's base differs from itself by more than the margin.

    The control is tested in both directions at half the level each, without a correction for the
    number of runs. This is conservative: a correction would classify fewer machines as unstable
    and accept more verdicts.
    """
    limit = math.log1p(design.margin) + ROUNDING
    slower, faster = control.low(design.level / 2) > limit, control.high(design.level / 2) < -limit
    return np.logical_or(slower, faster)


def _estimates(
    logs: Floats, is_new: NDArray[np.bool_], level: float
) -> tuple[list[Estimate], Floats]:
    centers = center(logs, is_new)
    low, high = bounds(logs, is_new, level)
    blocks = logs.shape[1]
    rest = logs - centers[:, None, None] * is_new
    rest -= rest.mean(axis=-1, keepdims=True)
    noise = np.sqrt((rest**2).sum(axis=(-2, -1)) / (3 * blocks - 1))
    noise = np.where(noise > ROUNDING, noise, 0.0)
    with np.errstate(over="ignore"):  # a few blocks can leave any slowdown possible
        columns = np.expm1([centers, np.minimum(low, centers), np.maximum(high, centers)])
    found = [
        Estimate(slowdown=slowdown, low=low, high=high, noise=one, blocks=blocks)
        for slowdown, low, high, one in zip(*columns.tolist(), noise.tolist(), strict=True)
    ]
    return found, centers


# --- Log ratios ---


class _Ratios:
    """Means of log ratios and their bounds from t tests, for each run.

    Args:
        ratios: log ratios, of shape (..., blocks), with at least two blocks.
        variance: variance of one log ratio, relative to the variance of a process.
    """

    def __init__(self, ratios: Floats, variance: float) -> None:
        self._blocks = ratios.shape[-1]
        self._variance = variance
        self.mean: Floats = ratios.mean(axis=-1)
        spread = ratios.std(axis=-1, ddof=1)
        self.spread: Floats = np.where(spread > ROUNDING, spread, 0.0)
        self._error = self.spread / math.sqrt(self._blocks)

    def low(self, level: float) -> Floats:
        return self.mean - self._half_width(level)

    def high(self, level: float) -> Floats:
        return self.mean + self._half_width(level)

    def _half_width(self, level: float) -> Floats:
        half_width: Floats = critical(level, self._blocks) * self._error
        return half_width

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
        _check_seconds(name, array)
    return [np.log(array) for array in arrays.values()]


def _blocks_of_four(times: ArrayLike, is_new: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    seconds, labels = np.asarray(times, dtype=np.float64), np.asarray(is_new, dtype=np.bool_)
    if seconds.ndim != 3 or seconds.shape[2] != 4:
        raise ValueError(f"times must have the shape (runs, blocks, 4), got {seconds.shape}")
    if labels.shape != seconds.shape[1:]:
        raise ValueError(
            f"is_new must have the shape (blocks, 4), {seconds.shape[1:]}, got {labels.shape}"
        )
    if (labels.sum(axis=1) != 2).any():
        raise ValueError("is_new must mark exactly two processes in each block")
    _check_seconds("times", seconds)
    return np.log(seconds), labels


def _check_seconds(name: str, array: Floats) -> None:
    if bad := array.size - int((np.isfinite(array) & (array > 0)).sum()):
        raise ValueError(
            f"{name} must be positive and finite seconds, got {plural(bad, 'other value')}"
        )


# --- Reasons, and blocks needed ---


def too_few_blocks(blocks: int, design: Design) -> Judged:
    """Return the verdict on a run with fewer than two blocks."""
    return Judged(
        outcome="INCONCLUSIVE",
        estimate=None,
        p=1.0,
        p_holm=1.0,
        control=None,
        reason=f"measured only {blocks} of {design.verdict_blocks} blocks",
        blocks_needed=design.verdict_blocks,
    )


def _blocks_to_decide(mean: float, noise: float, runs: int, design: Design) -> int | None:
    """Return the blocks that would decide if the true mean were the observed one.

    This is the smaller number of those that show it to be over the margin, corrected for all runs,
    and those that show it to be under ``max_slowdown``.
    """
    to_fail = (mean - math.log1p(design.margin), runs)
    to_pass = (math.log1p(design.max_slowdown) - mean, 1)
    return fewest_blocks([to_fail, to_pass], noise, design.level)


def _undecided_reason(
    estimate: Estimate, p_holm: float, runs: int, needed: int | None, design: Design
) -> str:
    return (
        f"the slowdown of {_interval(estimate)} is not shown to be over "
        f"{percent(design.margin)} (p = {p_holm:.2g} for {plural(runs, 'run')}) or under "
        f"{percent(design.max_slowdown)}; at the observed noise "
        f"({100 * estimate.noise:.1f}%), {count_blocks(needed)} would decide"
    )


def _interval(estimate: Estimate) -> str:
    slowdown, low, high = (100 * x for x in (estimate.slowdown, estimate.low, estimate.high))
    return f"{slowdown:.1f}% [{low:.1f}, {high:.1f}]"

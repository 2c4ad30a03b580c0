"""Whether a candidate's metric dropped by more than a limit, from paired scores.

Both models score the same samples, and two one-sided tests at level ``alpha`` decide: ``PASS`` if
a drop of the limit or more is excluded, ``FAIL`` if a drop within the limit is excluded,
``INCONCLUSIVE`` if neither is. Too few samples never pass.

Scores of 0 and 1 are judged by an exact test (:class:`.paired_exact.Flips`), all others, and all
samples that come in groups, by a t test that allows for collapses not seen yet
(:class:`.mean_tests.Means`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pytest_int8bench.accuracy.limit import Limit
from pytest_int8bench.accuracy.statistics.checks import (
    ScoreError,
    check_level,
    check_share,
    check_size,
    check_worst,
    numbers,
)
from pytest_int8bench.accuracy.statistics.groups import Codes, group_codes, grouped_means
from pytest_int8bench.accuracy.statistics.mean_tests import (
    MOST_SAMPLES,
    TIE,
    Floats,
    Means,
    image_collapse,
    pseudo_values,
    round_up,
    swaps,
)
from pytest_int8bench.accuracy.statistics.paired_exact import Flips

Outcome = Literal["PASS", "FAIL", "INCONCLUSIVE"]
Method = Literal["exact", "mean", "jackknife"]
#: Rows of all images, one each, to the metric.
Aggregate = Callable[[NDArray[Any]], float]

#: Level of each one-sided test: its bounds hold with 95 %.
ALPHA = 0.05


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the scores prove about a drop in a metric."""

    outcome: Outcome
    reference: float
    """The baseline's metric."""
    candidate: float
    drop: float
    """As seen, in the limit's terms: (reference - candidate) / reference for a relative limit,
    reference - candidate for an absolute one. Negative for a gain."""
    drop_low: float
    """One-sided bounds of the drop, each at the level of the verdict. Those of a relative drop are
    cut off at -1 and 1, where they say nothing any more, and infinite ones at the largest drop."""
    drop_high: float
    samples: int
    lost: int
    """Samples whose score got worse."""
    gained: int
    """Samples whose score got better."""
    needed: int | None
    """Samples that would decide, with ``INCONCLUSIVE``; at most ten million are asked for."""
    limit: Limit
    method: Method
    """``exact`` (0/1 scores), ``mean`` (continuous scores, and groups of any scores) or
    ``jackknife`` (aggregated)."""
    groups: int | None = None
    """Groups of samples that belong together; None if every sample stands for itself."""


class _Test(Protocol):
    """Two one-sided tests about one drop, in the limit's terms."""

    def at_least(self, drop: float) -> float:
        """p-value of H0: the true drop is ``drop`` or more."""

    def at_most(self, drop: float) -> float:
        """p-value of H0: the true drop is ``drop`` or less."""

    def error(self) -> float:
        """Standard error of the drop, never 0: where to look for its bounds."""

    def largest(self) -> float:
        """The largest drop or gain there can be, in terms of an absolute limit."""

    def needed(self, limit: float, drop: float) -> int:
        """Sampling units with which a lossless model passes and the drop seen is decided."""


def judge(
    reference: ArrayLike,
    candidate: ArrayLike,
    limit: Limit,
    *,
    alpha: float = ALPHA,
    aggregate: Aggregate | None = None,
    worst: float = 0.0,
    groups: Any = None,
    metric: str = "score",
) -> Verdict:
    """Judge a candidate by paired scores, higher being better.

    Args:
        reference: the baseline's scores, one per sample; with ``aggregate`` one row per image, of
            any shape (counts of true and false positives, say).
        candidate: the candidate's scores of the same samples, in the same order.
        limit: largest drop that passes.
        alpha: level of each one-sided test; divide it among several verdicts.
        aggregate: turns rows into the metric. It is called once per image left out and model, and
            once per image that differs.
        worst: the lowest score there can be. A sample that collapses falls to it. Not used with
            ``aggregate``, where a collapse is taken to cost up to twice the largest share that an
            image has in the metric. The highest is taken to be 1, or what was seen over it.
        groups: one label per sample; samples of one label belong together, such as the frames of a
            video. Groups are then taken to be independent, and not the samples in them.
        metric: the metric's name, for errors.

    Raises:
        ScoreError: one line, if the scores cannot be judged.
    """
    check_level(alpha)
    pairs = _pairs(reference, candidate, metric)
    codes = None if groups is None else group_codes(groups, len(pairs[0]), metric)
    test, method, metrics, moved = _found(pairs, limit, alpha, aggregate, worst, metric, codes)
    drop = (metrics[0] - metrics[1]) / (metrics[0] if limit.relative else 1.0)
    outcome = _outcome(test, limit, drop, alpha)
    low, high = _bounds(test, limit, drop, alpha, outcome)
    samples = len(pairs[0])
    needed = None
    if outcome == "INCONCLUSIVE":
        needed = _ask(test.needed(limit.value, drop), samples, codes)
    return Verdict(
        outcome=outcome,
        reference=metrics[0],
        candidate=metrics[1],
        drop=drop,
        drop_low=low,
        drop_high=high,
        samples=samples,
        lost=int((moved < 0).sum()),
        gained=int((moved > 0).sum()),
        needed=needed,
        limit=limit,
        method=method,
        groups=None if codes is None else int(codes.max()) + 1,
    )


def samples_to_pass(
    reference: ArrayLike,
    limit: Limit,
    *,
    alpha: float = ALPHA,
    aggregate: Aggregate | None = None,
    worst: float = 0.0,
    groups: Any = None,
    metric: str = "score",
) -> int | None:
    """Return with how many samples a candidate passes that changes nothing; None if the
    baseline's are enough. Arguments are those of :func:`judge`.

    Raises:
        ScoreError: one line, if the baseline's scores cannot be judged.
    """
    check_level(alpha)
    pairs = _pairs(reference, reference, metric)
    codes = None if groups is None else group_codes(groups, len(pairs[0]), metric)
    test = _found(pairs, limit, alpha, aggregate, worst, metric, codes)[0]
    if test.at_least(limit.value) <= alpha:
        return None
    return _ask(test.needed(limit.value, 0.0), len(pairs[0]), codes)


def _outcome(test: _Test, limit: Limit, drop: float, alpha: float) -> Outcome:
    # The drop seen can lie beyond the limit where the jackknife's estimate does not.
    if drop < limit.value and test.at_least(limit.value) <= alpha:
        return "PASS"
    if drop > limit.value and test.at_most(limit.value) <= alpha:
        return "FAIL"
    return "INCONCLUSIVE"


def _ask(needed: int, samples: int, codes: Codes | None) -> int:
    """Round up to two digits, to something over ``samples``; groups keep their mean size."""
    if codes is not None:
        needed = math.ceil(needed * samples / (int(codes.max()) + 1))
    return round_up(max(min(needed, MOST_SAMPLES), samples + 1))


# --- Scores ---


def _pairs(
    reference: ArrayLike, candidate: ArrayLike, metric: str
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Both models' scores as arrays of the same shape with finite numbers."""
    first, second = numbers(reference, metric, "baseline"), numbers(candidate, metric, "candidate")
    if first.shape != second.shape:
        raise ScoreError(
            f"{metric}: baseline and candidate must score the same samples, "
            f"got shapes {first.shape} and {second.shape}"
        )
    if first.ndim == 0 or len(first) < 2:
        raise ScoreError(f"{metric}: needs at least 2 samples, got {first.size}")
    return first, second


_Pairs = tuple[NDArray[Any], NDArray[Any]]
_Found = tuple[_Test, Method, tuple[float, float], Floats]


def _found(
    pairs: _Pairs,
    limit: Limit,
    alpha: float,
    aggregate: Aggregate | None,
    worst: float,
    metric: str,
    codes: Codes | None,
) -> _Found:
    """Choose the test. Groups of one sample each are no groups."""
    if codes is not None and int(codes.max()) + 1 == len(codes):
        codes = None
    if aggregate is None:
        return _plain(pairs, limit, alpha, worst, metric, codes)
    return _jackknifed(pairs, limit, alpha, aggregate, metric, codes)


def _plain(
    pairs: _Pairs,
    limit: Limit,
    alpha: float,
    worst: float,
    metric: str,
    codes: Codes | None = None,
) -> _Found:
    """Test, method, metrics and changes of one score per sample."""
    if pairs[0].ndim != 1:
        raise ScoreError(
            f"{metric}: needs one score per sample or an aggregate, got shape {pairs[0].shape}"
        )
    reference, candidate = (array.astype(np.float64) for array in pairs)
    worst = check_worst(worst, metric)
    check_size(metric, "scores and worst", reference, candidate, worst)
    for name, scores in (("baseline", reference), ("candidate", candidate)):
        if scores.min() < worst:
            raise ScoreError(
                f"{metric}: scores must be at least {worst:g}, the {name} has {scores.min():g}"
            )
    _check_varies(reference, candidate, metric)
    metrics = (float(reference.mean()), float(candidate.mean()))
    if limit.relative:
        check_share(metric, limit, metrics[0])
    moved = candidate - reference
    # Scores mostly end at 1, seen or not.
    highest = max(1.0, float(reference.max()), float(candidate.max()))
    if codes is not None:
        means = grouped_means(
            reference,
            candidate,
            codes,
            worst=worst,
            highest=highest,
            relative=limit.relative,
            alpha=alpha,
        )
        return means, "mean", metrics, moved
    if np.isin(reference, (0, 1)).all() and np.isin(candidate, (0, 1)).all():
        flips = Flips(
            lost=int((moved < 0).sum()),
            gained=int((moved > 0).sum()),
            right=int(reference.sum()),
            samples=len(reference),
            relative=limit.relative,
            alpha=alpha,
        )
        return flips, "exact", metrics, moved
    low, high = float(reference.min()), float(reference.max())
    means = Means(
        reference - candidate,
        reference if limit.relative else np.ones(len(reference)),
        collapse=(high - worst, high if limit.relative else 1.0),
        jump=(low - highest, low if limit.relative else 1.0),
        alpha=alpha,
    )
    return means, "mean", metrics, moved


def _check_varies(reference: Floats, candidate: Floats, metric: str) -> None:
    """A metric that is the same for every sample and model cannot fall, or was never computed."""
    low = min(reference.min(), candidate.min())
    high = max(reference.max(), candidate.max())
    if high - low <= TIE * max(abs(low), abs(high)):
        raise ScoreError(
            f"{metric}: every sample of both models scores {high:g}: "
            "a constant metric cannot show a drop"
        )


def _jackknifed(
    pairs: _Pairs,
    limit: Limit,
    alpha: float,
    aggregate: Aggregate,
    metric: str,
    codes: Codes | None = None,
) -> _Found:
    """Test, method, metrics and changes of rows that only together give a metric."""

    def value(rows: NDArray[Any]) -> float:
        try:
            found = float(aggregate(rows))
        except (TypeError, ValueError, ArithmeticError) as error:
            raise ScoreError(f"{metric}: aggregate must return one number: {error}") from error
        if not math.isfinite(found):
            raise ScoreError(
                f"{metric}: aggregate must return a finite number, got {found} of {len(rows)} rows"
            )
        return found

    metrics = (value(pairs[0]), value(pairs[1]))
    check_size(metric, "what aggregate returns", *metrics)
    if limit.relative:
        check_share(metric, limit, metrics[0])
    reference = pseudo_values(pairs[0], metrics[0], value, codes)
    candidate = reference
    if not np.array_equal(*pairs):
        candidate = pseudo_values(pairs[1], metrics[1], value, codes)
    check_size(metric, "what aggregate returns", reference, candidate)
    _check_varies(reference, candidate, metric)
    collapse = image_collapse(reference, candidate)
    jump = image_collapse(candidate, reference)[::-1]
    means = Means(
        reference - candidate,
        reference if limit.relative else np.ones(len(reference)),
        collapse=(collapse[0] - collapse[1], collapse[0] if limit.relative else 1.0),
        jump=(jump[0] - jump[1], jump[0] if limit.relative else 1.0),
        alpha=alpha,
        at_stake=2 * np.abs(reference),
    )
    return means, "jackknife", metrics, swaps(pairs, metrics[0], value)


# --- Bounds ---


def _bounds(
    test: _Test, limit: Limit, drop: float, alpha: float, outcome: Outcome
) -> tuple[float, float]:
    """The drops between which neither test rejects.

    They do not depend on the limit, but where rounding or a p-value that is not monotone puts one
    on the wrong side of it, it is moved to the limit: what is printed agrees with the outcome.
    """
    step = test.error()
    high = drop + _reach(lambda by: test.at_least(drop + by) <= alpha, step)
    low = drop - _reach(lambda by: test.at_most(drop - by) <= alpha, step)
    if limit.relative or math.isinf(high - low):
        largest = 1.0 if limit.relative else test.largest()
        low, high = max(low, min(drop, -largest)), min(high, max(drop, largest))
    if outcome == "PASS":
        return low, min(high, math.nextafter(limit.value, -1))
    if outcome == "FAIL":
        return max(low, math.nextafter(limit.value, 2)), high
    return min(low, limit.value), max(high, limit.value)


def _reach(rejects: Callable[[float], bool], step: float) -> float:
    """How far from the drop a test starts to reject; a little beyond rather than short of it.

    Infinite if it does not within a million steps. Both loops end for any step, NaN and infinity
    among them.
    """
    near, far = 1.6 * step, 1.8 * step  # 1.645 standard errors are expected
    if rejects(near):
        near, far = 0.0, near
    else:
        while not rejects(far):
            if not near < far < 1e6 * step:
                return math.inf
            near, far = far, far + 2 * (far - near)
    while far - near > step / 100 and near < (middle := (near + far) / 2) < far:
        if rejects(middle):
            far = middle
        else:
            near = middle
    return far

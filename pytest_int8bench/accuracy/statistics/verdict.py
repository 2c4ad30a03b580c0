"""Judge from paired scores whether a candidate's metric dropped by more than a limit.

Both models score the same samples, and two one-sided tests at level ``alpha`` decide: ``PASS`` if
they rule out a drop of at least the limit, ``FAIL`` if they rule out a drop of at most the limit,
and ``INCONCLUSIVE`` otherwise. Too few samples never pass.

0/1 scores without groups are judged by an exact test (:class:`.paired_exact.PairedExactTest`), all
others by a corrected t test (:class:`.mean_tests.MeanTest`).
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
from pytest_int8bench.accuracy.statistics.groups import Codes, group_codes, grouped_mean_test
from pytest_int8bench.accuracy.statistics.mean_tests import (
    MOST_SAMPLES,
    TIE,
    Floats,
    MeanTest,
    image_collapse,
    pseudo_values,
    round_up,
    swap_effects,
)
from pytest_int8bench.accuracy.statistics.paired_exact import PairedExactTest

Outcome = Literal["PASS", "FAIL", "INCONCLUSIVE"]
Method = Literal["exact", "mean", "jackknife"]
#: Computes the metric from one row per image.
Aggregate = Callable[[NDArray[Any]], float]

#: Significance level of each one-sided test: its bounds hold with 95 % confidence.
ALPHA = 0.05


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Outcome of a non-inferiority test, with the drop and its bounds."""

    outcome: Outcome
    reference: float
    """The baseline's metric."""
    candidate: float
    drop: float
    """Observed drop: (reference - candidate) / reference for a relative limit, reference -
    candidate for an absolute one. Negative for a gain."""
    drop_low: float
    """One-sided lower bound of the drop at the verdict's level. Bounds of a relative drop are
    clipped to -1 and 1, infinite bounds to the largest possible change."""
    drop_high: float
    """One-sided upper bound of the drop, like ``drop_low``."""
    samples: int
    lost: int
    """Samples whose score got worse."""
    gained: int
    """Samples whose score got better."""
    needed: int | None
    """Estimated samples needed for a decision if ``INCONCLUSIVE``, at most ten million."""
    limit: Limit
    method: Method
    """``exact`` (0/1 scores), ``mean`` (continuous scores, and groups of any scores) or
    ``jackknife`` (aggregated)."""
    groups: int | None = None
    """Number of groups; None if the samples are independent."""


class _Test(Protocol):
    """Two one-sided tests of a drop, which is relative if the limit is."""

    def p_at_least(self, drop: float) -> float:
        """Return the p-value of H0: the true drop is at least ``drop``."""

    def p_at_most(self, drop: float) -> float:
        """Return the p-value of H0: the true drop is at most ``drop``."""

    def standard_error(self) -> float:
        """Return a standard error of the drop above 0, the scale on which to search its bounds."""

    def largest_change(self) -> float:
        """Return the largest possible absolute drop or gain."""

    def needed(self, limit: float, drop: float) -> int:
        """Return the sampling units that let a lossless model pass and decide the observed drop."""


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
    """Judge a candidate by paired scores; higher scores are better.

    Args:
        reference: the baseline's scores, one per sample; with ``aggregate``, one row per image, of
            any shape (for example, counts of true and false positives).
        candidate: the candidate's scores of the same samples, in the same order.
        limit: the largest drop that passes.
        alpha: significance level of each one-sided test; divide it among several verdicts.
        aggregate: computes the metric from rows. It is called once per model and image (or group)
            left out, and once per image that differs.
        worst: the lowest possible score, to which a collapsed sample falls. The highest is assumed
            to be 1, or the highest observed score if that is larger. Ignored with ``aggregate``,
            where a collapse is assumed to cost up to twice the largest share of an image in the
            metric.
        groups: one label per sample. Samples with the same label belong together, such as the
            frames of a video; only different groups are assumed to be independent.
        metric: the metric's name, for errors.

    Raises:
        ScoreError: if the scores cannot be judged.
    """
    check_level(alpha)
    pairs = _pairs(reference, candidate, metric)
    codes = None if groups is None else group_codes(groups, len(pairs[0]), metric)
    test, method, metrics, changes = _choose(pairs, limit, alpha, aggregate, worst, metric, codes)
    drop = (metrics[0] - metrics[1]) / (metrics[0] if limit.relative else 1.0)
    outcome = _outcome(test, limit, drop, alpha)
    low, high = _bounds(test, limit, drop, alpha, outcome)
    samples = len(pairs[0])
    needed = None
    if outcome == "INCONCLUSIVE":
        needed = _samples_to_ask_for(test.needed(limit.value, drop), samples, codes)
    return Verdict(
        outcome=outcome,
        reference=metrics[0],
        candidate=metrics[1],
        drop=drop,
        drop_low=low,
        drop_high=high,
        samples=samples,
        lost=int((changes < 0).sum()),
        gained=int((changes > 0).sum()),
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
    """Return the samples needed for an unchanged candidate to pass, or None if there are enough.

    It takes the same arguments as :func:`judge`.

    Raises:
        ScoreError: if the baseline's scores cannot be judged.
    """
    check_level(alpha)
    pairs = _pairs(reference, reference, metric)
    codes = None if groups is None else group_codes(groups, len(pairs[0]), metric)
    test = _choose(pairs, limit, alpha, aggregate, worst, metric, codes)[0]
    if test.p_at_least(limit.value) <= alpha:
        return None
    return _samples_to_ask_for(test.needed(limit.value, 0.0), len(pairs[0]), codes)


def _outcome(test: _Test, limit: Limit, drop: float, alpha: float) -> Outcome:
    # The observed drop and the jackknife's estimate can lie on different sides of the limit.
    if drop < limit.value and test.p_at_least(limit.value) <= alpha:
        return "PASS"
    if drop > limit.value and test.p_at_most(limit.value) <= alpha:
        return "FAIL"
    return "INCONCLUSIVE"


def _samples_to_ask_for(needed: int, samples: int, codes: Codes | None) -> int:
    """Convert sampling units to samples, above the present number, rounded up to two digits."""
    if codes is not None:  # groups keep their mean size
        needed = math.ceil(needed * samples / (int(codes.max()) + 1))
    return round_up(max(min(needed, MOST_SAMPLES), samples + 1))


# --- Scores ---


_Pairs = tuple[NDArray[Any], NDArray[Any]]
#: Test, method, metrics of both models, and change of each sample.
_Chosen = tuple[_Test, Method, tuple[float, float], Floats]


def _pairs(reference: ArrayLike, candidate: ArrayLike, metric: str) -> _Pairs:
    first, second = numbers(reference, metric, "baseline"), numbers(candidate, metric, "candidate")
    if first.shape != second.shape:
        raise ScoreError(
            f"{metric}: baseline and candidate must score the same samples, "
            f"got shapes {first.shape} and {second.shape}"
        )
    if first.ndim == 0 or len(first) < 2:
        raise ScoreError(f"{metric}: needs at least 2 samples, got {first.size}")
    return first, second


def _choose(
    pairs: _Pairs,
    limit: Limit,
    alpha: float,
    aggregate: Aggregate | None,
    worst: float,
    metric: str,
    codes: Codes | None,
) -> _Chosen:
    if codes is not None and int(codes.max()) + 1 == len(codes):  # one sample per group
        codes = None
    if aggregate is None:
        return _score_test(pairs, limit, alpha, worst, metric, codes)
    return _jackknife_test(pairs, limit, alpha, aggregate, metric, codes)


def _score_test(
    pairs: _Pairs,
    limit: Limit,
    alpha: float,
    worst: float,
    metric: str,
    codes: Codes | None = None,
) -> _Chosen:
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
                f"{metric}: scores must be at least {worst:g} (worst), "
                f"got {scores.min():g} for the {name}"
            )
    _check_varies(reference, candidate, metric)
    metrics = (float(reference.mean()), float(candidate.mean()))
    if limit.relative:
        check_share(metric, limit, metrics[0])
    changes = candidate - reference
    # Most metrics have a maximum of 1, whether it was observed or not.
    highest = max(1.0, float(reference.max()), float(candidate.max()))
    if codes is not None:
        means = grouped_mean_test(
            reference,
            candidate,
            codes,
            worst=worst,
            highest=highest,
            relative=limit.relative,
            alpha=alpha,
        )
        return means, "mean", metrics, changes
    if np.isin(reference, (0, 1)).all() and np.isin(candidate, (0, 1)).all():
        exact = PairedExactTest(
            lost=int((changes < 0).sum()),
            gained=int((changes > 0).sum()),
            right=int(reference.sum()),
            samples=len(reference),
            relative=limit.relative,
            alpha=alpha,
        )
        return exact, "exact", metrics, changes
    low, high = float(reference.min()), float(reference.max())
    means = MeanTest(
        reference - candidate,
        reference if limit.relative else np.ones(len(reference)),
        collapse=(high - worst, high if limit.relative else 1.0),
        jump=(low - highest, low if limit.relative else 1.0),
        alpha=alpha,
    )
    return means, "mean", metrics, changes


def _check_varies(reference: Floats, candidate: Floats, metric: str) -> None:
    low = min(reference.min(), candidate.min())
    high = max(reference.max(), candidate.max())
    if high - low <= TIE * max(abs(low), abs(high)):
        raise ScoreError(
            f"{metric}: every sample of both models scores {high:g}: "
            "a constant metric cannot show a drop"
        )


def _jackknife_test(
    pairs: _Pairs,
    limit: Limit,
    alpha: float,
    aggregate: Aggregate,
    metric: str,
    codes: Codes | None = None,
) -> _Chosen:
    """Test the pseudo-values of a metric that ``aggregate`` computes from rows."""

    def value(rows: NDArray[Any]) -> float:
        try:
            found = float(aggregate(rows))
        except (TypeError, ValueError, ArithmeticError) as error:
            raise ScoreError(f"{metric}: aggregate must return one number: {error}") from error
        if not math.isfinite(found):
            raise ScoreError(
                f"{metric}: aggregate must return a finite number, got {found} for {len(rows)} rows"
            )
        return found

    metrics = (value(pairs[0]), value(pairs[1]))
    check_size(metric, "values of aggregate", *metrics)
    if limit.relative:
        check_share(metric, limit, metrics[0])
    reference = pseudo_values(pairs[0], metrics[0], value, codes)
    candidate = reference
    if not np.array_equal(*pairs):
        candidate = pseudo_values(pairs[1], metrics[1], value, codes)
    check_size(metric, "values of aggregate", reference, candidate)
    _check_varies(reference, candidate, metric)
    collapse = image_collapse(reference, candidate)
    jump = image_collapse(candidate, reference)[::-1]
    means = MeanTest(
        reference - candidate,
        reference if limit.relative else np.ones(len(reference)),
        collapse=(collapse[0] - collapse[1], collapse[0] if limit.relative else 1.0),
        jump=(jump[0] - jump[1], jump[0] if limit.relative else 1.0),
        alpha=alpha,
        possible_losses=2 * np.abs(reference),
    )
    return means, "jackknife", metrics, swap_effects(pairs, metrics[0], value)


# --- Bounds ---


def _bounds(
    test: _Test, limit: Limit, drop: float, alpha: float, outcome: Outcome
) -> tuple[float, float]:
    """Return the drops between which neither test rejects.

    They do not depend on the limit. But if rounding or a non-monotone p-value puts a bound on the
    wrong side of the limit, the bound is moved to the limit, so that it agrees with the outcome.
    """
    step = test.standard_error()
    high = drop + _rejection_distance(lambda by: test.p_at_least(drop + by) <= alpha, step)
    low = drop - _rejection_distance(lambda by: test.p_at_most(drop - by) <= alpha, step)
    if limit.relative or math.isinf(high - low):
        largest = 1.0 if limit.relative else test.largest_change()
        low, high = max(low, min(drop, -largest)), min(high, max(drop, largest))
    if outcome == "PASS":
        return low, min(high, math.nextafter(limit.value, -1))
    if outcome == "FAIL":
        return max(low, math.nextafter(limit.value, 2)), high
    return min(low, limit.value), max(high, limit.value)


def _rejection_distance(rejects: Callable[[float], bool], step: float) -> float:
    """Return the distance from the drop at which a test starts to reject, rounded outwards.

    Return infinity if it does not reject within a million steps. Both loops terminate for any
    step, including NaN and infinity.
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

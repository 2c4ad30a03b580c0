"""Refuse what no statistic can be computed from: one line each, before anything is computed."""

from __future__ import annotations

import math
from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pytest_int8bench.errors import ClearError

Numbers = NDArray[Any]

#: Squares of these, summed over all samples there can be, neither overflow nor vanish.
LARGEST, SMALLEST = 1e100, 1e-100
#: The exact test rounds its p-values up by more than a level below this.
LEAST_ALPHA = 1e-5


class ScoreError(ClearError, ValueError):
    """Scores that cannot be judged."""


def numbers(given: Any, metric: str, owner: str) -> Numbers:
    """Return scores as an array of finite real numbers, of any shape.

    numpy would take more: it reads text as numbers, drops the imaginary part, and shows what a
    mask hides.

    Raises:
        ScoreError: one line, if they are anything else.
    """
    try:
        array = np.ma.asanyarray(given) if np.ma.isMaskedArray(given) else np.asarray(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ScoreError(
            f"{metric}: the {owner}'s scores are not an array: {_line(error)}"
        ) from error
    if np.ma.isMaskedArray(array):
        if hidden := int(np.ma.getmaskarray(array).sum()):
            raise ScoreError(f"{metric}: scores must not be masked, the {owner} has {hidden}")
        array = array.data
    if array.dtype.kind == "O" and array.size:
        array = _of_objects(array, metric, owner)
    if array.dtype.kind not in "buif":
        raise ScoreError(f"{metric}: scores must be numbers, the {owner} has {array.dtype}")
    if array.dtype.itemsize > 8:  # long double
        with np.errstate(over="ignore"):
            array = array.astype(np.float64)
    if bad := array.size - int(np.isfinite(array).sum()):
        raise ScoreError(f"{metric}: scores must be finite, the {owner} has {bad} that are not")
    return array


def _of_objects(array: Numbers, metric: str, owner: str) -> Numbers:
    """Return numbers of Python, such as integers of any size and fractions, as floats."""

    def number(item: Any) -> float:
        if not isinstance(item, Real | Decimal | np.bool_):
            raise ScoreError(
                f"{metric}: scores must be numbers, the {owner} has {type(item).__name__}"
            )
        try:
            return float(item)
        except (OverflowError, ValueError):  # an integer over 1e308, a signaling NaN
            return math.nan

    return np.array([number(item) for item in array.ravel()]).reshape(array.shape)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def check_level(alpha: float) -> None:
    """Refuse levels at which the tests decide nothing, or everything."""
    if not LEAST_ALPHA <= alpha < 0.5:  # NaN too
        raise ScoreError(f"alpha must be at least {LEAST_ALPHA:g} and under 0.5, got {alpha}")


def check_worst(worst: Any, metric: str) -> float:
    """Return the lowest score there can be.

    Raises:
        ScoreError: one line, if it is not a finite number.
    """
    if not isinstance(worst, Real | np.bool_) or not math.isfinite(worst):
        raise ScoreError(
            f"{metric}: worst must be a finite number, got {worst!r:.40}; if scores have no lowest "
            "one, as log likelihoods, clip them at one that is bad enough and give that"
        )
    return float(worst)


def check_size(metric: str, what: str, *values: Any) -> None:
    """Refuse numbers whose squares overflow."""
    largest = max(float(np.abs(value).max()) for value in values)
    if not largest <= LARGEST:  # NaN too
        raise ScoreError(f"{metric}: {what} must be at most {LARGEST:g} in size, got {largest:g}")


def check_share(metric: str, limit: object, reference: float) -> None:
    """Refuse a metric that no share of can be lost.

    Args:
        metric: its name.
        limit: the relative limit.
        reference: the baseline's metric.
    """
    if not reference > 0:
        raise ScoreError(
            f"{metric}: a relative limit ({limit}) needs a baseline metric over 0, "
            f"got {reference:g}"
        )
    if reference < SMALLEST:  # a share of it vanishes in rounding
        raise ScoreError(
            f"{metric}: a relative limit ({limit}) needs a baseline metric of at least "
            f"{SMALLEST:g}, got {reference:g}"
        )

"""Validate the arguments of the statistics before anything is computed."""

from __future__ import annotations

import math
from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pytest_int8bench.errors import ClearError
from pytest_int8bench.words import plural

Numbers = NDArray[Any]

#: Sums of squares of numbers in this range neither overflow nor underflow.
LARGEST, SMALLEST = 1e100, 1e-100
#: Below this, the level is smaller than the amount by which the exact test rounds up its p-values.
LEAST_ALPHA = 1e-5


class ScoreError(ClearError, ValueError):
    """Raised for scores that cannot be judged."""


def numbers(given: Any, metric: str, owner: str) -> Numbers:
    """Convert scores to an array of finite real numbers, of any shape.

    numpy alone is too permissive: it parses text, drops imaginary parts, and ignores masks.

    Raises:
        ScoreError: for anything else.
    """
    try:
        array = np.ma.asanyarray(given) if np.ma.isMaskedArray(given) else np.asarray(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ScoreError(
            f"{metric}: the {owner}'s scores cannot be converted to an array: {_line(error)}"
        ) from error
    if np.ma.isMaskedArray(array):
        if hidden := int(np.ma.getmaskarray(array).sum()):
            raise ScoreError(
                f"{metric}: scores must not be masked, got {plural(hidden, 'masked score')} for "
                f"the {owner}"
            )
        array = array.data
    if array.dtype.kind == "O" and array.size:
        array = _of_objects(array, metric, owner)
    if array.dtype.kind not in "buif":
        raise ScoreError(f"{metric}: scores must be numbers, got {array.dtype} for the {owner}")
    if array.dtype.itemsize > 8:  # long double
        with np.errstate(over="ignore"):
            array = array.astype(np.float64)
    if bad := array.size - int(np.isfinite(array).sum()):
        raise ScoreError(
            f"{metric}: scores must be finite, got {plural(bad, 'non-finite score')} for "
            f"the {owner}"
        )
    return array


def _of_objects(array: Numbers, metric: str, owner: str) -> Numbers:
    """Convert Python numbers, such as large integers and fractions, to floats."""

    def number(item: Any) -> float:
        if not isinstance(item, Real | Decimal | np.bool_):
            raise ScoreError(
                f"{metric}: scores must be numbers, got {type(item).__name__} for the {owner}"
            )
        try:
            return float(item)
        except (OverflowError, ValueError):  # an integer over 1e308, a signaling NaN
            return math.nan

    return np.array([number(item) for item in array.ravel()]).reshape(array.shape)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def check_level(alpha: float) -> None:
    """Refuse significance levels at which the tests decide nothing or everything."""
    if not LEAST_ALPHA <= alpha < 0.5:  # NaN too
        raise ScoreError(f"alpha must be at least {LEAST_ALPHA:g} and under 0.5, got {alpha}")


def check_worst(worst: Any, metric: str) -> float:
    """Return the lowest possible score as a float.

    Raises:
        ScoreError: if it is not a finite number.
    """
    if not isinstance(worst, Real | np.bool_) or not math.isfinite(worst):
        raise ScoreError(
            f"{metric}: worst must be a finite number, got {worst!r:.40}; clip scores without a "
            "minimum, such as log-likelihoods, at a low value and set worst to that value"
        )
    return float(worst)


def check_size(metric: str, what: str, *values: Any) -> None:
    """Refuse numbers whose squares overflow."""
    largest = max(float(np.abs(value).max()) for value in values)
    if not largest <= LARGEST:  # NaN too
        raise ScoreError(
            f"{metric}: {what} must be at most {LARGEST:g} in magnitude, got {largest:g}"
        )


def check_share(metric: str, limit: object, reference: float) -> None:
    """Refuse a baseline metric to which a relative limit cannot apply.

    Args:
        metric: the metric's name.
        limit: the relative limit.
        reference: the baseline's metric.
    """
    if not reference > 0:
        raise ScoreError(
            f"{metric}: a relative limit ({limit}) needs a baseline metric over 0, "
            f"got {reference:g}"
        )
    if reference < SMALLEST:  # a share of it would underflow
        raise ScoreError(
            f"{metric}: a relative limit ({limit}) needs a baseline metric of at least "
            f"{SMALLEST:g}, got {reference:g}"
        )

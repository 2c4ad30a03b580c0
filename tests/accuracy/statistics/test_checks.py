"""Reject scores and options that no statistic can be computed from, each in one line."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_int8bench.accuracy.limit import Limit
from pytest_int8bench.accuracy.statistics.checks import ScoreError, numbers
from pytest_int8bench.accuracy.statistics.verdict import _rejection_distance, judge, samples_to_pass

ONE_PERCENT = Limit.parse("1%")
LIMITS = [ONE_PERCENT, Limit.parse("1pp")]
RNG = np.random.default_rng(20)
SCORES = RNG.uniform(0.3, 0.9, 50)
LOWER = np.clip(SCORES - RNG.normal(0, 0.02, 50), 0, 1)
NO_LOWEST = (
    "iou: worst must be a finite number, got {}; clip scores without a minimum, such "
    "as log-likelihoods, at a low value and set worst to that value"
)


def refused(*scores: Any, limit: Limit = ONE_PERCENT, **options: Any) -> str:
    with pytest.raises(ScoreError) as caught:
        judge(*scores, limit, metric="iou", **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("limit", LIMITS, ids=str)
@pytest.mark.parametrize("worst", [-math.inf, math.inf, math.nan, np.float32("-inf"), "low", None])
def test_worst_must_be_a_finite_number(worst: Any, limit: Limit) -> None:
    assert refused(SCORES, LOWER, limit=limit, worst=worst) == NO_LOWEST.format(repr(worst))
    with pytest.raises(ScoreError):
        samples_to_pass(SCORES, limit, worst=worst)


@pytest.mark.parametrize("limit", LIMITS, ids=str)
@pytest.mark.parametrize("scale", [1e101, 1e154, 1e155, 1e300, 1.7e308])
def test_rejects_huge_scores(scale: float, limit: Limit) -> None:
    expected = "iou: scores and worst must be at most 1e+100 in magnitude, got "
    assert refused(SCORES * scale, LOWER * scale, limit=limit).startswith(expected)
    assert refused(SCORES, LOWER, limit=limit, worst=-scale).startswith(expected)
    one = np.where(np.arange(50) == 3, -scale, SCORES)
    assert refused(SCORES, one, limit=limit, worst=-1).startswith("iou: scores ")


@pytest.mark.parametrize("scale", [1e-101, 1e-160, 1e-310, 5e-324])
def test_rejects_relative_limit_of_tiny_metric(scale: float) -> None:
    expected = "iou: a relative limit (1%) needs a baseline metric of at least 1e-100, got "
    assert refused(SCORES * scale, LOWER * scale).startswith(expected)
    assert refused(SCORES, LOWER, aggregate=lambda r: r.mean() * scale).startswith(expected)


def test_rejects_huge_aggregates() -> None:
    expected = "iou: values of aggregate must be at most 1e+100 in magnitude, got "
    assert refused(SCORES, LOWER, aggregate=lambda r: r.mean() * 1e154).startswith(expected)
    # Each image contributes more than the whole metric.
    assert refused(SCORES, LOWER, aggregate=lambda r: r[0] * 1e100).startswith(expected)


@pytest.mark.parametrize("error", [ZeroDivisionError("division by zero"), OverflowError("big")])
def test_rejects_failing_aggregate(error: Exception) -> None:
    def aggregate(rows: Any) -> float:
        if len(rows) < 50:
            raise error
        return 0.5

    found = refused(SCORES, LOWER, aggregate=aggregate)
    assert found == f"iou: aggregate must return one number: {error}"


@pytest.mark.parametrize("alpha", [0, -1, 1e-320, 1e-6, 0.5, 1, math.inf, math.nan])
def test_rejects_useless_alpha(alpha: float) -> None:
    message = f"alpha must be at least 1e-05 and under 0.5, got {alpha}"
    assert refused(SCORES, LOWER, alpha=alpha) == message
    assert refused(SCORES > 0.5, LOWER > 0.5, alpha=alpha) == message


@pytest.mark.parametrize("value", [0, -1, 1.5, math.nan, math.inf, 1e-300, 5e-324, "1%", None])
def test_limits_must_be_fractions(value: Any) -> None:
    message = f"a limit must be at least 1e-09 and at most 1, got {value}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Limit(value, relative=True)


def test_rejects_limit_that_underflows() -> None:
    text = f"0.{'0' * 310}1%"
    with pytest.raises(ValueError, match=r"^must be at least 1e-07, got '0\.000"):
        Limit.parse(text)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.array([1 + 2j, 3]), "scores must be numbers, got complex128 for the baseline"),
        ([1 + 2j, 3], "scores must be numbers, got complex128 for the baseline"),
        (np.array([1 + 2j, 3], dtype=object), "scores must be numbers, got complex"),
        (["0.5", "0.7"], "scores must be numbers, got <U3 for the baseline"),
        (np.array(["0.5", 1], dtype=object), "scores must be numbers, got str"),
        ([None, 0.5], "scores must be numbers, got NoneType for the baseline"),
        (np.array(["2026-01-01"] * 2, dtype="M8[D]"), "scores must be numbers, got d"),
        ([10**400, 1], "scores must be finite, got 1 non-finite score for the baseline"),
        ([Decimal("sNaN"), 1], "scores must be finite, got 1 non-finite score for the baseline"),
        (
            np.array([1, 2], dtype=np.longdouble) * np.longdouble("1e4000"),
            "scores must be finite, got 2 non-finite scores for the baseline",
        ),
        (
            np.ma.masked_array([0.5, 0.7, 0.6], mask=[0, 1, 0]),
            "scores must not be masked, got 1 masked score for the baseline",
        ),
        (
            [[0.5], [0.5, 0.7]],
            "the baseline's scores cannot be converted to an array: setting an array element",
        ),
    ],
)
def test_rejects_scores_that_are_not_real_numbers(given: Any, message: str) -> None:
    with pytest.raises(ScoreError) as caught:
        numbers(given, "iou", "baseline")
    assert str(caught.value).startswith(f"iou: {message}")


@pytest.mark.parametrize(
    "given",
    [
        [Decimal("0.5"), Fraction(3, 4), 1, True, np.bool_(False)],
        np.array([0.5, 0.75, 1, 1, 0], dtype=object),
        np.array([0.5, 0.75, 1, 1, 0], dtype=np.float16),
        np.array([0.5, 0.75, 1, 1, 0], dtype=np.longdouble),
        np.ma.masked_array([0.5, 0.75, 1, 1, 0]),
    ],
)
def test_accepts_scores_of_any_real_type(given: Any) -> None:
    found = numbers(given, "iou", "baseline")
    assert type(found) is np.ndarray
    assert found.tolist() == [0.5, 0.75, 1, 1, 0]


WEIRD = st.one_of(
    st.floats(0, 1),
    st.floats(),
    st.sampled_from([0.0, 1.0, -0.0, 5e-324, 1e-160, 1e99, 1e100, 1e154, 1.7e308, -1e99]),
)


@pytest.mark.filterwarnings("error")
@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(WEIRD, WEIRD), min_size=2, max_size=12),
    st.one_of(st.just(0.0), st.floats(), st.sampled_from([-1e99, -1.0])),
    st.sampled_from([*LIMITS, Limit(1e-9, relative=True), Limit(1.0, relative=False)]),
    st.sampled_from(["plain", "groups", "aggregate"]),
    st.sampled_from([1e-5, 0.05, 0.499]),
)
def test_a_verdict_is_finite_or_refused(
    pairs: list[tuple[float, float]], worst: float, limit: Limit, kind: str, alpha: float
) -> None:
    reference, candidate = (list(values) for values in zip(*pairs, strict=True))
    options: dict[str, Any] = {"alpha": alpha}
    if kind == "groups":
        options |= {"groups": [index // 2 for index in range(len(pairs))], "worst": worst}
    elif kind == "aggregate":
        options["aggregate"] = lambda rows: float(rows.sum() / len(rows))
    else:
        options["worst"] = worst
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # raised in the user's aggregate
            found = judge(reference, candidate, limit, **options)
    except ScoreError:
        return
    assert all(map(math.isfinite, (found.drop, found.drop_low, found.drop_high)))
    assert found.drop_low <= found.drop <= found.drop_high


@pytest.mark.parametrize("step", [0.0, 5e-324, 1e-9, 1.0, 1e300, math.inf, math.nan])
@pytest.mark.parametrize("at", [0.0, 1.7, 1e5, math.inf, math.nan])
def test_bound_search_terminates(step: float, at: float) -> None:
    """For any step, and a test that rejects late or never."""
    assert not _rejection_distance(lambda by: by >= at, step) < 0

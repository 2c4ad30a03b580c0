"""Samples that belong together: the group is the sampling unit."""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pytest_int8bench.accuracy.limit import Limit
from pytest_int8bench.accuracy.statistics.checks import ScoreError
from pytest_int8bench.accuracy.statistics.groups import group_codes
from pytest_int8bench.accuracy.statistics.verdict import ALPHA, Verdict, judge

ONE_PERCENT = Limit.parse("1%")
ONE_POINT = Limit.parse("1pp")
FAMILIES = 500
RNG_SEED = 20


@pytest.fixture(scope="module")
def simulated() -> Iterator[Any]:
    """Return the script that simulates the error rates in docs/accuracy.md."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[3] / "benchmarks")
        yield importlib.import_module("simulate_groups")


@pytest.mark.parametrize("size", ["equal", "uneven", "heavy"])
@pytest.mark.parametrize("change", ["whole", "half", "large", "flips", "shifts"])
def test_error_rates_with_groups(simulated: Any, change: str, size: str) -> None:
    """The true drop equals the limit, for every kind of change within groups."""
    allowed = ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / FAMILIES)
    size_of, change_of = getattr(simulated, size), getattr(simulated, change)
    passed, failed = simulated.rates(size_of, change_of, 300, 0.05, FAMILIES)
    assert passed <= allowed
    assert failed <= allowed


def test_ignoring_groups_inflates_passes(simulated: Any) -> None:
    found = simulated.as_if_independent(simulated.equal, simulated.whole, 100, 0.01, 60)
    assert found > 0.2


@pytest.mark.parametrize("size", ["equal", "uneven"])
def test_lossless_model_passes_with_needed_samples(simulated: Any, size: str) -> None:
    rng = np.random.default_rng(RNG_SEED)
    size_of = getattr(simulated, size)

    def draw(groups: int) -> Verdict:
        codes = np.repeat(np.arange(groups), size_of(rng, groups))
        scores = simulated.right(rng, codes, groups)
        return judge(scores, scores, Limit.parse("5%"), groups=codes)

    pilot = draw(30)
    assert pilot.outcome == "INCONCLUSIVE"
    assert pilot.needed is not None
    assert pilot.groups == 30
    groups = math.ceil(pilot.needed * pilot.groups / pilot.samples)
    assert sum(draw(groups).outcome == "PASS" for _ in range(20)) >= 14


# --- Laws ---


def scores(count: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(RNG_SEED)
    reference = rng.uniform(0.4, 0.9, count)
    return reference, reference - rng.normal(0.002, 0.02, count)


def close(a: Verdict, b: Verdict) -> bool:
    return a.outcome == b.outcome and (a.drop, a.drop_low, a.drop_high) == pytest.approx(
        (b.drop, b.drop_low, b.drop_high), abs=1e-5
    )


@pytest.mark.parametrize("limit", [ONE_PERCENT, ONE_POINT], ids=str)
@pytest.mark.parametrize("aggregate", [None, lambda rows: float(np.mean(rows) ** 2)])
def test_copies_in_a_group_add_no_evidence(limit: Limit, aggregate: Any) -> None:
    reference, candidate = scores(200)
    plain = judge(reference, candidate, limit, aggregate=aggregate)
    copied = judge(
        np.repeat(reference, 10),
        np.repeat(candidate, 10),
        limit,
        aggregate=aggregate,
        groups=np.repeat(np.arange(200), 10),
    )
    assert close(copied, plain)
    assert (copied.samples, copied.groups) == (2000, 200)
    assert copied.method == plain.method


def test_copies_of_0_1_scores_add_no_evidence() -> None:
    """400 unchanged groups pass 1 pp; 40 groups of ten samples have as many samples."""
    right = np.repeat([1.0, 1.0, 1.0, 0.0], 100)
    assert judge(right, right, ONE_POINT).outcome == "PASS"
    grouped = judge(right, right, ONE_POINT, groups=np.arange(400) // 10)
    assert (grouped.outcome, grouped.method) == ("INCONCLUSIVE", "mean")
    assert grouped.needed is not None
    assert grouped.needed > 3000


def test_groups_of_one_sample_equal_no_groups() -> None:
    right = np.repeat([1.0, 1.0, 0.0], 150)
    candidate = right.copy()
    candidate[0] = 0
    found = judge(right, candidate, ONE_POINT, groups=[f"image {i}" for i in range(450)])
    assert found.groups == 450
    assert dataclasses.replace(found, groups=None) == judge(right, candidate, ONE_POINT)


def test_names_and_order_of_groups_do_not_matter() -> None:
    reference, candidate = scores(300)
    labels = np.arange(300) % 60
    found = judge(reference, candidate, ONE_PERCENT, groups=labels)
    order = np.random.default_rng(1).permutation(300)
    for given in (
        torch.from_numpy(labels[order]),
        [f"video {label}" for label in labels[order]],
        [("site", int(label)) for label in labels[order]],
        tuple(float(label) for label in labels[order]),
    ):
        assert close(judge(reference[order], candidate[order], ONE_PERCENT, groups=given), found)


@pytest.mark.parametrize("limit", [ONE_PERCENT, ONE_POINT], ids=str)
@pytest.mark.parametrize("sizes", [(49, 1), (47, 2, 1), (25, 25), (1, 1, 48)])
def test_bounds_are_finite_with_few_groups(limit: Limit, sizes: tuple[int, ...]) -> None:
    reference, candidate = scores(50)
    codes = np.repeat(np.arange(len(sizes)), sizes)
    found = judge(reference, candidate, limit, groups=codes)
    assert found.outcome == "INCONCLUSIVE"
    assert found.drop_low <= found.drop <= found.drop_high
    assert math.isfinite(found.drop_high - found.drop_low)


# --- Errors ---


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1, 1, 2], "iou: groups must be one label per sample, got 3 labels for 4 samples"),
        ([], "iou: groups must be one label per sample, got 0 labels for 4 samples"),
        ("abcd", "iou: groups must be a list of one label per sample, got 'abcd'"),
        ({1, 2, 3, 4}, "iou: groups must be a list of one label per sample, got {1, 2, 3, 4}"),
        ({0: 1}, "iou: groups must be a list of one label per sample, got {0: 1}"),
        (4, "iou: groups must be a list of one label per sample, got 4"),
        (np.array(4), "iou: groups must be a list of one label per sample, got 4"),
        (iter([1, 1, 2, 2]), "iou: groups must be a list of one label per sample, got <list_iter"),
        ([1, 1, None, 2], "iou: every sample must have a group label, got None for sample 2"),
        ([1.0, math.nan, 2, 2], "iou: every sample must have a group label, got nan for sample 1"),
        (np.ones((4, 2)), "iou: group labels must be names or numbers, got [1.0, 1.0]"),
        (
            ["a"] * 4,
            "iou: needs at least 2 groups, got 1; groups, not the samples in them, count as ",
        ),
    ],
)
def test_rejects_bad_groups(given: Any, message: str) -> None:
    with pytest.raises(ScoreError, match=f"^{re.escape(message)}"):
        judge([0.5, 0.6, 0.7, 0.8], [0.5, 0.6, 0.7, 0.7], ONE_PERCENT, metric="iou", groups=given)


def test_codes_follow_order_of_appearance() -> None:
    assert group_codes(["b", "a", "b", "c"], 4, "iou").tolist() == [0, 1, 0, 2]

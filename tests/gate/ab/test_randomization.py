"""Test the randomization test against all orders, and its error rate by simulation."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pytest_int8bench.gate.ab.randomization import (
    PLACES,
    bounds,
    center,
    p_faster,
    p_slower,
    p_slower_of_family,
)
from toys.gate_noise import MACHINES, Noise, bimodal, outliers, periodic

Array = np.ndarray[Any, Any]

seeds = st.integers(0, 10_000)


def drawn(rng: np.random.Generator, *shape: int) -> Array:
    """Draw orders of blocks, of shape (..., blocks, 4)."""
    places = np.array([[place in chosen for place in range(4)] for chosen in PLACES])
    found: Array = places[rng.integers(len(PLACES), size=shape)]
    return found


def session(seed: int, runs: int = 3, blocks: int = 2) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    return rng.normal(0, 0.01, (runs, blocks, 4)), drawn(rng, blocks)


def statistic(logs: Array, is_new: Array, shift: float) -> float:
    """Compute the statistic of one run, written out."""
    moved = logs - shift * is_new
    residuals = moved - np.median(moved, axis=1, keepdims=True)
    cut = 1.4826 * np.median(np.abs(residuals))
    residuals = np.clip(residuals, -cut, cut)
    return float((residuals[is_new].sum() - residuals[~is_new].sum()) / 2)


@settings(max_examples=15)
@given(seeds, st.floats(-0.02, 0.02))
def test_p_is_the_fraction_of_orders_at_least_as_slow(seed: int, shift: float) -> None:
    logs, is_new = session(seed)
    # Under the null hypothesis, times without the shift do not depend on the order.
    moved = logs - shift * is_new
    every = [
        np.array([[place in chosen for place in range(4)] for chosen in choice])
        for choice in itertools.product(PLACES, repeat=2)
    ]
    found, largest = p_slower(logs, is_new, shift), p_slower_of_family(logs, is_new, shift)[1]
    others = np.array([[statistic(run, labels, 0.0) for run in moved] for labels in every])
    seen = np.array([statistic(run, is_new, shift) for run in logs])
    np.testing.assert_allclose(found, (others >= seen - 1e-12).mean(axis=0))
    slowest = int(seen.argmax())
    expected = (others.max(axis=1) >= seen[slowest] - 1e-12).mean()
    assert largest[slowest] == pytest.approx(expected)


@settings(max_examples=15)
@given(seeds)
def test_p_values_and_bounds_are_consistent(seed: int) -> None:
    logs, is_new = session(seed, runs=5, blocks=3)
    own, adjusted = p_slower_of_family(logs, is_new, 0.0)
    assert (adjusted >= own).all()
    assert (own >= 1 / 216).all()
    np.testing.assert_allclose(own, p_faster(-logs, is_new, 0.0))
    np.testing.assert_allclose(own, p_faster(logs, ~is_new, 0.0))
    order = np.random.default_rng(seed).permutation(5)
    np.testing.assert_array_equal(p_slower_of_family(logs[order], is_new, 0.0)[1], adjusted[order])
    low, high = bounds(logs, is_new, 0.05)
    middle = center(logs, is_new)
    assert (low <= middle).all()
    assert (middle <= high).all()
    np.testing.assert_allclose(center(logs + 0.03 * is_new, is_new), middle + 0.03, atol=1e-9)


@settings(max_examples=15)
@given(seeds)
def test_bounds_invert_the_tests(seed: int) -> None:
    logs, is_new = session(seed)
    low, high = bounds(logs, is_new, 0.05)
    assert (p_slower(logs, is_new, low - 1e-6) <= 0.05).all()
    assert (p_faster(logs, is_new, high + 1e-6) <= 0.05).all()
    assert (p_slower(logs, is_new, low + 1e-6) > 0.05).all()
    assert (p_faster(logs, is_new, high - 1e-6) > 0.05).all()


def test_too_few_orders_give_infinite_bounds() -> None:
    logs, is_new = session(0)
    assert np.isinf(bounds(logs, is_new, 0.02)).all()
    assert np.isfinite(bounds(logs, is_new, 0.03)).all()


def test_sampled_orders_approximate_all_orders() -> None:
    rng = np.random.default_rng(1)
    logs, is_new = rng.normal(0, 0.01, (40, 5, 4)), drawn(rng, 5)
    signs = np.where(drawn(np.random.default_rng(2), 20_000, 5), 0.5, -0.5)
    residuals = logs - np.median(logs, axis=2, keepdims=True)
    cut = 1.4826 * np.median(np.abs(residuals).reshape(40, -1), axis=1)[:, None, None]
    residuals = np.clip(residuals, -cut, cut)
    others = np.einsum("rbp,obp->ro", residuals, signs)
    seen = (residuals * np.where(is_new, 0.5, -0.5)).sum(axis=(1, 2))
    expected = (others >= seen[:, None] - 1e-12).mean(axis=1)
    np.testing.assert_allclose(p_slower(logs, is_new, 0.0), expected, atol=0.03)


def test_a_noisy_run_does_not_hide_a_steady_one() -> None:
    rng = np.random.default_rng(3)
    is_new = drawn(rng, 2)
    logs = rng.normal(0, 1, (2, 2, 4)) * np.array([0.002, 0.3])[:, None, None]
    logs[0] += 0.1 * is_new
    assert p_slower_of_family(logs, is_new, 0.01)[1][0] > 0.05
    scale = np.array([0.002, 0.3])
    assert p_slower_of_family(logs, is_new, 0.01, scale)[1][0] == pytest.approx(1 / 36)


# -- error rates ------------------------------------------------------------------------------


HARSH = {
    **{name: MACHINES[name] for name in ("normal 1 %", "drift, shared 1 %", "t(4) 1 %")},
    "two states": bimodal(shared=True, step=0.1),
    "two states of each run": bimodal(shared=False, step=0.1),
    **{f"period {n}": periodic(n, step=0.1) for n in (2, 3, 4, 8)},
    "outliers": outliers(0.005),
}


@pytest.mark.parametrize("blocks", [2, 4])
@pytest.mark.parametrize("noise", HARSH.values(), ids=HARSH)
def test_error_rate_holds_under_any_noise(noise: Noise, blocks: int) -> None:
    """Simulate families of 6 runs at the tested shift, each with its own random order."""
    families = 1000 if blocks == 2 else 200
    rng = np.random.default_rng(7)
    is_new = drawn(rng, families, blocks)
    logs = noise(rng, families, 4 * blocks, 6).reshape(families, blocks, 4, 6)
    logs = logs.transpose(0, 3, 1, 2) + math.log(1.01) * is_new[:, None]
    adjusted = p_slower_of_family(logs, is_new, math.log(1.01))[1].min(axis=1)
    excluded = p_faster(logs, is_new, math.log(1.01))[:, 0]
    for p in (adjusted, excluded):
        for level in (1 / 36, 0.05):
            hits = int((p <= level + 1e-9).sum())
            assert stats.binom.sf(hits - 1, families, level) > 0.001

"""Randomization test over the order of processes.

The verdict stage runs two processes of each revision per block of four, in one of six orders drawn
at random. If the new revision is slower by a known amount, subtracting it leaves the times that the
machine would have produced in any order, and all ``6 ** blocks`` orders are equally likely. The
p-value is the share of orders under which the new revision looks at least as slow. It is exact for
any noise, be it bimodal clocks, outliers, drift or periods of any length, whether the runs share it
or not.

Times are compared within their block, and residuals are clipped to limit outliers; neither depends
on the order. All runs share the same order, so the maximum statistic over the runs under each order
yields family-wise p-values (Westfall and Young 1993, step-down max T).

Arrays may have leading axes, with which the tests simulate many families at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray

from pytest_int8bench.gate.ab.design import ENUMERATED_BLOCKS, ORDERS_PER_BLOCK, ROUNDING

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

#: Places of the new revision's two processes in a block.
PLACES = tuple(itertools.combinations(range(4), 2))
_IS_NEW = np.array([[place in places for place in range(4)] for places in PLACES])
_SIGNS = np.where(_IS_NEW, 0.5, -0.5)
#: Number of orders to sample if there are too many to enumerate.
_DRAWN = 5000
#: Residuals are clipped at this many standard deviations, estimated from the median absolute
#: residual. If 8 % of times are 20 % too long, clipping at 2 detects a slowdown of 5 % in 70 % of
#: families, and clipping at 1 in 91 %, at no loss without outliers.
_CLIP = 1.0
_SD_OF_MEDIAN = 1.4826


def p_slower(logs: Floats, is_new: Bools, shift: float | Floats) -> Floats:
    """Return the p-value of H0 "slower by at most ``shift``" for each run.

    Args:
        logs: log times, of shape (..., runs, blocks, 4).
        is_new: whether a time is the new revision's, of shape (..., blocks, 4).
        shift: log ratio to test, a scalar or one per run.
    """
    actual, others = _statistics(logs, is_new, shift)
    return _share_of_orders(others >= actual[..., None] - ROUNDING, logs.shape[-2])


def p_faster(logs: Floats, is_new: Bools, shift: float | Floats) -> Floats:
    """Return the p-value of H0 "slower by at least ``shift``" for each run."""
    actual, others = _statistics(logs, is_new, shift)
    return _share_of_orders(others <= actual[..., None] + ROUNDING, logs.shape[-2])


def p_slower_of_family(
    logs: Floats, is_new: Bools, shift: float, scale: Floats | float = 1.0
) -> tuple[Floats, Floats]:
    """Return the p-values of :func:`p_slower`, unadjusted and adjusted for all runs.

    ``scale`` is the noise of each run, by which statistics are divided so that a noisy run does not
    mask the others. It must come from other data than ``logs``.
    """
    actual, others = _statistics(logs, is_new, shift)
    own = _share_of_orders(others >= actual[..., None] - ROUNDING, logs.shape[-2])
    divisor = np.broadcast_to(scale, actual.shape)
    actual, others = actual / divisor, others / divisor[..., None]
    order = np.argsort(-actual, axis=-1, kind="stable")
    ranked = np.take_along_axis(actual, order, -1)
    largest = np.take_along_axis(others, order[..., None], -2)
    # Step down: the maximum over a run and all runs that look less slow.
    largest = np.maximum.accumulate(largest[..., ::-1, :], axis=-2)[..., ::-1, :]
    slack = ROUNDING / np.min(scale)
    p = _share_of_orders(largest >= ranked[..., None] - slack, logs.shape[-2])
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, np.maximum.accumulate(p, axis=-1), -1)
    return own, adjusted


def center(logs: Floats, is_new: Bools) -> Floats:
    """Estimate the log ratio, new / base, of each run: the shift whose statistic is zero."""

    def is_under(shift: Floats) -> Bools:
        return _statistic(logs, is_new, shift)[0] > 0

    return _bisect(logs, is_new, is_under)


def bounds(logs: Floats, is_new: Bools, level: float) -> tuple[Floats, Floats]:
    """Return the smallest and the largest log ratio of each run that its test does not reject.

    They are infinite if there are too few orders to reject at this level.
    """
    if ORDERS_PER_BLOCK ** -float(logs.shape[-2]) > level:
        infinite = np.full(logs.shape[:-2], np.inf)
        return -infinite, infinite
    low = _bisect(logs, is_new, lambda shift: p_slower(logs, is_new, shift) <= level)
    high = _bisect(logs, is_new, lambda shift: p_faster(logs, is_new, shift) > level)
    return low, high


def _bisect(logs: Floats, is_new: Bools, is_under: Callable[[Floats], Bools]) -> Floats:
    """Return the shift of each run up to which ``is_under`` holds."""
    new = np.where(is_new[..., None, :, :], logs, np.nan)
    base = np.where(is_new[..., None, :, :], np.nan, logs)
    low = (np.nanmin(new, axis=-1) - np.nanmax(base, axis=-1)).min(axis=-1) - ROUNDING
    high = (np.nanmax(new, axis=-1) - np.nanmin(base, axis=-1)).max(axis=-1) + ROUNDING
    for _ in range(50):
        middle = (low + high) / 2
        under = is_under(middle)
        low, high = np.where(under, middle, low), np.where(under, high, middle)
    found: Floats = (low + high) / 2
    return found


def _statistics(logs: Floats, is_new: Bools, shift: float | Floats) -> tuple[Floats, Floats]:
    """Return the statistic under the actual order, of shape (..., runs), and under the reference
    orders, of shape (..., runs, orders)."""
    actual, residuals = _statistic(logs, is_new, shift)
    contrasts = residuals @ _SIGNS.T
    orders = _orders(logs.shape[-2])
    others = np.zeros((*actual.shape, len(orders)))
    for block in range(orders.shape[1]):
        others += contrasts[..., block, :][..., orders[:, block]]
    return actual, others


def _statistic(logs: Floats, is_new: Bools, shift: float | Floats) -> tuple[Floats, Floats]:
    labels = is_new[..., None, :, :]
    moved = logs - np.asarray(shift)[..., None, None] * labels
    residuals = moved - np.median(moved, axis=-1, keepdims=True)
    size = np.median(np.abs(residuals).reshape(*residuals.shape[:-2], -1), axis=-1)
    cut = np.where(size > ROUNDING, _CLIP * _SD_OF_MEDIAN * size, np.inf)[..., None, None]
    residuals = np.clip(residuals, -cut, cut)
    signed: Floats = residuals * np.where(labels, 0.5, -0.5)
    return signed.sum(axis=(-2, -1)), residuals


def _share_of_orders(hits: Bools, blocks: int) -> Floats:
    """Return the share of orders that are hits; the actual order counts in addition to sampled
    ones."""
    is_drawn = blocks > ENUMERATED_BLOCKS
    found: Floats = (hits.sum(axis=-1) + is_drawn) / (hits.shape[-1] + is_drawn)
    return found


@cache
def _orders(blocks: int) -> NDArray[np.intp]:
    """Return orders as indices of :data:`PLACES`, of shape (orders, blocks)."""
    if blocks <= ENUMERATED_BLOCKS:
        every = np.indices((ORDERS_PER_BLOCK,) * blocks)
        return every.reshape(blocks, -1).T.astype(np.intp)
    drawn = np.random.default_rng(blocks).integers(ORDERS_PER_BLOCK, size=(_DRAWN, blocks))
    return drawn.astype(np.intp)

"""Test by the order of processes: what would the times have shown in another order?

The verdict stage runs two processes of each revision in a block of four, in one of six orders that
is drawn at random. Suppose that the new revision is slower by a known amount. Take that off, and
the times of a block are what the machine would have given in any order, so that each of the
``6 ** blocks`` orders was as likely as the one that was drawn. The p-value is the share of orders
under which the new revision looks at least as slow. It is exact whatever the noise is: bimodal
clocks, outliers, drift, a period of any length, alike in all runs or not.

Times are compared within their block and outliers are cut, which the order has no influence on.
All runs have the same order, so that the largest statistic of all runs under each order gives
p-values for the family (Westfall and Young 1993, step-down max T).

Arrays may have leading axes, which the tests use to simulate many families at once.
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
#: Orders drawn where there are too many to look at all of them.
_DRAWN = 5000
#: Residuals are cut at so many standard deviations, as estimated from their median size. Cut at 2,
#: a slowdown of 5 % is found in 70 % of families where 8 % of times are 20 % too long; cut at 1, in
#: 91 %, and as often as before where there are no outliers.
_CUT = 1.0
_SD_OF_MEDIAN = 1.4826


def p_slower(logs: Floats, is_new: Bools, shift: float | Floats) -> Floats:
    """Return p-values of "slower by ``shift`` or less", one for each run.

    Args:
        logs: log times, of shape (..., runs, blocks, 4).
        is_new: which of them are the new revision's, of shape (..., blocks, 4).
        shift: the log ratio that is tested, one or one for each run.
    """
    seen, others = _statistics(logs, is_new, shift)
    return _share(others >= seen[..., None] - ROUNDING, logs.shape[-2])


def p_faster(logs: Floats, is_new: Bools, shift: float | Floats) -> Floats:
    """Return p-values of "slower by ``shift`` or more", one for each run."""
    seen, others = _statistics(logs, is_new, shift)
    return _share(others <= seen[..., None] + ROUNDING, logs.shape[-2])


def p_slower_of_family(
    logs: Floats, is_new: Bools, shift: float, scale: Floats | float = 1.0
) -> tuple[Floats, Floats]:
    """Return the p-values of :func:`p_slower`, and those adjusted for all runs.

    ``scale`` is how noisy each run is, so that a noisy one does not hide the others. It must not
    come from these times.
    """
    seen, others = _statistics(logs, is_new, shift)
    own = _share(others >= seen[..., None] - ROUNDING, logs.shape[-2])
    divisor = np.broadcast_to(scale, seen.shape)
    seen, others = seen / divisor, others / divisor[..., None]
    order = np.argsort(-seen, axis=-1, kind="stable")
    ranked = np.take_along_axis(seen, order, -1)
    largest = np.take_along_axis(others, order[..., None], -2)
    # The largest of a run and of all that look less slow than it.
    largest = np.maximum.accumulate(largest[..., ::-1, :], axis=-2)[..., ::-1, :]
    slack = ROUNDING / np.min(scale)
    p = _share(largest >= ranked[..., None] - slack, logs.shape[-2])
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, np.maximum.accumulate(p, axis=-1), -1)
    return own, adjusted


def center(logs: Floats, is_new: Bools) -> Floats:
    """Return for each run the log ratio at which the new revision looks neither slower nor
    faster."""

    def is_under(shift: Floats) -> Bools:
        return _seen(logs, is_new, shift)[0] > 0

    return _bisect(logs, is_new, is_under)


def bounds(logs: Floats, is_new: Bools, level: float) -> tuple[Floats, Floats]:
    """Return for each run the smallest and the largest log ratio that its test does not reject.

    They are infinite where there are too few orders for the level.
    """
    if ORDERS_PER_BLOCK ** -float(logs.shape[-2]) > level:
        nothing = np.full(logs.shape[:-2], np.inf)
        return -nothing, nothing
    low = _bisect(logs, is_new, lambda shift: p_slower(logs, is_new, shift) <= level)
    high = _bisect(logs, is_new, lambda shift: p_faster(logs, is_new, shift) > level)
    return low, high


def _bisect(logs: Floats, is_new: Bools, is_under: Callable[[Floats], Bools]) -> Floats:
    """Return for each run the shift up to which ``is_under`` holds."""
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
    """Return the statistic under the order that was drawn, and under those that it is compared
    with, of shape (..., runs, orders)."""
    seen, residuals = _seen(logs, is_new, shift)
    contrasts = residuals @ _SIGNS.T
    orders = _orders(logs.shape[-2])
    others = np.zeros((*seen.shape, len(orders)))
    for block in range(orders.shape[1]):
        others += contrasts[..., block, :][..., orders[:, block]]
    return seen, others


def _seen(logs: Floats, is_new: Bools, shift: float | Floats) -> tuple[Floats, Floats]:
    labels = is_new[..., None, :, :]
    moved = logs - np.asarray(shift)[..., None, None] * labels
    residuals = moved - np.median(moved, axis=-1, keepdims=True)
    size = np.median(np.abs(residuals).reshape(*residuals.shape[:-2], -1), axis=-1)
    cut = np.where(size > ROUNDING, _CUT * _SD_OF_MEDIAN * size, np.inf)[..., None, None]
    residuals = np.clip(residuals, -cut, cut)
    signed: Floats = residuals * np.where(labels, 0.5, -0.5)
    return signed.sum(axis=(-2, -1)), residuals


def _share(hits: Bools, blocks: int) -> Floats:
    """Return the share of orders; one that is drawn counts beside the others."""
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

"""Test mean scores by t tests that allow for collapses not seen yet, and turn a metric that is not
a mean into scores of images, by the jackknife.

The correction for collapses is that of Cornish and Fisher, see :class:`Means`; the pseudo-values
are Tukey's (1958), see :func:`pseudo_values`.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

#: How often a lossless model must pass with the number of samples that is asked for.
POWER = 0.8
MOST_SAMPLES = 10_000_000
#: Statistics closer than this are ties; they count as extreme.
TIE = 1e-9


class Means:
    """One-sided t tests of the mean loss that allow for collapses not seen yet.

    A few samples that fall to the worst score can make up a whole drop, and many samples hold none
    of them. So virtual samples join: ``collapse`` in the test that may pass a model, ``jump`` in
    the one that may fail it, (z² + 2) / 3 of each. With k collapses among n samples that bounds
    their rate by about k + m + z sqrt(k + m), no less than the exact limit of Garwood (Biometrika
    28, 1936, 437-442) for any k: it is the correction for skewness of Cornish and Fisher.

    The drop is the sum of all losses over that of all bases. A test looks at the mean of
    ``loss - drop * base``, which no division makes skew (Fieller 1954).

    Args:
        loss: reference less candidate of each sampling unit: scores, sums of scores of a group, or
            pseudo-values.
        base: what a drop is a share of: the reference, or with an absolute limit the number of
            samples in the unit.
        collapse: loss and base of a unit with the largest loss there can be.
        jump: those of a unit with the largest gain.
        alpha: level of each test.
        at_stake: what each unit can lose at most, where the largest of more units will be larger.
    """

    def __init__(
        self,
        loss: Floats,
        base: Floats,
        *,
        collapse: tuple[float, float],
        jump: tuple[float, float],
        alpha: float,
        at_stake: Floats | None = None,
    ) -> None:
        self._at_stake = at_stake
        self._values = np.stack([loss, base])
        self._alpha = alpha
        self._virtual = (z(alpha) ** 2 + 2) / 3
        self._largest_loss = max(collapse[0], 0.0)
        self._largest_gain = max(-jump[0], 0.0)
        self._largest_base = collapse[1]
        self._seen = self._moments(None)
        self._with_collapse = self._moments(collapse)
        self._with_jump = self._moments(jump)

    def at_least(self, drop: float) -> float:
        return self._p_value(self._with_collapse, drop, sign=1)

    def at_most(self, drop: float) -> float:
        return self._p_value(self._with_jump, drop, sign=-1)

    def error(self) -> float:
        widest = max(self._error_of(self._with_collapse), self._error_of(self._with_jump))
        return max(widest / self._scale(), TIE)

    def largest(self) -> float:
        return max(self._largest_loss, self._largest_gain) / self._largest_base

    def needed(self, limit: float, drop: float) -> int:
        _, covariance, _ = self._seen
        slope = np.array([1.0, -limit])
        spread = math.sqrt(max(float(slope @ covariance @ slope), 0.0))
        scale = self._scale()
        needed = self._enough(limit * scale, spread, self._largest_loss)
        if drop > 0:
            gap = abs(limit - drop) * scale
            extreme = self._largest_loss if drop < limit else self._largest_gain
            needed = max(needed, self._enough(gap, spread, extreme))
        return needed

    def _enough(self, gap: float, spread: float, extreme: float) -> int:
        needed = enough(gap, spread, extreme, self._alpha)
        if self._at_stake is not None:
            for _ in range(3):  # the more units, the larger the largest, by their logarithm
                largest = max(extreme, largest_of(needed, self._at_stake))
                needed = enough(gap, spread, largest, self._alpha)
        return needed

    def _scale(self) -> float:
        return abs(float(self._values[1].mean()))

    def _moments(self, virtual: tuple[float, float] | None) -> tuple[Floats, Floats, float]:
        """Means and covariances of loss and base, and the number of units with virtual ones. They
        make the test quick at any drop."""
        values = self._values
        weights = np.ones(values.shape[1])
        if virtual is not None:
            values = np.append(values, [[virtual[0]], [virtual[1]]], axis=1)
            weights = np.append(weights, self._virtual)
        total = float(weights.sum())
        means = values @ weights / total
        centred = values - means[:, None]
        return means, (centred * weights) @ centred.T / (total - 1), total

    def _error_of(self, moments: tuple[Floats, Floats, float]) -> float:
        _, covariance, total = moments
        return math.sqrt(max(float(covariance[0, 0]), 0.0) / total)

    def _p_value(self, moments: tuple[Floats, Floats, float], drop: float, *, sign: int) -> float:
        """p-value of H0: sign * (loss - drop * base) >= 0."""
        from scipy import special

        means, covariance, total = moments
        # A t statistic has no scale: this one does not overflow.
        slope = np.array([1.0, -drop]) / max(1.0, abs(drop))
        excess = sign * float(slope @ means)
        error = math.sqrt(max(float(slope @ covariance @ slope), 0.0) / total)
        if error == 0:
            return 0.0 if excess < 0 else 1.0
        return float(special.stdtr(self._values.shape[1] - 1, excess / error))


# --- Jackknife ---


def pseudo_values(
    rows: NDArray[Any],
    total: float,
    value: Callable[[NDArray[Any]], float],
    codes: NDArray[np.int64] | None = None,
) -> Floats:
    """What each image adds to the metric: n T - (n - 1) T without it (Tukey 1958).

    Args:
        rows: one per image.
        total: the metric of all.
        value: computes the metric.
        codes: number of each image's group; then groups are left out, not images.
    """
    if codes is not None:
        count = int(codes.max()) + 1
        without = np.array([value(rows[codes != code]) for code in range(count)])
        return count * total - (count - 1) * without
    count = len(rows)
    without = np.empty(count)
    rest = rows[1:].copy()
    for index in range(count):
        without[index] = value(rest)
        if index < count - 1:
            rest[index] = rows[index]
    return count * total - (count - 1) * without


def image_collapse(before: Floats, after: Floats) -> tuple[float, float]:
    """The worst that can happen to one image, as pseudo-values of before and after.

    An image that collapses loses its own share and can add errors that cost as much again, or as
    much as was seen.
    """
    share = float(np.abs(before).max())
    return share, share - max(2 * share, float((before - after).max()))


def swaps(
    pairs: tuple[NDArray[Any], NDArray[Any]],
    total: float,
    value: Callable[[NDArray[Any]], float],
) -> Floats:
    """How the reference's metric changes if one image's row is the candidate's, image by image."""
    reference, candidate = pairs
    changes = np.zeros(len(reference))
    rows = reference.copy()
    for index in range(len(rows)):
        if np.array_equal(rows[index], candidate[index]):
            continue
        rows[index] = candidate[index]
        change = value(rows) - total
        changes[index] = change if abs(change) > TIE * abs(total) / len(rows) else 0.0
        rows[index] = reference[index]
    return changes


# --- Samples needed ---


def enough(gap: float, spread: float, extreme: float, alpha: float) -> int:
    """Samples with which a gap between true drop and limit is seen with the power wanted.

    Args:
        gap: between the true mean and the hypothesis.
        spread: standard deviation of a sample.
        extreme: size of the virtual samples, 0 for none.
        alpha: level of the test.
    """
    level, power = z(alpha), z(1 - POWER)
    virtual = (level**2 + 2) / 3

    def seen(samples: float) -> bool:
        error = math.sqrt(samples * spread**2 + virtual * (extreme + gap) ** 2 * (extreme > 0))
        distance = samples * gap - virtual * extreme
        return distance >= level * error + power * spread * math.sqrt(samples)

    # Once there are enough samples, more are too: the distance grows faster than the error.
    return 2 + bisect_left(range(2, MOST_SAMPLES), True, key=seen)


def largest_of(count: int, seen: Floats) -> float:
    """What the largest of so many numbers stays under in nine of ten draws, if the tail of those
    seen is exponential."""
    order = np.sort(seen)[::-1]
    top = max(1, len(order) // 10)
    threshold = float(order[min(top, len(order) - 1)])
    excess = float(order[:top].mean()) - threshold
    beyond = max(1.0, count * top / len(order))
    return threshold + excess * (math.log(beyond) - math.log(-math.log(0.9)))


def z(tail: float) -> float:
    """Value that a standard normal variable exceeds with probability ``tail``."""
    from scipy import special

    return -float(special.ndtri(tail))


def round_up(number: float) -> int:
    whole = math.ceil(number)
    unit: int = 10 ** max(0, len(str(whole)) - 2)
    return -(-whole // unit) * unit

"""Test mean scores with t tests corrected for skewness, and jackknife other metrics.

:class:`MeanTest` explains the Cornish-Fisher correction. :func:`pseudo_values` turns a metric that
is not a mean into one value per image (Tukey 1958).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

#: Probability that a lossless model passes with the recommended number of samples.
POWER = 0.8
MOST_SAMPLES = 10_000_000
#: Statistics closer than this are ties and count as extreme.
TIE = 1e-9


class MeanTest:
    """One-sided t tests of the mean loss that allow for collapses not observed yet.

    A few samples that fall to the worst score can cause a whole drop, but even a large data set may
    contain none of them. Each test therefore adds m = (z² + 2) / 3 virtual samples: ``collapse`` in
    the test that can pass a model, ``jump`` in the one that can fail it. With k collapses among n
    samples, this bounds their expected number by about k + m + z sqrt(k + m), which is at least the
    exact limit of Garwood (Biometrika 28, 1936, 437-442) for any k. It is the Cornish-Fisher
    correction for skewness.

    The drop is the sum of all losses divided by the sum of all bases. Each test examines the mean
    of ``loss - drop * base``, which avoids the skewness of a ratio (Fieller 1954).

    Args:
        loss: reference minus candidate of each sampling unit: scores, a group's sums of scores, or
            pseudo-values.
        base: denominator of the drop: the reference, or the number of samples in the unit if the
            limit is absolute.
        collapse: loss and base of a unit with the largest possible loss.
        jump: loss and base of a unit with the largest possible gain.
        alpha: significance level of each test.
        possible_losses: the largest possible loss of each unit, if more units would contain larger
            ones.
    """

    def __init__(
        self,
        loss: Floats,
        base: Floats,
        *,
        collapse: tuple[float, float],
        jump: tuple[float, float],
        alpha: float,
        possible_losses: Floats | None = None,
    ) -> None:
        self._possible_losses = possible_losses
        self._values = np.stack([loss, base])
        self._alpha = alpha
        self._virtual = (z(alpha) ** 2 + 2) / 3
        self._largest_loss = max(collapse[0], 0.0)
        self._largest_gain = max(-jump[0], 0.0)
        self._largest_base = collapse[1]
        self._observed = self._moments(None)
        self._with_collapse = self._moments(collapse)
        self._with_jump = self._moments(jump)

    def p_at_least(self, drop: float) -> float:
        return self._p_value(self._with_collapse, drop, sign=1)

    def p_at_most(self, drop: float) -> float:
        return self._p_value(self._with_jump, drop, sign=-1)

    def standard_error(self) -> float:
        widest = max(self._error_of(self._with_collapse), self._error_of(self._with_jump))
        return max(widest / self._scale(), TIE)

    def largest_change(self) -> float:
        return max(self._largest_loss, self._largest_gain) / self._largest_base

    def needed(self, limit: float, drop: float) -> int:
        _, covariance, _ = self._observed
        slope = np.array([1.0, -limit])
        spread = math.sqrt(max(float(slope @ covariance @ slope), 0.0))
        scale = self._scale()
        needed = self._samples_needed(limit * scale, spread, self._largest_loss)
        if drop > 0:
            gap = abs(limit - drop) * scale
            extreme = self._largest_loss if drop < limit else self._largest_gain
            needed = max(needed, self._samples_needed(gap, spread, extreme))
        return needed

    def _samples_needed(self, gap: float, spread: float, extreme: float) -> int:
        needed = samples_needed(gap, spread, extreme, self._alpha)
        if self._possible_losses is not None:
            # A fixed point: the maximum grows with the logarithm of the number of units.
            for _ in range(3):
                largest = max(extreme, upper_bound_of_maximum(needed, self._possible_losses))
                needed = samples_needed(gap, spread, largest, self._alpha)
        return needed

    def _scale(self) -> float:
        return abs(float(self._values[1].mean()))

    def _moments(self, virtual: tuple[float, float] | None) -> tuple[Floats, Floats, float]:
        """Return means and covariance of loss and base, and the number of units with virtual ones.

        They suffice to test any drop without another pass over the samples.
        """
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
        """Return the p-value of H0: sign * mean(loss - drop * base) >= 0."""
        from scipy import special

        means, covariance, total = moments
        # Rescaling leaves a t statistic unchanged and avoids overflow.
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
    """Return each image's jackknife pseudo-value, n T - (n - 1) T_i, where T_i is the metric of
    all rows but the image's (Tukey 1958).

    Args:
        rows: one row per image.
        total: the metric T of all rows.
        value: function that computes the metric of rows.
        codes: group number of each image, to leave out one group at a time instead of one image.
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
    """Return the pseudo-values, before and after, of the worst assumed collapse of one image.

    A collapsed image loses its share and can add errors, such as false positives, that cost as much
    again. The loss is at least the largest one observed.
    """
    share = float(np.abs(before).max())
    return share, share - max(2 * share, float((before - after).max()))


def swap_effects(
    pairs: tuple[NDArray[Any], NDArray[Any]],
    total: float,
    value: Callable[[NDArray[Any]], float],
) -> Floats:
    """Return, for each image, how the reference's metric changes with the candidate's row."""
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


def samples_needed(gap: float, spread: float, extreme: float, alpha: float) -> int:
    """Return the number of samples that detect a gap with probability ``POWER``.

    Args:
        gap: difference between the true mean and the hypothesis.
        spread: standard deviation of one sample.
        extreme: magnitude of the virtual samples, 0 for none.
        alpha: significance level of the test.
    """
    level, power = z(alpha), z(1 - POWER)
    virtual = (level**2 + 2) / 3

    def detects(samples: float) -> bool:
        error = math.sqrt(samples * spread**2 + virtual * (extreme + gap) ** 2 * (extreme > 0))
        distance = samples * gap - virtual * extreme
        return distance >= level * error + power * spread * math.sqrt(samples)

    # Bisection works because the distance grows faster than the error.
    return 2 + bisect_left(range(2, MOST_SAMPLES), True, key=detects)


def upper_bound_of_maximum(count: int, observed: Floats) -> float:
    """Return the 90 % quantile of the maximum of ``count`` numbers, extrapolating an exponential
    tail from those observed."""
    order = np.sort(observed)[::-1]
    top = max(1, len(order) // 10)
    threshold = float(order[min(top, len(order) - 1)])
    excess = float(order[:top].mean()) - threshold
    beyond = max(1.0, count * top / len(order))
    return threshold + excess * (math.log(beyond) - math.log(-math.log(0.9)))


def z(tail: float) -> float:
    """Return the value that a standard normal variable exceeds with probability ``tail``."""
    from scipy import special

    return -float(special.ndtri(tail))


def round_up(number: float) -> int:
    """Round up to an integer with two significant digits."""
    whole = math.ceil(number)
    unit: int = 10 ** max(0, len(str(whole)) - 2)
    return -(-whole // unit) * unit

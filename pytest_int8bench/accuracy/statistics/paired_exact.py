"""Test paired 0/1 scores exactly, and compute the number of samples the test needs.

See :class:`PairedExactTest` for the statistic (Tango 1998) and the treatment of nuisance parameters
(Berger & Boos 1994).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pytest_int8bench.accuracy.statistics.mean_tests import (
    MOST_SAMPLES,
    POWER,
    TIE,
    Floats,
    round_up,
    samples_needed,
    z,
)

Ints = NDArray[np.int64]

#: Share of the significance level spent on the confidence interval of each nuisance parameter.
NUISANCE_SHARE = 0.01
#: Largest probability that a truncated sum over a binomial distribution may omit.
TRUNCATED = 1e-6
#: Grid spacing of a nuisance parameter, in square roots of expected counts. A Poisson count has a
#: standard deviation of 0.5 on this scale.
GRID_STEP = 0.2
#: With more expected discordant pairs, the power is computed by the normal approximation.
MANY_DISCORDANT = 2000


@dataclass(frozen=True)
class PairedExactTest:
    """Exact unconditional test of paired 0/1 scores.

    The samples follow a trinomial distribution: only the reference is right (``lost``), only the
    candidate is right (``gained``), or both agree. Discordant pairs are those that are lost or
    gained. Outcomes are ordered by Tango's score statistic (Stat. Med. 17, 1998, 891-908). The
    p-value is the probability of an outcome at least as extreme, maximized over a confidence
    interval of the share of discordant pairs q, plus the error of that interval (Berger & Boos,
    JASA 89, 1994, 1012-1016). Given q, the probability is largest for a drop on the edge of the
    hypothesis, so no other drops are tried.

    A relative limit times the reference's share of right samples is an absolute limit; that share
    is a second nuisance parameter.
    """

    lost: int
    gained: int
    right: int
    """Samples that the reference gets right."""
    samples: int
    relative: bool
    alpha: float

    def p_at_least(self, drop: float) -> float:
        if not self.relative:
            return self._p_value(drop, less=True)
        spent = self.alpha * NUISANCE_SHARE
        # The smallest right-hand side makes the hypothesis lost - gained >= drop * right widest.
        right = self._right(upper=drop < 0)
        return min(1.0, spent + self._p_value(drop * right, less=True))

    def p_at_most(self, drop: float) -> float:
        if not self.relative:
            return self._p_value(drop, less=False)
        spent = self.alpha * NUISANCE_SHARE
        right = self._right(upper=drop > 0)
        return min(1.0, spent + self._p_value(drop * right, less=False))

    def standard_error(self) -> float:
        scale = self.right if self.relative else self.samples
        return math.sqrt(self.lost + self.gained + 1) / scale

    def largest_change(self) -> float:
        return 1.0

    def needed(self, limit: float, drop: float) -> int:
        share = self.right / self.samples if self.relative else 1.0
        discordant = (self.lost + self.gained + 1) / (self.samples + 2)
        needed = self._lossless(limit, discordant)
        if drop > 0:
            observed = (self.lost + self.gained) / self.samples
            spread = math.sqrt(max(observed - (drop * share) ** 2, 0.0))
            needed = max(needed, samples_needed(abs(limit - drop) * share, spread, 0.0, self.alpha))
        return needed

    def _right(self, *, upper: bool) -> float:
        low, high = _clopper_pearson(self.right, self.samples, 2 * self.alpha * NUISANCE_SHARE)
        return high if upper else low

    def _p_value(self, drop: float, *, less: bool) -> float:
        return _p_value(
            self.lost, self.gained, self.samples, drop, self.alpha * NUISANCE_SHARE, less=less
        )

    def _lossless(self, limit: float, discordant: float) -> int:
        """Return the samples with which a lossless model with this share of discordant pairs passes
        with probability ``POWER``."""
        share = self.right / self.samples if self.relative else 1.0
        needed = max(
            samples_needed(limit * share, math.sqrt(discordant), 0.0, self.alpha),
            math.ceil(min(math.log(1 / self.alpha) / (limit * share), MOST_SAMPLES)),
        )
        while needed < MOST_SAMPLES:
            needed = round_up(needed)
            expected = dataclasses.replace(
                self, samples=needed, right=round(needed * self.right / self.samples)
            )
            if needed * discordant > MANY_DISCORDANT:
                sure = expected._right(upper=False) if self.relative else 1.0
                return math.ceil(
                    1.05 * samples_needed(limit * sure, math.sqrt(discordant), 0.0, self.alpha)
                )
            if expected.power(limit, discordant) >= POWER:
                return needed
            needed = math.ceil(1.04 * needed)
        return MOST_SAMPLES

    def power(self, limit: float, discordant: float) -> float:
        """Return how likely a lossless model with this share of discordant pairs passes."""
        spread = math.sqrt(self.samples * discordant * (1 - discordant))
        first = max(0, math.floor(self.samples * discordant - 4 * spread - 1))
        last = min(self.samples, math.ceil(self.samples * discordant + 4 * spread + 4))
        counts = np.arange(first, last + 1)
        # Interpolate the thresholds of many counts: they lie on a smooth curve. Rounding down
        # errs towards more samples.
        points = len(counts) if len(counts) <= 24 else 13
        tried = np.linspace(first, last, points).round().astype(np.int64)
        thresholds = [self.most_lost(int(count), limit) for count in tried]
        most = np.floor(np.interp(counts, tried, thresholds)).astype(np.int64)
        passed = _binomial_cdf(most, counts, np.full(len(counts), 0.5))
        return float((_binomial_pmf(counts, self.samples, np.array([discordant])) * passed).sum())

    def most_lost(self, count: int, limit: float) -> int:
        """Return the most lost samples among ``count`` discordant pairs that pass, or -1.

        The test is monotone: any smaller number passes as well.
        """

        def passes(lost: int) -> bool:
            split = dataclasses.replace(self, lost=lost, gained=count - lost)
            return split.p_at_least(limit) <= self.alpha

        right = self._right(upper=False) if self.relative else 1.0
        allowed = limit * right * self.samples
        guess = (count + allowed - z(self.alpha) * math.sqrt(count)) / 2
        lost = min(max(math.floor(guess), -1), count)
        while lost < count and passes(lost + 1):
            lost += 1
        while lost >= 0 and not passes(lost):
            lost -= 1
        return lost


def _p_value(
    lost: int, gained: int, samples: int, drop: float, spent: float, *, less: bool
) -> float:
    """Return the p-value of H0: the true drop is at least (``less``) or at most ``drop``.

    Args:
        lost: samples that only the reference gets right.
        gained: samples that only the candidate gets right.
        samples: all samples.
        drop: difference between the shares of right samples, -1 to 1.
        spent: error of the confidence interval of the share of discordant pairs; added to the
            p-value.
        less: whether a small observed drop, rather than a large one, is evidence against H0.
    """
    if drop < 0:
        return _p_value(gained, lost, samples, -drop, spent, less=not less)
    low, high = _clopper_pearson(lost + gained, samples, spent)
    if high < drop:  # too few discordant pairs for such a drop
        return spent if less else 1.0
    observed = float(_score(np.array([lost]), np.array([gained]), samples, drop)[0])

    def extreme(roots: Floats) -> Floats:
        return _tail((roots**2) * 2 / samples + drop, drop, samples, observed, less=less)

    # Equal steps in the square root of the expected gains span equally many standard deviations.
    start, end = (math.sqrt(max(q - drop, 0.0) / 2 * samples) for q in (low, high))
    roots = np.linspace(start, end, max(3, math.ceil((end - start) / GRID_STEP) + 1))
    found = extreme(roots)
    best = int(found.argmax())
    around = np.linspace(roots[max(best - 1, 0)], roots[min(best + 1, len(roots) - 1)], 9)
    worst = max(float(found.max()), float(extreme(around).max()))
    return min(1.0, spent + TRUNCATED + worst)


def _score(lost: NDArray[Any], gained: NDArray[Any], samples: int, drop: float) -> Floats:
    """Return Tango's score statistic of lost - gained for a hypothesized drop of at least 0.

    The restricted maximum likelihood estimate of the gained share is the larger root x of
    2n x² + (2n drop - (b + c) - (b - c) drop) x - c drop (1 - drop) = 0 for b lost, c gained.
    """
    linear = 2 * samples * drop - (lost + gained) - (lost - gained) * drop
    constant = -gained * drop * (1 - drop)
    share = (np.sqrt(linear**2 - 8 * samples * constant) - linear) / (4 * samples)
    variance = samples * (2 * share + drop * (1 - drop))
    difference = lost - gained - samples * drop
    with np.errstate(divide="ignore", invalid="ignore"):
        score: Floats = difference / np.sqrt(np.maximum(variance, 0.0))
    return np.where(difference == 0, 0.0, score)


def _tail(q: Floats, drop: float, samples: int, observed: float, *, less: bool) -> Floats:
    """Return the probability of a score at most (``less``) or at least ``observed``.

    Args:
        q: shares of discordant pairs, ``drop`` to 1.
        drop: the true drop, 0 to 1.
        samples: all samples.
        observed: the observed score.
        less: whether small scores are extreme.

    Returns:
        One probability for each ``q``, too small by at most ``TRUNCATED``.
    """
    q = np.clip(q, drop, 1.0)
    # By Bernstein's inequality, at most half of TRUNCATED lies beyond this on either side.
    reach = 9.7 + 5.39 * np.sqrt(samples * q * (1 - q))
    first = np.maximum(np.floor(samples * q - reach), 0).astype(np.int64)
    counts = first[:, None] + np.arange(int(2 * reach.max()) + 3)
    weights = np.where(counts <= samples, _binomial_pmf(counts, samples, q[:, None]), 0.0)
    # For a given number of discordant pairs, the statistic increases with the lost samples.
    every = np.arange(first.min(), counts.max() + 1)
    bound = _most_lost_within(every, samples, drop, observed + (TIE if less else -TIE))
    lost_share = np.divide(q + drop, 2 * q, out=np.full_like(q, 0.5), where=q > 0)[:, None]
    within = _binomial_cdf(bound[counts - first.min()], counts, lost_share)
    found: Floats = (weights * (within if less else 1 - within)).sum(axis=1)
    return found


def _most_lost_within(counts: Ints, samples: int, drop: float, score: float) -> Ints:
    """Return, for each number of discordant pairs, the most lost samples whose score is at most
    ``score``, or -1."""
    low = np.full_like(counts, -1)
    high = counts + 1
    while (high - low > 1).any():
        middle = np.maximum((low + high) // 2, 0)
        small = _score(middle, counts - middle, samples, drop) <= score
        open_ = high - low > 1
        low = np.where(open_ & small, middle, low)
        high = np.where(open_ & ~small, middle, high)
    return low


def _binomial_pmf(counts: Ints, samples: int, share: Floats) -> Floats:
    from scipy import special

    chosen = (
        special.gammaln(samples + 1.0)
        - special.gammaln(counts + 1.0)
        - special.gammaln(np.maximum(samples - counts, 0) + 1.0)
    )
    rest = np.maximum(samples - counts, 0)
    logarithm = chosen + special.xlogy(counts, share) + special.xlog1py(rest, -share)
    found: Floats = np.exp(logarithm)
    return found


def _binomial_cdf(successes: Ints, counts: Ints, share: Floats) -> Floats:
    """Return P(X <= successes) for X ~ Binomial(counts, share), where successes may be -1."""
    from scipy import special

    inside = (successes >= 0) & (successes < counts)
    upper = np.where(inside, counts - successes, 1)
    lower = np.where(inside, successes + 1, 1)
    found = special.betainc(upper, lower, 1 - share)
    return np.where(inside, found, np.where(successes < 0, 0.0, 1.0))


def _clopper_pearson(successes: int, samples: int, error: float) -> tuple[float, float]:
    """Return the exact two-sided confidence interval of a share, at level 1 - ``error``."""
    from scipy import special

    rest = samples - successes
    low = special.betaincinv(successes, rest + 1, error / 2) if successes else 0.0
    high = special.betainccinv(successes + 1, rest, error / 2) if rest else 1.0
    return float(low), float(high)

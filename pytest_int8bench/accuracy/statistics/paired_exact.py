"""The exact test of paired 0/1 scores, and how many samples it needs.

Its score statistic is Tango's (1998), the nuisance parameters are handled as by Berger & Boos
(1994); see :class:`Flips`.
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
    enough,
    round_up,
    z,
)

Ints = NDArray[np.int64]

#: Share of the level spent on the interval of each nuisance parameter.
NUISANCE_SHARE = 0.01
#: What the windows of a sum over a binomial distribution may leave out.
LEFT_OUT = 1e-6
#: Distance of the points at which a nuisance parameter is tried, in square roots of samples, where
#: a Poisson count has a standard deviation of 0.5.
GRID_STEP = 0.2
#: Expected flips from which the power is computed by the normal approximation.
MANY_FLIPS = 2000


@dataclass(frozen=True)
class Flips:
    """Exact unconditional test of paired 0/1 scores.

    The samples are trinomial: the reference alone is right (``lost``), the candidate alone is
    (``gained``), or neither. Outcomes are ordered by Tango's score statistic (Stat. Med. 17, 1998,
    891-908). The p-value is the largest probability of what is as extreme, over the share of flips
    q in a confidence interval, plus that interval's error (Berger & Boos, JASA 89, 1994,
    1012-1016). Given q, the probability is the larger the closer the drop is to the hypothesis, so
    only drops on its edge are tried.

    A relative limit is an absolute one times the reference's share of right samples, whose bound
    is a second nuisance parameter.
    """

    lost: int
    gained: int
    right: int
    """Samples that the reference has right."""
    samples: int
    relative: bool
    alpha: float

    def at_least(self, drop: float) -> float:
        if not self.relative:
            return self._p_value(drop, less=True)
        spent = self.alpha * NUISANCE_SHARE
        # The hypothesis lost - gained >= drop * right is widest at the smallest right-hand side.
        right = self._right(upper=drop < 0)
        return min(1.0, spent + self._p_value(drop * right, less=True))

    def at_most(self, drop: float) -> float:
        if not self.relative:
            return self._p_value(drop, less=False)
        spent = self.alpha * NUISANCE_SHARE
        right = self._right(upper=drop > 0)
        return min(1.0, spent + self._p_value(drop * right, less=False))

    def error(self) -> float:
        scale = self.right if self.relative else self.samples
        return math.sqrt(self.lost + self.gained + 1) / scale

    def largest(self) -> float:
        return 1.0

    def needed(self, limit: float, drop: float) -> int:
        share = self.right / self.samples if self.relative else 1.0
        flips = (self.lost + self.gained + 1) / (self.samples + 2)
        needed = self._lossless(limit, flips)
        if drop > 0:
            seen = (self.lost + self.gained) / self.samples
            spread = math.sqrt(max(seen - (drop * share) ** 2, 0.0))
            needed = max(needed, enough(abs(limit - drop) * share, spread, 0.0, self.alpha))
        return needed

    def _right(self, *, upper: bool) -> float:
        low, high = _clopper_pearson(self.right, self.samples, 2 * self.alpha * NUISANCE_SHARE)
        return high if upper else low

    def _p_value(self, drop: float, *, less: bool) -> float:
        return _p_value(
            self.lost, self.gained, self.samples, drop, self.alpha * NUISANCE_SHARE, less=less
        )

    def _lossless(self, limit: float, flips: float) -> int:
        """Samples with which a lossless model with this share of flips passes."""
        share = self.right / self.samples if self.relative else 1.0
        needed = max(
            enough(limit * share, math.sqrt(flips), 0.0, self.alpha),
            math.ceil(min(math.log(1 / self.alpha) / (limit * share), MOST_SAMPLES)),
        )
        while needed < MOST_SAMPLES:
            needed = round_up(needed)
            expected = dataclasses.replace(
                self, samples=needed, right=round(needed * self.right / self.samples)
            )
            if needed * flips > MANY_FLIPS:
                sure = expected._right(upper=False) if self.relative else 1.0
                return math.ceil(1.05 * enough(limit * sure, math.sqrt(flips), 0.0, self.alpha))
            if expected.power(limit, flips) >= POWER:
                return needed
            needed = math.ceil(1.04 * needed)
        return MOST_SAMPLES

    def power(self, limit: float, flips: float) -> float:
        """Return how often a lossless model with this share of discordant pairs passes."""
        spread = math.sqrt(self.samples * flips * (1 - flips))
        first = max(0, math.floor(self.samples * flips - 4 * spread - 1))
        last = min(self.samples, math.ceil(self.samples * flips + 4 * spread + 4))
        counts = np.arange(first, last + 1)
        # Thresholds of many flips lie on a smooth curve; rounding down asks for too many samples.
        points = len(counts) if len(counts) <= 24 else 13
        tried = np.linspace(first, last, points).round().astype(np.int64)
        thresholds = [self.most_lost(int(count), limit) for count in tried]
        most = np.floor(np.interp(counts, tried, thresholds)).astype(np.int64)
        passed = _binomial_cdf(most, counts, np.full(len(counts), 0.5))
        return float((_binomial_pmf(counts, self.samples, np.array([flips])) * passed).sum())

    def most_lost(self, count: int, limit: float) -> int:
        """The most lost samples among ``count`` flips that pass, -1 for none.

        Fewer lost ones pass all the more, see :class:`Flips`.
        """

        def passes(lost: int) -> bool:
            split = dataclasses.replace(self, lost=lost, gained=count - lost)
            return split.at_least(limit) <= self.alpha

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
    """p-value of H0 that the drop is ``drop`` or more (``less``), or that it is or less.

    Args:
        lost: samples that only the reference has right.
        gained: samples that only the candidate has right.
        samples: all samples.
        drop: difference of the shares of right samples, -1 to 1.
        spent: error of the interval of the share of flips; part of the p-value.
        less: a smaller drop speaks against H0, not a larger one.
    """
    if drop < 0:
        return _p_value(gained, lost, samples, -drop, spent, less=not less)
    low, high = _clopper_pearson(lost + gained, samples, spent)
    if high < drop:  # fewer flips than the drop needs
        return spent if less else 1.0
    observed = float(_score(np.array([lost]), np.array([gained]), samples, drop)[0])

    def extreme(roots: Floats) -> Floats:
        return _tail((roots**2) * 2 / samples + drop, drop, samples, observed, less=less)

    # Equal steps in the root of the expected gains are equally many standard deviations.
    start, end = (math.sqrt(max(q - drop, 0.0) / 2 * samples) for q in (low, high))
    roots = np.linspace(start, end, max(3, math.ceil((end - start) / GRID_STEP) + 1))
    found = extreme(roots)
    best = int(found.argmax())
    around = np.linspace(roots[max(best - 1, 0)], roots[min(best + 1, len(roots) - 1)], 9)
    worst = max(float(found.max()), float(extreme(around).max()))
    return min(1.0, spent + LEFT_OUT + worst)


def _score(lost: NDArray[Any], gained: NDArray[Any], samples: int, drop: float) -> Floats:
    """Tango's score statistic of lost - gained against a drop of 0 or more.

    The restricted maximum likelihood estimate of the share gained is the larger root of
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
    """Probability of a score as small (``less``) or as large as observed, at a true drop.

    Args:
        q: shares of flips, drop to 1.
        drop: the true drop, 0 to 1.
        samples: all samples.
        observed: the score that was seen.
        less: small scores are extreme.

    Returns:
        One probability for each ``q``, up to ``LEFT_OUT`` too small.
    """
    q = np.clip(q, drop, 1.0)
    # Bernstein's inequality: half of LEFT_OUT lies further off on either side.
    reach = 9.7 + 5.39 * np.sqrt(samples * q * (1 - q))
    first = np.maximum(np.floor(samples * q - reach), 0).astype(np.int64)
    counts = first[:, None] + np.arange(int(2 * reach.max()) + 3)
    weights = np.where(counts <= samples, _binomial_pmf(counts, samples, q[:, None]), 0.0)
    # Among the flips, the statistic grows with the lost ones.
    every = np.arange(first.min(), counts.max() + 1)
    bound = _most_lost_within(every, samples, drop, observed + (TIE if less else -TIE))
    lost_share = np.divide(q + drop, 2 * q, out=np.full_like(q, 0.5), where=q > 0)[:, None]
    within = _binomial_cdf(bound[counts - first.min()], counts, lost_share)
    found: Floats = (weights * (within if less else 1 - within)).sum(axis=1)
    return found


def _most_lost_within(counts: Ints, samples: int, drop: float, score: float) -> Ints:
    """The most lost samples among so many flips whose score is at most ``score``; -1 for none."""
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
    """P(X <= successes) of X ~ Binomial(counts, share); successes of -1 and of all included."""
    from scipy import special

    inside = (successes >= 0) & (successes < counts)
    upper = np.where(inside, counts - successes, 1)
    lower = np.where(inside, successes + 1, 1)
    found = special.betainc(upper, lower, 1 - share)
    return np.where(inside, found, np.where(successes < 0, 0.0, 1.0))


def _clopper_pearson(successes: int, samples: int, error: float) -> tuple[float, float]:
    """Exact interval of a share that misses with at most ``error``, half of it on either side."""
    from scipy import special

    rest = samples - successes
    low = special.betaincinv(successes, rest + 1, error / 2) if successes else 0.0
    high = special.betainccinv(successes + 1, rest, error / 2) if rest else 1.0
    return float(low), float(high)

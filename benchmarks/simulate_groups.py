"""Simulate how often grouped samples pass or fail if the true drop is exactly the limit.

    python benchmarks/simulate_groups.py [families]

The script prints the table in docs/accuracy.md, two rows for each way in which groups change. Each
cell is the largest rate over the three distributions of group sizes, for one limit and number of
groups. The last column judges the same samples as if they were independent.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from pytest_int8bench.accuracy.statistics.groups import grouped_mean_test
from pytest_int8bench.accuracy.statistics.paired_exact import PairedExactTest

ALPHA = 0.05
LIMITS = (0.01, 0.05)  # relative
SEED = 20
GROUPS = (20, 100, 300, 1000)

Array = np.ndarray[Any, Any]
Rng = np.random.Generator


def equal(rng: Rng, groups: int) -> Array:
    return np.full(groups, 10)


def uneven(rng: Rng, groups: int) -> Array:
    return rng.integers(1, 30, groups)


def heavy(rng: Rng, groups: int) -> Array:
    """Draw sizes of which a few are ten times larger than most."""
    return 1 + np.minimum(rng.lognormal(2.0, 1.0, groups), 150).astype(np.int64)


SIZES = (equal, uneven, heavy)
#: Takes the generator, group sizes, group of each sample, baseline scores and limit; returns
#: candidate scores whose true drop is the limit.
Change = Callable[[Rng, Array, Array, Array, float], Array]


def right(rng: Rng, codes: Array, groups: int) -> Array:
    """Draw 0/1 scores of a baseline that gets 80 % right, more in some groups than in others."""
    return (rng.random(len(codes)) < rng.beta(8, 2, groups)[codes]).astype(np.float64)


def continuous(rng: Rng, codes: Array, groups: int) -> Array:
    """Draw continuous scores with a mean of 0.75."""
    return rng.uniform(0.6, 0.9, groups)[codes] + rng.uniform(-0.05, 0.05, len(codes))


def whole(rng: Rng, sizes: Array, codes: Array, reference: Array, limit: float) -> Array:
    """Set all scores of a few groups to 0."""
    return reference * (rng.random(len(sizes)) >= limit)[codes]


def half(rng: Rng, sizes: Array, codes: Array, reference: Array, limit: float) -> Array:
    """Set half of the scores of a few groups to 0."""
    hit = (rng.random(len(sizes)) < 2 * limit)[codes]
    return reference * ~(hit & (rng.random(len(codes)) < 0.5))


def large(rng: Rng, sizes: Array, codes: Array, reference: Array, limit: float) -> Array:
    """Set all scores of a few groups to 0, more often those of large groups."""
    return reference * (rng.random(len(sizes)) >= limit * sizes * _per_sample(sizes))[codes]


@functools.cache
def _expected(size: Callable[[Rng, int], Array]) -> float:
    many = size(np.random.default_rng(0), 200_000).astype(np.float64)
    return float(many.mean() / (many**2).mean())


def _per_sample(sizes: Array) -> float:
    """Return the factor that turns size times limit into a group's probability of collapsing."""
    return _expected(equal if (sizes == 10).all() else uneven if sizes.max() < 30 else heavy)


def flips(rng: Rng, sizes: Array, codes: Array, reference: Array, limit: float) -> Array:
    """Flip samples of some groups in both directions, and lose the limit in addition."""
    share = 0.2 * rng.beta(0.2, 0.6, len(sizes))[codes]  # 5 % on average
    lost = rng.random(len(codes)) < limit + share
    gained = rng.random(len(codes)) < 4 * share  # balances share, because 80 % are right
    return np.where(reference == 1, ~lost, gained & (reference == 0)).astype(np.float64)


def shifts(rng: Rng, sizes: Array, codes: Array, reference: Array, limit: float) -> Array:
    """Shift continuous scores, each group as a whole and each sample a little."""
    shift = limit * 0.75 + rng.normal(0, 0.05, len(sizes))[codes]
    return reference - shift + rng.normal(0, 0.02, len(codes))


CHANGES: dict[str, Change] = {
    "whole groups collapse": whole,
    "half of a group collapses": half,
    "large groups collapse more often": large,
    "samples of some groups flip": flips,
    "groups shift (continuous)": shifts,
}


def family(
    rng: Rng, size: Callable[[Rng, int], Array], change: Change, groups: int, limit: float
) -> Any:
    """Return baseline scores, candidate scores and groups of an evaluation that drops by limit."""
    sizes = size(rng, groups)
    codes = np.repeat(np.arange(groups), sizes)
    reference = (continuous if change is shifts else right)(rng, codes, groups)
    return reference, change(rng, sizes, codes, reference, limit), codes


def rates(
    size: Callable[[Rng, int], Array], change: Change, groups: int, limit: float, families: int
) -> tuple[float, float]:
    """Return the shares of families that pass and that fail."""
    rng = np.random.default_rng(SEED)
    passed = failed = 0
    for _ in range(families):
        reference, candidate, codes = family(rng, size, change, groups, limit)
        test = grouped_mean_test(
            reference,
            candidate,
            codes,
            worst=min(0.0, float(candidate.min())),
            highest=1.0,
            relative=True,
            alpha=ALPHA,
        )
        passed += test.p_at_least(limit) <= ALPHA
        failed += test.p_at_most(limit) <= ALPHA
    return passed / families, failed / families


def as_if_independent(
    size: Callable[[Rng, int], Array], change: Change, groups: int, limit: float, families: int
) -> float:
    """Return the share of families with 0/1 scores that pass if judged without groups."""
    rng = np.random.default_rng(SEED)
    passed = 0
    for _ in range(families):
        reference, candidate, _ = family(rng, size, change, groups, limit)
        test = PairedExactTest(
            lost=int((reference > candidate).sum()),
            gained=int((reference < candidate).sum()),
            right=int(reference.sum()),
            samples=len(reference),
            relative=True,
            alpha=ALPHA,
        )
        passed += test.p_at_least(limit) <= ALPHA
    return passed / families


def main() -> None:
    families = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    columns = [(limit, groups) for limit in LIMITS for groups in GROUPS]
    cells = [f"{100 * at:g} %, {n} |" for at, n in columns]
    print("| change | outcome |", *cells, "without groups |")
    print("|---|---|" + "---|" * (len(columns) + 1))
    for name, change in CHANGES.items():
        found = [[rates(size, change, n, at, families) for size in SIZES] for at, n in columns]
        naive = ""
        if change is not shifts:
            cases = [(s, n, at) for s in SIZES for at, n in columns if n <= 300]
            worst = max(as_if_independent(s, change, n, at, families // 20) for s, n, at in cases)
            naive = f"{100 * worst:.0f} %"
        for index, outcome in enumerate(("passes", "fails")):
            shown = [f"{100 * max(rate[index] for rate in each):.1f} % |" for each in found]
            print(f"| {name} | {outcome} |", *shown, f"{naive if index == 0 else ''} |", flush=True)


if __name__ == "__main__":
    main()

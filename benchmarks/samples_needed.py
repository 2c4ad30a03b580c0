"""Print how many samples, or images, it takes to pass a limit if nothing drops at all.

python benchmarks/samples_needed.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pytest_int8bench.accuracy.limit import Limit
from pytest_int8bench.accuracy.statistics.verdict import samples_to_pass

LIMITS = ("1%", "2%", "5%", "10%")
#: Too few for any of the limits.
SAMPLES = 40

Array = np.ndarray[Any, Any]


def f1(rows: Array) -> float:
    right, wrong = rows.sum(axis=0).tolist()
    return float(2 * right / (2 * right + wrong))


def counts(sizes: Array, found: Any) -> Array:
    """Counts of true positives and of errors of images of which a share is found."""
    right = np.round(found * sizes)
    return np.stack([right, sizes - right], axis=1)


def main() -> None:
    rng = np.random.default_rng(20)
    right = np.arange(SAMPLES) % 5 > 0
    # Half a sample's width off, so that the sizes are those expected of an exponential draw.
    uneven = -100 * np.log((np.arange(SAMPLES) + 0.5) / SAMPLES)
    alike = np.full(SAMPLES, 100.0) + right
    found = rng.beta(8, 2, SAMPLES)
    groups = np.arange(SAMPLES)
    rows: dict[str, tuple[Array, Callable[[Array], float] | None, Any]] = {
        "continuous scores, 0.5 to 0.9": (rng.uniform(0.5, 0.9, SAMPLES), None, None),
        "groups of 10, 80 % right": (np.tile(right, 10), None, np.tile(groups, 10)),
        "F1, images that are alike": (counts(alike, 0.85), f1, None),
        "F1, images of exponential sizes, some hard": (counts(uneven, found), f1, None),
    }
    print("| scores |", *(f"{limit} |" for limit in LIMITS))
    print("|---|" + "---|" * len(LIMITS))
    for name, (scores, aggregate, labels) in rows.items():
        cells = []
        for text in LIMITS:
            limit = Limit.parse(text)
            needed = samples_to_pass(scores, limit, aggregate=aggregate, groups=labels)
            assert needed is not None
            cells.append(f"{needed // (10 if labels is not None else 1):,} |")
        print(f"| {name} |", *cells)


if __name__ == "__main__":
    main()

"""Print how many samples, or images, a candidate without any loss needs to pass a limit.

    python benchmarks/samples_needed.py

The command prints the table in docs/accuracy.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pytest_int8bench.accuracy.limit import Limit
from pytest_int8bench.accuracy.statistics.verdict import samples_to_pass

LIMITS = ("1%", "2%", "5%", "10%")
#: Too few samples to pass any of the limits.
SAMPLES = 40

Array = np.ndarray[Any, Any]


def f1(rows: Array) -> float:
    true_positives, errors = rows.sum(axis=0).tolist()
    return float(2 * true_positives / (2 * true_positives + errors))


def counts(objects: Array, recall: Any) -> Array:
    """Return true positives and errors of each image, from its number of objects and its recall."""
    true_positives = np.round(recall * objects)
    return np.stack([true_positives, objects - true_positives], axis=1)


def main() -> None:
    rng = np.random.default_rng(20)
    is_right = np.arange(SAMPLES) % 5 > 0
    # Quantiles of an exponential distribution, at the middle of each sample's share.
    uneven = -100 * np.log((np.arange(SAMPLES) + 0.5) / SAMPLES)
    alike = np.full(SAMPLES, 100.0) + is_right
    recall = rng.beta(8, 2, SAMPLES)
    groups = np.arange(SAMPLES)
    rows: dict[str, tuple[Array, Callable[[Array], float] | None, Any]] = {
        "continuous scores, 0.5 to 0.9": (rng.uniform(0.5, 0.9, SAMPLES), None, None),
        "groups of 10, 80 % right": (np.tile(is_right, 10), None, np.tile(groups, 10)),
        "F1, similar images": (counts(alike, 0.85), f1, None),
        "F1, images of exponential sizes, some hard": (counts(uneven, recall), f1, None),
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

"""Samples that belong together: the group is what was drawn at random, not the sample."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pytest_int8bench.accuracy.statistics.checks import ScoreError
from pytest_int8bench.accuracy.statistics.mean_tests import Floats, Means

Codes = NDArray[np.int64]


def group_codes(given: Any, samples: int, metric: str) -> Codes:
    """Return the number of each sample's group, counted from 0 in the order of appearance.

    Args:
        given: one label per sample: names, numbers, or tuples of them.
        samples: how many samples there are.
        metric: the metric's name, for errors.

    Raises:
        ScoreError: one line, if it is anything else, or if all samples are of one group.
    """
    labels = _labels(given, metric)
    if len(labels) != samples:
        raise ScoreError(
            f"{metric}: groups must be one label per sample, got {len(labels)} labels for "
            f"{samples} samples"
        )
    numbers: dict[Any, int] = {}
    codes = np.empty(samples, dtype=np.int64)
    for index, label in enumerate(labels):
        if label is None or label != label:  # NaN
            raise ScoreError(f"{metric}: every sample must be in a group, sample {index} is not")
        try:
            codes[index] = numbers.setdefault(label, len(numbers))
        except TypeError:
            raise ScoreError(
                f"{metric}: labels of groups must be names or numbers, got {label!r:.40}"
            ) from None
    if len(numbers) < 2:
        raise ScoreError(
            f"{metric}: needs at least 2 groups, got {len(numbers)}: the groups are what is "
            "sampled, not the samples in them"
        )
    return codes


def _labels(given: Any, metric: str) -> list[Any]:
    given = getattr(given, "tolist", lambda: given)()  # arrays, tensors, series
    if isinstance(given, str | bytes | Mapping | Set) or not hasattr(given, "__len__"):
        raise ScoreError(
            f"{metric}: groups must be a list of one label per sample, got {given!r:.40}"
        )
    return list(given)


def grouped_means(
    reference: Floats,
    candidate: Floats,
    codes: Codes,
    *,
    worst: float,
    highest: float,
    relative: bool,
    alpha: float,
) -> Means:
    """Return the test of a mean over samples whose groups are the sampling units.

    A unit's loss is the sum over its samples, so that large groups count for more, as they do in
    the metric. A whole group can collapse at once, the largest one too.
    """
    sizes = np.bincount(codes).astype(np.float64)
    largest = float(sizes.max())
    low, high = float(reference.min()), float(reference.max())
    return Means(
        _sums(reference - candidate, codes),
        _sums(reference, codes) if relative else sizes,
        collapse=(largest * (high - worst), largest * (high if relative else 1.0)),
        jump=(largest * (low - highest), largest * (low if relative else 1.0)),
        alpha=alpha,
        at_stake=sizes * (high - worst),
    )


def _sums(values: Floats, codes: Codes) -> Floats:
    found: Floats = np.bincount(codes, weights=values).astype(np.float64)
    return found

"""Test samples that come in groups, where the groups rather than the samples are independent."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pytest_int8bench.accuracy.statistics.checks import ScoreError
from pytest_int8bench.accuracy.statistics.mean_tests import Floats, MeanTest

Codes = NDArray[np.int64]


def group_codes(given: Any, samples: int, metric: str) -> Codes:
    """Number the groups from 0 in order of appearance, and return each sample's group number.

    Args:
        given: one label per sample: names, numbers, or tuples of them.
        samples: the number of samples.
        metric: the metric's name, for errors.

    Raises:
        ScoreError: for other labels, or if all samples are in one group.
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
            raise ScoreError(
                f"{metric}: every sample must have a group label, got {label} for sample {index}"
            )
        try:
            codes[index] = numbers.setdefault(label, len(numbers))
        except TypeError:
            raise ScoreError(
                f"{metric}: group labels must be names or numbers, got {label!r:.40}"
            ) from None
    if len(numbers) < 2:
        raise ScoreError(
            f"{metric}: needs at least 2 groups, got {len(numbers)}; groups, not the samples in "
            "them, count as independent"
        )
    return codes


def _labels(given: Any, metric: str) -> list[Any]:
    given = getattr(given, "tolist", lambda: given)()  # arrays, tensors, series
    if isinstance(given, str | bytes | Mapping | Set) or not hasattr(given, "__len__"):
        raise ScoreError(
            f"{metric}: groups must be a list of one label per sample, got {given!r:.40}"
        )
    return list(given)


def grouped_mean_test(
    reference: Floats,
    candidate: Floats,
    codes: Codes,
    *,
    worst: float,
    highest: float,
    relative: bool,
    alpha: float,
) -> MeanTest:
    """Return the test of a mean over samples, with groups as the sampling units.

    A unit's loss is the sum over its samples, so that large groups weigh more, as they do in the
    metric. Any group can collapse as a whole, even the largest.
    """
    sizes = np.bincount(codes).astype(np.float64)
    largest = float(sizes.max())
    low, high = float(reference.min()), float(reference.max())
    return MeanTest(
        _sums(reference - candidate, codes),
        _sums(reference, codes) if relative else sizes,
        collapse=(largest * (high - worst), largest * (high if relative else 1.0)),
        jump=(largest * (low - highest), largest * (low if relative else 1.0)),
        alpha=alpha,
        possible_losses=sizes * (high - worst),
    )


def _sums(values: Floats, codes: Codes) -> Floats:
    found: Floats = np.bincount(codes, weights=values).astype(np.float64)
    return found

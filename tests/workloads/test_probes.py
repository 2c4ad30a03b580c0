"""Test judging frozen embeddings by kNN and a linear probe."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_int8bench.errors import WorkloadError
from pytest_int8bench.workloads import Evaluation
from pytest_int8bench.workloads.probes import Split, embedding_evaluations

CLASSES, DIMENSIONS, BATCH = 3, 6, 7
SIZES = {"train": 45, "selection": 18, "certification": 30}


def samples(name: str, spread: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Return labels, and embeddings around one corner per class."""
    rng = np.random.default_rng(list(SIZES).index(name))
    labels = np.arange(SIZES[name]) % CLASSES
    return labels, np.eye(DIMENSIONS)[labels] + rng.normal(0, spread, (len(labels), DIMENSIONS))


def split(name: str, spread: float = 0.1) -> Split:
    labels, points = samples(name, spread)
    starts = range(0, len(labels), BATCH)
    return Split(labels, lambda: ((points[start : start + BATCH],) for start in starts))


class Encoder:
    """A forward that embeds samples by applying ``change``."""

    def __init__(self, change: Callable[[Any], Any] = lambda points: points) -> None:
        self.change = change
        self.calls = 0

    def __call__(self, points: np.ndarray) -> Any:
        self.calls += 1
        return self.change(points)


def evaluations(spread: float = 0.1, **splits: Split) -> tuple[Evaluation, Evaluation]:
    chosen = {name: split(name, spread) for name in SIZES} | splits
    return embedding_evaluations(**chosen, embed=lambda output: output, neighbours=5)


def accuracy(evaluation: Evaluation, baseline: Encoder, candidate: Encoder) -> float:
    assert evaluation.fit is not None
    _, scores = evaluation.scores(candidate, evaluation.fit(baseline))
    assert set(scores) <= {0.0, 1.0}
    return float(scores.mean())


def test_evaluates_20_nearest_neighbours_and_a_linear_probe() -> None:
    found = embedding_evaluations(*(split(name) for name in SIZES), lambda output: output)
    assert [evaluation.metric for evaluation in found] == ["knn20 top1", "linear probe top1"]
    assert [evaluation.metric for evaluation in evaluations()] == ["knn5 top1", "linear probe top1"]


@pytest.mark.parametrize("index", [0, 1], ids=["knn", "probe"])
def test_separable_classes_score_well(index: int) -> None:
    evaluation = evaluations()[index]
    assert evaluation.fit is not None
    assert evaluation.selection is not None
    forward = Encoder()
    fitted = evaluation.fit(forward)
    for score, name in ((evaluation.scores, "certification"), (evaluation.selection, "selection")):
        ids, scores = score(forward, fitted)
        assert list(ids) == list(range(SIZES[name]))
        assert scores.tolist() == [1.0] * SIZES[name]


@pytest.mark.parametrize("index", [0, 1], ids=["knn", "probe"])
def test_candidate_uses_the_probe_of_the_baseline(index: int) -> None:
    # A candidate that swaps classes separates them equally well, so it passes only if refitted.
    swapped = Encoder(lambda points: points[:, [1, 2, 0, 3, 4, 5]])
    assert accuracy(evaluations()[index], Encoder(), swapped) == 0.0
    assert accuracy(evaluations()[index], swapped, swapped) == 1.0


@pytest.mark.parametrize("index", [0, 1], ids=["knn", "probe"])
def test_centres_candidate_embeddings_by_the_baseline_mean(index: int) -> None:
    moved = Encoder(lambda points: points + 10 * np.eye(DIMENSIONS)[0])
    assert accuracy(evaluations()[index], Encoder(), moved) == pytest.approx(1 / CLASSES)


@settings(max_examples=10, deadline=None)
@given(
    exponents=st.lists(st.integers(-3, 3), min_size=DIMENSIONS, max_size=DIMENSIONS),
    shift=st.integers(-2, 2),
)
def test_result_does_not_depend_on_scale_of_a_dimension(exponents: list[int], shift: int) -> None:
    scaled = Encoder(lambda points: points * 2.0 ** np.array(exponents) + shift)
    plain = Encoder()
    for index in (0, 1):
        # The spread is large enough for some errors.
        expected = accuracy(evaluations(0.4)[index], plain, plain)
        assert 0.5 < expected < 1.0
        assert accuracy(evaluations(0.4)[index], scaled, scaled) == pytest.approx(
            expected, abs=1 / SIZES["certification"]
        )


def test_accepts_tensors_as_embeddings() -> None:
    forward = Encoder(lambda points: torch.from_numpy(points).requires_grad_())
    assert accuracy(evaluations()[0], forward, forward) == 1.0


def test_both_metrics_share_one_pass_of_each_split() -> None:
    baseline, candidate = Encoder(), Encoder()
    for evaluation in evaluations():
        assert evaluation.fit is not None
        assert evaluation.selection is not None
        fitted = evaluation.fit(baseline)
        for forward in (baseline, candidate):
            evaluation.scores(forward, fitted)
            evaluation.selection(forward, fitted)
    batches = {name: -(-size // BATCH) for name, size in SIZES.items()}
    assert baseline.calls == sum(batches.values())
    assert candidate.calls == batches["selection"] + batches["certification"]


def test_embeddings_are_freed_with_their_forward() -> None:
    evaluation = evaluations()[0]
    forward = Encoder()
    accuracy(evaluation, forward, forward)
    gone = weakref.ref(forward)
    del forward
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("members", [{"__slots__": ()}, {"__hash__": None}])
def test_supports_forward_that_cannot_be_weakly_referenced(members: dict[str, Any]) -> None:
    forward = type("Odd", (), {**members, "__call__": lambda self, points: points})()
    assert accuracy(evaluations()[0], forward, forward) == 1.0


def test_returns_ids_of_the_split() -> None:
    plain = split("certification")
    names = [f"scene {i}" for i in range(SIZES["certification"])]
    knn, _ = evaluations(certification=Split(plain.labels, plain.batches, names))
    assert knn.fit is not None
    forward = Encoder()
    assert knn.scores(forward, knn.fit(forward))[0] == names


@pytest.mark.parametrize("name", list(SIZES))
def test_rejects_empty_split(name: str) -> None:
    empty = Split(np.zeros(0, dtype=np.int64), list)
    with pytest.raises(WorkloadError) as caught:
        evaluations(**{name: empty})
    assert str(caught.value) == f"the {name} split must have at least 1 sample, got 0"


def test_rejects_fewer_train_samples_than_neighbours() -> None:
    with pytest.raises(WorkloadError) as caught:
        evaluations(train=Split(np.array([0, 1, 0, 1]), list))
    assert str(caught.value) == (
        "the train split must have at least 5 samples for a kNN of 5, got 4"
    )


def test_rejects_a_single_class() -> None:
    with pytest.raises(WorkloadError) as caught:
        evaluations(train=Split(np.full(9, 4), list))
    assert str(caught.value) == "the train split must have at least 2 classes, got only class 4"


@pytest.mark.parametrize("kept", [0, 9])
def test_needs_one_embedding_per_label(kept: int) -> None:
    labels, points = samples("selection")
    batches = [(points[:kept],)] if kept else []
    evaluation = evaluations(selection=Split(labels, lambda: batches))[0]
    assert evaluation.fit is not None
    assert evaluation.selection is not None
    forward = Encoder()
    with pytest.raises(WorkloadError) as caught:
        evaluation.selection(forward, evaluation.fit(forward))
    assert str(caught.value) == (
        f"the selection split must have one embedding per label, got {kept} embeddings "
        "for 18 labels"
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_embeddings_must_be_finite(value: float) -> None:
    def broken(points: np.ndarray) -> np.ndarray:
        # All values of one sample in each batch are bad: samples are counted, not values.
        return np.concatenate([np.full((1, DIMENSIONS), value), points[1:]])

    evaluation = evaluations()[1]
    assert evaluation.fit is not None
    fitted = evaluation.fit(Encoder())
    with pytest.raises(WorkloadError) as caught:
        evaluation.scores(Encoder(broken), fitted)
    assert str(caught.value) == (
        "embeddings must be finite, got NaN or infinity in 5 of 30 samples "
        "of the certification split"
    )


@pytest.mark.parametrize("index", [0, 1], ids=["knn", "probe"])
def test_reports_missing_scikit_learn_in_one_line(
    index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    evaluation = evaluations()[index]
    assert evaluation.fit is not None
    with pytest.raises(WorkloadError) as caught:
        evaluation.fit(Encoder())
    assert str(caught.value).startswith(
        "kNN and linear probe need pip install 'pytest-int8bench[eval]' ("
    )

"""Evaluate frozen embeddings with a kNN and a linear probe.

The classifiers are fitted on the baseline's embeddings alone and then classify both models'
embeddings, because a deployed classifier is not refitted when its encoder is quantized. Embeddings
are standardized with the statistics of the baseline's train embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from pytest_int8bench.errors import WorkloadError
from pytest_int8bench.workloads.workload import Evaluation

Forward: TypeAlias = Callable[..., Any]
Scores: TypeAlias = tuple[Sequence[Any], NDArray[np.float64]]

# With hundreds of dimensions and as many samples, scikit-learn's default of 1.0 overfits to
# dimensions that hardly vary. Of 10, 1, 0.1, 0.01 and 0.001, this value gave the highest accuracy
# on the selection split (BF16 OlmoEarth nano, v1 and v1.2, random weights).
_PROBE_C = 0.1
_PROBE_ITERATIONS = 5000


@dataclass(frozen=True, eq=False)
class Split:
    """Labelled samples."""

    labels: NDArray[np.int64]
    """(samples,) class of each sample."""
    batches: Callable[[], Iterable[tuple[Any, ...]]]
    """Return a new iterable of the model's inputs, batch by batch, in the order of the labels."""
    ids: Sequence[Any] | None = None
    """Names of the samples, unique within the split; by default, their positions."""


def embedding_evaluations(
    train: Split,
    selection: Split,
    certification: Split,
    embed: Callable[[Any], Any],
    *,
    neighbours: int = 20,
) -> tuple[Evaluation, Evaluation]:
    """Return a kNN (cosine) and a linear probe (logistic regression) that score samples 0 or 1.

    Both use the same embeddings, computed once per split and ``forward``, so a ``forward`` must
    always run the same model.

    Args:
        train: samples to fit the classifiers on, embedded by the baseline.
        selection: samples that ``Evaluation.selection`` scores.
        certification: samples that ``Evaluation.scores`` scores.
        embed: maps the output of ``forward`` to embeddings (batch, dimensions).
        neighbours: number of neighbours of the kNN.

    Raises:
        WorkloadError: one line. Raised here if a split is empty, or if ``train`` has fewer samples
            than neighbours or a single class; raised by the evaluations if embeddings are not
            finite or differ in number from the labels, or if scikit-learn is missing.
    """
    splits = {"train": train, "selection": selection, "certification": certification}
    for name, split in splits.items():
        if len(split.labels) == 0:
            raise WorkloadError(f"the {name} split must have at least 1 sample, got 0")
    if len(train.labels) < neighbours:
        raise WorkloadError(
            f"the train split must have at least {neighbours} samples for a kNN of {neighbours}, "
            f"got {len(train.labels)}"
        )
    classes = np.unique(train.labels)
    if len(classes) < 2:
        raise WorkloadError(
            f"the train split must have at least 2 classes, got only class {classes[0]}"
        )
    embeddings = _Embeddings(splits, embed)
    return (
        _evaluation(f"knn{neighbours} top1", embeddings, lambda: _knn(neighbours)),
        _evaluation("linear probe top1", embeddings, _probe),
    )


class _Embeddings:
    """Caches the embeddings of each split for each ``forward``, for as long as that object
    lives."""

    def __init__(self, splits: Mapping[str, Split], embed: Callable[[Any], Any]) -> None:
        self.splits = splits
        self._embed = embed
        self._known: WeakKeyDictionary[Forward, dict[str, NDArray[np.float32]]] = (
            WeakKeyDictionary()
        )

    def of(self, name: str, forward: Forward) -> NDArray[np.float32]:
        """Return the embeddings (samples, dimensions) of the split ``name``."""
        try:
            known = self._known.setdefault(forward, {})
        except TypeError:  # some callables have no weak references or no hash
            known = {}
        if name not in known:
            known[name] = self._compute(name, forward)
        return known[name]

    def _compute(self, name: str, forward: Forward) -> NDArray[np.float32]:
        split = self.splits[name]
        parts = [_array(self._embed(forward(*batch))) for batch in split.batches()]
        count = sum(len(part) for part in parts)
        if count != len(split.labels):
            raise WorkloadError(
                f"the {name} split must have one embedding per label, "
                f"got {count} embeddings for {len(split.labels)} labels"
            )
        embeddings = np.concatenate(parts)
        bad = int((~np.isfinite(embeddings).all(axis=1)).sum())
        if bad:
            raise WorkloadError(
                f"embeddings must be finite, got NaN or infinity in {bad} of {count} samples "
                f"of the {name} split"
            )
        return embeddings


def _evaluation(
    metric: str, embeddings: _Embeddings, make_classifier: Callable[[], Any]
) -> Evaluation:
    def fit(forward: Forward) -> Any:
        train = embeddings.splits["train"]
        return make_classifier().fit(embeddings.of("train", forward), train.labels)

    def score(name: str, forward: Forward, fitted: Any) -> Scores:
        split = embeddings.splits[name]
        predicted = fitted.predict(embeddings.of(name, forward))
        ids = range(len(split.labels)) if split.ids is None else split.ids
        return ids, (predicted == split.labels).astype(np.float64)

    return Evaluation(
        metric=metric,
        fit=fit,
        scores=lambda forward, fitted: score("certification", forward, fitted),
        selection=lambda forward, fitted: score("selection", forward, fitted),
    )


def _knn(neighbours: int) -> Any:
    _check_sklearn()
    from sklearn.neighbors import KNeighborsClassifier

    return _standardized(KNeighborsClassifier(n_neighbors=neighbours, metric="cosine"))


def _probe() -> Any:
    _check_sklearn()
    from sklearn.linear_model import LogisticRegression

    return _standardized(LogisticRegression(C=_PROBE_C, max_iter=_PROBE_ITERATIONS))


def _standardized(classifier: Any) -> Any:
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), classifier)


def _check_sklearn() -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise WorkloadError(
            f"kNN and linear probe need pip install 'pytest-int8bench[eval]' ({error})"
        ) from None


def _array(embeddings: Any) -> NDArray[np.float32]:
    if hasattr(embeddings, "detach"):  # a tensor, on any device
        embeddings = embeddings.detach().float().cpu().numpy()
    return np.asarray(embeddings, dtype=np.float32)

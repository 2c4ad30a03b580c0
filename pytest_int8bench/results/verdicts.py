"""Records of accuracy: verdicts, and what each layer costs."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Any

from pytest_int8bench.results.base import Record
from pytest_int8bench.results.checks import Bound, Count, Rule, one_of
from pytest_int8bench.results.shapes import Distance, Layer, Remedy

#: Metric of a comparison without labels.
NO_LABELS = "outputs"
# As :class:`~pytest_int8bench.accuracy.limit.Limit` writes it.
_LIMIT_TEXT = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(?:%|pp)\s*")
OUTCOMES = ("PASS", "FAIL", "INCONCLUSIVE", "proxy-ok")


def _is_limit(value: Any) -> bool:
    found = _LIMIT_TEXT.fullmatch(value) if isinstance(value, str) else None
    return found is not None and 0 < float(found[1]) <= 100


_LIMIT = Rule("a percentage such as 1% or 1pp, over 0 and at most 100", _is_limit)


@dataclass(frozen=True, kw_only=True)
class Accuracy(Record):
    """One verdict: a metric of a candidate against its baseline's."""

    KIND = "a verdict"

    metric: str
    """Name of the metric; ``outputs`` where there are no labels."""
    outcome: Annotated[str, one_of(OUTCOMES)]
    """``PASS``, ``FAIL``, ``INCONCLUSIVE`` or, without labels, ``proxy-ok``."""
    reason: str | None = None
    """What its reader should know: why a comparison without labels failed, the next step."""
    random_weights: bool = False
    """The model is not trained: the verdict only checks that the pipeline works."""
    samples: Count
    """Samples that were scored."""
    baseline: float | None = None
    """The baseline's metric."""
    candidate: float | None = None
    """The candidate's metric."""
    limit: Annotated[str, _LIMIT] | None = None
    """Largest drop that passes: ``1%`` relative, ``1pp`` absolute."""
    drop: float | None = None
    """In the limit's terms: a share of the baseline's metric, or a difference of both."""
    drop_low: Bound | None = None
    """One-sided 95 % lower bound of the drop."""
    drop_high: Bound | None = None
    """One-sided 95 % upper bound of the drop."""
    lost: Count | None = None
    """Samples whose score got worse."""
    gained: Count | None = None
    """Samples whose score got better."""
    needed: Count | None = None
    """Samples that would decide, with ``INCONCLUSIVE``."""
    method: str | None = None
    """``exact`` (0/1 scores), ``mean`` (continuous scores, and groups of any scores) or
    ``jackknife`` (aggregated)."""
    groups: Count | None = None
    """Groups of samples that belong together; None if every sample stands for itself."""
    distance: Distance | None = None
    """Without labels: how far the outputs are from the baseline's."""
    floor: Distance | None = None
    """Without labels: the same for the eager baseline, the noise floor."""
    remedies: list[Remedy] = field(default_factory=list)
    """What ``--int8-remedy`` tried, and what came of it."""
    seconds: float | None = None
    """Time that the scores took, compiling aside; with the first candidate of a baseline, that of
    the baseline's too. Evaluations that share outputs pay for them once."""

    @property
    def is_pipeline_check(self) -> bool:
        """A metric of random weights shows that the evaluation works, and judges nothing."""
        return self.random_weights and self.metric != NO_LABELS

    @property
    def identity(self) -> tuple[str, ...]:
        """What stays the same across commits: node id, workload name and metric."""
        return (self.nodeid, self.workload, self.metric)


@dataclass(frozen=True, kw_only=True)
class Sensitivity(Record):
    """What each layer, or block, of a model costs when it alone is quantized."""

    KIND = "a table of layers"

    by: str
    """``layer`` or ``block``."""
    metric: str | None = None
    """Metric of ``drop``; None where only SQNR was measured."""
    samples: Count
    """Samples that the metric, or else the SQNR, was measured on."""
    layers: list[Layer]
    """Worst first: ``name``, ``layers`` (names of the linear layers; none for the attention of a
    layer or block), ``sqnr_db`` (None for equal outputs), and with a metric ``drop`` (difference
    from the baseline's), ``lost``, ``gained``."""
    seconds: float | None = None
    """Time that measuring the table took."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for place, row in enumerate(self.layers):
            for name in ("drop", "lost", "gained") if self.metric is not None else ():
                if row.get(name) is None:
                    raise ValueError(f"layers[{place}].{name} must be a number, got None")

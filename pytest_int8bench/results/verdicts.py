"""Records of accuracy: verdicts, and tables of the accuracy lost by quantizing each layer."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Any

from pytest_int8bench.results.base import Record
from pytest_int8bench.results.checks import Bound, Count, Rule, one_of
from pytest_int8bench.results.shapes import Distance, Layer, Remedy

#: Metric of a comparison without labels.
NO_LABELS = "outputs"
# The format of :class:`~pytest_int8bench.accuracy.limit.Limit`.
_LIMIT_TEXT = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(?:%|pp)\s*")
OUTCOMES = ("PASS", "FAIL", "INCONCLUSIVE", "proxy-ok")


def _is_limit(value: Any) -> bool:
    found = _LIMIT_TEXT.fullmatch(value) if isinstance(value, str) else None
    return found is not None and 0 < float(found[1]) <= 100


_LIMIT = Rule("a percentage such as 1% or 1pp, over 0 and at most 100", _is_limit)


@dataclass(frozen=True, kw_only=True)
class Accuracy(Record):
    """One verdict on a metric of a candidate, compared with its baseline."""

    KIND = "a verdict"

    metric: str
    """Name of the metric; ``outputs`` if there are no labels."""
    outcome: Annotated[str, one_of(OUTCOMES)]
    """``PASS``, ``FAIL``, ``INCONCLUSIVE`` or, without labels, ``proxy-ok``."""
    reason: str | None = None
    """A note on the verdict, such as why a comparison without labels failed, or the suggested next
    step."""
    random_weights: bool = False
    """Whether the weights are random, so that the verdict only checks that the pipeline works."""
    samples: Count
    """Number of scored samples."""
    baseline: float | None = None
    """The baseline's metric."""
    candidate: float | None = None
    """The candidate's metric."""
    limit: Annotated[str, _LIMIT] | None = None
    """Largest drop that passes: ``1%`` relative, ``1pp`` absolute."""
    drop: float | None = None
    """Drop of the metric: relative to the baseline's metric if the limit is relative, else
    absolute."""
    drop_low: Bound | None = None
    """One-sided 95 % lower bound of the drop."""
    drop_high: Bound | None = None
    """One-sided 95 % upper bound of the drop."""
    lost: Count | None = None
    """Number of samples whose score got worse."""
    gained: Count | None = None
    """Number of samples whose score got better."""
    needed: Count | None = None
    """With ``INCONCLUSIVE``, the approximate number of samples needed to decide."""
    method: str | None = None
    """``exact`` (scores of 0 or 1), ``mean`` (continuous scores, or any scores with groups) or
    ``jackknife`` (aggregated metrics)."""
    groups: Count | None = None
    """Number of groups of dependent samples; None if samples are independent."""
    distance: Distance | None = None
    """Without labels, the distance of the outputs from the baseline's."""
    floor: Distance | None = None
    """Without labels, the same distance for the eager baseline: the noise floor."""
    remedies: list[Remedy] = field(default_factory=list)
    """The remedies that ``--int8-remedy`` tried, with their outcomes."""
    seconds: float | None = None
    """Time to compute the scores, without compilation. It includes the baseline's time for the
    first candidate of a baseline. If evaluations share outputs, only one includes the time to
    compute them."""

    @property
    def is_pipeline_check(self) -> bool:
        """Whether it is a metric on random weights, which only shows that the evaluation works."""
        return self.random_weights and self.metric != NO_LABELS

    @property
    def drop_unit(self) -> str:
        """Unit of ``100 * drop``: ``pp`` for an absolute limit, else ``%``."""
        return "pp" if str(self.limit).endswith("pp") else "%"

    @property
    def identity(self) -> tuple[str, ...]:
        """The values that stay the same across commits: node id, workload name and metric."""
        return (self.nodeid, self.workload, self.metric)


@dataclass(frozen=True, kw_only=True)
class Sensitivity(Record):
    """For each layer or block of a model, the accuracy lost if only it is quantized."""

    KIND = "a table of layers"

    by: str
    """``layer`` or ``block``."""
    metric: str | None = None
    """Metric of ``drop``; None if only SQNR was measured."""
    samples: Count
    """Number of samples for the metric or, without one, for the SQNR."""
    layers: list[Layer]
    """Worst first: ``name``, ``layers`` (names of the linear layers; empty for the attention of a
    layer or block), ``sqnr_db`` (None for equal outputs), and, with a metric, ``drop`` (from the
    baseline's metric), ``lost`` and ``gained``."""
    seconds: float | None = None
    """Time of the measurement."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for place, row in enumerate(self.layers):
            for name in ("drop", "lost", "gained") if self.metric is not None else ():
                if row.get(name) is None:
                    raise ValueError(f"layers[{place}].{name} must be a number, got None")

"""Name the outcomes of a comparison and the records that hold them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pytest_int8bench.results.figure import PLAIN

Identity = tuple[str, ...]

#: Outcomes of a run, in the order in which they are counted.
REGRESSED, IMPROVED, SAME, NEW, MISSING = "regressed", "improved", "same", "new", "missing"
#: Worse by more than the limit, but no more than processes of the same code may differ by.
SUSPECTED = "suspected"
OOM, FAILED, ACCURACY_FAILED = "oom", "failed", "accuracy-failed"
SKIPPED, DISABLED, INCOMPARABLE = "skipped", "disabled", "incomparable"
OUTCOMES = (
    REGRESSED,
    SUSPECTED,
    IMPROVED,
    SAME,
    NEW,
    MISSING,
    OOM,
    FAILED,
    ACCURACY_FAILED,
    SKIPPED,
    DISABLED,
    INCOMPARABLE,
)
#: Outcomes of one metric beside those: worse by no more than the limit, and without a limit.
WITHIN, NOT_JUDGED = "within limit", "not judged"
#: Outcome of a verdict that was PASS, where it does not count as regressed.
UNDECIDED_NOW = "inconclusive"

#: Exit codes: what a run or verdict adds to that of the comparison.
PASSES, REGRESSES, UNDECIDED = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class Change:
    """One metric of one run."""

    metric: str
    growth: float
    """By how much the cost grew, relative: 0.05 is 5 % worse, below 0 is better."""
    limit: float | None
    floor: float
    """Noise between processes: a growth of no more is no difference."""
    learned: bool
    """The floor comes from the files given, not from the metric's default or the rules."""
    outcome: str
    shown_from: float | None = None
    """Growth from which on the files show a regression, corrected for all that is judged; None
    where the rules give the floor, which decides then."""
    assumed: float | None = None
    """Standard deviation between processes that was assumed; None where the files show it, or show
    a larger one; infinite where a process says nothing about its own noise."""
    files_needed: int | None = None
    """Files of the base with which nothing is assumed; None where there are enough."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One run, or one verdict, of both sides."""

    nodeid: str
    workload: str
    run_name: str
    outcome: str
    exit_code: int
    reason: str | None = None

    @property
    def is_benchmark(self) -> bool:
        """It is a plain benchmark, not a point."""
        return self.workload == PLAIN


@dataclass(frozen=True, kw_only=True)
class RunChange(Compared):
    """One run of both sides."""

    base: Mapping[str, float] = field(default_factory=dict)
    """Metric -> geometric mean over the files of the base, in the unit of the field of
    ``Result``."""
    new: Mapping[str, float] = field(default_factory=dict)
    changes: tuple[Change, ...] = ()
    """Of the metrics that both sides have; empty where the run could not be compared."""

    def change(self, metric: str) -> Change | None:
        """Return the change of ``metric``, None where a side does not have it."""
        return next((change for change in self.changes if change.metric == metric), None)

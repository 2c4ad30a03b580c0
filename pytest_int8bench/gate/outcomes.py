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
    """The change of one metric of one run."""

    metric: str
    growth: float
    """Relative growth of the cost: 0.05 is 5 % worse, below 0 is better."""
    limit: float | None
    floor: float
    """Noise floor between processes; smaller growths count as equal."""
    learned: bool
    """Whether the floor was learned from the files rather than given."""
    outcome: str
    shown_from: float | None = None
    """Growth from which the files show a regression, corrected for the whole family; None if the
    rules give the floor, which then decides."""
    assumed: float | None = None
    """Assumed standard deviation between processes; None if the files show it or a larger one;
    infinite if a process says nothing about its own noise."""
    files_needed: int | None = None
    """Number of base files that would need no assumption; None if there are enough."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One run or verdict on both sides."""

    nodeid: str
    workload: str
    run_name: str
    outcome: str
    exit_code: int
    reason: str | None = None

    @property
    def is_benchmark(self) -> bool:
        """Whether it is a plain benchmark rather than a point."""
        return self.workload == PLAIN


@dataclass(frozen=True, kw_only=True)
class RunChange(Compared):
    """One run on both sides."""

    base: Mapping[str, float] = field(default_factory=dict)
    """Maps a metric to its geometric mean over the base files, in the unit of ``Result``."""
    new: Mapping[str, float] = field(default_factory=dict)
    changes: tuple[Change, ...] = ()
    """Changes of the metrics that both sides have; empty if the run could not be compared."""

    def change(self, metric: str) -> Change | None:
        """Return the change of ``metric``, or None if a side lacks it."""
        return next((change for change in self.changes if change.metric == metric), None)

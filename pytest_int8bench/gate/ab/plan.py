"""Plan an A/B: what is asked for, and the records of what came out."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pytest_int8bench.gate.ab.design import Design
from pytest_int8bench.gate.ab.judging import Judged, Screened
from pytest_int8bench.gate.ab.worktrees import Revision
from pytest_int8bench.gate.outcomes import PASSES, REGRESSES, UNDECIDED, Compared

WARM_UP, SCREENING, VERDICT = "warm-up", "screening", "verdict"
BASE, NEW = "base", "new"
#: Processes in a block.
PROCESSES = {SCREENING: 2, VERDICT: 4}

#: The round that represents a process, and the fields of ``Result`` and ``Benchmark`` that hold it.
MEDIAN, FASTEST = "median", "fastest"
FIELDS = {
    MEDIAN: ("batch_time_s", "call_time_s"),
    FASTEST: ("batch_time_min_s", "call_time_min_s"),
}
AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The request: what to compare, and how."""

    root: Path
    """Top level of the user's working tree."""
    folder: Path
    """Folder, in ``root``, that the command was given in."""
    base: Revision
    new: Revision
    pytest_args: tuple[str, ...] = ()
    design: Design = field(default_factory=Design)
    install: str | None = None
    """Shell command that builds or installs a side's packages."""
    budget_s: float | None = None
    retries: int = 3
    """Blocks in which the GPU was slowed down by heat that are measured again, all together."""
    allow_missing: bool = False
    allow_inconclusive: bool = False
    """Do not fail because of undecided runs."""
    statistic: str = AUTO
    """``median`` or ``fastest`` round of a process. ``auto``: the fastest without a GPU, where
    other load can only add to a time; else the median, for clocks vary both ways."""

    @property
    def key(self) -> str:
        """Identifies commands that are the same comparison."""
        parts = [self.base.commit, self.new.commit, *self.pytest_args, str(self.install)]
        parts += [self.statistic, os.environ.get("PYTEST_ADDOPTS", "")]
        parts += [str(self.folder.relative_to(self.root)), sys.executable, str(asdict(self.design))]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        """Return what is compared, as plain values."""
        return {
            "base": self.base.commit,
            "new": self.new.commit,
            "pytest_args": list(self.pytest_args),
            "install": self.install,
            "design": asdict(self.design),
        }


@dataclass(frozen=True, kw_only=True)
class AbRun(Compared):
    """One run of both revisions.

    Its outcome is ``PASS``, ``FAIL``, ``INCONCLUSIVE``, or why it was not compared: ``oom``,
    ``missing``, ``new``, ``failed``, ``skipped``, ``disabled``.
    """

    base_s: float | None = None
    """Seconds per batch, median of all processes of the last stage."""
    new_s: float | None = None
    screened: Screened | None = None
    judged: Judged | None = None
    """None if screening cleared it."""


@dataclass(frozen=True, kw_only=True)
class AbResult:
    """The outcome of a comparison."""

    plan: Plan
    environment: Mapping[str, Any]
    """Fingerprint of the machine."""
    runs: tuple[AbRun, ...]
    processes: int
    """Measuring processes that were run, also by commands that were interrupted."""
    seconds: float
    """Wall time of those."""
    statistic: str
    """The round that represents a process: ``median`` or ``fastest``."""
    notes: tuple[str, ...]

    @property
    def is_empty(self) -> bool:
        """No run was compared."""
        return not any(run.screened or run.judged for run in self.runs)

    @property
    def exit_code(self) -> int:
        """1 if a run is slower; else 2 if one is undecided or could not be compared, or nothing
        was; else 0."""
        codes = {run.exit_code for run in self.runs}
        if REGRESSES in codes:
            return REGRESSES
        return UNDECIDED if self.is_empty or UNDECIDED in codes else PASSES


def order_of(stage: str, block: int, attempt: int, seed: str) -> tuple[str, ...]:
    """Return who runs in a block, drawn at random, so that no rhythm of the machine can favour a
    side.

    In screening, two blocks are drawn together, AB BA or BA AB: a linear drift cancels. In the
    verdict stage each block is, from the six orders of two processes of each side.

    Args:
        stage: ``SCREENING`` or ``VERDICT``.
        block: its number, from 0 on.
        attempt: how often it was begun before.
        seed: what the order depends on, besides: the same for a comparison that is continued.
    """
    if stage == SCREENING:
        is_swapped = random.Random(f"{seed} {stage} {block // 2}").random() < 0.5
        return (NEW, BASE) if is_swapped != bool(block % 2) else (BASE, NEW)
    draw = random.Random(f"{seed} {stage} {block} {attempt}")
    places = list(itertools.combinations(range(PROCESSES[stage]), 2))
    new = places[draw.randrange(len(places))]
    return tuple(NEW if place in new else BASE for place in range(PROCESSES[stage]))


def duration(seconds: float) -> str:
    """Return a time as people read it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"

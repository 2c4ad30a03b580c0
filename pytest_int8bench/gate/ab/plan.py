"""Define the request for an A/B comparison, its result, and the order of its processes."""

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
#: Processes per block.
PROCESSES = {SCREENING: 2, VERDICT: 4}

#: Round whose time represents a process, and the fields of ``Result`` and ``Benchmark`` with it.
MEDIAN, FASTEST = "median", "fastest"
FIELDS = {
    MEDIAN: ("batch_time_s", "call_time_s"),
    FASTEST: ("batch_time_min_s", "call_time_min_s"),
}
AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Revisions to compare, and how to compare them."""

    root: Path
    """Top level of the user's working tree."""
    folder: Path
    """Folder in ``root`` from which the command was run."""
    base: Revision
    new: Revision
    pytest_args: tuple[str, ...] = ()
    design: Design = field(default_factory=Design)
    install: str | None = None
    """Shell command that builds or installs a side's packages."""
    budget_s: float | None = None
    retries: int = 3
    """Maximum number of blocks in total that are repeated because the GPU was throttled."""
    allow_missing: bool = False
    allow_inconclusive: bool = False
    """Whether inconclusive runs leave the exit code at 0."""
    statistic: str = AUTO
    """``median`` or ``fastest`` round of a process. ``auto`` is the fastest on a CPU, where other
    load can only add to a time, and the median on a GPU, whose clocks vary in both directions."""

    @property
    def key(self) -> str:
        """Hash that is equal for commands that request the same comparison."""
        parts = [self.base.commit, self.new.commit, *self.pytest_args, str(self.install)]
        parts += [self.statistic, os.environ.get("PYTEST_ADDOPTS", "")]
        parts += [str(self.folder.relative_to(self.root)), sys.executable, str(asdict(self.design))]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        """Return the header of the comparison's journal as JSON-compatible values."""
        return {
            "base": self.base.commit,
            "new": self.new.commit,
            "pytest_args": list(self.pytest_args),
            "install": self.install,
            "design": asdict(self.design),
        }


@dataclass(frozen=True, kw_only=True)
class AbRun(Compared):
    """Comparison of one run in both revisions.

    The outcome is ``PASS``, ``FAIL`` or ``INCONCLUSIVE``, or the reason why the run was not
    compared: ``oom``, ``missing``, ``new``, ``failed``, ``skipped`` or ``disabled``.
    """

    base_s: float | None = None
    """Seconds per batch: the median over all processes of the last stage."""
    new_s: float | None = None
    screened: Screened | None = None
    judged: Judged | None = None
    """None if screening cleared the run."""


@dataclass(frozen=True, kw_only=True)
class AbResult:
    """Result of a comparison."""

    plan: Plan
    environment: Mapping[str, Any]
    """Fingerprint of the machine."""
    runs: tuple[AbRun, ...]
    processes: int
    """Number of measuring processes, including those of interrupted commands."""
    seconds: float
    """Total wall time of these processes."""
    statistic: str
    """Round whose time represents a process: ``median`` or ``fastest``."""
    notes: tuple[str, ...]

    @property
    def is_empty(self) -> bool:
        """Whether no run was compared."""
        return not any(run.screened or run.judged for run in self.runs)

    @property
    def exit_code(self) -> int:
        """1 if a run is slower; otherwise 2 if a run is undecided or was not compared, or if there
        are none; otherwise 0."""
        codes = {run.exit_code for run in self.runs}
        if REGRESSES in codes:
            return REGRESSES
        return UNDECIDED if self.is_empty or UNDECIDED in codes else PASSES


def order_of(stage: str, block: int, attempt: int, seed: str) -> tuple[str, ...]:
    """Draw the order of the sides in a block at random, so that periodic noise favors neither.

    Screening draws two blocks together, AB BA or BA AB, so that a linear drift cancels. The verdict
    stage draws each block from the six orders of two processes per side.

    Args:
        stage: ``SCREENING`` or ``VERDICT``.
        block: index of the block in its stage.
        attempt: number of earlier attempts at the block.
        seed: seed of the draw; a resumed comparison must pass the same one.
    """
    if stage == SCREENING:
        is_swapped = random.Random(f"{seed} {stage} {block // 2}").random() < 0.5
        return (NEW, BASE) if is_swapped != bool(block % 2) else (BASE, NEW)
    draw = random.Random(f"{seed} {stage} {block} {attempt}")
    places = list(itertools.combinations(range(PROCESSES[stage]), 2))
    new = places[draw.randrange(len(places))]
    return tuple(NEW if place in new else BASE for place in range(PROCESSES[stage]))


def duration(seconds: float) -> str:
    """Format a time in seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"

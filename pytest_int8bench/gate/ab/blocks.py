"""Measure the blocks of an A/B comparison in fresh processes, within the time budget.

Blocks that are already in the journal are not measured again.
"""

from __future__ import annotations

import itertools
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pytest_int8bench.environment import differences
from pytest_int8bench.gate.ab.journal import AbError, AbJournal, Identity, Process
from pytest_int8bench.gate.ab.matching import throttle_reasons, wall_time_of
from pytest_int8bench.gate.ab.plan import (
    BASE,
    NEW,
    PROCESSES,
    SCREENING,
    VERDICT,
    WARM_UP,
    Plan,
    duration,
    order_of,
)
from pytest_int8bench.gate.ab.side import Side
from pytest_int8bench.results.figures import FIGURES
from pytest_int8bench.words import plural

_WARM = "warm"  # marker file of a cache that a warm-up process has filled


class BlockRunner:
    """Runs the processes of both sides in random order, block by block.

    Args:
        plan: revisions to compare, and how.
        sides: both sides, by ``BASE`` and ``NEW``.
        journal: journal to which each finished process is added.
        tell: called with progress messages, one line each.
    """

    def __init__(
        self,
        plan: Plan,
        sides: Mapping[str, Side],
        journal: AbJournal,
        tell: Callable[[str], None],
    ) -> None:
        self._plan = plan
        self._sides = sides
        self._journal = journal
        self._tell = tell
        self._start = time.monotonic()
        self._compiled: set[str] = set()
        """Sides that started with a cold cache."""
        self._throttled_blocks = 0
        self.is_cut_short = False
        """Whether the budget ended the measurement, which the same command can resume."""
        self._is_overrun_reported = False

    def warm_up(self) -> dict[str, Process]:
        """Fill the compile caches, and return one process of each side with all its runs."""
        warm = {key: self._warm_up(key) for key in self._sides}
        self._repeat_oom_while_compiling(warm)
        return warm

    def estimate(self, compared: Sequence[Identity]) -> None:
        """Report how long the comparison is expected to take.

        Raises:
            AbError: if screening alone would exceed the budget.
        """
        runs = len(compared)
        design, each = self._plan.design, self._process_s(SCREENING, compared)
        screening = 2 * design.screening_blocks * each
        verdict = PROCESSES[VERDICT] * design.verdict_blocks * each
        self._tell(
            f"{plural(runs, 'run')}, about {duration(each)} per process: screening takes about "
            f"{duration(screening)}, verdicts on flagged runs at most {duration(verdict)} more"
        )
        budget = self._plan.budget_s
        done = any(p.stage == SCREENING for p in self._journal.processes)
        if budget is not None and not done and self._elapsed_s() + screening > budget:
            raise AbError(
                f"--budget {duration(budget)} is too short: screening alone needs about "
                f"{duration(screening)}, after {duration(self._elapsed_s())} of warm-up"
            )

    def measure(
        self, stage: str, part: range, count: int, identities: Sequence[Identity]
    ) -> list[list[Process]]:
        """Measure the blocks that are not in the journal, and return all valid blocks.

        Args:
            stage: ``SCREENING`` or ``VERDICT``.
            part: indices of the blocks to measure.
            count: maximum number of blocks of the stage.
            identities: runs to measure.
        """
        only = self._journal.nodeids(identities) if stage == VERDICT else None
        # Once verdicts have started, screening must not change, even with more --retries: it could
        # flag other runs.
        is_closed = stage == SCREENING and any(
            process.stage == VERDICT for process in self._journal.processes
        )
        is_over = False
        found: list[list[Process]] = []
        for block in part:
            for attempt in itertools.count():
                processes = self._recorded(stage, block, attempt)
                order = order_of(stage, block, attempt, self._journal.path.stem)
                if not processes:
                    is_over |= is_closed
                    if is_over or not self._affordable(len(order), stage, identities):
                        is_over = True
                        break
                    processes = [
                        self._run(stage, block, attempt, position, key, only, count)
                        for position, key in enumerate(order)
                    ]
                if len(processes) < len(order):
                    continue  # repeat a partial block of an interrupted command
                reasons = ", ".join(
                    sorted({r for p in processes for r in throttle_reasons(p, identities)})
                )
                if not reasons:
                    found.append(processes)
                    break
                self._throttled_blocks += 1
                again = self._recorded(stage, block, attempt + 1)
                if self._throttled_blocks > self._plan.retries or (is_closed and not again):
                    self._journal.notes.append(
                        f"dropped {stage} block {block + 1}: the GPU was throttled ({reasons})"
                    )
                    break
                if not again:
                    self._tell(
                        f"{stage} {block + 1}/{count}: the GPU was throttled ({reasons}), "
                        "measuring the block again"
                    )
        if is_over and len(found) < len(part):
            done = part.start + len(found)
            self._journal.notes.append(f"--budget ended {stage} after {done} of {count} blocks")
            self.is_cut_short = True
        return found

    def _recorded(self, stage: str, block: int, attempt: int) -> list[Process]:
        """Return the processes of a block in the journal, even if the block is incomplete."""
        return [
            process
            for process in self._journal.processes
            if (process.stage, process.block, process.attempt) == (stage, block, attempt)
        ]

    # -- warm-up ------------------------------------------------------------------------------

    def _warm_up(self, key: str) -> Process:
        cache = self._sides[key].cache
        is_warm = cache / _WARM
        was_warm = is_warm.exists()
        for process in reversed(self._journal.processes):
            if process.stage == WARM_UP and process.side == key and was_warm:
                return process
        if key == NEW and not was_warm:
            # Autotuning picks kernels by their times, once per cache. Start from the base's cache,
            # so that both sides run the same kernels wherever the code is the same.
            shutil.copytree(self._sides[BASE].cache, cache, dirs_exist_ok=True)
            is_warm.unlink(missing_ok=True)
        measured = self._run(WARM_UP, 0, 0, 0, key, None)
        is_warm.touch()
        if not was_warm:
            self._compiled.add(key)
        return measured

    def _repeat_oom_while_compiling(self, warm: dict[str, Process]) -> None:
        """Repeat the warm-up of a side that ran out of memory while compiling, if the other fits.

        Autotuning needs memory that later processes do not need.
        """
        for key, other in ((BASE, NEW), (NEW, BASE)):
            fits = {i for i, result in warm[other].by_identity().items() if result.status == "ok"}
            ooms = {i for i, result in warm[key].by_identity().items() if result.oom}
            if key in self._compiled and fits & ooms:
                self._tell(f"{key} ran out of memory while compiling, warming up again")
                warm[key] = self._run(WARM_UP, 0, 1, 0, key, None)

    # -- one process --------------------------------------------------------------------------

    def _run(
        self,
        stage: str,
        block: int,
        attempt: int,
        position: int,
        key: str,
        only: Sequence[str] | None,
        count: int = 1,
    ) -> Process:
        side = self._sides[key]
        with self._reporting_overrun():
            measured = side.measure(self._plan.pytest_args, only)
        self._check_machine(measured.environment, side)
        process = Process(
            stage=stage,
            block=block,
            attempt=attempt,
            position=position,
            side=key,
            seconds=measured.seconds,
            results=tuple(measured.results),
        )
        self._journal.add(process, measured.environment)
        process = self._journal.named(process)
        where = f" {block + 1}/{count}" if stage != WARM_UP else ""
        self._tell(f"{stage}{where}: {key} {side.revision.label}, {measured.seconds:.0f} s")
        return process

    def _check_machine(self, environment: Mapping[str, Any], side: Side) -> None:
        first = self._journal.environment
        if first is None:
            return
        if found := differences(first, environment):
            listed = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in found.items())
            measured_trees = {self._sides[process.side].tree for process in self._journal.processes}
            if side.tree not in measured_trees:
                raise AbError(
                    f"{side.revision.label} and the base must run with the same software on the "
                    f"same machine, got {listed}; only the project's own code may differ"
                )
            raise AbError(
                f"the machine or its software changed since the comparison began: {listed}; remove "
                f"{self._journal.path} to start over"
            )

    # -- time ---------------------------------------------------------------------------------

    def _process_s(self, stage: str, identities: Sequence[Identity]) -> float:
        """Estimate the wall time of one process of a stage that measures these runs."""
        own = [p.seconds for p in self._journal.processes if p.stage == stage]
        if own:
            return statistics.fmean(own)
        screening = [p for p in self._journal.processes if p.stage == SCREENING]
        if screening:  # verdict processes skip all other runs
            return statistics.fmean(wall_time_of(process, identities) for process in screening)
        first = [
            max(p.seconds - sum(FIGURES["compile_s"].of(r) or 0.0 for r in p.results), 1.0)
            for p in self._journal.processes
        ]
        return statistics.fmean(first)

    @contextmanager
    def _reporting_overrun(self) -> Iterator[None]:
        """Report once if the budget runs out while a process runs; do not stop the process."""
        budget = self._plan.budget_s
        if budget is None or self._is_overrun_reported:
            yield
            return

        def tell() -> None:
            self._is_overrun_reported = True
            self._tell(
                f"--budget {duration(budget)} is used up: waiting for the processes of this block; "
                "no other block will start"
            )

        if (left := budget - self._elapsed_s()) <= 0:
            tell()
            yield
            return
        timer = threading.Timer(min(left, threading.TIMEOUT_MAX), tell)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _elapsed_s(self) -> float:
        return time.monotonic() - self._start

    def _affordable(self, processes: int, stage: str, identities: Sequence[Identity]) -> bool:
        budget = self._plan.budget_s
        if budget is None:
            return True
        return self._elapsed_s() + processes * self._process_s(stage, identities) <= budget

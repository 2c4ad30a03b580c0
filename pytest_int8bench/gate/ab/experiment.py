"""Compare two revisions on one machine by screening and verdicts from interleaved processes.

Each process is saved to a journal as soon as it ends, so that the same command can resume an
interrupted comparison.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pytest_int8bench.gate.ab.blocks import BlockRunner
from pytest_int8bench.gate.ab.design import spend
from pytest_int8bench.gate.ab.journal import AbError, AbJournal, Identity, Process
from pytest_int8bench.gate.ab.judging import judge, scales, screen, too_few_blocks
from pytest_int8bench.gate.ab.matching import (
    BlockTimes,
    block_times,
    match_runs,
    median_or_none,
    sides_of,
    to_arrays,
)
from pytest_int8bench.gate.ab.plan import (
    AUTO,
    BASE,
    FASTEST,
    MEDIAN,
    NEW,
    SCREENING,
    VERDICT,
    AbResult,
    AbRun,
    Plan,
)
from pytest_int8bench.gate.ab.side import Side
from pytest_int8bench.gate.ab.worktrees import has_submodules, worktrees
from pytest_int8bench.gate.outcomes import PASSES, REGRESSES, UNDECIDED
from pytest_int8bench.results.journal import journal_folder
from pytest_int8bench.words import plural

_KEPT_CACHES = 6


def run(plan: Plan, tell: Callable[[str], None]) -> AbResult:
    """Compare two revisions.

    Args:
        plan: revisions to compare, and how.
        tell: called with progress messages, one line each.

    Raises:
        ClearError: if the comparison is not possible. Finished processes stay in the journal.
    """
    plan.design.check(runs=1)
    folder = journal_folder(plan.root) / "ab"
    folder.mkdir(exist_ok=True)
    with _locked(folder), AbJournal.open(folder, plan.key, plan.to_dict(), tell) as journal:
        revisions = {BASE: plan.base, NEW: plan.new}
        if plan.base.commit == plan.new.commit:
            journal.notes.append("both revisions are the same commit: this only checks the machine")
        with worktrees(plan.root, revisions) as trees:
            sides = {key: _side(plan, folder, journal, key, trees[key]) for key in revisions}
            blocks = BlockRunner(plan, sides, journal, tell)
            if plan.install is not None:
                for side in sides.values():
                    tell(f"installing {side.revision.label}")
                    side.install(plan.install)
            result = _Experiment(plan, journal, blocks, tell).run()
        _prune_caches(folder / "cache")
        if not blocks.is_cut_short:
            journal.finish()
        return result


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise AbError(
            f"another int8bench ab is running in {folder}; wait for it to finish: two at once "
            "would disturb each other's timings"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _side(plan: Plan, folder: Path, journal: AbJournal, key: str, tree: Path) -> Side:
    revision = {BASE: plan.base, NEW: plan.new}[key]
    if has_submodules(tree):
        journal.notes.append(f"{revision.label}: submodules are not checked out; see --install")
    # The new revision's cache starts as a copy of the base's, so its name contains both commits.
    commits = [plan.base.commit[:12], *([revision.commit[:12]] if key == NEW else [])]
    cache = folder / "cache" / "-".join([key, *commits])
    cache.mkdir(parents=True, exist_ok=True)
    os.utime(cache)
    here = tree / plan.folder.relative_to(plan.root)
    if not here.is_dir():
        raise AbError(f"{revision.label} has no folder {plan.folder.relative_to(plan.root)}")
    return Side(
        revision=revision,
        root=plan.root,
        tree=tree,
        folder=here,
        site=tree.parent / f"site-{key}",
        cache=cache,
        log=journal.path.with_suffix(".log"),
    )


def _prune_caches(folder: Path) -> None:
    """Remove the least recently used caches."""
    caches = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)
    for cache in caches[:-_KEPT_CACHES]:
        shutil.rmtree(cache, ignore_errors=True)


class _Experiment:
    """Screens the runs of both sides and judges the flagged ones."""

    def __init__(
        self,
        plan: Plan,
        journal: AbJournal,
        blocks: BlockRunner,
        tell: Callable[[str], None],
    ) -> None:
        self._plan = plan
        self._journal = journal
        self._blocks = blocks
        self._tell = tell
        self._statistic = MEDIAN
        self._scales: dict[Identity, float] = {}
        """Noise of each run, from screening."""

    def run(self) -> AbResult:
        warm = self._blocks.warm_up()
        self._journal.match_names(warm.values())
        warm = {key: self._journal.named(process) for key, process in warm.items()}
        found = match_runs(warm[BASE], warm[NEW], allow_missing=self._plan.allow_missing)
        compared = [identity for identity, run in found.items() if run is None]
        screened: dict[Identity, AbRun] = {}
        if compared:
            self._plan.design.check(len(compared))
            self._statistic = self._choose_statistic([*warm.values()], compared)
            self._blocks.estimate(compared)
            screened = self._screen(compared)
            flagged = [i for i, run in screened.items() if run.screened and run.screened.flagged]
            if flagged:
                screened |= self._judge(flagged, screened)
        runs = [run or screened[identity] for identity, run in found.items()]
        processes = self._journal.processes
        return AbResult(
            plan=self._plan,
            environment=self._journal.environment or {},
            runs=tuple(runs),
            processes=len(processes),
            seconds=sum(process.seconds for process in processes),
            statistic=self._statistic,
            notes=tuple(self._journal.notes),
        )

    def _choose_statistic(self, processes: Sequence[Process], compared: Sequence[Identity]) -> str:
        """Return which round represents a process.

        Raises:
            AbError: if the user asked for a statistic that a revision's plugin does not save.
        """
        has_fastest = all(
            process.by_identity()[identity].fastest_s is not None
            for process in processes
            for identity in compared
        )
        requested = self._plan.statistic
        if requested == FASTEST and not has_fastest:
            raise AbError(
                "--statistic fastest: the pytest-int8bench of one revision is too old to save it"
            )
        if requested != AUTO:
            return requested
        gpu = (self._journal.environment or {}).get("gpu")
        return FASTEST if gpu is None and has_fastest else MEDIAN

    def _screen(self, compared: Sequence[Identity]) -> dict[Identity, AbRun]:
        count = self._plan.design.screening_blocks
        blocks = self._blocks.measure(SCREENING, range(count), count, compared)
        times, found = self._times(SCREENING, blocks, compared)
        base, new = to_arrays(times)
        outcomes = screen(base, new, self._plan.design) if times else []
        self._scales = dict(zip(times, scales(outcomes), strict=True))
        sides = sides_of(SCREENING, blocks)
        for identity, screened in zip(times, outcomes, strict=True):
            found[identity] = self._entry(
                identity, times[identity], sides, "PASS", PASSES, screened=screened
            )
        return {identity: found[identity] for identity in compared}

    def _judge(
        self, flagged: Sequence[Identity], screened: Mapping[Identity, AbRun]
    ) -> dict[Identity, AbRun]:
        names = ", ".join(dict.fromkeys(screened[identity].run_name for identity in flagged))
        self._tell(f"measuring {plural(len(flagged), 'flagged run')} again: {names}")
        design = self._plan.design
        # Runs that pass stay in the family and are still measured. Without them, only the runs that
        # looked slowest would remain, and testing those alone would be biased.
        family = list(flagged)
        found: dict[Identity, AbRun] = {}
        blocks: list[list[Process]] = []
        measured: list[int] = []
        start = 0
        for planned in design.looks:
            part = range(start, planned)
            blocks += self._blocks.measure(VERDICT, part, design.verdict_blocks, family)
            measured.append(len(blocks))
            is_last = planned == design.verdict_blocks or self._blocks.is_cut_short
            looked = self._look(blocks, family, screened, measured, is_last=is_last)
            passed = {i: run for i, run in found.items() if run.outcome == "PASS"}
            found |= looked | passed
            family = [i for i in family if found[i].outcome in ("PASS", "INCONCLUSIVE")]
            if is_last or not any(found[i].outcome == "INCONCLUSIVE" for i in family):
                break
            start = planned
        return found

    def _look(
        self,
        blocks: Sequence[Sequence[Process]],
        family: Sequence[Identity],
        screened: Mapping[Identity, AbRun],
        measured: Sequence[int],
        *,
        is_last: bool,
    ) -> dict[Identity, AbRun]:
        """Judge the runs that no earlier look found slower, from all blocks so far."""
        design = self._plan.design
        times, found = self._times(VERDICT, blocks, family)
        sides = sides_of(VERDICT, blocks)
        level = spend(design.level, design.verdict_blocks, measured)[-1]
        outcomes = (
            judge(
                list(times.values()),
                [[side == NEW for side in block] for block in sides],
                design,
                scale=[self._scales[identity] for identity in times],
                level=level,
                is_last=is_last,
            )
            if times and blocks
            else [too_few_blocks(0, design) for _ in times]
        )
        undecided = PASSES if self._plan.allow_inconclusive else UNDECIDED
        codes = {"PASS": PASSES, "FAIL": REGRESSES, "INCONCLUSIVE": undecided}
        for identity, judged in zip(times, outcomes, strict=True):
            found[identity] = self._entry(
                identity,
                times[identity],
                sides,
                judged.outcome,
                codes[judged.outcome],
                screened=screened[identity].screened,
                judged=judged,
                reason=judged.reason,
            )
        return found

    def _times(
        self, stage: str, blocks: Sequence[Sequence[Process]], identities: Sequence[Identity]
    ) -> tuple[BlockTimes, dict[Identity, AbRun]]:
        """Return the times of complete runs, and entries for runs with missing times."""
        times, broken = block_times(stage, blocks, identities, f"{self._statistic}_s")
        failed = {
            identity: self._entry(identity, (), (), "failed", UNDECIDED, reason=reason)
            for identity, reason in broken.items()
        }
        return {i: seconds for i, seconds in times.items() if i not in broken}, failed

    def _entry(
        self,
        identity: Identity,
        times: Sequence[Sequence[float]],
        sides: Sequence[Sequence[str]],
        outcome: str,
        exit_code: int,
        **values: Any,
    ) -> AbRun:
        seconds: dict[str, list[float]] = {BASE: [], NEW: []}
        for side, time in zip(chain(*sides), chain(*times), strict=False):
            seconds[side].append(time)
        return AbRun(
            nodeid=identity[0],
            workload=identity[1],
            run_name=self._name(identity),
            outcome=outcome,
            exit_code=exit_code,
            base_s=median_or_none(seconds[BASE]),
            new_s=median_or_none(seconds[NEW]),
            **values,
        )

    def _name(self, identity: Identity) -> str:
        return next(
            result.run_name
            for process in self._journal.processes
            for key, result in process.by_identity().items()
            if key == identity
        )

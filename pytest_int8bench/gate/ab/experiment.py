"""Two revisions on one machine: fresh processes in alternation, screening, and verdicts.

Everything that is measured goes to a journal at once, so that the same command goes on where an
interrupted one ended.
"""

from __future__ import annotations

import itertools
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pytest_int8bench.environment import differences
from pytest_int8bench.gate.ab.journal import AbError, AbJournal, Identity, Process
from pytest_int8bench.gate.ab.judging import judge, screen
from pytest_int8bench.gate.ab.matching import (
    block_times,
    match_runs,
    median_or_none,
    throttle_reasons,
    to_arrays,
    wall_time_of,
)
from pytest_int8bench.gate.ab.plan import (
    AUTO,
    BASE,
    FASTEST,
    FIELDS,
    MEDIAN,
    NEW,
    ORDERS,
    SCREENING,
    VERDICT,
    WARM_UP,
    AbResult,
    AbRun,
    Plan,
    duration,
)
from pytest_int8bench.gate.ab.side import Measured, Side
from pytest_int8bench.gate.ab.worktrees import has_submodules, worktrees
from pytest_int8bench.gate.outcomes import PASSES, REGRESSES, UNDECIDED
from pytest_int8bench.results.journal import journal_folder

_KEPT_CACHES = 6
_WARM = "warm"  # file in a cache: what a process compiles is in it, or need not be compiled


def run(plan: Plan, tell: Callable[[str], None]) -> AbResult:
    """Compare two revisions.

    Args:
        plan: what to compare.
        tell: called with a line for each thing that happens.

    Raises:
        ClearError: one line, if the comparison cannot be made. What was measured is kept.
    """
    plan.design.check(runs=1)
    folder = journal_folder(plan.root) / "ab"
    folder.mkdir(exist_ok=True)
    with _locked(folder), AbJournal.open(folder, plan.key, plan.to_dict(), tell) as journal:
        revisions = {BASE: plan.base, NEW: plan.new}
        if plan.base.commit == plan.new.commit:
            journal.notes.append("both are the same commit: this checks the machine")
        with worktrees(plan.root, revisions) as trees:
            sides = {key: _side(plan, folder, journal, key, trees[key]) for key in revisions}
            experiment = _Experiment(plan, sides, journal, tell)
            result = experiment.run()
        _prune_caches(folder / "cache")
        if not experiment.is_cut_short:
            journal.finish()
        return result


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise AbError(
            f"another int8bench ab runs in {folder}: two would disturb each other"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _side(plan: Plan, folder: Path, journal: AbJournal, key: str, tree: Path) -> Side:
    revision = {BASE: plan.base, NEW: plan.new}[key]
    if has_submodules(tree):
        journal.notes.append(f"{revision.label}: submodules are not checked out; see --install")
    # Both commits for the new one, which starts from the base's.
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
    """Remove the caches that were not used for the longest."""
    caches = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)
    for cache in caches[:-_KEPT_CACHES]:
        shutil.rmtree(cache, ignore_errors=True)


# -- the experiment -------------------------------------------------------------------------


class _Experiment:
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
        self._notes = journal.notes
        self._statistic = MEDIAN
        self._compiled: set[str] = set()
        """Sides that began with a cold cache."""
        self.is_cut_short = False
        """The budget ended it: the same command, with more time, goes on."""
        self._hot = 0
        """Blocks in which the GPU was slowed down."""

    def run(self) -> AbResult:
        if self._plan.install is not None:
            for side in self._sides.values():
                self._tell(f"installing {side.revision.label}")
                side.install(self._plan.install)
        warm = {key: self._warm_up(key) for key in self._sides}
        self._spare_compilers(warm)
        found = match_runs(warm[BASE], warm[NEW], allow_missing=self._plan.allow_missing)
        compared = [identity for identity, run in found.items() if run is None]
        screened: dict[Identity, AbRun] = {}
        if compared:
            self._plan.design.check(len(compared))
            self._statistic = self._choose_statistic([*warm.values()], compared)
            self._estimate(compared)
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
            notes=tuple(self._notes),
        )

    def _choose_statistic(self, processes: Sequence[Process], compared: Sequence[Identity]) -> str:
        """Return what stands for a process.

        Raises:
            AbError: if a revision's plugin is too old to say what is asked for.
        """
        has_fastest = all(
            process.by_identity()[identity].batch_time_min_s is not None
            for process in processes
            for identity in compared
        )
        asked = self._plan.statistic
        if asked == FASTEST and not has_fastest:
            raise AbError(
                "--statistic fastest: a revision's pytest-int8bench is too old to save it"
            )
        if asked != AUTO:
            return asked
        gpu = (self._journal.environment or {}).get("gpu")
        return FASTEST if gpu is None and has_fastest else MEDIAN

    # -- stages -------------------------------------------------------------------------------

    def _warm_up(self, key: str) -> Process:
        """Fill the compile cache, and see what there is to measure."""
        cache = self._sides[key].cache
        is_warm = cache / _WARM
        was_warm = is_warm.exists()
        for process in reversed(self._journal.processes):
            if process.stage == WARM_UP and process.side == key and was_warm:
                return process
        if key == NEW and not was_warm:
            # Autotuning chooses between kernels by their times, once for all processes of a side:
            # where the code is the same, both sides must run what was chosen for the base.
            shutil.copytree(self._sides[BASE].cache, cache, dirs_exist_ok=True)
            is_warm.unlink(missing_ok=True)
        measured = self._measure(WARM_UP, 0, 0, 0, key, None)
        is_warm.touch()
        if not was_warm:
            self._compiled.add(key)
        return measured

    def _spare_compilers(self, warm: dict[str, Process]) -> None:
        """Measure a side again that ran out of memory while it compiled, where the other one did
        not: autotuning takes memory that later processes do not need."""
        for key, other in ((BASE, NEW), (NEW, BASE)):
            fits = {i for i, result in warm[other].by_identity().items() if result.status == "ok"}
            ooms = {i for i, result in warm[key].by_identity().items() if result.oom}
            if key in self._compiled and fits & ooms:
                self._tell(f"{key} ran out of memory while it compiled: once more")
                warm[key] = self._measure(WARM_UP, 0, 1, 0, key, None)

    def _screen(self, compared: Sequence[Identity]) -> dict[Identity, AbRun]:
        blocks = self._blocks(SCREENING, self._plan.design.screening_blocks, compared)
        times, broken = block_times(SCREENING, blocks, compared, FIELDS[self._statistic])
        kept = [identity for identity in compared if identity not in broken]
        before, after = to_arrays(times, kept, 2)
        outcomes = screen(before, after, self._plan.design) if kept else []
        found = {identity: self._broken(identity, broken[identity]) for identity in broken}
        for identity, screened in zip(kept, outcomes, strict=True):
            found[identity] = self._entry(
                identity, times[identity], "PASS", PASSES, screened=screened
            )
        return {identity: found[identity] for identity in compared}

    def _judge(
        self, flagged: Sequence[Identity], screened: Mapping[Identity, AbRun]
    ) -> dict[Identity, AbRun]:
        names = ", ".join(dict.fromkeys(screened[identity].run_name for identity in flagged))
        self._tell(f"{len(flagged)} flagged, measured afresh: {names}")
        blocks = self._blocks(VERDICT, self._plan.design.verdict_blocks, flagged)
        times, broken = block_times(VERDICT, blocks, flagged, FIELDS[self._statistic])
        kept = [identity for identity in flagged if identity not in broken]
        before, after, again = to_arrays(times, kept, 3)
        outcomes = judge(before, after, again, self._plan.design) if kept else []
        found = {identity: self._broken(identity, broken[identity]) for identity in broken}
        undecided = PASSES if self._plan.allow_inconclusive else UNDECIDED
        codes = {"PASS": PASSES, "FAIL": REGRESSES, "INCONCLUSIVE": undecided}
        for identity, judged in zip(kept, outcomes, strict=True):
            found[identity] = self._entry(
                identity,
                times[identity],
                judged.outcome,
                codes[judged.outcome],
                screened=screened[identity].screened,
                judged=judged,
                reason=judged.reason,
            )
        return found

    def _blocks(
        self, stage: str, count: int, identities: Sequence[Identity]
    ) -> list[list[Process]]:
        """Measure the blocks that are not in the journal; return all that count."""
        only = sorted({nodeid for nodeid, _ in identities}) if stage == VERDICT else None
        # What verdicts were begun on must not change any more, also with more --retries.
        is_closed = stage == SCREENING and any(
            process.stage == VERDICT for process in self._journal.processes
        )
        is_over = False
        found: list[list[Process]] = []
        for block in range(count):
            order = ORDERS[stage][block % len(ORDERS[stage])]
            for attempt in itertools.count():
                processes = self._recorded(stage, block, attempt)
                if not processes:
                    is_over |= is_closed
                    if is_over or not self._affordable(len(order), stage, identities):
                        is_over = True
                        break
                    processes = [
                        self._measure(stage, block, attempt, position, key, only, count)
                        for position, key in enumerate(order)
                    ]
                if len(processes) < len(order):
                    continue  # half a block, of a command that was interrupted, is measured anew
                heat = ", ".join(
                    sorted({h for p in processes for h in throttle_reasons(p, identities)})
                )
                if not heat:
                    found.append(processes)
                    break
                self._hot += 1
                again = self._recorded(stage, block, attempt + 1)
                if self._hot > self._plan.retries or (is_closed and not again):
                    self._notes.append(
                        f"{stage} block {block + 1} is left out: the GPU was slowed down ({heat})"
                    )
                    break
                if not again:
                    self._tell(
                        f"{stage} {block + 1}/{count}: the GPU was slowed down ({heat}): the block "
                        "is measured again"
                    )
        if is_over and len(found) < count:
            self._notes.append(f"--budget: {stage} ended after {len(found)} of {count} blocks")
            self.is_cut_short = True
        return found

    def _recorded(self, stage: str, block: int, attempt: int) -> list[Process]:
        """Return what the journal has of a block, whole or not."""
        return [
            process
            for process in self._journal.processes
            if (process.stage, process.block, process.attempt) == (stage, block, attempt)
        ]

    # -- one process --------------------------------------------------------------------------

    def _measure(
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
        measured: Measured = side.measure(self._plan.pytest_args, only)
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
        where = f" {block + 1}/{count}" if stage != WARM_UP else ""
        self._tell(f"{stage}{where}: {key} {side.revision.label}, {measured.seconds:.0f} s")
        return process

    def _check_machine(self, environment: Mapping[str, Any], side: Side) -> None:
        first = self._journal.environment
        if first is None:
            return
        if found := differences(first, environment):
            listed = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in found.items())
            begun = {self._sides[process.side].tree for process in self._journal.processes}
            if side.tree not in begun:
                raise AbError(
                    f"{side.revision.label} runs with other software, or on another machine, than "
                    f"the base: {listed}; only the project's own code may differ"
                )
            raise AbError(
                f"machine or software changed since the comparison began: {listed}; remove "
                f"{self._journal.path} to begin anew"
            )

    # -- time ---------------------------------------------------------------------------------

    def _process_s(self, stage: str, identities: Sequence[Identity]) -> float:
        """Estimate the wall time of one process of a stage that measures these runs."""
        own = [p.seconds for p in self._journal.processes if p.stage == stage]
        if own:
            return statistics.fmean(own)
        screening = [p for p in self._journal.processes if p.stage == SCREENING]
        if screening:  # the runs that are left out take no time
            return statistics.fmean(wall_time_of(process, identities) for process in screening)
        first = [
            max(p.seconds - sum(r.compile_s or 0.0 for r in p.results), 1.0)
            for p in self._journal.processes
        ]
        return statistics.fmean(first)

    def _estimate(self, compared: Sequence[Identity]) -> None:
        runs = len(compared)
        design, each = self._plan.design, self._process_s(SCREENING, compared)
        screening = 2 * design.screening_blocks * each
        verdict = 3 * design.verdict_blocks * each
        self._tell(
            f"{runs} run(s), about {duration(each)} a process: screening in "
            f"{duration(screening)}; then verdicts on what it flags, in at most "
            f"{duration(verdict)} more"
        )
        budget = self._plan.budget_s
        done = any(p.stage == SCREENING for p in self._journal.processes)
        if budget is not None and not done and self._spent() + screening > budget:
            raise AbError(
                f"--budget {duration(budget)}: screening alone needs about "
                f"{duration(screening)}, after {duration(self._spent())} for warming up"
            )

    def _spent(self) -> float:
        return time.monotonic() - self._start

    def _affordable(self, processes: int, stage: str, identities: Sequence[Identity]) -> bool:
        budget = self._plan.budget_s
        if budget is None:
            return True
        return self._spent() + processes * self._process_s(stage, identities) <= budget

    # -- entries ------------------------------------------------------------------------------

    def _entry(
        self,
        identity: Identity,
        times: Sequence[Sequence[float]],
        outcome: str,
        exit_code: int,
        **values: Any,
    ) -> AbRun:
        base = [
            block[position] for block in times for position in range(len(block)) if position != 1
        ]
        return AbRun(
            nodeid=identity[0],
            workload=identity[1],
            run_name=self._name(identity),
            outcome=outcome,
            exit_code=exit_code,
            base_s=median_or_none(base),
            new_s=median_or_none([block[1] for block in times]),
            **values,
        )

    def _broken(self, identity: Identity, reason: str) -> AbRun:
        return AbRun(
            nodeid=identity[0],
            workload=identity[1],
            run_name=self._name(identity),
            outcome="failed",
            exit_code=UNDECIDED,
            reason=reason,
        )

    def _name(self, identity: Identity) -> str:
        return next(
            result.run_name
            for process in self._journal.processes
            for key, result in process.by_identity().items()
            if key == identity
        )

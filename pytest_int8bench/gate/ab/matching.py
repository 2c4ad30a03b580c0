"""Match the runs of both revisions, and collect their times by block."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from pytest_int8bench.gate.ab.journal import Identity, Process
from pytest_int8bench.gate.ab.plan import BASE, PROCESSES, SCREENING, AbRun
from pytest_int8bench.gate.outcomes import PASSES, REGRESSES, UNDECIDED
from pytest_int8bench.results.records import Timed

#: Seconds per batch by run and block. Times of a block are ordered base, new in screening, and in
#: the order of the processes in the verdict stage.
BlockTimes = dict[Identity, list[tuple[float, ...]]]


def match_runs(base: Process, new: Process, *, allow_missing: bool) -> dict[Identity, AbRun | None]:
    """Return the runs of both sides, with None for each run that can be compared."""
    before, after = base.by_identity(), new.by_identity()
    found: dict[Identity, AbRun | None] = {}
    for identity in dict.fromkeys((*before, *after)):
        old, now = before.get(identity), after.get(identity)
        known = now or old
        assert known is not None
        outcome, code, reason = _unmatched(old, now, allow_missing=allow_missing)
        if outcome is None:
            found[identity] = None
            continue
        found[identity] = AbRun(
            nodeid=known.nodeid,
            workload=known.workload,
            run_name=known.run_name,
            outcome=outcome,
            exit_code=code,
            reason=reason,
        )
    return found


def _unmatched(
    old: Timed | None, now: Timed | None, *, allow_missing: bool
) -> tuple[str | None, int, str | None]:
    """Return outcome, exit code and reason; the outcome is None if both sides measured the run."""
    lost = PASSES if allow_missing else UNDECIDED
    if now is None:
        assert old is not None
        code = PASSES if old.status == "skipped" else lost
        return "missing", code, "not in the new revision"
    if now.oom:
        if old is not None and old.oom:
            return "oom", PASSES, f"as in the base: {now.reason}"
        if old is None:
            return "oom", PASSES, now.reason
        return "oom", REGRESSES if old.status == "ok" else UNDECIDED, now.reason
    if now.status == "skipped":
        was = old is None or old.status == "skipped"
        return "disabled" if now.is_disabled else "skipped", PASSES if was else lost, now.reason
    if now.status != "ok":
        return "failed", UNDECIDED, now.reason
    if old is None or old.status != "ok":
        return "new", PASSES, f"was {old.status}: {old.reason}" if old else "not in the base"
    if old.timer != now.timer:
        return "failed", UNDECIDED, f"timed with other timers: {old.timer}, {now.timer}"
    return None, PASSES, None


def block_times(
    stage: str,
    blocks: Sequence[Sequence[Process]],
    identities: Sequence[Identity],
    field_name: str,
) -> tuple[BlockTimes, dict[Identity, str]]:
    """Return the times of each run by block, and the reason for each run with missing times."""
    times: BlockTimes = {identity: [] for identity in identities}
    broken: dict[Identity, str] = {}
    for processes in blocks:
        ordered = _ordered(stage, processes)
        found = [process.by_identity() for process in ordered]
        for identity in identities:
            results = [results.get(identity) for results in found]
            measured = [r for r in results if r is not None and r.status == "ok"]
            values = [getattr(result, field_name) for result in measured]
            seconds = tuple(value for value in values if value is not None)
            if len(seconds) < len(ordered):
                bad = [r for r in results if r is not None and r.status != "ok"]
                why = f"{bad[0].status}: {bad[0].reason}" if bad else "not measured"
                broken.setdefault(identity, f"in a process of the {stage}: {why}")
            times[identity].append(seconds)
    return times, broken


def to_arrays(times: BlockTimes) -> list[list[list[float]]]:
    """Convert screening times to one array of shape (runs, blocks) per side."""
    return [
        [[block[position] for block in blocks] for blocks in times.values()]
        for position in range(PROCESSES[SCREENING])
    ]


def sides_of(stage: str, blocks: Sequence[Sequence[Process]]) -> list[list[str]]:
    """Return the side of each time in each block, in the order of :func:`block_times`."""
    return [[process.side for process in _ordered(stage, processes)] for processes in blocks]


def _ordered(stage: str, processes: Sequence[Process]) -> list[Process]:
    ordered = sorted(processes, key=lambda p: p.position)
    if stage == SCREENING:
        ordered.sort(key=lambda p: p.side != BASE)
    return ordered


def wall_time_of(process: Process, identities: Sequence[Identity]) -> float:
    """Return the wall time of a process without its other runs, at least 1 s."""
    others = sum(
        result.wall_s
        for identity, result in process.by_identity().items()
        if identity not in identities
    )
    return max(process.seconds - others, 1.0)


def throttle_reasons(process: Process, identities: Sequence[Identity]) -> Iterator[str]:
    for identity, result in process.by_identity().items():
        if identity in identities:
            yield from result.throttled


def median_or_none(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None

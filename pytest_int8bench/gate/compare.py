"""Saved runs of two commits, metric by metric.

A saved file is one process. What differs by no more than the noise floor between processes is the
same; where there are files enough, the floor is learned from them. A growth over a
limit that the files do not show is suspected. :mod:`pytest_int8bench.gate.noise` says what they
show.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pytest_int8bench.environment import differences
from pytest_int8bench.gate.limits import Rules
from pytest_int8bench.gate.noise import Noise, NoiseFloors, metric_values, typical, usable_results
from pytest_int8bench.gate.notes import all_notes
from pytest_int8bench.gate.outcomes import (
    ACCURACY_FAILED,
    DISABLED,
    FAILED,
    IMPROVED,
    INCOMPARABLE,
    MISSING,
    NEW,
    NOT_JUDGED,
    OOM,
    OUTCOMES,
    PASSES,
    REGRESSED,
    REGRESSES,
    SAME,
    SKIPPED,
    SUSPECTED,
    UNDECIDED,
    WITHIN,
    Change,
    Identity,
    RunChange,
)
from pytest_int8bench.gate.renames import renamed
from pytest_int8bench.gate.rules import THROTTLED
from pytest_int8bench.gate.verdicts import VerdictChange, compare_verdict
from pytest_int8bench.printing import one_line
from pytest_int8bench.results.base import Record
from pytest_int8bench.results.figures import METRICS, Figure
from pytest_int8bench.results.locating import Run
from pytest_int8bench.results.records import Timed


@dataclass(frozen=True, kw_only=True)
class Side:
    """The files of one side."""

    files: tuple[str, ...]
    environment: Mapping[str, Any]
    """Fingerprint of the first file."""
    commits: tuple[str, ...]
    """In the order of the files; ``unknown`` where there is no repository."""
    dirty: bool


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that differs between two sides."""

    base: Side
    new: Side
    differences: Mapping[str, tuple[Any, Any]]
    """Names of the fingerprint that differ and are not allowed to: base's and new's value."""
    allowed: Mapping[str, tuple[Any, Any]]
    """Names that differ and are allowed to."""
    runs: tuple[RunChange, ...]
    accuracy: tuple[VerdictChange, ...]
    notes: tuple[str, ...] = ()
    """What its reader should know."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Outcome -> number of runs."""

    @property
    def compared(self) -> int:
        """Number of runs and verdicts that both sides have."""
        measured = sum(bool(run.changes) for run in self.runs)
        judged = (v for v in self.accuracy if not v.is_pipeline_check)
        return measured + sum(bool(v.base and v.new) for v in judged)

    @property
    def exit_code(self) -> int:
        """1 if anything regressed; else 2 if anything could not be compared; else 0."""
        codes = {entry.exit_code for entry in (*self.runs, *self.accuracy)}
        if REGRESSES in codes:
            return REGRESSES
        nothing = not self.compared
        return UNDECIDED if nothing or self.differences or UNDECIDED in codes else PASSES


def compare(
    base: Sequence[Run],
    new: Sequence[Run],
    rules: Rules,
    pick: Callable[[Collection[str]], bool] | None = None,
) -> Comparison:
    """Compare two sides, each of one file or more.

    A metric regressed if its cost grew by more than its limit, and the growth is shown. Several
    values of a side are taken at their geometric mean.

    Args:
        base: what was.
        new: what is.
        rules: what passes.
        pick: says by its names whether a run is compared; None compares all.
    """
    runs_of_both, renames = renamed([*base, *new])
    base, new = runs_of_both[: len(base)], runs_of_both[len(base) :]
    found = _differences(base, new)
    blocking = {name: values for name, values in found.items() if name not in rules.allow}
    before = _by_identity(record for run in base for record in run.saved.timed)
    after = _by_identity(record for run in new for record in run.saved.timed)
    before, after = _picked(before, after, pick)
    floors = NoiseFloors(before, after, rules)
    why = f"measured on another machine or software: {', '.join(blocking)}" if blocking else None
    runs = tuple(
        _compare_run(before.get(identity, []), after.get(identity, []), rules, floors, why)
        for identity in dict.fromkeys((*before, *after))
    )
    verdicts_before = _by_identity(v for run in base for v in run.saved.accuracy)
    verdicts_after = _by_identity(v for run in new for v in run.saved.accuracy)
    verdicts_before, verdicts_after = _picked(verdicts_before, verdicts_after, pick)
    accuracy = tuple(
        compare_verdict(
            verdicts_before.get(identity, []),
            verdicts_after.get(identity, []),
            rules,
            why,
        )
        for identity in dict.fromkeys((*verdicts_before, *verdicts_after))
    )
    count = Counter(run.outcome for run in runs)
    return Comparison(
        base=_side(base),
        new=_side(new),
        differences=blocking,
        allowed={name: values for name, values in found.items() if name in rules.allow},
        runs=runs,
        accuracy=accuracy,
        notes=(*renames.lines, *all_notes(base, new, runs, rules, is_whole=pick is None)),
        counts={outcome: count[outcome] for outcome in OUTCOMES if count[outcome]},
    )


# -- sides ----------------------------------------------------------------------------------


def _side(runs: Sequence[Run]) -> Side:
    environments = [run.saved.environment for run in runs]
    return Side(
        files=tuple(one_line(str(run.path)) for run in runs),
        environment=environments[0],
        commits=tuple(str(e.get("commit") or "unknown") for e in environments),
        dirty=any(bool(e.get("dirty")) for e in environments),
    )


def _differences(base: Sequence[Run], new: Sequence[Run]) -> dict[str, tuple[Any, Any]]:
    """Return what differs between the fingerprints of any two files; the first one may know little
    of its machine."""
    environments = [run.saved.environment for run in (*base, *new)]
    found: dict[str, tuple[Any, Any]] = {}
    kinds: set[str] = set()
    for place, one in enumerate(environments):
        # What differs between two files differs between one of them and the first of their kind.
        triton = (one.get("packages") or {}).get("triton")
        kind = repr((one.get("only"), bool(one.get("gpu")), triton))
        if kind in kinds:
            continue
        kinds.add(kind)
        for other in environments[place + 1 :]:
            found = {**differences(one, other), **found}
    return found


_Record = TypeVar("_Record", bound=Record)


def _by_identity(records: Iterable[_Record]) -> dict[Identity, list[_Record]]:
    found: dict[Identity, list[_Record]] = {}
    for record in records:
        found.setdefault(record.identity, []).append(record)
    return found


_Side = dict[Identity, list[_Record]]


def _picked(
    before: _Side[_Record], after: _Side[_Record], pick: Callable[[Collection[str]], bool] | None
) -> tuple[_Side[_Record], _Side[_Record]]:
    """Return both sides with the runs to compare: those that a name on either side picks."""
    if pick is None:
        return before, after
    names: dict[Identity, set[str]] = {}
    for identity, records in (*before.items(), *after.items()):
        found = names.setdefault(identity, set())
        found.update(n for r in records for n in (r.nodeid, r.workload, r.run_name))
    kept = {identity for identity in names if pick(names[identity])}
    one, other = ({i: side[i] for i in side if i in kept} for side in (before, after))
    return one, other


def _means(results: Sequence[Timed]) -> dict[str, float]:
    found = {
        metric.name: metric_values(usable_results(results), metric) for metric in METRICS.values()
    }
    return {name: typical(values) for name, values in found.items() if values}


# -- one run --------------------------------------------------------------------------------

# A side with several files has the worst status of them, if it is the new one.
_WORST = ("accuracy-failed", "oom", "failed", "skipped")


def _status(results: Sequence[Timed], *, worst: bool) -> str:
    statuses = [result.status for result in results]
    if not worst and "ok" in statuses:
        return "ok"
    return next((status for status in _WORST if status in statuses), "ok")


def _compare_run(
    base: list[Timed], new: list[Timed], rules: Rules, floors: NoiseFloors, why: str | None
) -> RunChange:
    known = (new or base)[0]
    common: dict[str, Any] = {
        "nodeid": known.nodeid,
        "workload": known.workload,
        "run_name": known.run_name,
        "base": _means(base),
        "new": _means(new),
    }

    def entry(outcome: str, exit_code: int, reason: str | None = None) -> RunChange:
        return RunChange(**common, outcome=outcome, exit_code=exit_code, reason=reason)

    lost = PASSES if rules.allow_missing else UNDECIDED
    before = _status(base, worst=False) if base else None
    if not new:
        if before == "skipped":
            return entry(MISSING, PASSES, f"was skipped: {_reason(base, 'skipped')}")
        return entry(MISSING, lost, "not in the new run")
    after = _status(new, worst=True)
    reason = _reason(new, after)
    if after == "accuracy-failed":
        if before == "accuracy-failed":
            return entry(ACCURACY_FAILED, UNDECIDED, f"as in the base: {reason}")
        return entry(ACCURACY_FAILED, REGRESSES, reason)
    if after == "oom":
        if before == "oom":
            return entry(OOM, PASSES, f"as in the base: {reason}")
        if base and why is not None:  # memory of another size, perhaps
            return entry(OOM, UNDECIDED, f"{reason}; {why}")
        if base and before not in ("ok", "accuracy-failed"):
            return entry(OOM, UNDECIDED, f"{reason}; was {before}: {_reason(base, str(before))}")
        return entry(OOM, REGRESSES if base else PASSES, reason)
    if after == "failed":
        return entry(FAILED, UNDECIDED, reason)
    if after == "skipped":
        outcome = DISABLED if all(result.is_disabled for result in new) else SKIPPED
        return entry(outcome, PASSES if before in (None, "skipped") else lost, reason)
    if before != "ok":
        was = f"was {before}: {_reason(base, before)}" if before else None
        return entry(NEW, PASSES, was or "not in the base")
    if why is not None:
        return entry(INCOMPARABLE, UNDECIDED, why)
    if names := {result.run_name for result in (*base, *new)} - {known.run_name}:
        return entry(INCOMPARABLE, UNDECIDED, f"another point: {', '.join(sorted(names))}")
    return _measured(common, usable_results(base), usable_results(new), rules, floors)


def _measured(
    common: dict[str, Any],
    base: list[Timed],
    new: list[Timed],
    rules: Rules,
    floors: NoiseFloors,
) -> RunChange:
    problem = "has no time" if not base or not new else None
    if len(timers := sorted({r.timer for r in (*base, *new) if r.timer})) > 1:
        problem = f"timed with other timers: {', '.join(timers)}"
    if problem is not None:
        return RunChange(**common, outcome=INCOMPARABLE, exit_code=UNDECIDED, reason=problem)
    heat = sorted({reason for result in (*base, *new) for reason in result.throttled})
    is_hot = bool(heat) and THROTTLED not in rules.allow
    changes: list[Change] = []
    noises: dict[str, Noise] = {}
    lacking = []
    for metric in METRICS.values():
        before, after = metric_values(base, metric), metric_values(new, metric)
        limit = rules.limit(metric.name, common["run_name"], common["nodeid"])
        if limit is not None and bool(before) != bool(after):
            side = "new run" if before else "base"
            lacking.append(f"{metric.option}: the {side} has no {metric.header}")
        if before and after:
            noise = noises[metric.name] = floors.of(base[0].identity, metric)
            change = _change(metric, before, after, limit, noise)
            if is_hot and metric.depends_on_clocks:
                # Neither a slowdown nor its absence is evidence then.
                change = dataclasses.replace(change, outcome=NOT_JUDGED)
            changes.append(change)
    judged = {change.outcome for change in changes}
    if is_hot and REGRESSED not in judged:
        return RunChange(
            **common,
            outcome=INCOMPARABLE,
            exit_code=UNDECIDED,
            reason=f"measured while the GPU was slowed down: {', '.join(heat)}",
            changes=tuple(changes),
        )
    if lacking and REGRESSED not in judged:
        return RunChange(
            **common,
            outcome=INCOMPARABLE,
            exit_code=UNDECIDED,
            reason="; ".join(lacking),
            changes=tuple(changes),
        )
    outcome = next((o for o in (REGRESSED, SUSPECTED, IMPROVED) if o in judged), SAME)
    return RunChange(
        **common,
        outcome=outcome,
        exit_code={REGRESSED: REGRESSES, SUSPECTED: UNDECIDED}.get(outcome, PASSES),
        reason="; ".join(
            _over(change, noises[change.metric])
            for change in changes
            if change.outcome == outcome and outcome in (REGRESSED, SUSPECTED)
        )
        or None,
        changes=tuple(changes),
    )


def _change(
    metric: Figure,
    base: Sequence[float],
    new: Sequence[float],
    limit: float | None,
    noise: Noise,
) -> Change:
    growth = metric.growth(typical(base), typical(new))
    if limit is None:
        outcome = NOT_JUDGED
    elif noise.hides_growth(growth, limit):
        outcome = SUSPECTED
    elif abs(growth) <= noise.floor:
        outcome = SAME
    elif growth < 0:
        outcome = IMPROVED
    elif growth <= limit:
        outcome = WITHIN
    else:
        is_shown = noise.is_shown and (noise.fastest is None or noise.fastest > limit)
        outcome = REGRESSED if is_shown else SUSPECTED
    return Change(
        metric=metric.name,
        growth=growth,
        limit=limit,
        floor=noise.floor,
        learned=noise.learned,
        shown_from=noise.shown_from,
        assumed=noise.assumed,
        files_needed=noise.files_needed,
        outcome=outcome,
    )


def _over(change: Change, noise: Noise) -> str:
    metric = METRICS[change.metric]
    grew = f"{metric.option}: {change.growth:+.1%}, limit {change.limit:.1%}"
    if change.outcome == REGRESSED:
        return f"{grew} (noise floor {change.floor:.1%})"
    files = "more files"
    if change.files_needed is not None:
        files = f"{change.files_needed} files of the base"
    who = f"int8bench ab or {files}" if metric.is_time_of_batch else files
    if noise.doubt is not None and noise.hides_growth(change.growth, change.limit or 0.0):
        return f"{grew}, but {noise.doubt[0]:+.1%} {noise.doubt[1]}: {who} can decide"
    if noise.fastest is not None and change.growth > (change.shown_from or 0.0):
        load = f"{grew}, but {noise.fastest:+.1%} by the fastest rounds, as other load shows"
        return f"{load}: {who} can decide"
    if change.assumed == math.inf:
        return f"{grew}, after a single round, whose noise is not known: {who} can decide"
    why = "by the scatter of the files"
    if change.assumed is not None:
        why = f"if processes differ by {change.assumed:.1%}, as is assumed"
    if noise.outlier is not None:
        why += f", with outliers of {noise.outlier:.1%} as in the files"
    return f"{grew}, shown from {change.shown_from:.1%} on {why}: {who} can decide"


def _reason(results: Sequence[Timed], status: str) -> str:
    found = (result.reason for result in results if result.status == status)
    return next(filter(None, found), "no reason given")

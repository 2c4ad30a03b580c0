"""Compare one run of two commits, metric by metric."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from pytest_int8bench.gate.limits import Rules
from pytest_int8bench.gate.noise import Noise, NoiseFloors, metric_values, typical, usable_results
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
    PASSES,
    REGRESSED,
    REGRESSES,
    SAME,
    SKIPPED,
    SUSPECTED,
    UNDECIDED,
    WITHIN,
    Change,
    RunChange,
)
from pytest_int8bench.gate.rules import THROTTLED
from pytest_int8bench.results.figures import METRICS, Figure
from pytest_int8bench.results.records import Timed

# If the new side has several files, the worst status counts.
_WORST = ("accuracy-failed", "oom", "failed", "skipped")


def _means(results: Sequence[Timed]) -> dict[str, float]:
    usable = usable_results(results)
    found = {metric.name: metric_values(usable, metric) for metric in METRICS.values()}
    return {name: typical(values) for name, values in found.items() if values}


def _status(results: Sequence[Timed], *, worst: bool) -> str:
    statuses = [result.status for result in results]
    if not worst and "ok" in statuses:
        return "ok"
    return next((status for status in _WORST if status in statuses), "ok")


def compare_run(
    base: list[Timed], new: list[Timed], rules: Rules, floors: NoiseFloors, why: str | None
) -> RunChange:
    """Compare the results that two sides have of one run.

    Args:
        base: results of the base.
        new: results of the new commit.
        rules: the limits.
        floors: the noise of all runs.
        why: why measurements cannot be compared, or None.
    """
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
        before, after = (common[side].get(metric.name) for side in ("base", "new"))
        limit = rules.limit(metric.name, common["run_name"], common["nodeid"])
        if limit is not None and (before is None) != (after is None):
            side = "base" if before is None else "new run"
            lacking.append(f"{metric.option}: the {side} has no {metric.header}")
        if before is not None and after is not None:
            noise = noises[metric.name] = floors.of(base[0].identity, metric)
            change = _change(metric, before, after, limit, noise)
            if is_hot and metric.depends_on_clocks:
                # A throttled GPU is no evidence, neither for a slowdown nor against one.
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
    base: float,
    new: float,
    limit: float | None,
    noise: Noise,
) -> Change:
    growth = metric.growth(base, new)
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

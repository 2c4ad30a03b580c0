"""Notes for the reader of a comparison of saved files."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pytest_int8bench.gate.limits import Rules
from pytest_int8bench.gate.outcomes import Change, RunChange
from pytest_int8bench.results.base import SPEED_CHANGED
from pytest_int8bench.results.benchmarks import partly_known, unsynchronized
from pytest_int8bench.results.figures import METRICS
from pytest_int8bench.results.locating import Run
from pytest_int8bench.words import some


def partial_notes(runs: Sequence[Run]) -> list[str]:
    """Return a note for each kind of file that identifies its machine only partly."""
    named: dict[str, list[str]] = {}
    for run in runs:
        if (line := partly_known(run.saved.environment)) is not None:
            named.setdefault(line, []).append(str(run.path))
    return [f"{some(paths)}: {line}" for line, paths in named.items()]


def all_notes(
    base: Sequence[Run],
    new: Sequence[Run],
    runs: Sequence[RunChange],
    rules: Rules,
    *,
    is_whole: bool,
) -> list[str]:
    """Return the notes of a comparison, one line each. ``is_whole`` is False if only some runs were
    selected."""
    lines = partial_notes([*base, *new])
    nodeids = {run.nodeid for run in runs}
    shown = {run.nodeid for run in runs if run.is_benchmark}
    timers = (
        unsynchronized([b for b in r.saved.benchmarks if b.nodeid in shown], r.saved.environment)
        for r in (*base, *new)
    )
    lines += dict.fromkeys(filter(None, timers))
    single = [run for run in runs if any(change.assumed == math.inf for change in run.changes)]
    if single:
        more = f" and {len(single) - 1} more" if single[1:] else ""
        lines.append(
            f"{single[0].run_name}{more}: a single round says nothing of the noise: give more "
            "rounds, or several files a side"
        )
    for name, side in (("base", base), ("new run", new)):
        if any(run.saved.environment.get("dirty") for run in side):
            lines.append(f"the {name} was measured with uncommitted changes")
        results = (result for run in side for result in run.saved.results)
        unsteady = dict.fromkeys(
            result.run_name
            for result in results
            if result.nodeid in nodeids and SPEED_CHANGED in (result.reason or "")
        )
        if unsteady:
            lines.append(
                f"{SPEED_CHANGED} of a point and its baseline in the {name}: {some([*unsteady])}"
            )
    tight: dict[str, Change] = {}
    for change in (change for run in runs for change in run.changes):
        if change.limit is not None and change.limit < change.floor:
            tight.setdefault(change.metric, change)
    for change in tight.values():
        how_many = "more" if change.learned else "several"
        lines.append(
            f"{METRICS[change.metric].option} {change.limit:.1%} is under the noise floor of "
            f"{change.floor:.1%}, which decides: give {how_many} files a side, or use int8bench ab"
        )
    names = [(run.run_name, run.nodeid) for run in runs]
    if not is_whole:
        return lines
    lines += [f"no run matches {pattern!r} in pyproject.toml" for pattern in rules.unmatched(names)]
    return lines

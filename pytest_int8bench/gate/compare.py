"""Saved runs of two commits, metric by metric.

A saved file is one process. What differs by no more than the noise floor between processes is the
same; where there are files enough, the floor is learned from them. A growth over a
limit that the files do not show is suspected. :mod:`pytest_int8bench.gate.noise` says what they
show.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pytest_int8bench.environment import differences
from pytest_int8bench.gate.limits import Rules
from pytest_int8bench.gate.noise import NoiseFloors
from pytest_int8bench.gate.notes import all_notes
from pytest_int8bench.gate.outcomes import (
    OUTCOMES,
    PASSES,
    REGRESSES,
    UNDECIDED,
    Identity,
    RunChange,
)
from pytest_int8bench.gate.renames import renamed
from pytest_int8bench.gate.runs import compare_run
from pytest_int8bench.gate.verdicts import VerdictChange, compare_verdict
from pytest_int8bench.printing import one_line
from pytest_int8bench.results.base import Record
from pytest_int8bench.results.locating import Run


@dataclass(frozen=True, kw_only=True)
class Side:
    """The files of one side."""

    files: tuple[str, ...]
    environment: Mapping[str, Any]
    """Fingerprint of the first file."""
    commits: tuple[str, ...]
    """One per file, in order; ``unknown`` without a repository."""
    dirty: bool


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The comparison of two sides."""

    base: Side
    new: Side
    differences: Mapping[str, tuple[Any, Any]]
    """Differing names of the fingerprint that are not allowed to: values of base and new."""
    allowed: Mapping[str, tuple[Any, Any]]
    """Differing names that are allowed to."""
    runs: tuple[RunChange, ...]
    accuracy: tuple[VerdictChange, ...]
    notes: tuple[str, ...] = ()
    """Notes for the reader."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Outcome -> number of runs."""

    @property
    def compared(self) -> int:
        """Number of runs and verdicts present on both sides."""
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
    """Compare two sides with at least one file each.

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
        compare_run(before.get(identity, []), after.get(identity, []), rules, floors, why)
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
    """Return the differences between the fingerprints of all files, of which the first may be
    partial."""
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
    """Return both sides with the runs that match on either side."""
    if pick is None:
        return before, after
    names: dict[Identity, set[str]] = {}
    for identity, records in (*before.items(), *after.items()):
        found = names.setdefault(identity, set())
        found.update(n for r in records for n in (r.nodeid, r.workload, r.run_name))
    kept = {identity for identity in names if pick(names[identity])}
    one, other = ({i: side[i] for i in side if i in kept} for side in (before, after))
    return one, other

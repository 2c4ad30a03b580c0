"""Match points of older files, in which every workload had a name of OlmoEarth's form, and node ids
did not hold the workload of a marker.

What such a name says of OlmoEarth's fields came from the preset, unless the workload reads them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TypeVar

from pytest_int8bench.choices import DEVICES
from pytest_int8bench.params import RunParams
from pytest_int8bench.results.base import Record
from pytest_int8bench.results.locating import Run
from pytest_int8bench.results.records import Result
from pytest_int8bench.words import plural
from pytest_int8bench.workloads.registry import OLMOEARTH_FIELDS, is_built_in, is_reference

_Key = tuple[str, str, str]  # node id, workload, run name
#: Characters before the run name in a node id that holds a workload.
_LONGEST_HEAD = 1000
_Record = TypeVar("_Record", bound=Record)


class Renames:
    """Records that also exist under a newer name.

    Attributes:
        lines: what to say of them.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        known: dict[_Key, Record] = {}
        for record in records:
            before = known.setdefault(_key(record), record)
            if isinstance(record, Result) and not (isinstance(before, Result) and _work(before)):
                known[_key(record)] = record  # which says more
        self._found = dict(_pairs([*known.values()]))
        self.lines: list[str] = []
        self._refuse_other_models(known)
        self._tell()

    def of(self, record: _Record) -> _Record:
        """Return ``record`` under its newer name and parameters, if there is one."""
        newer = self._found.get(_key(record))
        if newer is None:
            return record
        known = {name: getattr(newer, name) for name in ("nodeid", "run_name", "params")}
        return dataclasses.replace(record, **known)

    @property
    def nodeids(self) -> dict[str, str]:
        """Maps outdated node ids to the current ones."""
        return {key[0]: newer.nodeid for key, newer in self._found.items()}

    def _refuse_other_models(self, known: dict[_Key, Record]) -> None:
        """Exclude workloads that may read fields missing from the newer names, unless parameter or
        token counts show that the models are the same."""
        for workload in dict.fromkeys(workload for _, workload, _ in self._found):
            pairs = [(known[k], n) for k, n in self._found.items() if k[1] == workload]
            dropped = [(old, new) for old, new in pairs if _point(old) != _point(new)]
            if not dropped or is_built_in(workload):
                continue
            same = [
                math.isclose(a, b, rel_tol=1e-6)
                for old, new in dropped
                for a, b in zip(_work(old), _work(new), strict=False)
                if a is not None and b is not None
            ]
            if same and all(same):
                continue
            for old, _ in dropped:
                del self._found[_key(old)]
            why = "its model or inputs differ" if same else "nothing shows that it ignored them"
            self.lines.append(
                f"{workload}: {dropped[0][0].run_name} is not compared with "
                f"{dropped[0][1].run_name}, which does not set {_fields(dropped)}: {why}"
            )

    def _tell(self) -> None:
        if not self._found:
            return
        count = len(self._found)
        (nodeid, _, old), newer = next(iter(self._found.items()))
        old, new = (old, newer.run_name) if old != newer.run_name else (nodeid, newer.nodeid)
        have = "has a new name: " if count == 1 else "have new names, such as "
        self.lines.append(f"{plural(count, 'record')} {have}{old} is {new} now")


def renamed(runs: Sequence[Run]) -> tuple[list[Run], Renames]:
    """Return the files under the newest names, and the renames."""
    found = Renames(record for run in runs for record in _records(run))
    return [_with_new_names(run, found) for run in runs], found


def new_nodeid(record: Record, collected: Collection[str]) -> str:
    """Return the current node id, among ``collected``, of a record of an older file; unchanged if
    there is none."""
    start, tail = _around_name(record)
    for nodeid in collected:
        for name in _names(record.run_name):
            head = nodeid.removesuffix(name + tail)
            if head != nodeid and start in _heads(head, record.workload):
                return nodeid
    return record.nodeid


def _with_new_names(run: Run, found: Renames) -> Run:
    saved = run.saved
    return Run(
        run.path,
        dataclasses.replace(
            saved,
            results=[found.of(record) for record in saved.results],
            accuracy=[found.of(record) for record in saved.accuracy],
            sensitivity=[found.of(record) for record in saved.sensitivity],
        ),
    )


def _records(run: Run) -> Iterator[Record]:
    return itertools.chain(run.saved.results, run.saved.accuracy, run.saved.sensitivity)


def _pairs(records: Sequence[Record]) -> Iterator[tuple[_Key, Record]]:
    """Yield the keys of records with older names, with the records that replace them."""
    newer: dict[tuple[str, str, str], dict[str, list[Record]]] = {}
    for record in records:
        head, tail = _around_name(record)
        starts = [*_heads(head, record.workload)]
        if len(starts) > 1 or record.run_name.partition("_")[0] in DEVICES:
            for start in starts:
                tests = newer.setdefault((start, tail, record.workload), {})
                tests.setdefault(record.run_name, []).append(record)
    candidates: dict[_Key, list[Record]] = {}
    taken: set[_Key] = set()
    for record in records if newer else ():
        found = newer.get((*_around_name(record), record.workload))
        names = _names(record.run_name) if found else ()
        named = [[r for r in (found or {}).get(name, ()) if r is not record] for name in names]
        if len(exact := list(itertools.chain(*named[:2]))) == 1:
            taken.add(_key(exact[0]))
            yield _key(record), exact[0]
        elif names:
            candidates[_key(record)] = list(itertools.chain(*named))
    claimed = Counter(_key(other) for others in candidates.values() for other in others)
    for key, others in candidates.items():
        free = [other for other in others if _key(other) not in taken]
        if len(free) == 1 and claimed[_key(free[0])] == 1:
            yield key, free[0]


def _key(record: Record) -> _Key:
    return (record.nodeid, record.workload, record.run_name)


def _around_name(record: Record) -> tuple[str, str]:
    """Return the parts of the node id around the run name; all of it and "" without one."""
    if not record.run_name:  # an empty separator is an error
        return (record.nodeid, "")
    head, name, tail = record.nodeid.rpartition(record.run_name)
    return (head, tail) if name else (tail, "")


def _heads(head: str, workload: str) -> Iterator[str]:
    """Yield the part before the name, with and without a marker's workload."""
    yield head
    if len(head) > _LONGEST_HEAD:
        return
    for match in re.finditer(r"[\[-]", head):
        label = head[match.end() :].removesuffix("-")
        if label and (label == workload or is_reference(label)):
            yield head[: match.end()]


@functools.lru_cache(maxsize=10_000)
def _names(run_name: str) -> tuple[str, ...]:
    """Return the possible current names of a point named in OlmoEarth's form, starting with its own
    and the one with the same fields; nothing for other forms."""
    if run_name.partition("_")[0] in DEVICES:
        return ()
    try:
        point = RunParams.from_run_name(run_name)
    except ValueError:  # of a mode that is not registered here
        return ()
    default = RunParams()
    point = point.with_short_name()
    set_ones = [n for n in OLMOEARTH_FIELDS if getattr(point, n) != getattr(default, n)]
    subsets = (c for k in range(len(set_ones) + 1) for c in itertools.combinations(set_ones, k))
    resets = [{name: getattr(default, name) for name in subset} for subset in subsets]
    return (run_name, *(point.replace(**reset).run_name for reset in resets))


def _point(record: Record) -> RunParams:
    return RunParams.from_run_name(record.run_name)


def _fields(pairs: Iterable[tuple[Record, Record]]) -> str:
    """Return the fields that the newer names no longer set."""
    fields = {
        f"{name}={getattr(_point(old), name)}": None
        for old, new in pairs
        for name in OLMOEARTH_FIELDS
        if getattr(_point(old), name) != getattr(_point(new), name)
    }
    return ", ".join(fields)


def _work(record: Record) -> tuple[float | None, ...]:
    """Return what distinguishes models and inputs, as far as it was saved: number of parameters,
    and tokens and pixels per sample."""
    if not isinstance(record, Result):
        return ()
    rate = record.samples_per_s
    per_sample = [
        value / rate if value is not None and rate else None
        for value in (record.tokens_per_s, record.pixels_per_s)
    ]
    return ((record.coverage or {}).get("total_parameters"), *per_sample)

"""The files that ``int8bench report`` is given: each session counts once, in the order of time."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from pytest_int8bench.gate.files import Run, find, read_runs
from pytest_int8bench.results import Record, Result, Saved

_FIRST = datetime.min.replace(tzinfo=UTC)
_RecordT = TypeVar("_RecordT", bound=Record)


def gather(names: Sequence[str], storage: Path) -> list[Run]:
    """Return what files, folders and numbers of pytest-benchmark stand for, oldest first.

    Files of the same time keep their order; one that says no time stays behind the one before it. A
    file that is given twice counts once. What a JSON file and the journal of its session both hold
    is that of the JSON file.

    Raises:
        FileError: if there is no such file.
        SchemaError: one line, if a file is damaged or not ours.
        OSError: if one cannot be read.
    """
    found = [path for name in names for path in find(name, storage, journals=True)]
    paths = {path.resolve(): path for path in reversed(found)}
    return _by_time(_without_twins(read_runs([*reversed(paths.values())])))


def _by_time(runs: Sequence[Run]) -> list[Run]:
    times: list[datetime] = []
    for run in runs:
        times.append(run.saved.time or (times[-1] if times else _FIRST))
    order = sorted(range(len(runs)), key=times.__getitem__)
    return [runs[place] for place in order]


def _without_twins(runs: Sequence[Run]) -> list[Run]:
    files = [(run.saved, _texts(run.saved)) for run in runs if not run.saved.is_journal]
    kept = []
    for run in runs:
        saved = run.saved
        if saved.is_journal:
            texts, timed = _texts(saved), {_text(r) for r in _records(saved) if _is_timed(r)}
            for file, known in files:
                # The runner writes a journal for a process that died before it had an environment.
                alike = saved.environment in ({}, file.environment)
                # No two sessions measure the same times.
                if alike and (timed & known if timed else texts <= known):
                    saved = _rest(saved, file)
            if saved is not run.saved and not _records(saved):
                continue
        kept.append(Run(run.path, saved))
    return kept


def _texts(saved: Saved) -> set[str]:
    return {_text(record) for record in _records(saved)}


def _records(saved: Saved) -> tuple[Record, ...]:
    return (*saved.results, *saved.accuracy, *saved.sensitivity)


def _is_timed(record: Record) -> bool:
    return getattr(record, "batch_time_s" if isinstance(record, Result) else "seconds") is not None


def _text(record: Record) -> str:
    return json.dumps([record.KIND, record.to_dict()], sort_keys=True)  # NaN equals itself here


def _rest(journal: Saved, file: Saved) -> Saved:
    """Return the points of ``journal`` that ``file`` lacks."""
    return dataclasses.replace(
        journal,
        results=_others(journal.results, file.results),
        accuracy=_others(journal.accuracy, file.accuracy),
        sensitivity=_others(journal.sensitivity, file.sensitivity),
    )


def _others(records: Sequence[_RecordT], known: Sequence[_RecordT]) -> list[_RecordT]:
    identities = {record.identity for record in known}
    return [record for record in records if record.identity not in identities]

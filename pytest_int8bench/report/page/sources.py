"""The files from which a report is built, and the choice of records that it uses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from pytest_int8bench.gate.renames import renamed
from pytest_int8bench.printing import one_line
from pytest_int8bench.results.base import Record
from pytest_int8bench.results.locating import Run
from pytest_int8bench.results.records import Saved

_RecordT = TypeVar("_RecordT", bound=Record)
_COMMIT_DIGITS = 7


@dataclass(frozen=True)
class Source:
    """One saved file, or the session that is ending."""

    name: str
    """The file's name, preceded by its folders if names alone are ambiguous."""
    label: str
    """A short unique label: the commit, or the file's name."""
    saved: Saved


@dataclass(frozen=True)
class Found(Generic[_RecordT]):
    """A record and the file it comes from."""

    source: Source
    record: _RecordT

    @property
    def device(self) -> str:
        """Name of the GPU or CPU on which it was measured."""
        return device(self.source.saved.environment)


def sources(named: Sequence[tuple[str, Saved]]) -> tuple[Source, ...]:
    """Return a source for each pair of name (such as a path) and content. All strings must be
    clean, as they are after reading a file or after :meth:`~.Saved.cleaned`."""
    names = [one_line(Path(name).name or name) for name, _ in named]
    if len(set(names)) < len(names):
        names = [one_line(name) for name, _ in named]
    found: list[Source] = []
    taken: set[str] = set()
    for name, (_, saved) in zip(names, named, strict=True):
        start = label = _label(name, saved.environment)
        again = 2
        while label in taken:
            label, again = f"{start} #{again}", again + 1
        taken.add(label)
        found.append(Source(name, label, saved))
    return tuple(found)


def with_new_names(given: Sequence[Source]) -> tuple[list[Source], list[str]]:
    """Return the sources with renamed points of older files under their new names, and one line per
    renaming."""
    runs, renames = renamed([Run(Path(source.name), source.saved) for source in given])
    return [replace(s, saved=r.saved) for s, r in zip(given, runs, strict=True)], renames.lines


def current(
    given: Iterable[Source], records: Callable[[Saved], Sequence[_RecordT]]
) -> list[Found[_RecordT]]:
    """Return each record from the last file that has it. Records from different devices are
    different records."""
    latest: dict[tuple[Any, ...], Found[_RecordT]] = {}
    for source in given:
        for record in records(source.saved):
            found = Found(source, record)
            key = (found.device, record.run_name, *record.identity)
            latest.pop(key, None)
            latest[key] = found
    return list(latest.values())


def device(environment: dict[str, Any]) -> str:
    """Return the name of the GPU or, if there is none, of the CPU."""
    gpu = environment.get("gpu") or {}
    return str(gpu.get("name") or environment.get("cpu") or "unknown device")


def _label(name: str, environment: dict[str, Any]) -> str:
    commit = environment.get("commit")
    if not isinstance(commit, str) or not commit:
        return name
    return commit[:_COMMIT_DIGITS] + ("+" if environment.get("dirty") else "")

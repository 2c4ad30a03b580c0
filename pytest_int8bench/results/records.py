"""The records of a session, and the content of the file that holds them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Self, TypeVar

from pytest_int8bench.printing import cleaned
from pytest_int8bench.results.base import Record
from pytest_int8bench.results.benchmarks import Benchmark
from pytest_int8bench.results.result import Result as Result
from pytest_int8bench.results.verdicts import Accuracy, Sensitivity

SCHEMA = 1
#: A record that the gate compares: a point of this plugin, or a plain benchmark.
Timed = Result | Benchmark
AnyRecord = TypeVar("AnyRecord", bound=Record)
#: Field of :class:`Saved` -> the kind of its records.
KINDS: dict[str, type[Record]] = {
    "results": Result,
    "accuracy": Accuracy,
    "sensitivity": Sensitivity,
    "benchmarks": Benchmark,
}


@dataclass(frozen=True)
class Saved:
    """The content of a saved file."""

    environment: dict[str, Any]
    results: list[Result]
    accuracy: list[Accuracy] = field(default_factory=list)
    sensitivity: list[Sensitivity] = field(default_factory=list)
    benchmarks: list[Benchmark] = field(default_factory=list)
    """Plain benchmarks, which pytest-benchmark timed itself."""
    is_journal: bool = field(default=False, compare=False)
    """Whether it was read from a journal."""
    skipped: tuple[int, ...] = field(default=(), compare=False)
    """Numbers of journal lines that are not valid JSON, such as a line cut by a full disk."""
    time: datetime | None = field(default=None, compare=False)
    """When the JSON was saved or the journal started, in UTC; None if the file has no time."""

    @property
    def timed(self) -> list[Timed]:
        """All records that the gate compares."""
        return [*self.results, *self.benchmarks]

    @property
    def records(self) -> list[Record]:
        """All records, kind by kind."""
        return [record for name in KINDS for record in getattr(self, name)]

    @classmethod
    def of(cls, environment: Mapping[str, Any], records: Iterable[Record]) -> Self:
        """Return the content of a file that holds records of any kind."""
        return cls(dict(environment), [])._with(records)

    def without(self, records: Iterable[Record]) -> Self:
        """Return a copy without the records that have the kind and identity of one of
        ``records``."""
        gone = {(record.KIND, record.identity) for record in records}
        return self._with(r for r in self.records if (r.KIND, r.identity) not in gone)

    def _with(self, records: Iterable[Record]) -> Self:
        found = list(records)
        kept: dict[str, Any] = {
            name: [record for record in found if isinstance(record, kind)]
            for name, kind in KINDS.items()
        }
        return replace(self, **kept)

    def broken(self) -> str | None:
        """Return a warning about lines that were skipped, or None if there are none."""
        if not self.skipped:
            return None
        word = "line" if len(self.skipped) == 1 else "lines"
        return f"skipped broken {word} {', '.join(map(str, self.skipped))}"

    def cleaned(self) -> Self:
        """Return a copy with all strings cleaned, as if the file had been saved and read."""
        return replace(self, environment=cleaned(self.environment))._with(
            map(_cleaned, self.records)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the ``int8bench`` object of the JSON. Of the plain benchmarks, it lists only those
        that are not ``ok``, as pytest-benchmark saves the others."""
        kept = {name: [record.to_dict() for record in getattr(self, name)] for name in KINDS}
        untimed = [entry for entry in kept.pop("benchmarks") if entry["status"] != "ok"]
        kept |= {"benchmarks": untimed} if untimed else {}
        return {"schema": SCHEMA, "environment": self.environment, **kept}


def _cleaned(record: AnyRecord) -> AnyRecord:
    values = vars(record)
    changed = {name: v for name in values if (v := cleaned(values[name])) != values[name]}
    return replace(record, **changed) if changed else record


def latest(records: Iterable[AnyRecord]) -> list[AnyRecord]:
    """Return the last record of each identity."""
    found: dict[tuple[str, ...], AnyRecord] = {}
    for record in records:
        found.pop(record.identity, None)
        found[record.identity] = record
    return list(found.values())

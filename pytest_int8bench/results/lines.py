"""Convert records to and from the lines of journals."""

from __future__ import annotations

from typing import Any

from pytest_int8bench.results.base import Record
from pytest_int8bench.results.records import KINDS


def wrapped(record: Record) -> dict[str, Any]:
    """Return a record's values for a line of a journal. All records but results are wrapped in an
    object that names their kind."""
    [kind] = (name for name, kind in KINDS.items() if isinstance(record, kind))
    return record.to_dict() if kind == "results" else {kind: record.to_dict()}


def unwrapped(line: Any) -> tuple[str, Any]:
    """Return the kind (a key of :data:`KINDS`) and the values of a line from :func:`wrapped`."""
    [name] = line if isinstance(line, dict) and len(line) == 1 else ["results"]
    return (name, line[name]) if name in KINDS and name != "results" else ("results", line)

"""Records as lines of journals hold them."""

from __future__ import annotations

from typing import Any

from pytest_int8bench.results.base import Record
from pytest_int8bench.results.records import KINDS


def wrapped(record: Record) -> dict[str, Any]:
    """Return a record as a line of a journal holds it: in an object that names its kind, except
    results."""
    [kind] = (name for name, kind in KINDS.items() if isinstance(record, kind))
    return record.to_dict() if kind == "results" else {kind: record.to_dict()}


def unwrapped(line: Any) -> tuple[str, Any]:
    """Return the kind, by its name in :data:`KINDS`, and the values of what :func:`wrapped`
    returned."""
    [name] = line if isinstance(line, dict) and len(line) == 1 else ["results"]
    return (name, line[name]) if name in KINDS and name != "results" else ("results", line)

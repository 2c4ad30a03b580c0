"""Read ``@pytest.mark.int8``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def marker_changes(item: pytest.Item) -> tuple[dict[str, Any], str | None]:
    """Return the RunParams fields and the workload that ``@pytest.mark.int8`` sets. Closer markers
    take precedence.

    Raises:
        ValueError: if a marker is invalid; one line that names the marker, the test and the key.
    """
    try:
        return _read_markers(item)
    except ValueError as error:
        raise ValueError(f"@pytest.mark.int8 of {item.nodeid}: {error}") from None


def _read_markers(item: pytest.Item) -> tuple[dict[str, Any], str | None]:
    from pytest_int8bench.params import FIELD_TYPES, RunParams

    changes: dict[str, Any] = {}
    workload = None
    for marker in reversed(list(item.iter_markers("int8"))):
        if marker.args:
            raise ValueError(f"arguments must be keywords, got {marker.args[0]!r}")
        for key, value in marker.kwargs.items():
            if key == "workload":
                workload = _workload_name(value, marker.kwargs)
            elif key not in FIELD_TYPES and key != "extra":
                raise ValueError(
                    f"unknown key {key!r}; keys are workload, {', '.join(FIELD_TYPES)}, extra"
                )
            elif key == "extra" and isinstance(value, dict):
                changes["extra"] = {**changes.get("extra", {}), **value}
            else:
                changes[key] = value
    RunParams().replace(**changes)  # raises for an invalid value
    return changes, workload


def _workload_name(value: Any, fields: Iterable[str]) -> str:
    """Return the workload's name, after checking that it exists and uses ``fields``."""
    if not isinstance(value, str):
        raise ValueError(f"workload must be a name, got {value!r}")
    from pytest_int8bench.workloads.registry import check_fields, check_workload_name

    try:
        name = check_workload_name(value)
    except ValueError as error:
        raise ValueError(f"workload {error}") from None
    check_fields(name, fields)
    return name

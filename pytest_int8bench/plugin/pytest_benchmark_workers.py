"""Move timings from pytest-xdist workers to the controller, using pytest-benchmark's internals."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_int8bench.plugin.pytest_benchmark import is_disabled_by_user, session_of

#: Attributes of the ``benchmark`` fixture that pytest-benchmark reads when it saves timings.
_TIMING_NAMES = ("name", "group", "param", "params", "extra_info", "has_error")


def silence_xdist_warning(config: pytest.Config) -> None:
    """Suppress pytest-benchmark's warning that xdist disables it (since 5.3, issued at the end)."""
    session = session_of(config)
    if session is not None:
        session.xdist_benchmark_found = False


def take_timings(config: pytest.Config) -> list[dict[str, Any]]:
    """Remove this worker's timings from pytest-benchmark's session and return them, so that the
    worker does not write a file of its own."""
    session = session_of(config)
    if session is None:
        return []
    timed = [entry for entry in session.benchmarks if entry]
    session.benchmarks.clear()
    return [{**entry.as_dict(), "has_error": entry.has_error} for entry in timed]


def add_timing(config: pytest.Config, fullname: str, values: Mapping[str, Any]) -> None:
    """Add a worker's timing to pytest-benchmark's session, as if this process had measured it.

    Args:
        config: the controller's configuration.
        fullname: node id of the test.
        values: an entry returned by :func:`take_timings`.
    """
    from pytest_benchmark import stats

    session = session_of(config)
    if session is None:
        return
    fixture = SimpleNamespace(
        fullname=fullname,
        cprofile_stats=None,
        **{name: values[name] for name in _TIMING_NAMES},
    )
    metadata: Any = stats.Metadata
    timed = metadata(fixture, values["stats"]["iterations"], values["options"])
    for seconds in values["stats"]["data"]:
        timed.stats.update(seconds)
    session.benchmarks.append(timed)


def enable_saving(config: pytest.Config, order: Mapping[str, int], *, untimed: bool) -> None:
    """Let pytest-benchmark save and compare the timings of workers, although it disabled itself.

    Args:
        config: the controller's configuration.
        order: maps node ids to their positions among the tests.
        untimed: whether to save the session even if it has no timings.
    """
    session = session_of(config)
    if session is None:
        return
    session.benchmarks.sort(key=lambda timed: order.get(timed.fullname, -1))
    if (session.benchmarks or untimed) and not is_disabled_by_user(config):
        session.disabled = False

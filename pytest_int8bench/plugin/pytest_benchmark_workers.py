"""What depends on the insides of pytest-benchmark under pytest-xdist: timings of workers."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_int8bench.plugin.pytest_benchmark import is_disabled_by_user, session_of

#: What pytest-benchmark wants of a fixture whose times it saves.
_TIMING_NAMES = ("name", "group", "param", "params", "extra_info", "has_error")


def silence_xdist_warning(config: pytest.Config) -> None:
    """Keep pytest-benchmark from warning (since 5.3, at the end) that xdist has disabled it."""
    session = session_of(config)
    if session is not None:
        session.xdist_benchmark_found = False


def take_timings(config: pytest.Config) -> list[dict[str, Any]]:
    """Remove the timings of this worker from pytest-benchmark's session, which would write a file
    of its own, and return them."""
    session = session_of(config)
    if session is None:
        return []
    timed = [entry for entry in session.benchmarks if entry]
    session.benchmarks.clear()
    return [{**entry.as_dict(), "has_error": entry.has_error} for entry in timed]


def add_timing(config: pytest.Config, fullname: str, values: Mapping[str, Any]) -> None:
    """Add a timing of a worker to pytest-benchmark's session, as if this process had timed it.

    Args:
        config: of the process that started the worker.
        fullname: node id of the test.
        values: an entry of :func:`take_timings`.
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
    """Make pytest-benchmark, which disabled itself, save and compare the timings of workers.

    Args:
        config: of the process that started the workers.
        order: places of node ids among the tests.
        untimed: whether to save a session without timings too.
    """
    session = session_of(config)
    if session is None:
        return
    session.benchmarks.sort(key=lambda timed: order.get(timed.fullname, -1))
    if (session.benchmarks or untimed) and not is_disabled_by_user(config):
        session.disabled = False

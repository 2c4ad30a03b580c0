"""Load torch and the other libraries that tests need before the first test starts."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

import pytest

from pytest_int8bench.plugin.collection import captured, uses_session_workload
from pytest_int8bench.plugin.points import params_of
from pytest_int8bench.plugin.state import recorder_of


def load_libraries(config: pytest.Config, items: Iterable[pytest.Item]) -> None:
    """Import what the first test would otherwise import. That takes seconds, or minutes from a cold
    disk, and must not count towards a test's time limit, such as that of pytest-timeout."""
    users = [item for item in items if _uses_models(item)]
    if config.option.collectonly or not users:
        return
    is_compiled = any((params := params_of(i)) and params.compile_mode != "off" for i in users)
    with _quietly(config):
        from pytest_int8bench.compiler.backend import load_inductor
        from pytest_int8bench.plugin import calls  # noqa: F401

        if is_compiled:
            load_inductor("cpu")
        from pytest_int8bench.accuracy import guardrail  # noqa: F401
        from pytest_int8bench.measure import point  # noqa: F401
    if any(map(uses_session_workload, users)):  # load the libraries of the session's workload too
        with _quietly(config):
            recorder_of(config).session.workload(None)


@contextmanager
def _quietly(config: pytest.Config) -> Iterator[None]:
    """Suppress output, errors and warnings. The tests import the same modules and report errors
    themselves; warnings from libraries must not become errors."""
    with captured(config), warnings.catch_warnings(), suppress(Exception):
        warnings.simplefilter("ignore")
        yield


def _uses_models(item: pytest.Item) -> bool:
    return (
        "int8_workload" in getattr(item, "fixturenames", ())
        and item.get_closest_marker("skip") is None  # --benchmark-skip sets this too
    )

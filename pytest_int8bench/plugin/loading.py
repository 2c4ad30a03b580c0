"""Load torch and what else tests need before the first of them starts."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

import pytest

from pytest_int8bench.plugin.collection import captured, takes_workload
from pytest_int8bench.plugin.points import params_of
from pytest_int8bench.plugin.session import SESSION


def load_libraries(config: pytest.Config, items: Iterable[pytest.Item]) -> None:
    """Import what the first test would import, which takes seconds, and minutes from a cold disk: a
    clock of a test, such as pytest-timeout's, must not count that."""
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
    if any(map(takes_workload, users)):  # the libraries of the session's workload
        with _quietly(config):
            config.stash[SESSION].workload(None)


@contextmanager
def _quietly(config: pytest.Config) -> Iterator[None]:
    """Leave errors to the tests, each of which imports the same, and let no warning of a library
    become one."""
    with captured(config), warnings.catch_warnings(), suppress(Exception):
        warnings.simplefilter("ignore")
        yield


def _uses_models(item: pytest.Item) -> bool:
    return (
        "int8_workload" in getattr(item, "fixturenames", ())
        and item.get_closest_marker("skip") is None  # of --benchmark-skip, too
    )

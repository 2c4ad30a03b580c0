"""Find the recorder of a pytest session. Sessions that do not use this plugin never create one, and
so do not pay for importing it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_int8bench.plugin.recorder import Recorder

#: Set when pytest is configured; None until something needs a recorder.
RECORDER = pytest.StashKey["Recorder | None"]()
#: A test is an INT8 test if it uses one of these fixtures. Our other fixtures depend on them.
_INT8_FIXTURES = frozenset({"int8_params", "int8_workload", "int8_throughput"})


def is_int8_test(item: pytest.Item) -> bool:
    """Return whether a test uses a fixture of this plugin."""
    return not _INT8_FIXTURES.isdisjoint(getattr(item, "fixturenames", ()))


def existing_recorder(config: pytest.Config) -> Recorder | None:
    """Return the session's recorder; None if nothing has needed one so far."""
    return config.stash.get(RECORDER, None)


def recorder_of(config: pytest.Config) -> Recorder:
    """Return the session's recorder, creating it with default settings on first use. Sessions with
    options of this plugin, and those of pytest-xdist, create theirs when pytest is configured."""
    recorder = config.stash[RECORDER]
    if recorder is None:
        from pytest_int8bench.plugin.recorder import Recorder
        from pytest_int8bench.plugin.session import Session
        from pytest_int8bench.plugin.settings import Settings

        recorder = config.stash[RECORDER] = Recorder(Session(config, Settings()))
    return recorder

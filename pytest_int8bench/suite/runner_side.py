"""pytest plugin for processes that the runner starts: end when the runner ends, and tell it about
Ctrl-C."""

from __future__ import annotations

import pytest

from pytest_int8bench.processes.parent import end_with
from pytest_int8bench.processes.runner_files import Handover


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """End this process when the runner is killed, rather than keep the GPU busy."""
    if hasattr(config, "workerinput"):  # an xdist worker would finish its test before it ends
        end_with(lambda pid: True)
        return
    try:
        is_alive = end_with(Handover.from_env_vars().is_started_by)
    except OSError:  # the runner's file is gone
        is_alive = False
    if not is_alive:
        raise pytest.UsageError("the runner that started this process has ended")


def pytest_keyboard_interrupt(excinfo: pytest.ExceptionInfo[BaseException]) -> None:
    # pytest calls this hook for collection errors and pytest.exit() too.
    if not isinstance(excinfo.value, (pytest.Session.Interrupted, pytest.exit.Exception)):
        Handover.from_env_vars().note_interrupted()

"""pytest plugin of a process that the runner starts: it ends with the runner, and tells it of
Ctrl-C."""

from __future__ import annotations

import pytest

from pytest_int8bench.processes.parent import end_with
from pytest_int8bench.processes.runner_files import Handover


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Do not go on, with the GPU in use, where the runner was killed."""
    if hasattr(config, "workerinput"):  # of xdist, which would finish its test first
        end_with(lambda pid: True)
        return
    try:
        is_alive = end_with(Handover.from_env_vars().is_started_by)
    except OSError:  # its file is gone
        is_alive = False
    if not is_alive:
        raise pytest.UsageError("the runner, which started this process, is gone")


def pytest_keyboard_interrupt(excinfo: pytest.ExceptionInfo[BaseException]) -> None:
    # pytest takes this way for tests that cannot be collected too.
    if not isinstance(excinfo.value, (pytest.Session.Interrupted, pytest.exit.Exception)):
        Handover.from_env_vars().note_interrupted()

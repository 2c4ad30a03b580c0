"""pytest plugin of a process that ``int8bench sensitivity`` starts: it ends with the command."""

from __future__ import annotations

import pytest

from pytest_int8bench.processes.parent import end_with
from pytest_int8bench.processes.scan_request import ScanRequest


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Do not go on, with the GPU in use, where the command was killed."""
    if hasattr(config, "workerinput"):  # it ends with the process that started it
        return
    if not end_with(ScanRequest.from_env_vars().is_started_by):
        raise pytest.UsageError("int8bench sensitivity, which started this process, is gone")


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Hide the path of the packaged test, which means nothing to a user."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        reporter.showfspath = False

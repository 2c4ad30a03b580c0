"""pytest plugin for processes that ``int8bench sensitivity`` starts: end when the command ends."""

from __future__ import annotations

import pytest

from pytest_int8bench.processes.parent import end_with
from pytest_int8bench.processes.scan_request import ScanRequest


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """End this process when the command is killed, rather than keep the GPU busy."""
    if hasattr(config, "workerinput"):  # a worker ends with the controller that started it
        return
    if not end_with(ScanRequest.from_env_vars().is_started_by):
        raise pytest.UsageError("the int8bench sensitivity that started this process has ended")


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Hide the path of the packaged test, which means nothing to a user."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        reporter.showfspath = False

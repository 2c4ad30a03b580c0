"""pytest plugin for processes that ``int8bench ab`` starts: run the selected tests, report which
files modules were loaded from, and end when the command ends."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from pytest_int8bench.processes.ab_files import SideFiles
from pytest_int8bench.processes.parent import end_with


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Generator[None, object, object]:
    result = yield
    only = SideFiles.from_env_vars().only()
    if only is not None:
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in only])
        items[:] = [item for item in items if item.nodeid in only]
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_configure() -> None:
    """End this process when the command is killed, rather than keep the GPU busy."""
    if not end_with(SideFiles.from_env_vars().is_started_by):
        raise pytest.UsageError("the int8bench ab that started this process has ended")


def pytest_sessionfinish() -> None:
    SideFiles.from_env_vars().note_modules()

"""pytest plugin of a process that ``int8bench ab`` starts: it runs the tests asked for, and says
which files the process's modules came from. It ends with the command that started it."""

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
    """Do not go on, with the GPU in use, where the command was killed."""
    if not end_with(SideFiles.from_env_vars().is_started_by):
        raise pytest.UsageError("int8bench ab, which started this process, is gone")


def pytest_sessionfinish() -> None:
    SideFiles.from_env_vars().note_modules()

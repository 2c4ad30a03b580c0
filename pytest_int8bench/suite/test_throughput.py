"""Measure each point that the runner hands over in a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from pytest_int8bench.params import RunParams
from pytest_int8bench.processes.runner_files import Handover
from pytest_int8bench.results.records import Result
from pytest_int8bench.workloads.workload import Workload

HANDOVER = Handover.from_env_vars()

pytestmark = pytest.mark.benchmark(group=HANDOVER.group)


@pytest.fixture(autouse=True)
def _report_running(int8_params: RunParams) -> Iterator[None]:
    """Tell the runner which point is running, in case this process dies."""
    HANDOVER.note_running(int8_params.run_name)
    yield
    HANDOVER.note_running("")


@pytest.mark.parametrize("int8_params", HANDOVER.run_names, ids=HANDOVER.run_names, indirect=True)
def test_throughput(
    int8_workload: Workload,
    int8_throughput: Callable[[], Result],
    request: pytest.FixtureRequest,
) -> None:
    import torch

    from pytest_int8bench.measure.memory import chain_of

    HANDOVER.note_workload(int8_workload.name)
    try:
        result = int8_throughput()
    except Exception as error:
        if any(isinstance(cause, torch.AcceleratorError) for cause in chain_of(error)):
            # Every further call on the device would fail, so the runner continues in a new process.
            HANDOVER.ask_for_new_process()
            request.session.shouldfail = f"the device is unusable in this process: {error}"
        raise
    assert result.oom or (result.samples_per_s or 0) > 0

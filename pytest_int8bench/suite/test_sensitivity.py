"""The test that ``int8bench sensitivity`` runs."""

from __future__ import annotations

from collections.abc import Callable

from pytest_int8bench.processes.scan_request import ScanRequest
from pytest_int8bench.results.verdicts import Sensitivity


def test_sensitivity(int8_sensitivity: Callable[..., Sensitivity]) -> None:
    request = ScanRequest.from_env_vars()
    int8_sensitivity(by=request.by, metric=request.metric)

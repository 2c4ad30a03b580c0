"""The test that ``int8bench sensitivity`` runs."""

from __future__ import annotations

from collections.abc import Callable

from pytest_int8bench.results.records import Sensitivity


def test_sensitivity(
    int8_sensitivity: Callable[..., Sensitivity], int8_scan: dict[str, object]
) -> None:
    int8_sensitivity(**int8_scan)

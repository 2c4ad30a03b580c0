"""``int8bench sensitivity``: the packaged test of layers, run by pytest in this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

_SUITE = Path(__file__).parents[1] / "suite"


class _Scan:
    """Hands the command's own options to the test."""

    def __init__(self, by: str, metric: bool) -> None:
        self._asked = {"by": by, "metric": metric}

    @pytest.fixture
    def int8_scan(self) -> dict[str, object]:
        return self._asked


def run(*, by: str, metric: bool, json: Path | None, pytest_args: Sequence[str]) -> int:
    """Scan the layers and print the table.

    Args:
        by: ``layer`` or ``block``.
        metric: score each on labelled samples too.
        json: file to save the table in.
        pytest_args: options of the plugin, such as ``--int8-workload=digits``.

    Returns:
        pytest's exit code.
    """
    arguments = [
        f"-c={_SUITE / 'pytest.ini'}",
        "--no-header",
        "-W=ignore::pytest.PytestAssertRewriteWarning",  # this package is loaded already
        "--int8-set=compile_mode=off",  # layers run eagerly; the user's own comes later and wins
        str(_SUITE / "test_sensitivity.py"),
        *([f"--benchmark-json={json}"] if json is not None else []),
        *pytest_args,
    ]
    return int(pytest.main(arguments, plugins=[_Scan(by, metric)]))

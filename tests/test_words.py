"""Counts in words."""

from __future__ import annotations

import pytest

from pytest_int8bench.words import plural


@pytest.mark.parametrize(("count", "text"), [(0, "0 runs"), (1, "1 run"), (24, "24 runs")])
def test_only_one_is_singular(count: int, text: str) -> None:
    assert plural(count, "run") == text

"""Test counts and lists in messages."""

from __future__ import annotations

import pytest

from pytest_int8bench.words import plural, some


@pytest.mark.parametrize(("count", "text"), [(0, "0 runs"), (1, "1 run"), (24, "24 runs")])
def test_plural_is_singular_only_for_one(count: int, text: str) -> None:
    assert plural(count, "run") == text


def test_long_lists_of_names_are_shortened() -> None:
    names = [f"n{place}" for place in range(2000)]
    assert some(names[:3], 3) == "n0, n1, n2"
    assert some(names, 2) == "n0, n1 and 1,998 more"

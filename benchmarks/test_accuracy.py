"""Test the accuracy of INT8 against BF16: ``pytest benchmarks --int8-mode=w8a8``."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pytest_int8bench.results.verdicts import Accuracy


def test_accuracy(int8_guardrail: Callable[..., list[Accuracy]]) -> None:
    int8_guardrail()


@pytest.mark.int8(workload="digits")
def test_digits(int8_guardrail: Callable[..., list[Accuracy]]) -> None:
    int8_guardrail()

"""Test which names a workload may have."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_int8bench import Evaluation, Workload
from pytest_int8bench.errors import WorkloadError
from pytest_int8bench.printing import cleaned

ODD = [
    None,
    3,
    b"toy",
    "",
    " ",
    "a\nb",
    "a\r::error::b",
    "\x1b[31mred",
    "a\u202eb",
    "\ud800",
    "a\x00",
]


@pytest.mark.parametrize("name", ODD)
def test_rejects_names_that_cannot_be_saved(name: Any) -> None:
    with pytest.raises(WorkloadError) as info:
        Workload(name=name, build=lambda p: p, inputs=lambda p, device: ())
    problem = f"must be one line of printable text, got {name!r}"
    assert str(info.value) == f"the name of a workload {problem}"
    with pytest.raises(WorkloadError) as info:
        Evaluation(metric=name, scores=lambda forward: [])
    assert str(info.value) == f"the metric of an evaluation {problem}"


@pytest.mark.parametrize("name", ["toy", "hf:my model", "größe_模型", "a|b`<script>", "mIoU [%]"])
def test_names_round_trip_through_files(name: str) -> None:
    Workload(name=name, build=lambda p: p, inputs=lambda p, device: ())
    Evaluation(metric=name, scores=lambda forward: [])
    assert cleaned(name) == name

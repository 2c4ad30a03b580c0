"""Test copying, comparing and casting the inputs of models."""

from __future__ import annotations

import collections
import random
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pytest_int8bench.tensors import cast, deep_copy, same_values

CPU = torch.device("cpu")


@dataclass
class Box:
    """Hold any value."""

    value: Any


class Slots:
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


LAYOUTS = {
    "sliced": lambda x: x[:, :3],
    "transposed": lambda x: x.t(),
    "expanded": lambda x: x[:1].expand(4, 8),
    "empty": lambda x: x[:0],
    "scalar": lambda x: x[0, 0],
    "sparse": lambda x: x.to_sparse(),
    "complex": lambda x: x.to(torch.complex64).conj(),
    "integers": lambda x: x.long(),
    "flags": lambda x: x > 0,
    "graph": lambda x: x.clone().requires_grad_() * 2,
    "parameter": torch.nn.Parameter,
    "nested": lambda x: torch.nested.nested_tensor([x[0, :3], x[1]], layout=torch.jagged),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_copies_tensors_of_any_layout(layout: str) -> None:
    x = LAYOUTS[layout](torch.arange(1.0, 33.0).reshape(4, 8))
    copied = deep_copy({"x": x})["x"]
    assert same_values(x, copied)
    assert copied.dtype == x.dtype
    assert copied.requires_grad == x.requires_grad
    if x.layout is torch.strided:
        assert copied.stride() == x.stride()
    if layout not in ("empty", "expanded", "flags"):
        with torch.no_grad():
            copied.mul_(3)
        assert not same_values(x, copied)


def grown(cache: Any) -> None:
    cache.value.append(1)


CHANGES: dict[str, tuple[Any, Any]] = {
    "list": ([1], lambda v: v.append(1)),
    "dict": ({"a": 1}, lambda v: v.update(b=1)),
    "order of a dict": ({"a": 1, "b": 1}, lambda v: v.update(a=v.pop("a"))),
    "set": ({1}, lambda v: v.add(2)),
    "array": (np.ones(3), lambda v: v.__imul__(2)),
    "array of objects": (np.array([{"a": 1}], dtype=object), lambda v: v[0].update(a=2)),
    "default dict": (collections.defaultdict(list, a=[1]), lambda v: v["a"].append(2)),
    "deque": (collections.deque([1]), lambda v: v.append(1)),
    "dataclass": (Box([1]), grown),
    "slots": (Slots([1]), grown),
    "random": (random.Random(1), lambda v: v.random()),
    "numpy's random": (np.random.default_rng(1), lambda v: v.random()),
    "torch's random": (torch.Generator().manual_seed(1), lambda v: torch.rand(1, generator=v)),
    "deep": ({"a": [Box((torch.ones(2),))]}, lambda v: v["a"][0].value[0].neg_()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changing_the_copy_is_detected_and_keeps_the_original(name: str) -> None:
    value, change = CHANGES[name]
    copied, kept = deep_copy(value), deep_copy(value)
    assert same_values(value, copied)
    change(copied)
    assert not same_values(value, copied)
    assert same_values(value, kept)


def test_copy_preserves_shared_tensors() -> None:
    x = torch.ones(2)
    first, second = deep_copy([x, {"x": x}])
    assert first is second["x"]


def test_shares_only_what_cannot_be_copied() -> None:
    lock, x = threading.Lock(), torch.ones(2)
    value = (Box({"lock": lock, "x": x}), [x, lock])
    copied = deep_copy(value)
    assert copied[0].value["lock"] is copied[1][1] is lock
    copied[0].value["x"].neg_()
    copied[1][0].neg_()
    assert torch.equal(x, torch.ones(2))
    assert not same_values(value, copied)


def test_a_view_is_copied_without_its_storage() -> None:
    large = torch.zeros(1 << 16)
    assert deep_copy(large[4:8]).untyped_storage().nbytes() == 16


def test_copies_values_that_contain_themselves() -> None:
    loop: list[Any] = [torch.ones(1)]
    loop.append(loop)
    assert same_values(loop, deep_copy(loop))


def test_same_values_compares_bits() -> None:
    nan = torch.tensor([torch.nan, 0.0])
    assert same_values(nan, nan.clone())
    assert same_values(float("nan"), float("nan"))
    assert not same_values(torch.zeros(1), -torch.zeros(1))
    assert not same_values(torch.zeros(1), torch.zeros(1, dtype=torch.int32))
    assert not same_values(torch.ones(2, 3), torch.ones(3, 2).t())  # x.t_() was called
    assert not same_values([1], (1,))


@given(st.floats(width=32), st.sampled_from([torch.bfloat16, torch.float16, torch.float64]))
def test_cast_keeps_finite_values_finite(number: float, dtype: torch.dtype) -> None:
    x = torch.tensor([number], dtype=torch.float32)
    made = cast(x, dtype)
    assert made.dtype == dtype
    assert made.isfinite().item() == x.isfinite().item()
    if x.to(dtype).isfinite():
        assert torch.equal(made, x.to(dtype))
    assert cast(x, torch.float32) is x

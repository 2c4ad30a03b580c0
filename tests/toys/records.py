"""Hypothesis strategies of records, from their annotations."""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from typing import Annotated, Any, NotRequired, Union

from hypothesis import strategies as st

from pytest_int8bench.printing import one_line
from pytest_int8bench.results import checks
from pytest_int8bench.results.base import STATUSES
from pytest_int8bench.results.figures import FIGURES
from pytest_int8bench.results.records import Result
from pytest_int8bench.results.result import COMPILE_CACHES
from pytest_int8bench.results.verdicts import OUTCOMES, Accuracy, Sensitivity

text = st.text(max_size=8).map(one_line)  # other texts are cleaned when they are read
numbers = st.floats(allow_nan=False, allow_infinity=False)
scalars = st.one_of(text, st.integers(-(2**60), 2**60), numbers, st.booleans())
positive = st.floats(min_value=sys.float_info.min, allow_infinity=False)
BY_HINT: dict[Any, st.SearchStrategy[Any]] = {
    str: text,
    int: st.integers(-(2**60), 2**60),
    float: numbers,
    bool: st.booleans(),
    Any: st.none() | scalars,
    checks.Scalar: scalars,
    checks.Positive: positive,
    checks.NotNegative: st.floats(min_value=0, allow_infinity=False),
    checks.Bound: st.floats(allow_nan=False),
    checks.Share: st.floats(0, 1),
    checks.Count: st.integers(0, 2**60),
}
BY_NAME = {
    "status": st.sampled_from(STATUSES),
    "limit": st.none() | st.sampled_from(["1%", "0.5pp", "0.000025%"]),
    "outcome": st.sampled_from(OUTCOMES),
    "compile_cache": st.none() | st.sampled_from(COMPILE_CACHES),
    **{f.field: st.none() | positive for f in FIGURES.values() if f.check == "positive"},
    "peak_memory_bytes": st.none() | st.integers(1, 2**60),
    # A batch holds what its time and its rates say.
    **{
        name: st.none() | st.floats(1e-7, 1e7)
        for name in (
            "batch_time_s",
            "samples_per_s",
            "tokens_per_s",
            "pixels_per_s",
            "square_km_per_s",
        )
    },
}


def of(hint: Any) -> st.SearchStrategy[Any]:
    """Return values that a type allows."""
    if hint in BY_HINT:
        return BY_HINT[hint]
    if typing.is_typeddict(hint):
        return _object(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        shape, *needs = arguments[1:]
        found = of(shape)
        for need in needs:
            found = found.filter(lambda value, need=need: _has(value, need))
        return found
    if origin in (Union, types.UnionType):
        return st.none() | of(arguments[0])
    if origin is dict:
        return st.dictionaries(text, of(arguments[1]), max_size=3)
    assert origin is list, hint
    return st.lists(of(arguments[0]), max_size=2)


def _object(kind: Any) -> st.SearchStrategy[dict[str, Any]]:
    needed, others = {}, {}
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        if typing.get_origin(hint) is NotRequired:
            others[name] = of(typing.get_args(hint)[0])
        else:
            (needed if kind.__total__ else others)[name] = of(hint)
    known = st.fixed_dictionaries(needed, optional=others)
    later = st.just({}) | st.fixed_dictionaries({"later": numbers.map(abs)})
    return st.tuples(known, later).map(lambda both: {**both[1], **both[0]})


def _has(value: dict[str, Any], need: checks.Needs) -> bool:
    has = value.get(need.name) is not None
    return not has or all(value.get(other) is not None for other in need.others)


def any_of(kind: type[Any]) -> st.SearchStrategy[Any]:
    """Return records of this kind, with every field at any value that it can have."""
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = [field.name for field in dataclasses.fields(kind)]
    return st.builds(kind, **{name: BY_NAME.get(name) or of(hints[name]) for name in fields})


results = any_of(Result)
verdicts = any_of(Accuracy)
_layers = typing.get_type_hints(Sensitivity, include_extras=True)["layers"]
_losses = {"drop": numbers, "lost": st.integers(0, 9), "gained": st.integers(0, 9)}
_rows = st.tuples(of(typing.get_args(_layers)[0]), st.fixed_dictionaries(_losses)).map(
    lambda both: {**both[0], **both[1]}
)
tables = st.builds(
    Sensitivity,
    nodeid=text,
    workload=text,
    run_name=text,
    params=st.just({}),
    by=text,
    metric=st.none() | text,
    samples=st.integers(0, 2**60),
    layers=st.lists(_rows, max_size=2),
    seconds=st.none() | numbers,
)

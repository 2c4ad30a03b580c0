"""Valid values of records, and the errors for all others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from pytest_int8bench.accuracy.limit import Limit
from pytest_int8bench.results.base import SchemaError
from pytest_int8bench.results.records import Result
from pytest_int8bench.results.verdicts import Accuracy, Sensitivity
from toys.results import CEILING, result_of, verdict_of

NAN = float("nan")
TABLE = Sensitivity(
    nodeid="scan", workload="toy", run_name="x", params={}, by="layer", samples=1, layers=[]
)
LIMIT = "limit must be a percentage such as 1% or 1pp, over 0 and at most 100, got "
ROW = {"name": "a", "sqnr_db": 1.0}


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("params", "x", "params must be an object, got 'x'"),
        ("params", {"batch_size": "8"}, "params.batch_size must be a whole number of at least 0"),
        ("params", {"bf16": 1}, "params.bf16 must be true or false, got 1"),
        (
            "params",
            {"extra": {"a": [1]}},
            "params.extra.a must be a string, a number, true or false",
        ),
        ("rounds", True, "rounds must be a whole number of at least 0, got True"),
        ("rounds", 2.0, "rounds must be a whole number of at least 0, got 2.0"),
        ("rounds", -1, "rounds must be a whole number of at least 0, got -1"),
        ("steady", 0, "steady must be true or false, got 0"),
        ("warm_up_s", NAN, "warm_up_s must be a number, got nan"),
        ("ceiling_reached", float("inf"), "ceiling_reached must be a number, got inf"),
        ("speedup", 0, "speedup must be a number above 0, got 0"),
        ("speedup_low", -0.5, "speedup_low must be a number above 0, got -0.5"),
        ("int8_time_share", 1.5, "int8_time_share must be a share from 0 to 1, got 1.5"),
        ("throttled", [1], "throttled[0] must be a string, got 1"),
        ("kernels", [{}, {"calls": "3"}], "kernels[1].calls must be a whole number of at least 0"),
        ("kernels", {}, "kernels must be a list, got {}"),
        ("coverage", {"left_out": []}, "coverage.left_out must be an object, got []"),
        ("coverage", {"left_out": {"a": 5}}, "coverage.left_out.a must be a string, got 5"),
        ("coverage", {"smoothed_runtime": None}, "coverage.smoothed_runtime must be a list of st"),
        ("device_breakdown", {"rest": NAN}, "device_breakdown.rest must be a number of at least 0"),
        ("device_breakdown", {"later": "x"}, "device_breakdown.later must be a number of at least"),
        (
            "ceiling",
            {**CEILING, "product_ratio": 0},
            "ceiling.product_ratio must be a number above",
        ),
        (
            "ceiling",
            {"baseline": {}},
            "ceiling.baseline.int8_products must be a number of at least",
        ),
        (
            "ceiling",
            {"baseline": CEILING["baseline"], "product_ratio": 2.0},
            "ceiling must be an object with products_speedup, quantized_share if it has base",
        ),
        (
            "ceiling",
            {**CEILING, "attention": {"share": 1.5, "ratio": 2.0, "ops_per_s": 1e14}},
            "ceiling.attention.share must be a share from 0 to 1, got 1.5",
        ),
        ("gpu_after", {"power_w": "300"}, "gpu_after.power_w must be a number of at least 0"),
        ("worker", ["gw0"], "worker must be an object, got ['gw0']"),
    ],
)
def test_checks_values_of_results(name: str, value: Any, why: str) -> None:
    with pytest.raises(SchemaError) as info:
        Result.from_dict({**result_of().to_dict(), name: value})
    assert str(info.value).startswith(f"not a result: {why}")


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("samples", None, "samples must be a whole number of at least 0, got None"),
        ("random_weights", "no", "random_weights must be true or false, got 'no'"),
        ("limit", 0.01, f"{LIMIT}0.01"),
        ("limit", "0%", f"{LIMIT}'0%'"),
        ("limit", "1e400pp", f"{LIMIT}'1e400pp'"),
        ("limit", "1", f"{LIMIT}'1'"),
        ("drop", float("inf"), "drop must be a number, got inf"),
        ("drop_low", NAN, "drop_low must be a number, got nan"),
        ("distance", {"cosine": "1"}, "distance.cosine must be a number, got '1'"),
        ("floor", [], "floor must be an object, got []"),
        ("remedies", [{}], "remedies[0].rung must be a string, got None"),
    ],
)
def test_checks_values_of_verdicts(name: str, value: Any, why: str) -> None:
    with pytest.raises(SchemaError) as info:
        Accuracy.from_dict({**verdict_of().to_dict(), name: value})
    assert str(info.value) == f"not a verdict: {why}"


def test_judged_remedies_have_figures() -> None:
    row = dict.fromkeys(("setting", "selection_drop", "problem", "outcome"))
    tried = {**row, "rung": "W8"}
    assert verdict_of(remedies=[tried]).remedies == [tried]
    with pytest.raises(ValueError, match=r"^remedies\[0\] must be an object with drop, samples, "):
        verdict_of(remedies=[{**tried, "outcome": "PASS"}])


def test_small_limits_are_read_as_they_are_written() -> None:
    limit = Limit.parse("0.000025%")
    assert str(limit).startswith("0.000025")
    assert Limit.parse(str(limit)).value == pytest.approx(limit.value)
    assert verdict_of(limit=str(limit)).limit == str(limit)


def test_bounds_may_be_infinite() -> None:
    for value in (float("inf"), float("-inf")):
        assert verdict_of(drop_high=value).drop_high == value


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"layers": [[]]}, "layers[0] must be an object, got []"),
        ({"layers": [{"sqnr_db": 1.0}]}, "layers[0].name must be a string, got None"),
        (
            {"layers": [{"name": "a"}]},
            "layers[0] must be an object with sqnr_db, got {'name': 'a'}",
        ),
        ({"layers": [ROW], "metric": "top1"}, "layers[0].drop must be a number, got None"),
        (
            {"layers": [{**ROW, "layers": "a"}]},
            "layers[0].layers must be a list of strings, got 'a'",
        ),
    ],
)
def test_checks_values_of_layer_tables(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(SchemaError) as info:
        Sensitivity.from_dict({**TABLE.to_dict(), **changes})
    assert str(info.value) == f"not a table of layers: {why}"


def test_objects_may_have_more_fields() -> None:
    later = {"later": [{"a": 1}], "mode": "w4"}
    assert result_of(coverage=later).coverage == later
    params = {"later": {"a": 1}, "int8_mode": "w4a4"}
    assert result_of(params=params).params == params


def test_to_dict_copies_deeply() -> None:
    result = result_of(coverage={"left_out": {"a": "why"}}, throttled=["heat"])
    values = result.to_dict()
    values["coverage"]["left_out"].clear()
    values["throttled"].clear()
    assert result.coverage == {"left_out": {"a": "why"}}
    assert result.throttled == ["heat"]


def test_fields_must_have_types_that_json_can_hold() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Odd(Result):
        where: tuple[str, ...] = ()

    with pytest.raises(TypeError, match=r"^a field of a record must have a type that JSON can"):
        Odd(nodeid="a", workload="toy", run_name="x", params={})

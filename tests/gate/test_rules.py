"""Test limits, noise floors, allowed differences, and the table in ``pyproject.toml``."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_int8bench.environment import FINGERPRINT_NAMES
from pytest_int8bench.gate.rules import (
    ALLOWABLE,
    METRICS,
    Rules,
    check_allow,
    find_pyproject,
    parse_floor,
    parse_limit,
    parse_share,
    read_rules,
)
from pytest_int8bench.results.benchmarks import Benchmark
from pytest_int8bench.results.records import Result

OPTIONS = (
    "max-slowdown, max-batch-time-growth, max-p95-growth, max-memory-growth, max-compile-growth, "
    "max-energy-growth, max-call-time-growth"
)
KEYS = f"{OPTIONS}, noise-floor, allow, allow-missing, fail-on-inconclusive, runs"
NAMES = ", ".join(ALLOWABLE)


# -- metrics ------------------------------------------------------------------------------------


def test_metrics_are_numeric_fields_with_documented_defaults() -> None:
    limits = {name: (metric.limit, metric.floor) for name, metric in METRICS.items()}
    assert limits == {
        "throughput": (0.05, 0.02),
        "batch-time": (None, 0.02),
        "p95": (None, 0.05),
        "memory": (0.05, 0.01),
        "compile": (None, 0.3),
        "energy": (None, 0.03),
        "call-time": (0.05, 0.02),
    }
    for metric in METRICS.values():
        kind = Benchmark if metric.of_benchmarks else Result
        assert metric.field in {spec.name for spec in fields(kind)}
    assert ", ".join(metric.option for metric in METRICS.values()) == OPTIONS
    assert [name for name, metric in METRICS.items() if not metric.depends_on_clocks] == ["memory"]


@pytest.mark.parametrize(
    ("metric", "base", "new", "growth"),
    [
        ("throughput", 100.0, 80.0, 0.25),  # a sample takes 25 % longer
        ("throughput", 100.0, 125.0, -0.2),
        ("batch-time", 0.1, 0.125, 0.25),
        ("memory", 1000, 800, -0.2),
    ],
)
def test_growth_measures_cost(metric: str, base: float, new: float, growth: float) -> None:
    assert METRICS[metric].growth(base, new) == pytest.approx(growth)


@given(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
def test_rate_and_its_time_have_equal_growth(base: float, new: float) -> None:
    rate = METRICS["throughput"].growth(1 / base, 1 / new)
    assert rate == pytest.approx(METRICS["batch-time"].growth(base, new))


# -- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "share"), [("5%", 0.05), (" 0.5 % ", 0.005), ("0%", 0.0), ("150%", 1.5)]
)
def test_parses_percentages(text: str, share: float) -> None:
    assert parse_share(text) == pytest.approx(share)
    assert parse_limit(text) == parse_share(text)


def test_a_limit_can_be_off() -> None:
    assert parse_limit(" off ") is None


@pytest.mark.parametrize("text", ["5", "", "%", "-1%", "+5%", "5 percent", "1e1%", "nan%", "off"])
def test_rejects_invalid_percentages(text: str) -> None:
    with pytest.raises(ValueError, match="must be a percentage") as caught:
        parse_share(text)
    assert str(caught.value) == f"must be a percentage such as 5%, got {text!r}"
    if text != "off":
        with pytest.raises(ValueError, match="must be a percentage") as caught:
            parse_limit(text)
        assert str(caught.value) == f"must be a percentage such as 5%, or off, got {text!r}"


def test_percentages_must_be_finite() -> None:
    for read in (parse_share, parse_limit):
        with pytest.raises(
            ValueError, match=r"^must be a percentage such as 5%.*9\.\.\.9"
        ) as caught:
            read("9" * 400 + "%")
        assert len(str(caught.value)) < 200


def test_a_floor_names_its_metric() -> None:
    assert parse_floor(" memory = 0.5%") == ("memory", pytest.approx(0.005))


@pytest.mark.parametrize("text", ["3%", "speed=3%", "=3%", "max-slowdown=3%", ""])
def test_rejects_floor_of_unknown_metric(text: str) -> None:
    with pytest.raises(ValueError, match="METRIC") as caught:
        parse_floor(text)
    assert str(caught.value) == (
        "must be METRIC=PERCENTAGE with a metric of throughput, batch-time, p95, memory, compile, "
        f"energy, call-time, got {text!r}"
    )


def test_floor_cannot_be_off() -> None:
    with pytest.raises(ValueError, match=r"^must be a percentage such as 5%, got 'off'$"):
        parse_floor("memory=off")


def test_every_difference_but_the_commit_can_be_allowed() -> None:
    assert set(ALLOWABLE) == {*FINGERPRINT_NAMES, "throttled"} - {"commit", "dirty"}
    assert check_allow(ALLOWABLE) == frozenset(ALLOWABLE)
    assert check_allow([]) == frozenset()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("commit", "commit may always differ"),
        ("dirty", "dirty may always differ"),
        ("drivers", f"must be one of {NAMES}, got 'drivers'"),
        ("", f"must be one of {NAMES}, got ''"),
    ],
)
def test_rejects_other_names(name: str, why: str) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(why)}$"):
        check_allow(["driver", name])


# -- precedence of limits ------------------------------------------------------------------------


def test_per_run_limit_overrides_general_limit_which_overrides_default() -> None:
    runs = (("*_bs1", {"throughput": 0.15}), ("test_a.py::*", {"memory": None}))
    rules = Rules(limits={"throughput": 0.1}, runs=runs)
    assert rules.limit("throughput", "nano_bs1", "test_a.py::test[nano_bs1]") == 0.15
    assert rules.limit("throughput", "nano_bs16", "test_a.py::test[nano_bs16]") == 0.1
    assert rules.limit("memory", "nano_bs1", "test_a.py::test[nano_bs1]") is None
    assert rules.limit("memory", "nano_bs1", "test_b.py::test[nano_bs1]") == 0.05
    assert Rules().limit("throughput", "nano_bs1") == 0.05


def test_the_last_pattern_that_matches_wins() -> None:
    runs = (("*", {"p95": 0.1}), ("nano*", {"p95": 0.2}), ("tiny*", {"p95": 0.3}))
    assert Rules(runs=runs).limit("p95", "nano_bs1") == 0.2
    assert Rules(runs=runs[::-1]).limit("p95", "nano_bs1") == 0.1


def test_node_id_matches_literally() -> None:
    # In a pattern, its brackets would match a set of characters.
    rules = Rules(runs=(("test_a.py::test[nano_bs1]", {"throughput": 0.5}),))
    assert rules.limit("throughput", "nano_bs1", "test_a.py::test[nano_bs1]") == 0.5
    assert rules.limit("throughput", "n", "test_a.py::testn") == 0.5
    assert rules.limit("throughput", "nano_bs2", "test_a.py::test[nano_bs2]") == 0.05


def test_finds_patterns_that_match_no_run() -> None:
    rules = Rules(runs=(("*_bs1", {}), ("*_bs2", {}), ("test_a.py::*", {})))
    assert rules.unmatched([("nano_bs1", "test_a.py::test[nano_bs1]")]) == ["*_bs2"]
    assert rules.unmatched([]) == ["*_bs1", "*_bs2", "test_a.py::*"]


# -- the table ----------------------------------------------------------------------------------

TABLE = """
[project]
name = "mine"

[tool.int8bench.gate]
max-slowdown = "4%"
max-compile-growth = "50%"
max-memory-growth = "off"
noise-floor = { throughput = "3%", p95 = "8 %" }
allow = ["driver", "throttled"]
allow-missing = true
fail-on-inconclusive = true

[tool.int8bench.gate.runs."*_bs1"]
max-slowdown = "15%"

[tool.int8bench.gate.runs."test_a.py::test[*]"]
max-p95-growth = "10%"
"""


@pytest.fixture
def pyproject(tmp_path: Path) -> Path:
    return tmp_path / "pyproject.toml"


def test_reads_every_key_of_the_table(pyproject: Path) -> None:
    pyproject.write_text(TABLE)
    assert read_rules(pyproject) == Rules(
        limits={"throughput": 0.04, "compile": 0.5, "memory": None},
        runs=(("*_bs1", {"throughput": 0.15}), ("test_a.py::test[*]", {"p95": 0.1})),
        floors={"throughput": 0.03, "p95": 0.08},
        allow=frozenset({"driver", "throttled"}),
        allow_missing=True,
        fail_on_inconclusive=True,
    )


@pytest.mark.parametrize(
    "content", ["", "[tool.other]\na = 1\n", "tool = 5\n", "[tool.int8bench.gate]\n"]
)
def test_uses_defaults_without_a_table(pyproject: Path, content: str) -> None:
    pyproject.write_text(content)
    assert read_rules(pyproject) == read_rules(None) == Rules()


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("max-slowdow = '5%'", f"unknown key 'max-slowdow'; keys are {KEYS}"),
        ("max-slowdown = 5", "max-slowdown: must be a percentage such as 5%, or off, got '5'"),
        (
            "max-p95-growth = false",
            "max-p95-growth: must be a percentage such as 5%, or off, got 'False'",
        ),
        ("allow-missing = 'yes'", "allow-missing must be true or false, got 'yes'"),
        ("fail-on-inconclusive = 1", "fail-on-inconclusive must be true or false, got 1"),
        ("allow = 'driver'", "allow must be a list of names, got 'driver'"),
        ("allow = [5]", "allow must be a list of names, got [5]"),
        ("allow = ['gpus']", f"allow: must be one of {NAMES}, got 'gpus'"),
        ("allow = ['commit']", "allow: commit may always differ"),
        ("noise-floor = '3%'", "noise-floor must be a table of metrics, got '3%'"),
        (
            "noise-floor = { speed = '3%' }",
            (
                "noise-floor: must be METRIC=PERCENTAGE with a metric of throughput, batch-time, "
                "p95, memory, compile, energy, call-time, got 'speed=3%'"
            ),
        ),
        ("noise-floor = { memory = 3 }", "noise-floor: must be a percentage such as 5%, got '3'"),
        ("runs = ['*']", "runs must be a table of patterns, got ['*']"),
        ("runs = { '*' = '5%' }", "runs.'*': must be a table, got '5%'"),
        (
            "runs = { '*_bs1' = { allow = [] } }",
            f"runs.'*_bs1': unknown key 'allow'; keys are {OPTIONS}",
        ),
        (
            "runs = { '*_bs1' = { max-slowdown = '1' } }",
            "runs.'*_bs1': max-slowdown: must be a percentage such as 5%, or off, got '1'",
        ),
    ],
)
def test_rejects_bad_tables_in_one_line(pyproject: Path, line: str, why: str) -> None:
    pyproject.write_text(f"[tool.int8bench.gate]\n{line}\n")
    with pytest.raises(ValueError, match="gate") as caught:
        read_rules(pyproject)
    assert str(caught.value) == f"{pyproject}: tool.int8bench.gate: {why}"


def test_rejects_gate_that_is_not_a_table(pyproject: Path) -> None:
    pyproject.write_text("[tool.int8bench]\ngate = 5\n")
    with pytest.raises(ValueError, match=r": tool\.int8bench\.gate: must be a table, got 5$"):
        read_rules(pyproject)


@pytest.mark.parametrize("content", [b"[tool", b"\xff\xfe"])
def test_rejects_file_that_is_not_toml(pyproject: Path, content: bytes) -> None:
    pyproject.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(pyproject))} is not TOML: [^\n]+$"):
        read_rules(pyproject)


def test_uses_the_closest_pyproject(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (tmp_path / "pyproject.toml").touch()
    assert find_pyproject(inner) == tmp_path / "pyproject.toml"
    (tmp_path / "a" / "pyproject.toml").touch()
    assert find_pyproject(inner) == tmp_path / "a" / "pyproject.toml"

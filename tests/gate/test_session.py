"""Test the gate in a session: each point is judged immediately, and problems fail at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_int8bench.errors import ClearError
from pytest_int8bench.gate.limits import Rules
from pytest_int8bench.gate.session import IncomparableError, RegressionError, SessionGate
from pytest_int8bench.results.locating import Run
from pytest_int8bench.results.records import Result, Saved
from toys.results import plain, timed

HERE: dict[str, Any] = {"cpu": "EPYC", "packages": {"torch": "2.11.0"}, "commit": "abc"}


def node(name: str) -> str:
    return f"test_a.py::test[{name}]"


def gate_of(*results: Result, rules: Rules | None = None, **environment: Any) -> SessionGate:
    run = Run(Path("base.json"), Saved({**HERE, **environment}, list(results)))
    return SessionGate([run], rules or Rules())


def said(judge: Callable[[], None], kind: type[Exception]) -> str:
    assert issubclass(kind, ClearError)  # without a traceback of this package
    with pytest.raises(kind) as caught:
        judge()
    message = str(caught.value)
    assert "\n" not in message
    return message


def problems(
    gate: SessionGate,
    collected: set[str],
    deselected: frozenset[str] = frozenset(),
    *,
    by_node: bool = False,
    gone: tuple[str, ...] = (),
) -> list[str]:
    return gate.problems(collected, deselected, by_node=by_node, is_gone=gone.__contains__)


# -- one point ----------------------------------------------------------------------------------


def test_unchanged_point_passes() -> None:
    gate = gate_of(timed(), timed("other"))
    gate.judge(timed(slower=1.01), HERE)
    assert gate.summary() == ["compared with base.json: 1 same"]


def test_regression_names_point_limit_and_base() -> None:
    gate = gate_of(timed())
    assert said(lambda: gate.judge(timed(slower=1.25), HERE), RegressionError) == (
        "regressed: toy: x: max-slowdown: +25.0%, limit 5.0% (noise floor 2.0%); compared with "
        "base.json"
    )
    assert gate.summary() == ["compared with base.json: 1 regressed"]


def test_the_last_attempt_of_a_test_counts() -> None:
    gate = gate_of(timed())
    said(lambda: gate.judge(timed(slower=1.25), HERE), RegressionError)
    gate.forget(timed().nodeid)
    assert problems(gate, {timed().nodeid}) == [
        "nothing was compared with base.json",
        f"not measured, so not compared: {timed().nodeid}",
    ]
    gate.judge(timed(), HERE)
    assert problems(gate, {timed().nodeid}) == []


def test_uses_limits_of_the_rules() -> None:
    gate = gate_of(timed(), rules=Rules(limits={"throughput": 0.3}))
    gate.judge(timed(slower=1.25), HERE)
    with pytest.raises(RegressionError):
        gate.judge(timed(slower=1.35), HERE)


def test_new_point_passes_and_is_listed() -> None:
    gate = gate_of(timed("other"))
    gate.judge(timed(), HERE)
    assert gate.summary() == ["compared with base.json: 1 new", "new: toy: x: not in the base"]


def test_out_of_memory_regresses_only_if_new() -> None:
    oom = timed(status="oom")
    assert said(lambda: gate_of(timed()).judge(oom, HERE), RegressionError) == (
        "oom: toy: x: why; compared with base.json"
    )
    gate_of(oom).judge(oom, HERE)


def test_throttled_point_cannot_be_compared() -> None:
    hot = timed(throttled=["power brake"])
    assert said(lambda: gate_of(timed()).judge(hot, HERE), IncomparableError) == (
        "incomparable: toy: x: measured while the GPU was slowed down: power brake; compared with "
        "base.json"
    )


def test_compares_points_of_the_same_test_and_workload() -> None:
    other = timed(slower=0.1, workload="vit")
    gate = gate_of(other, timed())
    gate.judge(timed(), HERE)
    with pytest.raises(RegressionError):
        gate.judge(timed(workload="vit"), HERE)


def test_several_base_files_determine_the_noise() -> None:
    runs = [
        Run(Path(f"{slower}.json"), Saved(HERE, [timed(slower=slower)])) for slower in (1.0, 1.3)
    ]
    gate = SessionGate(runs, Rules())
    gate.judge(timed(slower=1.4), HERE)
    assert gate.summary()[0] == "compared with 1.0.json, 1.3.json: 1 suspected"
    gate = SessionGate(runs * 4, Rules())
    gate.judge(timed(slower=1.4), HERE)
    assert gate.summary()[0].endswith(": 1 same")


# -- the machine --------------------------------------------------------------------------------


def test_rejects_another_machine_before_measuring() -> None:
    there = {**HERE, "cpu": "Xeon", "packages": {"torch": "2.12.0"}, "commit": "def"}
    assert said(lambda: gate_of().check_machine(there), IncomparableError) == (
        "base.json was measured on another machine or software: cpu EPYC -> Xeon, torch 2.11.0 -> "
        "2.12.0; to compare all the same: --int8-allow cpu --int8-allow torch"
    )
    gate_of(rules=Rules(allow=frozenset({"cpu", "torch"}))).check_machine(there)
    gate_of().check_machine({**HERE, "commit": "def", "dirty": True})


# -- the end of a session -----------------------------------------------------------------------


def test_no_problem_if_all_points_were_measured() -> None:
    gate = gate_of(timed(), timed("skipped", status="skipped"))
    gate.judge(timed(), HERE)
    assert problems(gate, {node("x")}) == []


def test_nothing_compared_is_a_problem() -> None:
    gate = gate_of(timed("other"))
    assert problems(gate, set(), by_node=True) == ["nothing was compared with base.json"]
    gate.judge(timed(), HERE)  # new
    rules = Rules(allow_missing=True)
    assert problems(gate, {node("x")}, by_node=True) == ["nothing was compared with base.json"]
    assert problems(gate_of(rules=rules), set()) == ["nothing was compared with base.json"]


def test_reports_missing_and_unmeasured_points() -> None:
    gate = gate_of(timed("x"), timed("gone"), timed("idle", status="oom"))
    gate.judge(timed("x"), HERE)
    found = {node("x"), node("idle")}
    idle = f"not measured, so not compared: {node('idle')}"
    missing = f"missing: {node('gone')} is in base.json and not in this session"
    assert problems(gate, found) == [missing, idle]
    # A test selected by node id must be measured; the others were not requested.
    assert problems(gate, found, by_node=True) == [idle]
    assert problems(gate, found, frozenset({node("idle"), node("gone")})) == []


def test_tests_outside_the_selected_files_are_not_missing() -> None:
    elsewhere = timed(nodeid="test_b.py::test[x]")
    gate = gate_of(timed(), elsewhere)
    gate.judge(timed(), HERE)
    assert problems(gate, {node("x")}) == []
    # Files deleted from a selected folder are missing, however.
    assert problems(gate, {node("x")}, gone=("test_b.py",)) == [
        "missing: test_b.py::test[x] is in base.json and not in this session"
    ]


def test_missing_points_can_be_allowed() -> None:
    gate = gate_of(timed(), timed("gone"), rules=Rules(allow_missing=True))
    gate.judge(timed(), HERE)
    assert problems(gate, {node("x")}) == []


def test_reports_session_without_points() -> None:
    assert gate_of(timed()).summary() == ["compared with base.json: nothing"]


def test_suspected_regression_is_listed_and_does_not_fail() -> None:
    gate = gate_of(timed(), timed("other"))
    gate.judge(timed(slower=1.08), HERE)
    first, suspected = gate.summary()
    assert first == "compared with base.json: 1 suspected"
    assert suspected.startswith("suspected: toy: x: max-slowdown: +8.0%, limit 5.0%, shown from ")


def test_compares_plain_benchmarks_with_the_file() -> None:
    run = Run(Path("base.json"), Saved({**HERE, "only": ["cpu"]}, [], benchmarks=[plain("x")]))
    gate = SessionGate([run], Rules())
    gate.check_machine({**HERE, "cuda": "13.0"})
    assert said(lambda: gate.judge(plain("x", 1.3e-3), HERE), RegressionError) == (
        "regressed: test_a.py::x: max-call-time-growth: +30.0%, limit 5.0% (noise floor 2.0%); "
        "compared with base.json"
    )
    assert gate.summary()[1].startswith(
        "note: base.json: saved without pytest-int8bench: only mach"
    )
    gate.forget("test_a.py::x")
    assert problems(gate, {"test_a.py::x"})[1:] == ["not measured, so not compared: test_a.py::x"]

"""Test comparing saved runs of two commits: regressions, incomparable runs, and noise."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_int8bench.environment import differences
from pytest_int8bench.gate import compare as gate_compare
from pytest_int8bench.gate.compare import Comparison, compare
from pytest_int8bench.gate.limits import Rules
from pytest_int8bench.gate.outcomes import RunChange
from pytest_int8bench.gate.verdicts import VerdictChange
from pytest_int8bench.results.base import NOT_MEASURED, SPEED_CHANGED, Record
from pytest_int8bench.results.figures import METRICS
from pytest_int8bench.results.locating import Run
from pytest_int8bench.results.records import Result, Saved
from pytest_int8bench.results.verdicts import Accuracy
from toys.results import plain, saved, timed, verdict_of

ENVIRONMENT: dict[str, Any] = {
    "gpu": {"name": "A100", "driver": "580.1"},
    "gpu_count": 1,
    "cuda": "13.0",
    "packages": {"torch": "2.11.0"},
    "cpu": "EPYC",
    "commit": "a" * 40,
    "dirty": False,
}
RULES = Rules()
DEFAULT_LIMIT = 0.05


DISABLED = timed(status="skipped", reason=f"{NOT_MEASURED}: pytest-benchmark is disabled")


def side(*records: Record, name: str = "file.json", **environment: Any) -> Run:
    return Run(Path(name), saved(*records, **{**ENVIRONMENT, **environment}))


def compared(base: Sequence[Record], new: Sequence[Record], **rules: Any) -> Comparison:
    return compare([side(*base)], [side(*new)], dataclasses.replace(RULES, **rules))


def one(base: Result | None, new: Result | None, **rules: Any) -> tuple[str, int, str | None]:
    """Compare one run, next to an unchanged one; return outcome, exit code and reason."""
    same = timed("same")
    found = compared([r for r in (base, same) if r], [r for r in (new, same) if r], **rules)
    [run] = [run for run in found.runs if run.run_name == "x"]
    assert found.exit_code == run.exit_code
    assert found.counts == ({"same": 2} if run.outcome == "same" else {run.outcome: 1, "same": 1})
    return run.outcome, run.exit_code, run.reason


def verdict(
    base: Accuracy | None, new: Accuracy | None, **rules: Any
) -> tuple[str, int, str | None]:
    """Like ``one``, for one verdict."""
    same = timed("same")
    found = compared([r for r in (base, same) if r], [r for r in (new, same) if r], **rules)
    [change] = found.accuracy
    assert found.exit_code == change.exit_code
    return change.outcome, change.exit_code, change.reason


# -- metrics ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slower", "outcome", "exit_code"),
    [
        (0.5, "improved", 0),
        (0.979, "improved", 0),
        (0.981, "same", 0),
        (1.0, "same", 0),
        (1.019, "same", 0),
        (1.021, "same", 0),  # above the noise, within the limit
        (1.049, "same", 0),
        (1.051, "suspected", 2),  # over the limit, but two processes may differ by that much
        (1.12, "suspected", 2),
        (1.15, "regressed", 1),
        (3.0, "regressed", 1),
    ],
)
def test_slowdown_over_limit_regresses(slower: float, outcome: str, exit_code: int) -> None:
    assert one(timed(), timed(slower=slower))[:2] == (outcome, exit_code)


def test_the_reason_names_option_growth_limit_and_noise() -> None:
    bigger = timed(slower=1.25, peak_memory_bytes=3 << 29)
    assert one(timed(), bigger)[2] == (
        "max-slowdown: +25.0%, limit 5.0% (noise floor 2.0%); "
        "max-memory-growth: +50.0%, limit 5.0% (noise floor 1.0%)"
    )


@pytest.mark.parametrize("metric", ["batch-time", "p95", "compile"])
def test_metrics_without_a_limit_are_judged_on_request(metric: str) -> None:
    spec = METRICS[metric]
    worse = dataclasses.replace(timed(), **{spec.field: getattr(timed(), spec.field) * 2})
    [change] = [
        change for change in compared([timed()], [worse]).runs[0].changes if change.metric == metric
    ]
    assert (change.growth, change.limit, change.outcome) == (
        pytest.approx(1.0),
        None,
        "not judged",
    )
    assert one(timed(), worse)[:2] == ("same", 0)
    assert one(timed(), worse, limits={metric: 0.9})[:2] == ("regressed", 1)
    assert one(timed(), worse, limits={metric: 1.1})[:2] == ("same", 0)


def test_more_memory_is_a_regression_even_if_faster() -> None:
    faster = timed(slower=0.5, peak_memory_bytes=round(1.1 * (1 << 30)))
    assert one(timed(), faster) == (
        "regressed",
        1,
        "max-memory-growth: +10.0%, limit 5.0% (noise floor 1.0%)",
    )


@pytest.mark.parametrize(
    ("field", "option", "header"),
    [
        ("peak_memory_bytes", "max-memory-growth", "peak MiB"),
        ("samples_per_s", "max-slowdown", "samples/s"),
    ],
)
def test_judged_metric_missing_on_one_side_is_incomparable(
    field: str, option: str, header: str
) -> None:
    lacking = timed(slower=1.2, **{field: None})
    for base, new, side in ((timed(slower=1.2), lacking, "new run"), (lacking, timed(), "base")):
        [run] = compared([base], [new]).runs
        assert (run.outcome, run.exit_code) == ("incomparable", 2)
        assert run.reason == f"{option}: the {side} has no {header}"


def test_regression_takes_precedence_over_missing_metric() -> None:
    [run] = compared([timed()], [timed(slower=1.2, peak_memory_bytes=None)]).runs
    assert (run.outcome, run.exit_code) == ("regressed", 1)


def test_unjudged_metric_may_be_missing_on_one_side() -> None:
    [run] = compared([timed()], [timed(peak_memory_bytes=None)], limits={"memory": None}).runs
    assert (run.outcome, run.exit_code) == ("same", 0)
    [run] = compared([timed()], [timed(compile_s=None)]).runs  # has no limit
    assert (run.outcome, run.exit_code) == ("same", 0)


def test_compares_metric_that_only_some_files_have() -> None:
    some = compare([side(timed()), side(timed(peak_memory_bytes=None))], [side(timed())], RULES)
    assert [(run.outcome, run.exit_code) for run in some.runs] == [("same", 0)]


def test_run_can_have_its_own_limits() -> None:
    runs = (("x", {"throughput": 0.5}),)
    slow = [timed("x", slower=1.25), timed("y", slower=1.25)]
    found = compared([timed("x"), timed("y")], slow, runs=runs)
    assert [run.outcome for run in found.runs] == ["same", "regressed"]
    named = ((timed().nodeid, {"throughput": None}),)
    assert one(timed(), timed(slower=2), runs=named)[:2] == ("same", 0)


def test_given_floor_overrides_the_default() -> None:
    slower = timed(slower=1.25)
    assert one(timed(), slower, floors={"throughput": 0.3})[:2] == ("same", 0)
    quiet = {"limits": {"throughput": 0.0}, "floors": {"throughput": 0.001}}
    assert one(timed(), timed(slower=1.01), **quiet)[:2] == ("regressed", 1)


def test_notes_limit_below_the_noise() -> None:
    found = compared([timed()], [timed()], limits={"throughput": 0.01})
    assert found.notes == (
        (
            "max-slowdown 1.0% is under the noise floor of 2.0%, which decides: give several files "
            "a side, or use int8bench ab"
        ),
    )


def test_notes_pattern_that_matches_no_run() -> None:
    found = compared([timed()], [timed()], runs=(("y*", {}), ("x", {})))
    assert found.notes == ("no run matches 'y*' in pyproject.toml",)


def test_notes_that_the_speed_of_the_machine_changed() -> None:
    reason = f"{SPEED_CHANGED}: the speedup is measured in alternation"
    found = compared([timed(reason="INT8 weights")], [timed(reason=reason)])
    assert found.notes == (f"{SPEED_CHANGED} of a point and its baseline in the new run: x",)


def test_uncommitted_changes_are_only_noted() -> None:
    new = side(timed(), dirty=True, commit="b" * 40)
    found = compare([side(timed())], [new], RULES)
    assert found.exit_code == 0
    assert found.notes == ("the new run was measured with uncommitted changes",)
    assert (found.new.commits, found.new.dirty) == (("b" * 40,), True)
    assert (found.differences, found.allowed) == ({}, {})


# -- statuses -----------------------------------------------------------------------------------

OK, FAILED, SKIPPED = timed(), timed(status="failed"), timed(status="skipped")
OOM, WRONG = timed(status="oom"), timed(status="accuracy-failed")


@pytest.mark.parametrize(
    ("base", "new", "expected", "with_missing"),
    [
        (OK, None, ("missing", 2, "not in the new run"), 0),
        (OOM, None, ("missing", 2, "not in the new run"), 0),
        (SKIPPED, None, ("missing", 0, "was skipped: why"), 0),
        (None, OK, ("new", 0, "not in the base"), 0),
        (FAILED, OK, ("new", 0, "was failed: why"), 0),
        (WRONG, OK, ("new", 0, "was accuracy-failed: why"), 0),
        (OOM, OK, ("new", 0, "was oom: why"), 0),
        (SKIPPED, OK, ("new", 0, "was skipped: why"), 0),
        (OK, OOM, ("oom", 1, "why"), 1),
        (OOM, OOM, ("oom", 0, "as in the base: why"), 0),
        (FAILED, OOM, ("oom", 2, "why; was failed: why"), 2),
        (SKIPPED, OOM, ("oom", 2, "why; was skipped: why"), 2),
        (None, OOM, ("oom", 0, "why"), 0),
        (OK, FAILED, ("failed", 2, "why"), 2),
        (FAILED, FAILED, ("failed", 2, "why"), 2),
        (None, FAILED, ("failed", 2, "why"), 2),
        (OK, WRONG, ("accuracy-failed", 1, "why"), 1),
        (WRONG, WRONG, ("accuracy-failed", 2, "as in the base: why"), 2),
        (None, WRONG, ("accuracy-failed", 1, "why"), 1),
        (OK, SKIPPED, ("skipped", 2, "why"), 0),
        (OOM, SKIPPED, ("skipped", 2, "why"), 0),
        (SKIPPED, SKIPPED, ("skipped", 0, "why"), 0),
        (None, SKIPPED, ("skipped", 0, "why"), 0),
        (OK, DISABLED, ("disabled", 2, DISABLED.reason), 0),
        (DISABLED, DISABLED, ("disabled", 0, DISABLED.reason), 0),
    ],
)
def test_outcomes_of_runs_not_measured_on_both_sides(
    base: Result | None, new: Result | None, expected: Any, with_missing: int
) -> None:
    assert one(base, new) == expected
    assert one(base, new, allow_missing=True) == (expected[0], with_missing, expected[2])


def test_reports_missing_reason() -> None:
    assert one(OK, timed(status="failed", reason=None))[2] == "no reason given"


def test_inaccurate_timings_are_not_a_baseline() -> None:
    wrong = dataclasses.replace(OK, status="accuracy-failed", reason="top1 dropped")
    [run] = compared([wrong], [timed(slower=5)]).runs
    assert (run.outcome, run.reason, run.changes) == (
        "new",
        "was accuracy-failed: top1 dropped",
        (),
    )
    assert run.base == {}


def test_does_not_compare_different_points_of_one_name() -> None:
    other = dataclasses.replace(OK, run_name="y")
    found = compared([other, timed("same")], [OK, timed("same")])
    assert (found.runs[0].outcome, found.runs[0].reason) == ("incomparable", "another point: y")
    assert found.exit_code == 2


def test_does_not_compare_point_without_batch_time() -> None:
    bare = timed(batch_time_s=None)
    assert one(OK, bare) == ("incomparable", 2, "has no time")


@pytest.mark.parametrize(
    "results", [([], []), ([OK], []), ([], [OK]), ([OOM], [OOM]), ([SKIPPED], [SKIPPED])]
)
def test_fails_if_nothing_is_compared(results: tuple[list[Result], list[Result]]) -> None:
    found = compared(*results, allow_missing=True)
    assert (found.compared, found.exit_code) == (0, 2)


def test_regression_takes_precedence_over_incomparable_runs() -> None:
    base = [timed(name) for name in "abc"]
    assert compared(base, [timed("a"), timed("b", slower=2)]).exit_code == 1
    assert compared(base, [timed("a"), timed("b")]).exit_code == 2
    assert compared(base, base).exit_code == 0


# -- another machine ----------------------------------------------------------------------------


def test_does_not_compare_different_machines() -> None:
    gpu = {"name": "H200", "driver": "590.2"}
    base, new = side(OK, verdict_of()), side(timed(slower=9), verdict_of(), gpu=gpu)
    found = compare([base], [new], RULES)
    assert found.differences == {"gpu": ("A100", "H200"), "driver": ("580.1", "590.2")}
    assert [entry.outcome for entry in (*found.runs, *found.accuracy)] == ["incomparable"] * 2
    assert found.runs[0].reason == "measured on another machine or software: gpu, driver"
    assert found.exit_code == 2

    allowed = compare([base], [new], Rules(allow=frozenset({"gpu", "driver"})))
    assert (allowed.differences, allowed.allowed) == ({}, found.differences)
    assert [run.outcome for run in allowed.runs] == ["regressed"]
    half = compare([base], [new], Rules(allow=frozenset({"gpu"})))
    assert (set(half.differences), set(half.allowed)) == ({"driver"}, {"gpu"})
    assert half.exit_code == 2


def test_machine_difference_fails_even_without_compared_runs() -> None:
    found = compare([side(SKIPPED)], [side(SKIPPED, cuda="12.8")], RULES)
    assert found.differences == {"cuda": ("13.0", "12.8")}
    assert found.exit_code == 2


def test_files_of_one_side_must_agree() -> None:
    for files in ([side(OK), side(OK, cpu="Xeon")], [side(OK, cpu="Xeon"), side(OK)]):
        found = compare(files, [side(OK)], RULES)
        assert set(found.differences) == {"cpu"}
        assert found.exit_code == 2


def test_out_of_memory_on_another_gpu_is_not_a_regression() -> None:
    found = compare([side(OK)], [side(OOM, gpu={"name": "L4", "driver": "580.1"})], RULES)
    [run] = found.runs
    assert (run.outcome, run.exit_code) == ("oom", 2)
    assert run.reason == "why; measured on another machine or software: gpu"


# -- heat ---------------------------------------------------------------------------------------


def hot(slower: float = 1.0, **values: Any) -> Result:
    return timed(slower=slower, throttled=["power brake"], **values)


@pytest.mark.parametrize("slower", [0.5, 1.0, 2.0])
def test_does_not_compare_throttled_run(slower: float) -> None:
    why = "measured while the GPU was slowed down: power brake"
    assert one(OK, hot(slower)) == ("incomparable", 2, why)
    assert one(hot(slower), OK) == ("incomparable", 2, why)
    expected = {0.5: ("improved", 0), 1.0: ("same", 0), 2.0: ("regressed", 1)}[slower]
    assert one(OK, hot(slower), allow=frozenset({"throttled"}))[:2] == expected


def test_throttling_does_not_excuse_memory_growth() -> None:
    assert one(OK, hot(2, peak_memory_bytes=1 << 31)) == (
        "regressed",
        1,
        "max-memory-growth: +100.0%, limit 5.0% (noise floor 1.0%)",
    )


def test_uses_only_files_without_throttling() -> None:
    new = [side(hot(3)), side(timed()), side(timed(slower=1.001))]
    [run] = compare([side(OK)], new, RULES).runs
    assert (run.outcome, run.new["batch-time"]) == ("same", pytest.approx(0.128, rel=1e-3))


# -- several files ------------------------------------------------------------------------------


def files_of(*slower: float, name: str = "x") -> list[Run]:
    return [side(timed(name, slower=factor)) for factor in slower]


def test_averages_logs_of_several_files() -> None:
    [run] = compare(files_of(1, 1.21, 1.331), files_of(1.1), RULES).runs
    middle = (1 * 1.21 * 1.331) ** (1 / 3)
    assert run.base["batch-time"] == pytest.approx(0.128 * middle)
    assert run.change("throughput").growth == pytest.approx(1.1 / middle - 1)


def test_uses_worst_new_and_best_base_status() -> None:
    [run] = compare([side(OK)], [side(OK), side(OOM)], RULES).runs
    assert (run.outcome, run.exit_code) == ("oom", 1)
    [run] = compare([side(FAILED), side(OK)], [side(OK)], RULES).runs
    assert (run.outcome, run.exit_code) == ("same", 0)


def test_learns_noise_floor_from_the_files() -> None:
    steady = compare(files_of(1, 1.001, 0.999), files_of(1.03, 1.031, 1.029), RULES)
    change = steady.runs[0].change("throughput")
    assert change.learned
    # 1.645 * 0.0987 % * sqrt(2 / 3), and Student's t with 4 degrees of freedom, 2.132, for a
    # regression: at 5 %, since memory is the only other test, and is left.
    assert change.floor == pytest.approx(0.00133, rel=0.01)
    assert change.shown_from == pytest.approx(0.00172, rel=0.01)
    assert (change.assumed, change.files_needed) == (None, None)
    assert change.outcome == "within limit"
    noisy = compare(files_of(1, 1.3, 0.8), files_of(1.2, 1.0, 1.5), RULES)
    assert noisy.runs[0].change("throughput").floor > 0.4
    assert noisy.runs[0].outcome == "same"


def test_noise_floor_is_learned_per_run() -> None:
    def both(factors: Sequence[float]) -> list[Run]:
        steady = [timed(f"steady{number}") for number in range(20)]
        return [side(*steady, timed("x", slower=factor)) for factor in factors]

    found = compare(both([1, 1.2, 0.8]), both([1.1, 0.95, 1.3]), RULES)
    floors = {run.run_name: run.change("throughput").floor for run in found.runs}
    assert floors["steady0"] < floors["x"] / 3
    assert found.runs[-1].outcome == "same"


def test_equal_files_still_have_a_noise_floor() -> None:
    rules = Rules(limits={"throughput": 0.0})
    found = compare(files_of(1, 1, 1), files_of(*[1.0005] * 3), rules)
    change = found.runs[0].change("throughput")
    assert (change.floor, change.learned, change.outcome) == (0.001, True, "same")


def test_extreme_values_do_not_overflow() -> None:
    found = compare(files_of(1e-200, 1e200), files_of(1e-200, 1e200), RULES)
    assert found.exit_code == 0


# -- verdicts -----------------------------------------------------------------------------------

RANDOM = {"random_weights": True}


@pytest.mark.parametrize(
    ("base", "new", "expected"),
    [
        ("PASS", "PASS", ("same", 0, None)),
        ("PASS", "FAIL", ("regressed", 1, "worse")),
        ("proxy-ok", "FAIL", ("regressed", 1, "worse")),
        ("INCONCLUSIVE", "FAIL", ("regressed", 1, "worse")),
        (None, "FAIL", ("regressed", 1, "worse")),
        ("FAIL", "FAIL", ("accuracy-failed", 0, "as in the base")),
        ("FAIL", "PASS", ("improved", 0, None)),
        ("INCONCLUSIVE", "PASS", ("improved", 0, None)),
        ("INCONCLUSIVE", "INCONCLUSIVE", ("same", 0, None)),
        ("PASS", "INCONCLUSIVE", ("inconclusive", 0, "its samples do not decide any more")),
        ("PASS", None, ("missing", 2, "not in the new run")),
        ("FAIL", None, ("missing", 2, "not in the new run")),
        (None, "PASS", ("new", 0, "not in the base")),
    ],
)
def test_outcomes_of_verdict_changes(base: str | None, new: str | None, expected: Any) -> None:
    reason = "worse" if new == "FAIL" else None
    assert expected == verdict(base and verdict_of(base), new and verdict_of(new, reason=reason))


def test_options_change_outcomes_of_verdicts() -> None:
    undecided = (verdict_of("PASS"), verdict_of("INCONCLUSIVE"))
    assert verdict(*undecided, fail_on_inconclusive=True)[:2] == ("regressed", 1)
    assert verdict(verdict_of(), None, allow_missing=True)[:2] == ("missing", 0)


def test_reports_changed_accuracy_limit() -> None:
    assert verdict(verdict_of(limit="1%"), verdict_of(limit="5%")) == (
        "same",
        0,
        "the limit was 1% and is 5%",
    )
    new = [side(verdict_of(limit="1%"), OK), side(verdict_of(limit="5%"), OK)]
    [change] = compare([side(OK)], new, RULES).accuracy
    assert (change.outcome, change.reason) == ("new", "not in the base")


def test_failing_verdict_counts_on_another_machine() -> None:
    found = compare([side(verdict_of())], [side(verdict_of("FAIL"), cpu="Xeon")], RULES)
    assert (found.accuracy[0].outcome, found.exit_code) == ("regressed", 1)


@pytest.mark.parametrize("base", ["PASS", "FAIL", None])
@pytest.mark.parametrize("new", ["PASS", "FAIL", "INCONCLUSIVE"])
def test_does_not_judge_random_weights(base: str | None, new: str) -> None:
    before = base and verdict_of(base, **RANDOM)
    assert verdict(before, verdict_of(new, **RANDOM), fail_on_inconclusive=True) == (
        "not judged",
        0,
        "pipeline check: the weights are random",
    )


def test_random_weights_cannot_replace_a_verdict() -> None:
    why = "its weights are random now: it is a pipeline check"
    assert verdict(verdict_of(), verdict_of(**RANDOM)) == ("missing", 2, why)
    assert verdict(verdict_of(), verdict_of(**RANDOM), allow_missing=True)[1] == 0
    assert verdict(verdict_of("FAIL", **RANDOM), verdict_of("FAIL"))[:2] == ("regressed", 1)
    assert verdict(verdict_of(**RANDOM), verdict_of())[0] == "new"
    assert verdict(verdict_of(**RANDOM), None)[:2] == ("not judged", 0)


def test_pipeline_checks_alone_do_not_count_as_compared() -> None:
    checks = [verdict_of(**RANDOM)]
    assert compared(checks, checks).exit_code == 2
    assert compared([verdict_of()], [verdict_of()]).exit_code == 0


# -- laws ---------------------------------------------------------------------------------------

factors = st.floats(0.25, 4)
many = st.lists(factors, min_size=1, max_size=4)
SEVERITY = {0: 0, 2: 1, 1: 2}
STATES: dict[str, Callable[[float], Result | None]] = {
    "ok": lambda f: timed(slower=f),
    "hot": hot,
    "oom": lambda f: OOM,
    "failed": lambda f: FAILED,
    "accuracy-failed": lambda f: WRONG,
    "skipped": lambda f: SKIPPED,
    "none": lambda f: None,
}
points = st.tuples(st.sampled_from([*STATES]), factors)


def named(points: Sequence[tuple[str, float]]) -> list[Result]:
    made = ((str(index), STATES[state](factor)) for index, (state, factor) in enumerate(points))
    return [
        dataclasses.replace(result, nodeid=name, run_name=name) for name, result in made if result
    ]


def outcomes(comparison: Comparison) -> dict[Any, Any]:
    entries: tuple[RunChange | VerdictChange, ...] = (*comparison.runs, *comparison.accuracy)
    return {
        (entry.nodeid, entry.run_name): (entry.outcome, entry.exit_code, entry.reason)
        for entry in entries
    }


@given(st.lists(points, max_size=5), st.integers(1, 3))
def test_identical_files_never_regress(states: list[tuple[str, float]], copies: int) -> None:
    base = [side(*named(states), name=f"base{index}") for index in range(copies)]
    new = [side(*named(states), name=f"new{index}") for index in range(copies)]
    rules = Rules(limits=dict.fromkeys(METRICS, 0.0))
    found = compare(base, new, rules)
    assert found.exit_code != 1
    assert not any(change.growth for run in found.runs for change in run.changes)
    kinds = {state for state, _ in states}
    if "ok" in kinds and not kinds & {"hot", "failed", "accuracy-failed"}:
        assert found.exit_code == 0


@given(many, many, st.sampled_from([2.0**power for power in (-20, -1, 1, 20)]))
def test_machine_speed_cancels(base: list[float], new: list[float], scale: float) -> None:
    rules = Rules(limits=dict.fromkeys(METRICS, 0.0))
    found = compare(files_of(*base), files_of(*new), rules)
    scaled = compare(
        files_of(*(scale * f for f in base)), files_of(*(scale * f for f in new)), rules
    )
    for before, after in zip(found.runs[0].changes, scaled.runs[0].changes, strict=True):
        assert after.growth == pytest.approx(before.growth)
        assert after.floor == pytest.approx(before.floor)
        assert after.outcome == before.outcome or abs(abs(before.growth) - before.floor) < 1e-9
    assert scaled.exit_code == found.exit_code or found.runs[0].outcome != scaled.runs[0].outcome


@given(
    st.lists(st.tuples(points, points), min_size=1, max_size=4),
    st.sampled_from([metric.field for metric in METRICS.values() if not metric.of_benchmarks]),
    st.floats(1, 4),
)
def test_worse_never_looks_better(states: Any, field: str, factor: float) -> None:
    base, new = named([before for before, _ in states]), named([after for _, after in states])
    is_rate = field == "samples_per_s"
    worse = [
        dataclasses.replace(
            result, **{field: type(value)(value / factor if is_rate else value * factor)}
        )
        if (value := getattr(result, field)) is not None
        else result
        for result in new
    ]
    before, after = compared(base, new).exit_code, compared(base, worse).exit_code
    assert SEVERITY[after] >= SEVERITY[before]


@given(many, many, st.floats(1, 4))
def test_slower_files_never_look_better(base: list[float], new: list[float], factor: float) -> None:
    before = compare(files_of(*base), files_of(*new), RULES).exit_code
    after = compare(files_of(*base), files_of(*(factor * f for f in new)), RULES).exit_code
    assert SEVERITY[after] >= SEVERITY[before]


@given(st.lists(st.lists(points, max_size=4), min_size=2, max_size=5), st.randoms())
def test_result_does_not_depend_on_order(
    states: list[list[tuple[str, float]]], random_state: random.Random
) -> None:
    sides = [[side(*named(file)) for file in part] for part in (states[:1], states[1:])]
    found = compare(sides[0], sides[1], RULES)
    shuffled = []
    for files in sides:
        mixed = []
        for run in random_state.sample(files, len(files)):
            results = random_state.sample(run.saved.results, len(run.saved.results))
            mixed.append(Run(run.path, Saved(run.saved.environment, results)))
        shuffled.append(mixed)
    again = compare(shuffled[0], shuffled[1], RULES)
    assert outcomes(again) == outcomes(found)
    assert (again.exit_code, again.counts) == (found.exit_code, found.counts)


@given(st.floats(1.5, 4), st.integers(1, 3))
def test_sides_can_be_swapped(factor: float, count: int) -> None:
    base, new = files_of(*[1.0] * count), files_of(*[factor] * count)
    [there], [back] = compare(base, new, RULES).runs, compare(new, base, RULES).runs
    assert (there.outcome, back.outcome) == ("regressed", "improved")
    for change in there.changes:
        other = back.change(change.metric)
        assert (1 + change.growth) * (1 + other.growth) == pytest.approx(1)


# -- plain benchmarks ---------------------------------------------------------------------------


def slower(by: float, **values: Any) -> Record:
    return plain("x", 1e-3 * by, **values)


@pytest.mark.parametrize(
    ("new", "outcome", "code", "reason"),
    [
        (slower(1.01), "same", 0, None),
        (slower(0.9), "improved", 0, None),
        (slower(1.06), "suspected", 2, "shown from 13.6% on if processes differ by 4.0%"),
        (
            slower(1.3),
            "regressed",
            1,
            "max-call-time-growth: +30.0%, limit 5.0% (noise floor 2.0%)",
        ),
        # Neither rounds that differ nor a single round determine the figure of their process.
        (slower(1.3, call_time_standard_error=0.2), "suspected", 2, "processes differ by 20.4%"),
        (
            slower(1.3, call_time_standard_error=None, rounds=1),
            "suspected",
            2,
            "after a single round, whose noise is not known: int8bench ab or 7 files of the base",
        ),
        (slower(9, status="failed", reason="boom"), "failed", 2, "boom"),
        (slower(1, status="skipped", reason="no"), "skipped", 2, "no"),
        (slower(1, status="skipped", reason=f"{NOT_MEASURED}: off"), "disabled", 2, "off"),
        (slower(1, call_time_s=None), "incomparable", 2, "has no time"),
        (
            slower(9, timer="synchronized_perf_counter"),
            "incomparable",
            2,
            "timed with other timers: perf_counter, synchronized_perf_counter",
        ),
        (plain("moved"), "missing", 2, "not in the new run"),
    ],
)
def test_plain_benchmarks_have_the_same_outcomes_as_points(
    new: Record, outcome: str, code: int, reason: str | None
) -> None:
    found = compared([slower(1), timed()], [new, timed()])
    run = next(run for run in found.runs if run.nodeid == "test_a.py::x")
    assert (run.outcome, run.exit_code, found.exit_code) == (outcome, code, code)
    assert (reason or "") in (run.reason or "")
    assert bool(run.reason) == bool(reason)


def test_always_notes_a_single_round() -> None:
    found = compared([slower(1)], [slower(0.8, call_time_standard_error=None)])
    assert found.runs[0].outcome == "improved"
    assert any("test_a.py::x: a single round says nothing" in note for note in found.notes)


def test_enough_files_determine_the_noise_of_single_rounds() -> None:
    files = [side(slower(by, call_time_standard_error=None)) for by in (1, 1.01, 0.99, 1, 1, 1, 1)]
    new = side(slower(1.3, call_time_standard_error=None))
    assert compare(files, [new], RULES).runs[0].outcome == "regressed"


def test_benchmarks_of_one_name_in_two_files_are_separate() -> None:
    here, there = slower(1), plain("x", 1e-3, nodeid="test_b.py::x", run_name="test_b.py::x")
    found = compared([here, there], [slower(2), there])
    assert [run.outcome for run in found.runs] == ["regressed", "same"]


def test_all_files_must_be_of_one_machine() -> None:
    little = side(timed(), only=["cpu"])
    other = {"gpu": {"name": "H100", "driver": "580.1"}}
    found = compare([little], [side(timed()), side(timed(), **other)], RULES)
    assert found.differences == {"gpu": ("A100", "H100")}
    assert any("only machine_info (cpu) could be" in note for note in found.notes)


def test_finds_all_differences_among_files() -> None:
    kinds: list[dict[str, Any]] = [
        {},
        {"cpu": "Xeon"},
        {"cpu": "Xeon", "gpu": None},
        {"only": ["cpu"]},
        {"cpu": "Xeon", "only": ["cpu"]},
    ]
    for picked in itertools.product(kinds, repeat=3):
        files = [side(**kind) for kind in picked]
        pairs = itertools.combinations([file.saved.environment for file in files], 2)
        names = {name for one, other in pairs for name in differences(one, other)}
        assert set(compare(files[:2], files[2:], RULES).differences) == names


@pytest.mark.parametrize("differing", [False, True])
def test_does_not_compare_many_files_pairwise(
    differing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    counted = lambda one, other: calls.append(1) or differences(one, other)  # noqa: E731
    monkeypatch.setattr(gate_compare, "differences", counted)
    files = [side(timed(), commit=str(n), cpu=f"cpu {n * differing}") for n in range(100)]
    found = compare(files[:50], files[50:], RULES)
    assert set(found.differences) == ({"cpu"} if differing else set())
    assert len(calls) == 99


def test_selects_runs_by_name_on_either_side() -> None:
    sides = [side(slower(1), timed(), verdict_of())], [side(slower(2), timed(slower=2))]
    assert [r.run_name for r in compare(*sides, RULES, lambda n: "x" in n).runs] == ["x"]
    found = compare(*sides, RULES, lambda names: "pytest-benchmark" in names)
    assert [r.nodeid for r in found.runs] == ["test_a.py::x"]
    assert not found.accuracy

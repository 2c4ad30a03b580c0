"""The reports of an A/B measurement agree: text, Markdown, JSON and JUnit."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_int8bench.gate.ab.design import Design
from pytest_int8bench.gate.ab.judging import Estimate, Judged, Screened
from pytest_int8bench.gate.ab.plan import AbResult, AbRun, Plan
from pytest_int8bench.gate.ab.worktrees import Revision
from pytest_int8bench.report.ab import cases, page, to_dict
from pytest_int8bench.report.junit import to_xml

PLAN = Plan(
    root=Path("/repository"),
    folder=Path("/repository"),
    base=Revision("main", "a" * 40),
    new=Revision("HEAD", "b" * 40),
    pytest_args=("benchmarks",),
    install="make",
)
ENVIRONMENT = {"cpu": "EPYC", "cpu_threads": 8, "packages": {"torch": "2.11.0"}}


def estimate(slowdown: float, blocks: int = 6) -> Estimate:
    return Estimate(
        slowdown=slowdown, low=slowdown - 0.004, high=slowdown + 0.006, noise=0.003, blocks=blocks
    )


def screened(slowdown: float, *, flagged: bool = False) -> Screened:
    return Screened(estimate=estimate(slowdown, 4), flagged=flagged)


def judged(outcome: Any, slowdown: float, reason: str | None = None) -> Judged:
    return Judged(
        outcome=outcome,
        estimate=estimate(slowdown),
        p=0.0001,
        p_holm=0.00034,
        control=estimate(0.001),
        reason=reason,
        blocks_needed=None,
    )


def run(name: str, outcome: str, exit_code: int, **values: Any) -> AbRun:
    return AbRun(
        nodeid=f"test_a.py::test[{name}]",
        workload=values.pop("workload", "olmoearth"),
        run_name=name,
        outcome=outcome,
        exit_code=exit_code,
        **values,
    )


CLEARED = run("cleared", "PASS", 0, base_s=0.0123, new_s=0.0121, screened=screened(-0.016))
PASSED = run(
    "passed",
    "PASS",
    0,
    base_s=0.01,
    new_s=0.0101,
    screened=screened(0.02, flagged=True),
    judged=judged("PASS", 0.01),
)
FAILED = run(
    "slow",
    "FAIL",
    1,
    workload="vit",
    base_s=1.0,
    new_s=1.08,
    screened=screened(0.05, flagged=True),
    judged=judged("FAIL", 0.08),
)
OPEN = run(
    "open",
    "INCONCLUSIVE",
    2,
    base_s=0.01,
    new_s=0.0102,
    screened=screened(0.03, flagged=True),
    judged=judged("INCONCLUSIVE", 0.03, "3 blocks would decide"),
)
MISSING = run("gone", "missing", 2, reason="not in the new revision")
ALLOWED = dataclasses.replace(MISSING, exit_code=0)
OOM = run("big", "oom", 1, reason="2 GiB asked for")
SKIPPED = run("none", "skipped", 0, reason="no modality")
BROKEN = run("broken", "failed", 2, reason="in a process of the screening: failed: x")


def result(*runs: AbRun, notes: tuple[str, ...] = (), **plan: Any) -> AbResult:
    return AbResult(
        plan=dataclasses.replace(PLAN, **plan),
        environment=ENVIRONMENT,
        runs=runs,
        processes=28,
        seconds=250.0,
        statistic="median",
        notes=notes,
    )


def text_of(found: AbResult) -> str:
    return page(found).text(width=None, color=False)


# -- text -------------------------------------------------------------------------------------


def test_the_fastest_round_is_named() -> None:
    found = dataclasses.replace(result(CLEARED), statistic="fastest")
    assert " ".join(text_of(found).split()).startswith("run ms/batch, fastest slowdown ")
    assert to_dict(found)["int8bench_ab"]["statistic"] == "fastest"


def test_the_report_as_text() -> None:
    open_ = dataclasses.replace(OPEN, reason=OPEN.judged and OPEN.judged.reason)
    found = result(CLEARED, PASSED, FAILED, open_, MISSING, notes=("a note",))
    lines = [" ".join(line.split()) for line in text_of(found).splitlines()]
    assert lines == [
        "run ms/batch slowdown [95 %, one-sided] noise blocks p base again verdict",
        "cleared 12.3 -> 12.1 -1.6% [-2.0, -1.0] 0.3% 4 - - PASS",
        "passed 10.0 -> 10.1 +1.0% [+0.6, +1.6] 0.3% 4 + 6 0.00034 +0.1% [-0.3, +0.7] PASS",
        "vit: slow 1,000 -> 1,080 +8.0% [+7.6, +8.6] 0.3% 4 + 6 0.00034 +0.1% [-0.3, +0.7] FAIL",
        "open 10.0 -> 10.2 +3.0% [+2.6, +3.6] 0.3% 4 + 6 0.00034 +0.1% [-0.3, +0.7] INCONCLUSIVE",
        "gone - - - - - - missing",
        "INCONCLUSIVE: open: 3 blocks would decide",
        "missing: gone: not in the new revision",
        "note: a note",
        "base: main (aaaaaaaaaa); new: HEAD (bbbbbbbbbb); 28 processes, 4 min",
        (
            "FAIL: slower by more than 1.0% (randomization test over the order of processes, "
            "family-wise error 5% over all looks); PASS: a slowdown of 5.0% is ruled out"
        ),
        "EPYC, 8 threads, torch 2.11.0",
        "int8bench ab: FAIL (2 PASS, 1 FAIL, 1 INCONCLUSIVE, 1 missing)",
    ]


def test_bounds_use_the_level_of_the_design() -> None:
    found = result(CLEARED, design=Design(level=0.01))
    assert "slowdown [99 %, one-sided]" in text_of(found)
    assert "family-wise error 1% over all looks" in text_of(found)


@pytest.mark.parametrize(
    ("run", "style"),
    [(CLEARED, None), (FAILED, "red"), (OOM, "red"), (OPEN, "yellow"), (SKIPPED, "dim")],
)
def test_rows_are_colored_by_outcome(run: AbRun, style: str | None) -> None:
    [grid] = page(result(run)).grids
    assert grid.styles == [style]


def test_no_runs() -> None:
    assert text_of(result()).splitlines()[0] == "nothing was compared"
    assert text_of(result()).splitlines()[-1] == "int8bench ab: INCONCLUSIVE (no run)"
    assert page(result()).grids == []


# -- all together -----------------------------------------------------------------------------

ALL = (CLEARED, PASSED, FAILED, OPEN, MISSING, ALLOWED, OOM, SKIPPED, BROKEN)
HEADLINES = {0: "PASS", 1: "FAIL", 2: "INCONCLUSIVE"}


def xml_of(found: AbResult) -> ElementTree.Element:
    [suite] = ElementTree.fromstring(to_xml("int8bench ab", cases(found)).encode())
    return suite


@given(st.lists(st.sampled_from(ALL), max_size=6))
def test_the_reports_agree(runs: list[AbRun]) -> None:
    found = result(*runs)
    code = found.exit_code
    text, markdown = text_of(found), page(found).markdown()
    headline = text.splitlines()[-1]
    assert headline.startswith(f"int8bench ab: {HEADLINES[code]} (")
    assert markdown.splitlines()[0] == f"## {headline}"
    for report in (text, markdown):
        assert ("nothing was compared" in report) is found.is_empty
        for entry in runs:
            assert entry.run_name in report
    values = json.loads(json.dumps(to_dict(found)))["int8bench_ab"]
    assert values["exit_code"] == code
    assert [entry["outcome"] for entry in values["runs"]] == [entry.outcome for entry in runs]
    suite = xml_of(found)
    failures, errors = int(suite.attrib["failures"]), int(suite.attrib["errors"])
    assert failures == sum(entry.exit_code == 1 for entry in runs)
    assert errors == sum(entry.exit_code == 2 for entry in runs) + found.is_empty
    # A CI server that reads JUnit alone comes to the same conclusion.
    assert code == (1 if failures else 2 if errors else 0)
    assert int(suite.attrib["tests"]) == len(runs) + found.is_empty


# -- JUnit ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "status", "message"),
    [
        (CLEARED, "passed", "PASS (slowdown -1.6% [-2.0, -1.0])"),
        (FAILED, "failure", "FAIL (slowdown +8.0% [+7.6, +8.6])"),
        (OPEN, "error", "INCONCLUSIVE (slowdown +3.0% [+2.6, +3.6])"),
        (MISSING, "error", "missing: not in the new revision"),
        (ALLOWED, "skipped", "missing: not in the new revision"),
        (OOM, "failure", "oom: 2 GiB asked for"),
        (SKIPPED, "skipped", "skipped: no modality"),
        (BROKEN, "error", "failed: in a process of the screening: failed: x"),
    ],
)
def test_a_run_as_a_test_case(run: AbRun, status: str, message: str) -> None:
    case = cases(result(run, CLEARED))[0]
    assert (case.status, case.message) == (status, message)
    assert case.classname == run.nodeid
    assert case.name == ("vit: slow" if run is FAILED else run.run_name)


@pytest.mark.parametrize("runs", [(), (SKIPPED,), (ALLOWED, SKIPPED)])
def test_nothing_compared_is_an_extra_error_case(runs: tuple[AbRun, ...]) -> None:
    *others, last = cases(result(*runs))
    assert [case.status for case in others] == ["skipped"] * len(runs)
    assert (last.name, last.status, last.message) == ("compared", "error", "nothing was compared")


def test_names_beyond_ascii() -> None:
    odd = dataclasses.replace(CLEARED, run_name="Größe_*|x", nodeid="a.py::test[Größe\x1b]")
    found = result(odd)
    assert "Größe_*|x" in text_of(found)
    assert r"| Größe\_\*\|x |" in page(found).markdown()
    [case] = xml_of(found)
    assert case.attrib == {"classname": "a.py::test[Größe?]", "name": "Größe_*|x"}


# -- JSON -------------------------------------------------------------------------------------


def test_the_report_as_json() -> None:
    values = to_dict(result(CLEARED, FAILED, notes=("a note",)))["int8bench_ab"]
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    runs = values.pop("runs")
    assert values == {
        "schema": 1,
        "exit_code": 1,
        "base": {"name": "main", "commit": "a" * 40},
        "new": {"name": "HEAD", "commit": "b" * 40},
        "pytest_args": ["benchmarks"],
        "install": "make",
        "design": dataclasses.asdict(Design()),
        "environment": ENVIRONMENT,
        "statistic": "median",
        "processes": 28,
        "seconds": 250.0,
        "notes": ["a note"],
    }
    assert runs == [dataclasses.asdict(CLEARED), dataclasses.asdict(FAILED)]


def test_infinite_bounds_are_shown_and_valid_json() -> None:
    """Two blocks can leave any slowdown possible."""
    wide = dataclasses.replace(estimate(0.5, 2), high=math.inf)
    found = result(
        dataclasses.replace(OPEN, judged=dataclasses.replace(judged("FAIL", 1), estimate=wide))
    )
    assert re.search(r"\+50\.0% \[\+49\.6, \+inf\]", text_of(found))
    values = json.loads(json.dumps(to_dict(found), allow_nan=False))
    bounds = values["int8bench_ab"]["runs"][0]["judged"]["estimate"]
    assert (bounds["low"], bounds["high"]) == (0.496, None)

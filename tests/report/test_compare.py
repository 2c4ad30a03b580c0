"""The reports of a comparison agree: text, Markdown, JSON and JUnit cases."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_int8bench.gate.compare import Comparison, compare
from pytest_int8bench.gate.limits import Rules
from pytest_int8bench.report.compare import cases, page, to_dict
from pytest_int8bench.report.junit import Case, to_xml
from pytest_int8bench.report.tables import Grid, Page, number
from pytest_int8bench.results.base import STATUSES, Record
from pytest_int8bench.results.locating import Run
from toys.results import saved, timed, verdict_of


def side(name: str, records: Sequence[Record], **environment: Any) -> Run:
    return Run(Path(name), saved(*records, **{"commit": name * 20, **environment}))


def compared(base: Sequence[Record], new: Sequence[Record], **rules: Any) -> Comparison:
    return compare([side("base", base)], [side("new", new)], Rules(**rules))


def text_of(comparison: Comparison) -> str:
    return page(comparison).text(width=None, color=False)


MIXED = compared(
    [timed("same"), timed("slow_one"), timed("big"), timed("gone"), verdict_of()],
    [
        timed("same"),
        timed("slow_one", slower=1.25, compile_s=20.0),
        timed("big", status="oom", reason="big it is"),
        timed("fresh"),
        verdict_of("FAIL", reason="top1 dropped"),
    ],
)


# -- text ---------------------------------------------------------------------------------------

TEXT = """\
run samples/s ms/batch peak MiB compile s outcome
toy: same 1,000 -> 1,000 128 -> 128 (+0.0%) 1,024 -> 1,024 (+0.0%) 20.0 -> 20.0 (+0.0%) same
toy: slow_one 1,000 -> 800 128 -> 160 (+25.0%) 1,024 -> 1,024 (+0.0%) 20.0 -> 20.0 (+0.0%) regressed
toy: big 1,000 -> OOM 128 -> - 1,024 -> - 20.0 -> - oom
toy: gone 1,000 -> - 128 -> - 1,024 -> - 20.0 -> - missing
toy: fresh - -> 1,000 - -> 128 - -> 1,024 - -> 20.0 new

accuracy metric base new outcome
toy: x top1 PASS FAIL regressed
regressed: toy: slow_one: max-slowdown: +25.0%, limit 5.0% (noise floor 2.0%)
oom: toy: big: big it is
missing: toy: gone: not in the new run
new: toy: fresh: not in the base
regressed: toy: x top1: top1 dropped
base: base (basebaseba)
new: new (newnewnewn)
max-slowdown: 5.0%; noise floor between processes 2.0% (the default for few files); \
regressions are detected from 17.5% on, assuming that processes differ by 4.0%
max-memory-growth: 5.0%; noise floor between processes 1.0% (the default for few files); \
regressions are detected from 3.5% on, assuming that processes differ by 1.0%
int8bench compare: REGRESSED (5 runs: 1 regressed, 1 same, 1 new, 1 missing, 1 oom; \
1 verdict: 1 regressed)
"""


def test_the_text_lists_all_and_ends_with_the_headline() -> None:
    assert re.sub(" +", " ", text_of(MIXED)) == TEXT


def test_the_95th_percentile_is_shown_if_judged() -> None:
    assert "p95" not in text_of(compared([timed()], [timed()]))
    judged = text_of(compared([timed()], [timed(slower=2)], limits={"p95": 0.1}))
    assert "130 -> 260 (+100.0%)" in judged
    assert "max-p95-growth: 10.0%; noise floor between processes 5.0%" in judged


def test_differences_are_listed_once_with_options_to_allow_them() -> None:
    names = {"cpu": "EPYC", "packages": {"torch": "2.11.0"}}
    base = side("base", [timed("a"), timed("b"), verdict_of()], **names)
    new = side("new", [timed("a"), timed("b"), verdict_of()], cpu="Xeon")
    lines = text_of(compare([base], [new], Rules())).splitlines()
    assert [line for line in lines if "->" not in line or "differs" in line][3:] == [
        "toy: x               top1   PASS PASS incomparable",
        "differs: cpu: EPYC -> Xeon",
        "differs: torch: 2.11.0 -> None",
        (
            "results of different machines or software are not compared; to compare anyway: "
            "--allow cpu --allow torch"
        ),
        "base: base (basebaseba)",
        "new: new (newnewnewn)",
        "int8bench compare: NOT COMPARED (2 runs: 2 incomparable; 1 verdict: 0 regressed)",
    ]
    fingerprint = Case(
        classname="int8bench compare",
        name="fingerprint",
        status="error",
        message="cpu: EPYC -> Xeon; torch: 2.11.0 -> None",
    )
    assert fingerprint in cases(compare([base], [new], Rules()))
    allowed = Rules(allow=frozenset({"cpu", "torch"}))
    lines = text_of(compare([base], [new], allowed)).splitlines()
    assert "differs, as allowed: cpu: EPYC -> Xeon" in lines
    assert lines[-1] == (
        "int8bench compare: nothing regressed (2 runs: 2 same; 1 verdict: 0 regressed)"
    )


def test_reports_nothing_compared() -> None:
    lines = text_of(compared([], [])).splitlines()
    assert lines == [
        "nothing was compared: no run or verdict was measured on both sides",
        "base: base (basebaseba)",
        "new: new (newnewnewn)",
        "int8bench compare: NOT COMPARED (no run)",
    ]


def test_footer_names_files_commits_and_source_of_the_noise() -> None:
    base = [side(name, [timed(slower=f)]) for name, f in (("one", 1.0), ("two", 1.01))]
    new = side("new", [timed()], dirty=True, commit=None)
    limits = {"batch-time": 0.1, "memory": None}
    rules = Rules(limits=limits, floors={"batch-time": 0.04}, runs=(("x", {"throughput": 0.15}),))
    lines = text_of(compare(base, [new], rules)).splitlines()
    assert lines[2:-1] == [
        "note: the new run was measured with uncommitted changes",
        "base: one, two (oneoneoneo, twotwotwot)",
        "new: new (unknown, uncommitted changes)",
        (
            "max-slowdown: 15.0%; noise floor between processes 2.0% (the default for few files); "
            "regressions are detected from 8.4% on, assuming that processes differ by 4.0%"
        ),
        "max-batch-time-growth: 10.0%; noise floor between processes 4.0% (as given)",
    ]


def test_the_footer_names_some_of_many_files() -> None:
    found = compare([side(f"b{n}", [timed()]) for n in range(30)], [side("n", [timed()])], Rules())
    [line] = [line for line in page(found).footer if line.startswith("base: ")]
    assert line.startswith("base: b0, b1, ")
    assert ", b9 and 20 more (" in line
    assert len(to_dict(found)["int8bench_compare"]["base"]["files"]) == 30


def test_reports_a_range_of_limits() -> None:
    both = [timed("x"), timed("y")]
    found = compared(both, both, runs=(("x", {"throughput": 0.15}),))
    assert "max-slowdown: 5.0% to 15.0%; noise floor" in text_of(found)


def test_random_weights_are_marked() -> None:
    checks = [verdict_of(random_weights=True), timed()]
    text = text_of(compared(checks, checks))
    assert "toy: x               top1   PASS PASS* not judged\n" in text
    assert "not judged: toy: x top1: pipeline check: the weights are random\n" in text


# -- Markdown -----------------------------------------------------------------------------------


def test_markdown_starts_with_the_headline() -> None:
    lines = page(MIXED).markdown().splitlines()
    assert lines[0] == (
        "## int8bench compare: REGRESSED (5 runs: 1 regressed, 1 same, 1 new, 1 missing, 1 oom; "
        "1 verdict: 1 regressed)"
    )
    assert lines[2:6] == [
        "| run | samples/s | ms/batch | peak MiB | compile s | outcome |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
        (
            r"| toy: same | 1,000 -\> 1,000 | 128 -\> 128 (+0.0%) | 1,024 -\> 1,024 (+0.0%) "
            r"| 20.0 -\> 20.0 (+0.0%) | same |"
        ),
        (
            r"| toy: slow\_one | 1,000 -\> 800 | 128 -\> 160 (+25.0%) "
            r"| 1,024 -\> 1,024 (+0.0%) | 20.0 -\> 20.0 (+0.0%) | regressed |"
        ),
    ]
    assert (
        r"- regressed: toy: slow\_one: max-slowdown: +25.0%, limit 5.0% (noise floor 2.0%)" in lines
    )
    assert "<sub>base: base (basebaseba)</sub><br>" in lines


def test_markdown_escapes_names_into_one_row() -> None:
    grid = Grid(columns=["run"], rows=[["a|b\n<c>_d_ `e` ~f~ &lt;"]], styles=[None], name="run")
    assert grid.markdown().splitlines()[2:] == [r"| a\|b \<c\>\_d\_ \`e\` \~f\~ \&lt; |"]
    text = Page(title="t", headline="h", grids=[], remarks=["one\n## two"], footer=[]).markdown()
    assert text == "## t: h\n\n- one \\#\\# two\n"


def test_columns_are_as_wide_as_their_figures() -> None:
    grid = Grid(columns=["run", "x"], rows=[["a" * 30, "1,234,567"]], styles=["red"], name="run")
    assert "1,234,567" in grid.text(width=20, color=False)
    assert "\x1b[31m" in grid.text(width=20, color=True)
    assert "\x1b" not in grid.text(width=20, color=False)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.01234, "0.0123"), (1.234, "1.23"), (12.34, "12.3"), (1234.5, "1,234")],
)
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert number(value) == text


# -- JSON ---------------------------------------------------------------------------------------


def test_json_has_everything_in_the_text() -> None:
    block = json.loads(json.dumps(to_dict(MIXED)))
    assert set(block) == {"int8bench_compare"}
    values = block["int8bench_compare"]
    assert (values["schema"], values["exit_code"]) == (1, 1)
    assert values["counts"] == {"regressed": 1, "same": 1, "new": 1, "missing": 1, "oom": 1}
    slow = values["runs"][1]
    assert (slow["run_name"], slow["outcome"], slow["exit_code"]) == ("slow_one", "regressed", 1)
    assert slow["base"]["throughput"] == 1000
    assert slow["new"]["throughput"] == 800
    assert slow["changes"][0] == {
        "metric": "throughput",
        "growth": 0.25,
        "limit": 0.05,
        "floor": 0.02,
        "learned": False,
        "outcome": "regressed",
        "shown_from": pytest.approx(0.1750, abs=0.0001),
        "assumed": 0.04,
        "files_needed": 7,
    }
    assert values["accuracy"][0]["metric"] == "top1"
    assert values["base"]["commits"] == ["base" * 20]


# -- JUnit --------------------------------------------------------------------------------------


def test_junit_cases() -> None:
    def case(name: str, status: str, message: str) -> Case:
        test = "test_accuracy[x]" if "top1" in name else f"test[{name.removeprefix('toy: ')}]"
        return Case(classname=f"test_a.py::{test}", name=name, status=status, message=message)

    why = "max-slowdown: +25.0%, limit 5.0% (noise floor 2.0%)"
    assert cases(MIXED) == [
        case("toy: same", "passed", "same"),
        case("toy: slow_one", "failure", f"regressed: {why}"),
        case("toy: big", "failure", "oom: big it is"),
        case("toy: gone", "error", "missing: not in the new run"),
        case("toy: fresh", "skipped", "new: not in the base"),
        case("toy: x top1", "failure", "regressed: top1 dropped"),
        Case(classname="int8bench compare", name="fingerprint", status="passed"),
    ]


def test_allowed_losses_are_skipped_cases() -> None:
    found = compared([timed("x"), timed("y")], [timed("x")], allow_missing=True)
    assert [case.status for case in cases(found)] == ["passed", "skipped", "passed"]


# -- all agree ----------------------------------------------------------------------------------

states = st.sampled_from([*STATUSES, "slow", "hot", "none"])
outcomes = st.sampled_from(["PASS", "FAIL", "INCONCLUSIVE", "random", "none"])


def records(results: list[str], verdicts: list[str]) -> list[Record]:
    found: list[Record] = []
    for index, state in enumerate(results):
        if state in STATUSES:
            found.append(timed(f"run{index}", status=state))
        elif state != "none":
            heat = ["power brake"] if state == "hot" else []
            found.append(timed(f"run{index}", slower=2, throttled=heat))
    for index, outcome in enumerate(verdicts):
        if outcome != "none":
            is_random = outcome == "random"
            found.append(
                verdict_of(
                    "FAIL" if is_random else outcome,
                    metric=f"metric{index}",
                    random_weights=is_random,
                )
            )
    return found


@given(
    st.lists(st.tuples(states, states), max_size=4),
    st.lists(st.tuples(outcomes, outcomes), max_size=2),
    st.sampled_from(["EPYC", "Xeon"]),
    st.booleans(),
)
def test_text_markdown_json_and_junit_agree(
    runs: list[tuple[str, str]], verdicts: list[tuple[str, str]], cpu: str, lenient: bool
) -> None:
    base, new = (records([r[i] for r in runs], [v[i] for v in verdicts]) for i in (0, 1))
    found = compare(
        [side("base", base, cpu="EPYC")], [side("new", new, cpu=cpu)], Rules(allow_missing=lenient)
    )
    code = found.exit_code

    root = ElementTree.fromstring(to_xml("int8bench compare", cases(found)))
    failures, errors = len(root.findall(".//failure")), len(root.findall(".//error"))
    assert code == (1 if failures else 2 if errors else 0)
    values = json.loads(json.dumps(to_dict(found)))["int8bench_compare"]
    assert values["exit_code"] == code
    entries = [*values["runs"], *values["accuracy"]]
    assert sum(entry["exit_code"] == 1 for entry in entries) == failures

    text, markdown = text_of(found), page(found).markdown()
    headline = text.splitlines()[-1].removeprefix("int8bench compare: ")
    assert headline.startswith(["nothing regressed", "REGRESSED", "NOT COMPARED"][code])
    assert markdown.splitlines()[0] == f"## int8bench compare: {headline}"
    for outcome, count in values["counts"].items():
        assert re.search(rf"\b{count} {outcome}\b", headline)
    for entry in entries:
        name = f"toy: {entry['run_name']}"
        row = re.compile(rf"^{re.escape(name)} .*{re.escape(entry['outcome'])}$", re.MULTILINE)
        assert row.search(text)
        assert f"| toy: {entry['run_name']} |" in markdown


def test_brackets_in_a_header_are_not_markup() -> None:
    grid = Grid(columns=["drop [one-sided]"], rows=[["1"]], styles=[None], name="")
    assert grid.text(width=None, color=False).splitlines()[0] == "drop [one-sided]"


def test_a_suspicion_is_the_headline_and_an_error_in_junit() -> None:
    found = compared([timed()], [timed(slower=1.1)])
    assert text_of(found).splitlines()[-1] == "int8bench compare: SUSPECTED (1 run: 1 suspected)"
    assert [case.status for case in cases(found)][:1] == ["error"]
    assert found.exit_code == 2

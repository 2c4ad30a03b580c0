"""Test plain benchmarks in a session: recorded with the points, compared with a file, rerun, and
measured by ``int8bench ab``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pytest_int8bench.results.reading import read
from toys.projects import SMOKE, bf16, journals, load, make_project, without

TESTS = """
import pytest


def test_point(int8_throughput):
    int8_throughput()


@pytest.mark.parametrize("n", [10, 20])
def test_sort(benchmark, n):
    benchmark.pedantic(sorted, ([*range(n)],), rounds=20)


def test_fails_after_it_was_timed(benchmark):
    benchmark.pedantic(sum, ([],), rounds=3)
    assert False, "too many"


def test_raises(benchmark):
    benchmark(lambda: 1 / 0)


def test_skips(benchmark):
    pytest.skip("not here")


def test_of_a_model(int8_model, benchmark):
    benchmark.pedantic(lambda: None, rounds=2)


def test_without():
    pass
"""
FILE = "test_one.py::test_"
OFF = "--int8-mode=off"


@pytest.fixture
def project(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, forked: None
) -> pytest.Pytester:
    return make_project(pytester, monkeypatch, test_one=TESTS)


def statuses(path: Path) -> dict[str, tuple[str, str | None]]:
    found = read(path).benchmarks
    return {b.nodeid.removeprefix(FILE): (b.status, b.reason) for b in found}


def test_records_and_compares_plain_benchmarks(project: pytest.Pytester) -> None:
    base, new = project.path / "base.json", project.path / "new.json"
    result = project.runpytest_subprocess(*SMOKE, *without(), OFF, f"--benchmark-json={base}")
    result.assert_outcomes(passed=5, failed=2, skipped=1)
    expected = {
        "sort[10]": ("ok", None),
        "sort[20]": ("ok", None),
        f"of_a_model[{bf16(4)}]": ("ok", None),
        "fails_after_it_was_timed": ("failed", "AssertionError: too many"),
        "raises": ("failed", "ZeroDivisionError: division by zero"),
        "skips": ("skipped", "not here"),
    }
    assert statuses(base) == statuses(journals(project)[-1]) == expected
    assert [r.nodeid for r in read(base).results] == [f"{FILE}point[{bf16(4)}]"]
    at = next(i for i, line in enumerate(result.outlines) if line.startswith("benchmark  "))
    assert {line.split()[0] for line in result.outlines[at + 1 : at + 5]} >= {f"{FILE}sort[10]"}

    # This also works without int8bench tests, and with a file saved by pytest-benchmark alone.
    saved = load(base)
    del saved["int8bench"]
    for entry in saved["benchmarks"]:
        slower = 1e-9 if "[10]" in entry["fullname"] else 1e6
        entry["stats"] |= dict.fromkeys(("median", "min", "stddev", "iqr"), slower)
    base.write_text(json.dumps(saved))
    compare = ("--int8-compare=base.json", f"--benchmark-json={new}", "-k", "sort")
    result = project.runpytest_subprocess(*SMOKE, *without(), OFF, *compare)
    result.assert_outcomes(passed=1, failed=1, deselected=6)
    result.stdout.re_match_lines([r"RegressionError: regressed: \S+sort\[10\]: max-call-time-gro"])
    result.stdout.fnmatch_lines(["compared with base.json: 1 regressed, 1 improved"])
    result.stdout.fnmatch_lines(
        ["note: base.json: saved without pytest-int8bench: only machine_info *"]
    )
    assert statuses(new)["sort[10]"][0] == "failed"
    assert statuses(new)["sort[20]"] == ("ok", None)


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (
            "--benchmark-disable",
            ("skipped", "ran once, not measured: pytest-benchmark is disabled"),
        ),
        ("--int8-lean", ("ok", None)),
    ],
)
def test_options_apply_to_plain_benchmarks(
    project: pytest.Pytester, option: str, expected: tuple[str, str | None]
) -> None:
    tests = ("test_one.py", "-k", "sort or without", "--int8-journal=new.jsonl")
    result = project.runpytest_subprocess(*SMOKE, *without(), option, *tests)
    assert result.ret == pytest.ExitCode.OK
    assert statuses(project.path / "new.jsonl") == {"sort[10]": expected, "sort[20]": expected}

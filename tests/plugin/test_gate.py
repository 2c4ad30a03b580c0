"""Test ``--int8-compare`` and ``--benchmark-compare`` in a session: each regression fails its own
test, and nothing passes silently."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pytest_int8bench.results.reading import read
from toys import projects
from toys.projects import load, make_project, without

SMOKE = (*projects.SMOKE, "--int8-mode=off")

TESTS = """
import pytest


def test_first(int8_throughput):
    int8_throughput()


def test_second(int8_throughput):
    int8_throughput()
"""


@pytest.fixture
def project(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, forked: None
) -> pytest.Pytester:
    """Return a project with two tests of one point."""
    return make_project(pytester, monkeypatch, test_one=TESTS)


def run(project: pytest.Pytester, *options: str, using: str | None = None) -> pytest.RunResult:
    """Run pytest without optional plugins except ``using``."""
    return project.runpytest_subprocess(*SMOKE, *without(using), *options)


POINT = projects.bf16(4)


def node(name: str, file: str = "test_one.py") -> str:
    return f"{file}::test_{name}[{POINT}]"


class Base:
    """A saved file that tests change as if it had been measured elsewhere."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.saved = load(path)

    def write(self, times: dict[str, float], **environment: Any) -> None:
        """Save results with the measured times multiplied by a factor; a name that was not
        measured gets a copy of the first result."""
        saved = json.loads(json.dumps(self.saved))
        block = saved["int8bench"]
        block["environment"] |= environment
        known = {result["nodeid"]: result for result in block["results"]}
        block["results"] = []
        for nodeid, factor in times.items():
            result = {**known.get(nodeid, next(iter(known.values()))), "nodeid": nodeid}
            result["samples_per_s"] /= factor
            for field in ("batch_time_s", "batch_time_min_s"):
                result[field] *= factor
            block["results"].append(result)
        self.path.write_text(json.dumps(saved))


MEASURED: list[str] = []


@pytest.fixture
def base(project: pytest.Pytester) -> Base:
    """Save what the project measures; the first test that requests this fixture measures."""
    path = project.path / "base.json"
    if not MEASURED:
        result = run(project, "--benchmark-json=base.json")
        assert result.ret == pytest.ExitCode.OK
        result.stdout.no_fnmatch_line("*int8bench gate*")
        MEASURED.append(path.read_text())
    path.write_text(MEASURED[0])
    return Base(path)


def gate_lines(result: pytest.RunResult) -> list[str]:
    """Return the lines below the gate's heading."""
    at = next(i for i, line in enumerate(result.outlines) if " int8bench gate " in line)
    lines = result.outlines[at + 1 :]
    return lines[: next(i for i, line in enumerate(lines) if line[:1] in ("=", "!"))]


SLOW, FAST = 1e6, 1e-6  # a base far slower or faster than this machine can be


def test_compares_session_with_a_saved_file(project: pytest.Pytester, base: Base) -> None:
    first, second = node("first"), node("second")
    compare = ("--int8-compare=base.json", "-Werror:Benchmark fixture was not used")

    # A regression fails its own test, is not a baseline, and appears in the reports.
    base.write({first: SLOW, second: FAST})
    result = run(project, *compare, "--benchmark-json=out.json", "--junit-xml=out.xml")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.re_match_lines(
        [
            (
                r"RegressionError: regressed: toy: cpu\S+: max-slowdown: \+\d+\.\d%, limit 5\.0% "
                r"\(noise floor 2\.0%\); compared with base\.json$"
            )
        ]
    )
    result.stdout.no_fnmatch_line("*insession.py*")  # no traceback of this package
    assert gate_lines(result) == ["compared with base.json: 1 improved, 1 regressed"]
    saved = read(project.path / "out.json")
    assert {r.nodeid: r.status for r in saved.results} == {first: "ok", second: "failed"}
    assert saved.results[1].reason.startswith("RegressionError: regressed: toy: cpu")
    assert [b["fullname"] for b in load(project.path / "out.json")["benchmarks"]] == [first]
    assert "<failure message=" in (project.path / "out.xml").read_text()

    # Points without a baseline pass. Missing points fail, alone or with their file, and so do
    # skipped ones.
    skipped = "\n\n@pytest.mark.skip\ndef test_skipped(int8_throughput):\n    pass\n"
    (project.path / "test_one.py").write_text(TESTS + skipped)
    base.write(
        {first: SLOW, node("skipped"): 1.0, node("gone"): 1.0, node("old", "test_gone.py"): 1.0}
    )
    result = run(project, *compare)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=2, skipped=1)
    assert gate_lines(result) == [
        "compared with base.json: 1 improved, 1 new",
        f"new: toy: {POINT}: not in the base",
        f"missing: {node('old', 'test_gone.py')} is in base.json and not in this session",
        f"missing: {node('gone')} is in base.json and not in this session",
        f"not measured, so not compared: {node('skipped')}",
    ]

    # Tests that were not selected, by node id or by -k, are not missing.
    base.write({first: SLOW, second: SLOW, node("gone"): 1.0})
    result = run(
        project, *compare, "test_one.py::test_first", "test_one.py::test_second", "-kfirst"
    )
    assert result.ret == pytest.ExitCode.OK
    result.assert_outcomes(passed=1, deselected=1)
    assert gate_lines(result) == ["compared with base.json: 1 improved"]


def test_another_machine_fails_before_measuring(project: pytest.Pytester, base: Base) -> None:
    base.write({node("first"): SLOW}, cpu="Other CPU", commit="def")
    result = run(project, "--int8-compare=base.json")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(failed=2)
    lines = [line for line in result.outlines if line.startswith("IncomparableError: ")]
    assert len(lines) == 2
    assert lines[0].startswith(
        "IncomparableError: base.json was measured on another machine or software: cpu Other CPU "
        "-> "
    )
    assert lines[0].endswith("; to compare all the same: --int8-allow cpu")
    assert gate_lines(result) == [
        "compared with base.json: nothing",
        "nothing was compared with base.json",
        f"not measured, so not compared: {node('first')}",
    ]


def test_benchmark_compare_checks_the_machine(project: pytest.Pytester, base: Base) -> None:
    stored = project.path / ".benchmarks" / "Linux" / "0001_base.json"
    stored.parent.mkdir(parents=True)
    base.path.rename(stored)
    base.path = stored
    options = ("-k", "first", "--benchmark-storage=.benchmarks", "--benchmark-compare=*/0001")
    base.write({node("first"): 1.0}, cpu="Other CPU", commit="def", dirty=True)
    result = run(project, *options)
    assert result.ret == pytest.ExitCode.OK
    why = (
        "the file given by --benchmark-compare was measured on another machine or with other "
        "software: cpu Other CPU -> *; see --int8-allow"
    )
    result.stdout.fnmatch_lines([f"*UserWarning: int8bench: {why}"])
    result = run(project, *options, "--benchmark-compare-fail=min:100000%")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(failed=1, deselected=1)
    result.stdout.fnmatch_lines([f"IncomparableError: --benchmark-compare-fail: {why}"])


# -- without measuring --------------------------------------------------------------------------


@pytest.fixture
def copy(project: pytest.Pytester) -> None:
    """Save a base that was not measured."""
    block = {"schema": 1, "environment": {}, "results": [], "accuracy": []}
    (project.path / "base.json").write_text(json.dumps({"benchmarks": [], "int8bench": block}))


def test_collecting_prints_no_comparison(project: pytest.Pytester, copy: None) -> None:
    result = run(project, "--int8-compare=base.json", "--collect-only", "-q")
    assert result.ret == pytest.ExitCode.OK
    result.stdout.no_fnmatch_line("*gate*")


def test_session_that_compares_nothing_fails(project: pytest.Pytester, copy: None) -> None:
    project.makepyfile(test_plain="def test_plain(): pass")
    result = run(project, "--int8-compare=base.json", "--color=yes", "test_plain.py")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    text = "int8bench fails this run: nothing was compared with base.json"
    [line] = [line for line in result.outlines if text in line]
    assert line.startswith("\x1b[31m!")
    assert result.outlines.index(line) == len(result.outlines) - 2


@pytest.mark.parametrize(
    ("options", "using", "why"),
    [
        (
            ("--benchmark-disable",),
            None,
            "cannot be combined with --benchmark-disable: nothing would be measured",
        ),
        (
            ("--codspeed",),
            "codspeed",
            "cannot be combined with --codspeed: nothing would be measured",
        ),
    ],
)
def test_rejects_options_that_prevent_measuring_at_start(
    project: pytest.Pytester, copy: None, options: tuple[str, ...], using: str | None, why: str
) -> None:
    if using is not None:
        pytest.importorskip(f"{'' if using == 'xdist' else 'pytest_'}{using}")
    result = run(project, "--int8-compare=base.json", *options, using=using)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert [line for line in result.errlines if line] == [f"ERROR: --int8-compare: {why}"]
    assert not list(project.path.glob(".benchmarks/int8bench/*"))


def test_does_not_overwrite_the_base(project: pytest.Pytester, copy: None) -> None:
    before = (project.path / "base.json").read_text()
    result = run(project, "--int8-compare=base.json", "--benchmark-json=base.json")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert [line for line in result.errlines if line] == [
        "ERROR: --benchmark-json: must be another file than those of --int8-compare, got base.json"
    ]
    assert (project.path / "base.json").read_text() == before


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "base.json is empty"),
        (
            '{"benchmarks": []}',
            ("base.json has no int8bench block: it was not saved by pytest-int8bench"),
        ),
        (
            '{"benchmarks": [], "int8bench": {"schema": 1, "environment": {"a": DEEP}, '
            '"results": [], "accuracy": []}}'.replace("DEEP", "[" * 250 + "]" * 250),
            "base.json is nested too deeply; at most 32 levels are allowed",
        ),
        ("[" * 100_000, "base.json is nested too deeply; at most 32 levels are allowed"),
    ],
    ids=["empty", "not ours", "nested", "nested and cut"],
)
def test_rejects_unreadable_base(project: pytest.Pytester, content: str, why: str) -> None:
    (project.path / "base.json").write_text(content)
    result = run(project, "--int8-compare=base.json")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert [line for line in result.errlines if line] == [f"ERROR: --int8-compare: {why}"]


def test_rejects_a_base_that_is_a_pipe(project: pytest.Pytester) -> None:
    os.mkfifo(project.path / "base.json")
    result = run(project, "--int8-compare=base.json")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert [line for line in result.errlines if line] == [
        "ERROR: --int8-compare: base.json must be a regular file, got a pipe"
    ]

"""If a test is rerun, the last attempt counts for every kind of record."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_int8bench.results.reading import read
from pytest_int8bench.results.records import Saved
from toys import projects
from toys.projects import SMOKE, bf16, int8, journals, load, make_project, without

#: Reruns each failed test once, like pytest-rerunfailures with --reruns=1.
RERUNS = """
from _pytest.runner import runtestprotocol


def pytest_runtest_protocol(item, nextitem):
    for attempt in (1, 2):
        item.attempt = attempt
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        item._initrequest()
        for report in runtestprotocol(item, nextitem=nextitem, log=False):
            if report.failed and attempt == 1:
                report.outcome = "rerun"
            item.ihook.pytest_runtest_logreport(report=report)
            if report.outcome == "rerun":
                break
        else:
            break
    return True


def pytest_report_teststatus(report):
    return ("rerun", "R", "RERUN") if report.outcome == "rerun" else None
"""
TESTS = """
import pytest


def fails_first(request, error=AssertionError("first attempt")):
    if request.node.attempt == 1:
        raise error


def test_throughput(int8_throughput, request):
    result = int8_throughput()
    fails_first(request)


def test_throughput_before(int8_throughput, request):
    fails_first(request, KeyError("before it is measured"))
    int8_throughput()


@pytest.fixture
def network(request):
    fails_first(request, OSError("no network"))


def test_model(network, int8_model):
    pass


def test_guardrail(int8_guardrail, request):
    fails_first(request)
    int8_guardrail()


def test_guardrail_that_fails(int8_guardrail, request, monkeypatch):
    from pytest_int8bench.accuracy.guardrail import Guardrail

    if request.node.attempt == 1:
        monkeypatch.setattr(Guardrail, "check", lambda *_, **__: 1 / 0)
    int8_guardrail()


def test_sensitivity(int8_sensitivity, request):
    int8_sensitivity(by="block" if request.node.attempt == 1 else "layer")
    fails_first(request)


def test_fails_twice(int8_guardrail, request):
    if request.node.attempt == 1:
        int8_guardrail()
    raise ValueError(f"attempt {request.node.attempt}")


def test_skips(int8_throughput, request):
    fails_first(request)
    pytest.skip("not on this machine")
"""


def found_by(saved: Saved) -> dict[str, list[Any]]:
    """Return the content of each kind of record by test name."""
    found: dict[str, list[Any]] = {}
    for result in saved.results:
        name = result.nodeid.partition("::")[2]
        found.setdefault(name, []).append((result.status, result.reason))
    for verdict in saved.accuracy:
        found.setdefault(verdict.nodeid.partition("::")[2], []).append(verdict.outcome)
    for table in saved.sensitivity:
        found.setdefault(table.nodeid.partition("::")[2], []).append(table.by)
    return found


def test_every_record_has_the_last_attempt(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, forked: None
) -> None:
    conftest = projects.CONFTEST + RERUNS
    project = make_project(pytester, monkeypatch, conftest=conftest, test_one=TESTS)
    found = project.runpytest_subprocess(*SMOKE, "--benchmark-json=new.json", *without())
    assert found.parseoutcomes() == {"passed": 8, "failed": 1, "skipped": 2, "rerun": 11}
    small, quick = bf16(4), int8(4)
    kinds = found_by(read(project.path / "new.json"))
    throughput = [
        f"{name}[{point}]"
        for name in ("test_throughput", "test_throughput_before")
        for point in (small, quick)
    ]
    assert [kinds[name][0][0] for name in throughput] == ["ok"] * 4
    assert {name: kinds[name] for name in kinds if name not in throughput} == {
        f"test_guardrail[{quick}]": ["proxy-ok"],
        f"test_guardrail_that_fails[{quick}]": ["proxy-ok"],
        f"test_sensitivity[{quick}]": ["layer"],
        f"test_fails_twice[{quick}]": [("failed", "ValueError: attempt 2")],
        f"test_skips[{small}]": [("skipped", "not on this machine")],
        f"test_skips[{quick}]": [("skipped", "not on this machine")],
    }
    [journal] = journals(project)
    assert found_by(read(journal)) == kinds
    timed = [entry["name"] for entry in load(project.path / "new.json")["benchmarks"]]
    assert sorted(timed) == sorted(throughput)
    found.stdout.no_fnmatch_line("*first attempt*")
    found.stdout.no_fnmatch_line("accuracy-failed:*")

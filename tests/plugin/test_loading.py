"""Libraries are loaded before the first test, and only for tests that use them."""

from __future__ import annotations

import pytest

LOADED = """
import sys

import pytest

AT_START = {}


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    AT_START.setdefault(item.name, sorted(HEAVY & set(sys.modules)))
    return (yield)


HEAVY = {"torch", "torchao", "toy_library", "torch._inductor.compile_fx"}


def pytest_terminal_summary(terminalreporter):
    for name, found in AT_START.items():
        terminalreporter.write_line(f"{name.partition('[')[0]}: {' '.join(found)}")
"""
WORKLOAD = """
import time

import toy_library

from pytest_int8bench import Workload


def make():
    return Workload(name="toy", build=lambda p: 1 / 0, inputs=lambda p, device: ())
"""


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeconftest(LOADED)
    pytester.makepyfile(
        mine=WORKLOAD,
        toy_library="",
        test_one="""
        import pytest

        def test_other():
            pass

        def test_first(int8_params, int8_workload):
            pass
        """,
    )
    return pytester


@pytest.mark.parametrize(
    ("options", "found"),
    [
        pytest.param(
            *(["--int8-set=compile_mode=off"], "torch torchao toy_library"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            [], "torch torch._inductor.compile_fx torchao toy_library", marks=pytest.mark.slow
        ),
        (["-k", "other"], ""),
    ],
    ids=["off", "compiled", "others"],
)
def test_loads_libraries_before_the_first_test(
    project: pytest.Pytester, options: list[str], found: str
) -> None:
    arguments = ["--int8-preset=smoke", "--int8-workload=mine.py:make", "-pno:randomly"]
    run = project.runpytest_subprocess(*arguments, *options, "-W", "error")
    run.stdout.fnmatch_lines([f"test_other: {found}".rstrip() + "*"])
    assert run.ret == pytest.ExitCode.OK


@pytest.mark.slow
def test_broken_library_fails_in_its_test(
    project: pytest.Pytester,
) -> None:
    project.makepyfile(toy_library="raise KeyError('damaged')")
    arguments = ["--int8-preset=smoke", "--int8-workload=mine.py:make", "-pno:randomly"]
    run = project.runpytest_subprocess(*arguments, "--int8-set=compile_mode=off")
    run.assert_outcomes(passed=1, errors=1)
    run.stdout.fnmatch_lines(["*KeyError: 'damaged'*"])

"""Errors while reporting, recording or inspecting the machine never end a session."""

from __future__ import annotations

import inspect
from collections.abc import Generator
from typing import Any

import pytest

from pytest_int8bench.plugin import hooks
from pytest_int8bench.plugin.guarding import guarded
from pytest_int8bench.plugin.recorder import Recorder
from pytest_int8bench.plugin.session import Session
from pytest_int8bench.plugin.settings import Settings
from pytest_int8bench.plugin.state import RECORDER, recorder_of
from pytest_int8bench.plugin.xdist.controller import Controller
from pytest_int8bench.plugin.xdist.worker import Worker

#: Hooks that decide what runs; their errors must appear before anything runs.
DECIDING = {
    "pytest_addoption",
    "pytest_load_initial_conftests",
    "pytest_configure",
    "pytest_generate_tests",
}


@pytest.mark.parametrize("owner", [hooks, hooks.AtTheEnd, Recorder, Controller, Worker])
def test_guards_every_hook_that_does_not_decide_what_runs(owner: Any) -> None:
    for name, hook in inspect.getmembers(owner, inspect.isfunction):
        if name.startswith("pytest_") and name not in DECIDING:
            assert getattr(hook, "is_guarded", False), name


@pytest.fixture
def config(pytester: pytest.Pytester) -> pytest.Config:
    config = pytester.parseconfig()
    config.stash[RECORDER] = Recorder(Session(config, Settings()))
    return config


LINE = "int8bench: trying failed: KeyError: 'bug'"


def drive(steps: Generator[None, Any, Any], answer: Any) -> Any:
    """Run a wrapper like pluggy does around hooks that return or raise ``answer``."""
    next(steps)
    try:
        if isinstance(answer, BaseException):
            steps.throw(answer)
        else:
            steps.send(answer)
    except StopIteration as end:
        return end.value
    raise AssertionError("a wrapper has one step")


def test_error_becomes_one_line(config: pytest.Config) -> None:
    @guarded("trying")
    def hook(config: pytest.Config) -> None:
        raise KeyError("bug")

    hook(config)
    assert recorder_of(config).reported == [LINE]
    assert not recorder_of(config).finish()


@pytest.mark.parametrize("when", ["before", "after"])
def test_failing_wrapper_keeps_the_inner_result(config: pytest.Config, when: str) -> None:
    @guarded("trying")
    def hook(config: pytest.Config) -> Generator[None, Any, Any]:
        if when == "before":
            raise KeyError("bug")
        yield
        raise KeyError("bug")

    assert drive(hook(config), "found") == "found"
    assert recorder_of(config).reported == [LINE]


def test_inner_error_passes_through_a_wrapper(config: pytest.Config) -> None:
    @guarded("trying")
    def hook(config: pytest.Config) -> Generator[None, Any, Any]:
        try:
            return (yield)
        finally:
            raise KeyError("bug")  # must not replace it

    with pytest.raises(OSError, match="inside"):
        drive(hook(config), OSError("inside"))
    assert recorder_of(config).reported == [LINE]


@pytest.mark.parametrize(
    "error", [pytest.UsageError("u"), pytest.exit.Exception("x"), KeyboardInterrupt()], ids=repr
)
def test_does_not_catch_deliberate_exits(config: pytest.Config, error: BaseException) -> None:
    @guarded("trying")
    def hook(config: pytest.Config) -> None:
        raise error

    with pytest.raises(type(error)):
        hook(config)


#: Functions that hooks call; each is broken in a separate session.
BROKEN = {
    "plugin.points.params_of": "",
    "plugin.collection.sort_by_model": "ordering tests",
    "plugin.session.Session.preset": "naming the preset",
    "plugin.recorder.Recorder.begin_attempt": "recording",
    "plugin.recorder.Recorder.end_attempt": "recording",
    "plugin.recorder.Recorder.note_error": "recording",
    "plugin.outcomes.record_outcome": "recording",
    "plugin.outcomes.shorten": "recording",
    "plugin.recorder.Recorder.check_collection": "checking the tests",
    "plugin.recorder.Recorder.has_something_to_show": "the",
    "plugin.summary.show": "the summary",
    "environment.fingerprint": "recording",
}


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_step_does_not_end_the_session(pytester: pytest.Pytester, broken: str) -> None:
    pytester.makeconftest(
        f"""
        import pytest

        def fail(*args, **kwargs):
            raise KeyError("bug")

        @pytest.hookimpl(trylast=True)
        def pytest_configure(config):
            patch = pytest.MonkeyPatch()
            config.add_cleanup(patch.undo)
            patch.setattr("pytest_int8bench.{broken}", fail, raising=True)
        """
    )
    pytester.makepyfile(
        """
        import pytest

        def test_skips(int8_params):
            pytest.skip("not today")

        def test_fails(int8_params):
            assert 1 == 2

        def test_other():
            pass
        """
    )
    found = pytester.runpytest_inprocess("--int8-preset=seed", "-pno:randomly", "-pno:xdist")
    found.stdout.no_fnmatch_line("*INTERNALERROR*")
    found.assert_outcomes(passed=1, skipped=1, failed=1)
    assert found.ret == pytest.ExitCode.TESTS_FAILED


def test_an_error_in_a_session_without_our_fixtures_fails_it(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        """
        import pytest

        def fail(*args, **kwargs):
            raise KeyError("bug")

        @pytest.hookimpl(trylast=True)
        def pytest_configure(config):
            patch = pytest.MonkeyPatch()
            config.add_cleanup(patch.undo)
            patch.setattr("pytest_int8bench.plugin.hooks.is_int8_test", fail)
        """
    )
    pytester.makepyfile("def test_other(): pass")
    found = pytester.runpytest_inprocess("-pno:randomly", "-pno:xdist")
    found.assert_outcomes(passed=1)
    assert found.ret == pytest.ExitCode.TESTS_FAILED
    found.stdout.fnmatch_lines(["int8bench: ordering tests failed: KeyError: 'bug'"])


def test_a_fixture_requested_at_run_time_finds_the_session(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        mine="""
        from pytest_int8bench import Workload

        toy = Workload(name="toy", build=lambda p: 1 / 0, inputs=lambda p, device: ())
        """,
        test_late="""
        import pytest

        @pytest.mark.int8(workload="mine.py:toy")
        def test_late(request):
            assert request.getfixturevalue("int8_workload").name == "toy"
        """,
    )
    found = pytester.runpytest_inprocess("-pno:randomly", "-pno:xdist")
    found.assert_outcomes(passed=1)

"""Test where records go, and that one failing step does not stop the others."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_int8bench.params import RunParams
from pytest_int8bench.plugin import hooks, pytest_benchmark, summary
from pytest_int8bench.plugin.recorder import Recorder
from pytest_int8bench.plugin.session import Session
from pytest_int8bench.plugin.settings import Settings
from pytest_int8bench.report import terminal
from pytest_int8bench.results.reading import read
from pytest_int8bench.results.records import Result

MACHINE = {"gpu": {"name": "A100"}}
POINT = RunParams()


@pytest.fixture
def recorder(pytester: pytest.Pytester) -> Recorder:
    made = Recorder(Session(pytester.parseconfig(), Settings()))
    made.start_journal(MACHINE)
    return made


def result(**changes: Any) -> Result:
    values = {
        "nodeid": "a.py::t",
        "workload": "toy",
        "run_name": POINT.run_name,
        "params": POINT.to_dict(),
        "samples_per_s": 10.0,
    }
    return Result(**{**values, **changes})


def fail(*_: object, **__: object) -> None:
    raise KeyError("bug")


#: The steps at the end of a session, in order.
STEPS = {
    "the gate": (Session, "gate_problems"),
    "saving": (pytest_benchmark, "save_without_timings"),
    "reports": (Recorder, "write_reports"),
    "freeing the models": (Session, "close"),
    "Weights & Biases": (Recorder, "track"),
}


@pytest.mark.parametrize("failing", STEPS)
def test_failing_final_step_is_reported_and_stops_no_other(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    done = []

    def note(what: str) -> Callable[..., Any]:
        return lambda *_: done.append(what) or what == "reports" or []

    for what, (owner, name) in STEPS.items():
        monkeypatch.setattr(owner, name, fail if what == failing else note(what))
    assert not recorder.finish()
    assert done == [what for what in STEPS if what != failing]
    assert recorder.reported == [f"int8bench: {failing} failed: KeyError: 'bug'"]


def test_session_passes_if_final_steps_succeed(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pytest_benchmark, "save_without_timings", lambda config: None)
    assert recorder.finish()
    assert recorder.reported == []


class Terminal:
    """Keep the lines that are written."""

    isatty = hasmarkup = False
    _tw: Any = None

    def __init__(self) -> None:
        self.lines: list[str] = []

    def section(self, title: str, **_: object) -> None:
        self.lines.append(title)

    def write(self, text: str) -> None:
        self.lines += text.splitlines()

    def write_line(self, line: str, **_: object) -> None:
        self.lines.append(line)


@pytest.mark.parametrize(
    ("owner", "name", "what"),
    [
        (terminal, "render", "the results"),
        (Recorder, "measured_by", "the workers"),
        (summary, "describe_saved", "the saved files"),
        (summary, "_where_profiles", "the profiles"),
    ],
)
def test_broken_summary_part_hides_no_other(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, what: str
) -> None:
    recorder.record(result())
    recorder.reported.append("report: r.md")
    monkeypatch.setattr(owner, name, fail)
    shown: Any = Terminal()
    summary.show_results(shown, recorder)
    assert f"int8bench: cannot show {what}: KeyError: 'bug'" in shown.lines
    assert shown.lines[-1] == "report: r.md"
    assert sum("cannot show" in line for line in shown.lines) == 1
    assert any(line.startswith("journal: ") for line in shown.lines)


@pytest.mark.parametrize(
    ("statuses", "is_told"), [(("skipped", "skipped"), True), (("skipped", "failed"), False)]
)
def test_warns_if_every_point_is_skipped(
    recorder: Recorder, statuses: tuple[str, ...], is_told: bool
) -> None:
    for index, status in enumerate(statuses):
        name = POINT.replace(batch_size=index + 1).run_name
        reason = "image_size=2 is smaller than patch_size=4"
        recorder.record(
            result(nodeid=name, run_name=name, status=status, reason=reason, samples_per_s=None)
        )
    shown: Any = Terminal()
    summary.show_results(shown, recorder)
    text = (
        "WARNING: no point was measured: 2 points skipped, the first because: image_size=2 is "
        "smaller than patch_size=4"
    )
    assert (text in shown.lines) is is_told


class Broken(Terminal):
    """Write to a pipe whose reader has ended."""

    def write_line(self, line: str, **_: object) -> None:
        super().write_line(line)
        raise BrokenPipeError


def test_closed_terminal_does_not_end_the_session(recorder: Recorder) -> None:
    recorder.record(result())
    recorder.reported.append("report: r.md")
    shown: Any = Broken()
    summary.show_results(shown, recorder)
    assert shown.lines[-1] == "report: r.md"


def test_lines_fit_the_encoding_and_contain_no_commands(recorder: Recorder) -> None:
    recorder.record(result(workload="größe\n::error::x\x1b[2J\udcff"))
    shown: Any = Terminal()
    shown._tw = SimpleNamespace(_file=SimpleNamespace(encoding="ascii"))
    summary.show_results(shown, recorder)
    text = "\n".join(shown.lines)
    assert "gr\\xf6\\xdfe ::error::x\\x1b[2J\\udcff" in text
    assert text.isascii()
    assert not any(line.startswith("::") for line in shown.lines)


def test_unrecordable_result_does_not_end_the_session(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        """
        from pytest_int8bench.params import RunParams
        from pytest_int8bench.plugin.recorder import Recorder
        from pytest_int8bench.plugin.state import recorder_of

        def fail(self, record):
            raise KeyError("bug")

        Recorder.record = fail

        def pytest_runtest_setup(item):
            if "int8_params" in item.fixturenames:
                recorder_of(item.config).note_point(item.nodeid, RunParams(), "toy")
        """
    )
    pytester.makepyfile(
        """
        import pytest

        def test_skips(int8_params):
            pytest.skip("not today")

        def test_other():
            pass
        """
    )
    found = pytester.runpytest_subprocess("--int8-preset=seed", "-pno:randomly")
    assert found.ret == pytest.ExitCode.TESTS_FAILED
    found.assert_outcomes(passed=1, skipped=1)
    found.stdout.fnmatch_lines(["int8bench: recording failed: KeyError: 'bug'"])
    found.stdout.no_fnmatch_line("*INTERNALERROR*")


def test_journal_keeps_records_until_they_can_be_written(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left")

    monkeypatch.setattr("pytest_int8bench.results.journal.Journal._write", full)
    with pytest.warns(
        UserWarning, match=r"^int8bench: cannot write a result to the journal: No space"
    ):
        recorder.record(result())
    assert recorder.results_of("a.py::t") == [result()]


def test_hooks_and_fixtures_are_registered_once(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        test_one="""
        def test_one(request):
            manager = request.config.pluginmanager
            names = [name for name, _ in manager.list_name_plugin() if "int8bench" in name]
            assert sorted(names) == [
                "int8bench", "int8bench-benchmark", "int8bench-end", "int8bench-fixtures",
            ]
            for name in ("int8_throughput", "int8_params", "_int8_point", "_int8_benchmark"):
                found = request.session._fixturemanager.getfixturedefs(name, request.node)
                assert len(found) == 1, name
            hooks = manager.hook.pytest_runtest_makereport.get_hookimpls()
            assert [hook.plugin_name for hook in hooks].count("int8bench") == 1
        """
    )
    pytester.runpytest_subprocess("-pno:randomly").assert_outcomes(passed=1)


def test_the_entry_point_has_every_hook() -> None:
    from pytest_int8bench import plugin

    names = [name for name in vars(hooks) if name.startswith("pytest_")]
    assert len(names) > 10
    assert all(getattr(plugin, name) is getattr(hooks, name) for name in names)


# -- tests that are run again ------------------------------------------------------------------

TIMED, JUDGED = "a.py::t", "a.py::accuracy"


def fail_accuracy(recorder: Recorder, nodeid: str = JUDGED) -> None:
    recorder.note_accuracy_failed(nodeid, "toy", POINT, "1.2 % is over the limit")


def statuses(recorder: Recorder) -> list[str]:
    assert recorder.journal is not None
    assert recorder.journal.path is not None
    kept = [entry.status for entry in recorder.journal.results]
    assert [entry.status for entry in read(recorder.journal.path).results] == kept
    return kept


def test_point_is_ok_if_accuracy_finally_passes(recorder: Recorder) -> None:
    recorder.record(result())
    recorder.begin_attempt(JUDGED)
    fail_accuracy(recorder)
    assert statuses(recorder) == ["accuracy-failed"]
    recorder.begin_attempt(JUDGED)
    assert statuses(recorder) == ["accuracy-failed"]  # until the attempt ends
    recorder.end_attempt(JUDGED)
    assert recorder.journal is not None
    assert recorder.journal.results == [result()]
    assert recorder.marked(result()) == result()


def test_point_stays_marked_if_accuracy_fails_again(recorder: Recorder) -> None:
    recorder.record(result())
    for _ in range(2):
        recorder.begin_attempt(JUDGED)
        fail_accuracy(recorder)
        recorder.end_attempt(JUDGED)
    assert statuses(recorder) == ["accuracy-failed"]


def test_point_stays_marked_if_another_accuracy_test_fails(recorder: Recorder) -> None:
    recorder.record(result())
    fail_accuracy(recorder)
    fail_accuracy(recorder, "a.py::another")
    recorder.begin_attempt(JUDGED)
    recorder.end_attempt(JUDGED)
    assert statuses(recorder) == ["accuracy-failed"]


def test_point_stays_marked_if_its_own_test_failed(recorder: Recorder) -> None:
    fail_accuracy(recorder)
    marked = recorder.marked(result())
    recorder.record(marked)
    recorder.keep_marked(marked)
    recorder.begin_attempt(JUDGED)
    recorder.end_attempt(JUDGED)
    assert statuses(recorder) == ["accuracy-failed"]


def test_interrupted_attempt_keeps_the_previous_one(recorder: Recorder) -> None:
    recorder.record(result(status="failed"))
    recorder.begin_attempt(TIMED)
    assert recorder.results_of(TIMED) == []
    assert statuses(recorder) == ["failed"]


def test_attempt_without_results_replaces_the_previous_one(recorder: Recorder) -> None:
    recorder.record(result(status="failed"))
    recorder.record(result(nodeid="a.py::other"))
    recorder.begin_attempt(TIMED)
    recorder.end_attempt(TIMED)
    assert statuses(recorder) == ["ok"]


def test_new_attempt_discards_the_previous_comparison(recorder: Recorder) -> None:
    forgotten: list[str] = []
    recorder.session.gate = SimpleNamespace(forget=forgotten.append)  # type: ignore[assignment]
    recorder.begin_attempt(TIMED)
    assert forgotten == []
    recorder.record(result(status="failed"))
    recorder.begin_attempt(TIMED)
    assert forgotten == [TIMED]


def test_warns_if_the_journal_cannot_be_updated(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left")

    recorder.record(result(status="failed"))
    recorder.begin_attempt(TIMED)
    monkeypatch.setattr("pytest_int8bench.files.replace_text", full)
    with pytest.warns(UserWarning, match=r"^int8bench: cannot update the journal: No space"):
        recorder.end_attempt(TIMED)
    assert recorder.results_of(TIMED) == []


def test_warning_turned_into_an_error_is_one_line(
    recorder: Recorder, recwarn: pytest.WarningsRecorder
) -> None:
    warnings.simplefilter("error")
    recorder.warn("cannot create the journal: full")
    assert recorder.reported == ["int8bench: cannot create the journal: full"]

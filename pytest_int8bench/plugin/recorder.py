"""Take what tests find: into the journal at once, and into reports when the tests are over."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_int8bench.plugin import pytest_benchmark
from pytest_int8bench.plugin.options import OPTIONS
from pytest_int8bench.plugin.session import Session
from pytest_int8bench.words import plural

if TYPE_CHECKING:
    from pytest_int8bench.params import RunParams
    from pytest_int8bench.report.wandb import Tracked
    from pytest_int8bench.results.base import Record
    from pytest_int8bench.results.journal import Journal
    from pytest_int8bench.results.records import Result


RECORDER = pytest.StashKey["Recorder"]()


@dataclass(frozen=True)
class Earlier:
    """What earlier attempts of a test found."""

    records: tuple[Record, ...] = ()
    points: tuple[tuple[str, str], ...] = ()
    """Workload and run name of points whose accuracy it found to have dropped."""


class Recorder:
    """Takes the records of a session. Those of pytest-xdist's processes build on it."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.config = session.config
        self.journal: Journal | None = None
        """Started with the first record."""
        self.tracked: Tracked | None = None
        """The outcome of logging to Weights & Biases, once that is done."""
        self.points_of: dict[str, tuple[str, RunParams]] = {}
        """Node id -> workload and point of its test."""
        self.reported: list[str] = []
        """Lines for the end of the session: reports that were written, and steps that failed."""
        self._asked: Journal | None = None
        """The file of ``--int8-journal``, made before anything is measured."""
        self._environment: dict[str, Any] | None = None
        self._accuracy_failed: dict[tuple[str, str], dict[str, str]] = {}
        """Workload and run name -> accuracy test that failed -> why."""
        self._unmarked: dict[tuple[str, ...], Result] = {}
        """Identity -> the result that was marked as ``accuracy-failed``."""
        self._earlier: dict[str, Earlier] = {}
        """Node id of a test that runs again -> what its earlier attempts found."""
        self._has_failed = False
        self._problems: list[str] = []
        """Problems that fail the session, found at its end."""

    # -- what this process can measure --------------------------------------------------------

    def pin(self) -> None:
        """Claim the GPU of this process before it starts CUDA."""

    def check_collection(self, items: list[pytest.Item]) -> None:
        """Refuse what no collected test can run with.

        Raises:
            pytest.UsageError: one line.
        """
        if self.config.option.collectonly:
            return
        from pytest_int8bench.plugin.benchmark_files import check_saving

        check_saving(self.config)
        if self.session.in_suite:
            return  # the runner asks for the outcome of each point
        from pytest_int8bench.plugin.collection import check_named, check_workload

        check_workload(self.session, items)
        check_named(self.session, items)

    def no_gpu(self, params: RunParams) -> str | None:
        """Return why there is no GPU for a point, None if there is one or it needs none."""
        return None

    def not_kept(self) -> str | None:
        """Return why results would be lost, None if they are not."""
        return None

    def not_timed(self, params: RunParams) -> str | None:
        """Return why times of this process would mean nothing, None if they do."""
        return None

    def not_benchmarked(
        self, benchmark: pytest_benchmark.Benchmark, params: RunParams
    ) -> str | None:
        """Return why pytest-benchmark is not to time a test, None if it is."""
        return pytest_benchmark.DISABLED if benchmark.is_disabled else None

    def environment(self) -> dict[str, Any]:
        """Return the fingerprint of machine and software."""
        if self._environment is None:
            from pytest_int8bench.environment import fingerprint
            from pytest_int8bench.measure.watchers import active_tracers

            self._environment = fingerprint(self.session.root, active_tracers())
        return self._environment

    # -- records ------------------------------------------------------------------------------

    def note_point(self, nodeid: str, params: RunParams, workload: str) -> None:
        """Remember which point a test runs, for when it fails or is skipped."""
        self.points_of[nodeid] = (workload, params)

    def placed(self, result: Result) -> Result:
        """Return ``result`` with the worker that measured it."""
        return result

    def record(self, record: Record) -> None:
        """Write ``record`` to the journal at once. If that fails, keep it in memory and warn."""
        try:
            (self.journal or self.start_journal(self.environment())).append(record)
        except OSError as error:
            self.warn(f"a result is not in the journal: {error}")

    def start_journal(self, environment: Mapping[str, Any]) -> Journal:
        """Start the journal of the session with a fingerprint, and return it."""
        self._environment = dict(environment)
        self.journal = self._open_journal(self._environment)
        return self.journal

    def reserve_journal(self) -> None:
        """Make the file of ``--int8-journal``, which no other session has. It is removed if
        nothing is recorded.

        Raises:
            pytest.UsageError: one line, if it is there already or cannot be made.
        """
        handover = self.session.handover
        asked = self.session.settings.journal if handover is None else handover.journal
        if asked is None:
            return
        from pytest_int8bench.results.base import SchemaError
        from pytest_int8bench.results.journal import Journal

        if handover is not None:  # the runner has made the file, and gets every result without it
            with suppress(OSError, SchemaError):
                self._asked = Journal.reopen(Path(asked))
            return
        try:
            self._asked = Journal(self.session.invocation / asked, {})
        except OSError as error:
            rule = "must be a file that is not there yet"
            if not isinstance(error, FileExistsError):
                rule += " and can be written"
            source = OPTIONS["journal"].source(self.config)
            why = error.strerror or error
            raise pytest.UsageError(f"{source}: {rule}, got {asked!r}: {why}") from None
        self.config.add_cleanup(self._asked.discard)

    def _open_journal(self, environment: dict[str, Any]) -> Journal:
        from pytest_int8bench.files import timestamp
        from pytest_int8bench.results.journal import Journal, journal_folder

        journal = self._asked
        try:
            if self.session.handover is not None:
                journal = journal or Journal(None, environment)
                journal.tell = self.session.handover.note_line
            if journal is not None:
                journal.begin(environment)
                return journal
            # Two sessions in one process may start within a second.
            name = f"{timestamp()}-{os.getpid()}-{id(self):x}.jsonl"
            return Journal(journal_folder(self.session.root) / name, environment)
        except OSError as error:
            self.warn(f"no journal: {error}")
            return journal or Journal(None, environment)

    def records_of(self, nodeid: str) -> list[Record]:
        """Return what this attempt of a test has found so far, the latest last."""
        earlier = self._earlier.get(nodeid, Earlier()).records
        found = self.journal.records_of(nodeid) if self.journal else []
        return [record for record in found if all(record is not old for old in earlier)]

    def results_of(self, nodeid: str) -> list[Result]:
        """Return the results of this attempt of a test so far."""
        from pytest_int8bench.results.records import Result, latest

        return latest(r for r in self.records_of(nodeid) if isinstance(r, Result))

    def note_accuracy_failed(
        self, nodeid: str, workload: str, params: RunParams, reason: str
    ) -> None:
        """Mark the timing of a point whose accuracy test failed, also one yet to be measured."""
        self._accuracy_failed.setdefault((workload, params.run_name), {})[nodeid] = reason
        for result in self.journal.results if self.journal else []:
            marked = self.marked(result)
            if marked is not result:
                self.record(marked)
                pytest_benchmark.leave_out(self.config, result.nodeid)

    def marked(self, result: Result) -> Result:
        """Return ``result``, as ``accuracy-failed`` if the accuracy test of its point failed."""
        reasons = self._accuracy_failed.get((result.workload, result.run_name))
        if not reasons or result.status != "ok":
            return result
        self._unmarked[result.identity] = result
        return dataclasses.replace(result, status="accuracy-failed", reason=[*reasons.values()][-1])

    def note_error(self, error: BaseException) -> None:
        """Take note of an error that ended a phase of a test."""

    # -- tests that are run again -------------------------------------------------------------

    def begin(self, nodeid: str) -> None:
        """Note that a test starts, perhaps once more (pytest-rerunfailures, flaky): then this
        attempt counts, and what earlier ones found is withdrawn when it is over. Until then it
        stays, for a crash would lose it."""
        records = tuple(self.journal.records_of(nodeid)) if self.journal else ()
        points = tuple(point for point, by in self._accuracy_failed.items() if by.pop(nodeid, None))
        if not (records or points):
            return
        before = self._earlier.get(nodeid, Earlier())
        self._earlier[nodeid] = Earlier(records, (*before.points, *points))
        pytest_benchmark.drop_timings(self.config, nodeid)
        if self.session.gate is not None:
            self.session.gate.forget(nodeid)

    def settle(self, nodeid: str) -> None:
        """Let the attempt of a test that is over count instead of earlier ones."""
        earlier = self._earlier.pop(nodeid, None)
        if earlier is None or self.journal is None:
            return
        try:
            self.journal.withdraw(earlier.records)
        except OSError as error:
            self.warn(f"the journal is not up to date: {error}")
        for result in self.journal.results:
            point = (result.workload, result.run_name)
            is_marked = result.status == "accuracy-failed" and not self._accuracy_failed.get(point)
            if point in earlier.points and is_marked and result.identity in self._unmarked:
                self.record(self._unmarked.pop(result.identity))
                pytest_benchmark.leave_out(self.config, result.nodeid, is_left_out=False)

    def keep_marked(self, result: Result) -> None:
        """Leave ``result`` marked whatever becomes of its accuracy test: its own test failed."""
        self._unmarked.pop(result.identity, None)

    # -- the end of the session ---------------------------------------------------------------

    def finish(self) -> bool:
        """Save, report and log what was recorded, each step whatever became of the others. Return
        whether nothing makes the session fail."""
        with self.guard("the gate"):
            self._problems = [*self.session.gate_problems(), *self.problems()]
        is_passed = not self._problems
        with self.guard("the journal"):
            self.check_journal()
        with self.guard("saving"):
            if self.journal is not None:
                pytest_benchmark.save_without_timings(self.config)
        with self.guard("reports"):
            is_passed = self.write_reports() and is_passed
        with self.guard("freeing the models"):
            self.session.close()
        with self.guard("Weights & Biases"):
            self.track()
        return is_passed and not self._has_failed

    def why_failed(self) -> str:
        """Return one line that says why a session fails in which no test failed."""
        first, *others = self._problems or ["see the lines of int8bench above"]
        more = f" (and {plural(len(others), 'more problem')}, see above)" if others else ""
        return f"int8bench fails this run: {first}{more}"

    def check_journal(self) -> None:
        """Write what the journal lacks; if that is not possible, fail a session that asked for
        one."""
        if self._asked is not None and self._asked.problem() is not None:
            self._has_failed = True  # the line that says where it is says why

    @contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """Turn an error into a line at the end of the session, and make the session fail: in a
        hook an error would end pytest, and lose what comes after it."""
        try:
            yield
        except Exception as error:
            self.note_failure(what, error)

    def note_failure(self, what: str, error: Exception) -> None:
        """Add a line to the end of the session, and make the session fail."""
        self._has_failed = True
        self.reported.append(f"int8bench: {what} failed: {type(error).__name__}: {error}")

    def warn(self, text: str) -> None:
        """Warn about something that the session can do without, also where warnings are errors."""
        try:
            warnings.warn(f"int8bench: {text}", stacklevel=3)
        except Warning:
            self.reported.append(f"int8bench: {text}")

    def problems(self) -> list[str]:
        """Return what must not pass silently about how tests were distributed, a line each."""
        return []

    def measured_by(self) -> list[str]:
        """Return lines that say which worker measured, on which GPU."""
        return []

    def has_something_to_show(self) -> bool:
        """Return whether the end of the session has a section or a line of ours."""
        return bool(self.journal or self.reported or self.session.gate)

    def write_reports(self) -> bool:
        """Write the reports of ``--int8-report``, and say so in ``reported``. Return whether all
        were written that there is something for."""
        settings = self.session.settings
        if not settings.reports or self.config.option.collectonly:
            return True
        from pytest_int8bench.plugin.reports import nothing_to_report, write_report

        if self.journal is None:
            self.reported += nothing_to_report(self.config)
            return True
        outcomes = [write_report(self.journal, path) for path in settings.reports]
        self.reported += [line for _, lines in outcomes for line in lines]
        return all(is_written for is_written, _ in outcomes)

    def track(self) -> None:
        """Log the points to Weights & Biases that ask for it, or all of them with
        ``--int8-wandb``. The runner does it for the processes that it starts."""
        settings = self.session.settings
        if self.journal is None or self.session.in_suite or settings.lean:
            return
        from pytest_int8bench.report.wandb import log, runs_of

        every = settings.changes.get("wandb_enabled", False)
        runs = runs_of(self.journal.saved(), every=every)
        reporter: Any = self.config.pluginmanager.get_plugin("terminalreporter")
        if runs and reporter is not None and self.config.get_verbosity() >= 0:
            reporter.ensure_newline()
            reporter.write_line("int8bench: logging to Weights & Biases ...")
        if runs or every:
            self.tracked = log(runs, folder=self.session.invocation)

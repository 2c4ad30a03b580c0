"""Record results: immediately in the journal, and at the end of the session in reports."""

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

if TYPE_CHECKING:
    from pytest_int8bench.params import RunParams
    from pytest_int8bench.report.wandb import Tracked
    from pytest_int8bench.results.base import Record
    from pytest_int8bench.results.journal import Journal
    from pytest_int8bench.results.records import Result


@dataclass(frozen=True)
class Earlier:
    """Results of earlier attempts of a test."""

    records: tuple[Record, ...] = ()
    points: tuple[tuple[str, str], ...] = ()
    """Workload and run name of each point that failed this accuracy test in an earlier attempt."""


class Recorder:
    """Records the results of a session. Subclasses are used in pytest-xdist's processes."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.config = session.config
        self.journal: Journal | None = None
        """The journal; None until the first record."""
        self.tracked: Tracked | None = None
        """The outcome of logging to Weights & Biases; None until it is logged."""
        self.points_of: dict[str, tuple[str, RunParams]] = {}
        """Maps a node id to the workload and point of the test."""
        self.reported: list[str] = []
        """Lines for the terminal summary: written reports and failed steps."""
        self._requested: Journal | None = None
        """The journal of ``--int8-journal``, created before anything is measured."""
        self._environment: dict[str, Any] | None = None
        self._accuracy_failed: dict[tuple[str, str], dict[str, str]] = {}
        """Maps workload and run name to the accuracy tests that failed (node id -> reason)."""
        self._unmarked: dict[tuple[str, ...], Result] = {}
        """Maps the identity of a result marked ``accuracy-failed`` to the result without the
        mark."""
        self._earlier: dict[str, Earlier] = {}
        """Maps the node id of a rerun test to the results of its earlier attempts."""
        self._has_failed = False
        self._problems: list[str] = []
        """Problems that fail the session, found at its end."""

    # -- what this process can measure, and where ---------------------------------------------

    def pin(self) -> None:
        """Restrict this process to its own GPU, before it initializes CUDA. Only workers do so."""

    def check_collection(self, items: list[pytest.Item]) -> None:
        """Reject options that none of the collected tests can run with.

        Raises:
            pytest.UsageError: for such an option; one line.
        """
        if self.config.option.collectonly:
            return
        from pytest_int8bench.plugin.benchmark_files import check_saving

        check_saving(self.config)
        if self.session.in_suite:
            return  # the runner needs an outcome for each point instead of one error
        from pytest_int8bench.plugin.collection import check_loadable, check_workload

        check_workload(self.session, items)
        check_loadable(self.session, items)

    def why_no_gpu(self, params: RunParams) -> str | None:
        """Return why a point cannot get a GPU; None if it can, or does not need one."""
        return None

    def why_not_kept(self) -> str | None:
        """Return why the results of this process would be lost; None if they are kept."""
        return None

    def why_not_timed(self, params: RunParams) -> str | None:
        """Return why timings in this process would be meaningless; None if they are valid."""
        return None

    def why_not_benchmarked(
        self, benchmark: pytest_benchmark.Benchmark, params: RunParams
    ) -> str | None:
        """Return why pytest-benchmark must not time a test; None if it may."""
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
        """Remember the point of a test, to record it if the test fails or is skipped."""
        self.points_of[nodeid] = (workload, params)

    def with_worker(self, result: Result) -> Result:
        """Return ``result`` with the worker that measured it, if this process is one."""
        return result

    def record(self, record: Record) -> None:
        """Write ``record`` to the journal immediately. If that fails, keep it in memory and
        warn."""
        try:
            (self.journal or self.start_journal(self.environment())).append(record)
        except OSError as error:
            self.warn(f"cannot write a result to the journal: {error}")

    def start_journal(self, environment: Mapping[str, Any]) -> Journal:
        """Start the session's journal with a fingerprint and return it."""
        self._environment = dict(environment)
        self.journal = self._open_journal(self._environment)
        return self.journal

    def reserve_journal(self) -> None:
        """Create the file of ``--int8-journal``, so that no other session uses it. It is removed at
        the end if nothing was recorded.

        Raises:
            pytest.UsageError: if it exists or cannot be created; one line.
        """
        handover = self.session.handover
        asked = self.session.settings.journal if handover is None else handover.journal
        if asked is None:
            return
        from pytest_int8bench.results.base import SchemaError
        from pytest_int8bench.results.journal import Journal

        if handover is not None:  # the runner has created the file, and also works without it
            with suppress(OSError, SchemaError):
                self._requested = Journal.reopen(Path(asked))
            return
        try:
            self._requested = Journal(self.session.invocation / asked, {})
        except OSError as error:
            source = OPTIONS["journal"].source(self.config)
            rule = "must be a writable file that does not exist yet"
            why = error.strerror or error
            raise pytest.UsageError(f"{source}: {rule}, got {asked!r}: {why}") from None
        self.config.add_cleanup(self._requested.discard)

    def _open_journal(self, environment: dict[str, Any]) -> Journal:
        from pytest_int8bench.files import timestamp
        from pytest_int8bench.results.journal import Journal, journal_folder

        journal = self._requested
        try:
            if self.session.handover is not None:
                journal = journal or Journal(None, environment)
                journal.tell = self.session.handover.note_line
            if journal is not None:
                journal.begin(environment)
                return journal
            # The id distinguishes sessions of one process that start within the same second.
            name = f"{timestamp()}-{os.getpid()}-{id(self):x}.jsonl"
            return Journal(journal_folder(self.session.root) / name, environment)
        except OSError as error:
            self.warn(f"cannot create the journal: {error}")
            return journal or Journal(None, environment)

    def records_of(self, nodeid: str) -> list[Record]:
        """Return the records of a test's current attempt, the latest last."""
        earlier = self._earlier.get(nodeid, Earlier()).records
        found = self.journal.records_of(nodeid) if self.journal else []
        return [record for record in found if all(record is not old for old in earlier)]

    def results_of(self, nodeid: str) -> list[Result]:
        """Return the latest results of a test's current attempt."""
        from pytest_int8bench.results.records import Result, latest

        return latest(r for r in self.records_of(nodeid) if isinstance(r, Result))

    def note_accuracy_failed(
        self, nodeid: str, workload: str, params: RunParams, reason: str
    ) -> None:
        """Mark all timings, past and future, of a point whose accuracy test failed."""
        self._accuracy_failed.setdefault((workload, params.run_name), {})[nodeid] = reason
        for result in self.journal.results if self.journal else []:
            marked = self.marked(result)
            if marked is not result:
                self.record(marked)
                pytest_benchmark.leave_out(self.config, result.nodeid)

    def marked(self, result: Result) -> Result:
        """Return ``result``, marked ``accuracy-failed`` if an accuracy test of its point failed."""
        reasons = self._accuracy_failed.get((result.workload, result.run_name))
        if not reasons or result.status != "ok":
            return result
        self._unmarked[result.identity] = result
        return dataclasses.replace(result, status="accuracy-failed", reason=[*reasons.values()][-1])

    def note_error(self, error: BaseException) -> None:
        """Handle an error that ended a phase of a test. Only workers need to do anything."""

    # -- reruns of tests ----------------------------------------------------------------------

    def begin_attempt(self, nodeid: str) -> None:
        """Handle the start of a test, which may be a rerun (pytest-rerunfailures, flaky).

        Only the last attempt counts. Records of earlier attempts are kept until the last one has
        ended, so that a crash does not lose them; :meth:`end_attempt` then withdraws them.
        """
        records = tuple(self.journal.records_of(nodeid)) if self.journal else ()
        points = tuple(point for point, by in self._accuracy_failed.items() if by.pop(nodeid, None))
        if not (records or points):
            return
        before = self._earlier.get(nodeid, Earlier())
        self._earlier[nodeid] = Earlier(records, (*before.points, *points))
        pytest_benchmark.drop_timings(self.config, nodeid)
        if self.session.gate is not None:
            self.session.gate.forget(nodeid)

    def end_attempt(self, nodeid: str) -> None:
        """Replace the records of earlier attempts with those of the attempt that has just ended."""
        earlier = self._earlier.pop(nodeid, None)
        if earlier is None or self.journal is None:
            return
        try:
            self.journal.withdraw(earlier.records)
        except OSError as error:
            self.warn(f"cannot update the journal: {error}")
        for result in self.journal.results:
            point = (result.workload, result.run_name)
            is_marked = result.status == "accuracy-failed" and not self._accuracy_failed.get(point)
            if point in earlier.points and is_marked and result.identity in self._unmarked:
                self.record(self._unmarked.pop(result.identity))
                pytest_benchmark.leave_out(self.config, result.nodeid, is_left_out=False)

    def keep_marked(self, result: Result) -> None:
        """Keep ``result`` marked even if a rerun of the accuracy test passes, because its own test
        failed."""
        self._unmarked.pop(result.identity, None)

    # -- the end of the session ---------------------------------------------------------------

    def finish(self) -> bool:
        """Save, report and log the records, even if one of these steps fails. Return whether the
        session passes."""
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
        """Return one line that explains a failed session without failed tests."""
        from pytest_int8bench.words import plural

        first, *others = self._problems or ["see the lines of int8bench above"]
        more = f" (and {plural(len(others), 'more problem')}, see above)" if others else ""
        return f"int8bench fails this run: {first}{more}"

    def check_journal(self) -> None:
        """Complete the journal of ``--int8-journal``; if that is impossible, fail the session."""
        if self._requested is not None and self._requested.problem() is not None:
            self._has_failed = True  # the summary gives the reason

    @contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """Turn an error into a line of the terminal summary and fail the session. If a hook raised
        the error, pytest would end and skip the remaining steps."""
        try:
            yield
        except Exception as error:
            self.note_failure(what, error)

    def note_failure(self, what: str, error: Exception) -> None:
        """Add an error to the terminal summary and fail the session."""
        self._has_failed = True
        self.reported.append(f"int8bench: {what} failed: {type(error).__name__}: {error}")

    def warn(self, text: str) -> None:
        """Warn about a problem that must not fail the session, even if warnings are turned into
        errors."""
        try:
            warnings.warn(f"int8bench: {text}", stacklevel=3)
        except Warning:
            self.reported.append(f"int8bench: {text}")

    def problems(self) -> list[str]:
        """Return problems between workers that fail the session, one line each."""
        return []

    def measured_by(self) -> list[str]:
        """Return lines that name the workers that measured and their GPUs."""
        return []

    def has_something_to_show(self) -> bool:
        """Return whether the terminal summary has anything to show."""
        return bool(self.journal or self.reported or self.session.gate)

    def write_reports(self) -> bool:
        """Write the reports of ``--int8-report`` and list them in ``reported``. Return whether all
        were written; if nothing was recorded, write none and return True."""
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
        """Log points to Weights & Biases: all with ``--int8-wandb``, otherwise those with
        ``wandb_enabled``. For the processes that it starts, the runner does so itself."""
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

"""Take what tests find: into the journal at once, and into reports when the tests are over."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from pytest_int8bench.plugin import pytest_benchmark
from pytest_int8bench.plugin.session import Session

if TYPE_CHECKING:
    from pytest_int8bench.params import RunParams
    from pytest_int8bench.report.wandb import Tracked
    from pytest_int8bench.results.journal import Journal
    from pytest_int8bench.results.records import Result
    from pytest_int8bench.results.verdicts import Accuracy, Sensitivity


RECORDER = pytest.StashKey["Recorder"]()


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
        self._environment: dict[str, Any] | None = None
        self._accuracy_failed: dict[tuple[str, str], str] = {}
        self._has_failed = False

    # -- what this process can measure --------------------------------------------------------

    def pin(self) -> None:
        """Claim the GPU of this process before it starts CUDA."""

    def check_collection(self, items: list[pytest.Item]) -> None:
        """Refuse what no collected test can run with.

        Raises:
            pytest.UsageError: one line.
        """
        if self.session.in_suite or self.config.option.collectonly:
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

    def record(self, record: Result | Accuracy | Sensitivity) -> None:
        """Write ``record`` to the journal at once. If that fails, keep it in memory and warn."""
        try:
            (self.journal or self.start_journal(self.environment())).append(record)
        except OSError as error:
            warnings.warn(f"int8bench: a result is not in the journal: {error}", stacklevel=2)

    def start_journal(self, environment: Mapping[str, Any]) -> Journal:
        """Start the journal of the session with a fingerprint, and return it."""
        self._environment = dict(environment)
        self.journal = self._open_journal(self._environment)
        return self.journal

    def _open_journal(self, environment: dict[str, Any]) -> Journal:
        from pytest_int8bench.files import timestamp
        from pytest_int8bench.results.journal import Journal, journal_folder

        stamp = timestamp()
        # Two sessions in one process may start within a second.
        name = f"{stamp}-{os.getpid()}-{id(self):x}.jsonl"
        try:
            asked = self.session.settings.journal
            folder = self.session.invocation if asked else journal_folder(self.session.root)
            return Journal(folder / (asked or name), environment)
        except OSError as error:
            warnings.warn(f"int8bench: no journal: {error}", stacklevel=2)
            return Journal(None, environment)

    def results_of(self, nodeid: str) -> list[Result]:
        """Return the results of a test so far."""
        return [r for r in self.journal.results if r.nodeid == nodeid] if self.journal else []

    def note_accuracy_failed(self, workload: str, params: RunParams, reason: str) -> None:
        """Mark the timing of a point whose accuracy test failed, also one yet to be measured."""
        self._accuracy_failed[workload, params.run_name] = reason
        for result in self.journal.results if self.journal else []:
            marked = self.marked(result)
            if marked is not result:
                self.record(marked)
                pytest_benchmark.leave_out(self.config, result.nodeid)

    def marked(self, result: Result) -> Result:
        """Return ``result``, as ``accuracy-failed`` if the accuracy test of its point failed."""
        reason = self._accuracy_failed.get((result.workload, result.run_name))
        if reason is None or result.status != "ok":
            return result
        return dataclasses.replace(result, status="accuracy-failed", reason=reason)

    def attach(
        self, item: pytest.Item, report: pytest.TestReport, call: pytest.CallInfo[None]
    ) -> None:
        """Send what was found since the last report with ``report``, from a worker."""

    # -- the end of the session ---------------------------------------------------------------

    def finish(self) -> bool:
        """Save, report and log what was recorded, each step whatever became of the others. Return
        whether nothing makes the session fail."""
        is_passed = True
        with self.guard("the gate"):
            is_passed = not (self.session.gate_problems() or self.problems())
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

    @contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """Turn an error into a line at the end of the session, and make the session fail: in a
        hook an error would end pytest, and lose what comes after it."""
        try:
            yield
        except Exception as error:
            self._has_failed = True
            self._note_failed(f"int8bench: {what} failed: {type(error).__name__}: {error}")

    def _note_failed(self, text: str) -> None:
        self.reported.append(text)

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

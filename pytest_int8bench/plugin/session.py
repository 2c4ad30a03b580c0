"""What one pytest session holds: settings, and what is made from them when it is first needed."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_int8bench.files import timestamp
from pytest_int8bench.plugin.pytest_benchmark import leave_out
from pytest_int8bench.plugin.settings import Settings
from pytest_int8bench.sweep import unique, with_baselines

if TYPE_CHECKING:
    from pytest_int8bench.accuracy.guardrail import Guardrail
    from pytest_int8bench.accuracy.limit import Limit
    from pytest_int8bench.gate.session import SessionGate
    from pytest_int8bench.measure.point import Throughput
    from pytest_int8bench.measure.pool import ModelPool
    from pytest_int8bench.measure.traces import Profiles
    from pytest_int8bench.params import RunParams
    from pytest_int8bench.plugin.xdist.controller import Controller
    from pytest_int8bench.plugin.xdist.worker import Worker
    from pytest_int8bench.report.wandb import Tracked
    from pytest_int8bench.results.journal import Journal
    from pytest_int8bench.results.records import Accuracy, Result, Sensitivity
    from pytest_int8bench.workloads import Workload


STATE = pytest.StashKey["State"]()
_SUITE_INI = Path(__file__).parents[1] / "suite" / "pytest.ini"


class State:
    """Everything of one session. Nothing heavy is imported before it is used."""

    def __init__(self, config: pytest.Config, settings: Settings) -> None:
        self.settings = settings
        self.invocation = config.invocation_params.dir
        # The runner's ini file makes the package's own folder the root.
        self.in_suite = config.inipath == _SUITE_INI
        self.root = self.invocation if self.in_suite else config.rootpath
        self.worker: Worker | None = None
        """Set in a worker of pytest-xdist."""
        self.controller: Controller | None = None
        """Set in the process that starts such workers."""
        self.journal: Journal | None = None
        self.profiles: Profiles | None = None
        """Made with what measures points."""
        self.tracked: Tracked | None = None
        """What became of logging to Weights & Biases, once that is done."""
        self.points_of: dict[str, tuple[str, RunParams]] = {}
        self.compared_with: list[dict[str, Any] | None] = []
        """Fingerprints of the files of ``--benchmark-compare``; None for a file without one."""
        self.collected: set[str] = set()
        """Node ids of all tests that were found."""
        self.deselected: set[str] = set()
        """Those among them that are not to be run."""
        self.reported: list[str] = []
        """Lines that say which reports were written, or why not."""
        self._config = config
        self._preset: str | None = None
        self._pool: ModelPool | None = None
        self._filter: Any = None
        self._throughput: Throughput | None = None
        self._guardrail: Guardrail | None = None
        self._gate: SessionGate | None = None
        self._environment: dict[str, Any] | None = None
        self._accuracy_failed: dict[tuple[str, str], str] = {}
        self._workloads: dict[str, Workload | ValueError] = {}

    # -- points -----------------------------------------------------------------------------

    @property
    def preset(self) -> str | None:
        """Which preset is used and why, None before a test asked for points."""
        if self._preset is None:
            return None
        why = "as asked"
        if self.settings.preset == "auto":
            found = {"seed": "CUDA is available", "smoke": "no CUDA device"}
            why = f"chosen by auto: {found[self._preset]}"
        return f"preset {self._preset} ({why})"

    def points(self, changes: dict[str, Any], *, twins: bool) -> list[RunParams]:
        """Return the points of a test.

        Args:
            changes: RunParams fields that the test's markers set.
            twins: put BF16 twins before them.
        """
        if self._preset is None:
            self._preset = self.settings.resolved_preset(_cuda_available)
        points = [
            p.replace(**{**changes, "extra": {**p.extra, **changes.get("extra", {})}})
            for p in self.settings.points(self._preset)
        ]
        points = unique(p if p.int8_enabled else p.baseline() for p in points)
        return with_baselines(points) if twins and self.settings.baseline else points

    def note_point(self, item: pytest.Item, params: RunParams, workload: str) -> None:
        """Remember which point a test runs, for when it fails or is skipped."""
        self.points_of[item.nodeid] = (workload, params)

    # -- made when first needed -------------------------------------------------------------

    def workload(self, name: str | None) -> Workload:
        """Return the workload of the settings, or of a test's marker."""
        from pytest_int8bench.workloads.registry import load_workload

        name = name or self.settings.workload
        if name not in self._workloads:
            try:
                self._workloads[name] = load_workload(
                    name, self.invocation, eval_data=self.settings.eval_data
                )
            except ValueError as error:  # kept: a hub that does not answer takes its time
                self._workloads[name] = error
        found = self._workloads[name]
        if isinstance(found, ValueError):
            raise found
        return found

    def pool(self) -> ModelPool:
        """Return the session's models."""
        if self._pool is None:
            from pytest_int8bench.measure.pool import ModelPool

            self._pool = ModelPool(
                weights=self.settings.weights, cache_dir=self.settings.compile_cache
            )
        return self._pool

    def filter(self) -> Any:
        """Return the filter of the settings, None if there is none.

        Raises:
            ValueError: one line, if there is no such callable.
        """
        if self._filter is None and self.settings.filter is not None:
            from pytest_int8bench.workloads.registry import load_object

            found = load_object(self.settings.filter, self.invocation)
            if not callable(found):
                raise ValueError(f"{self.settings.filter} is not callable")
            self._filter = found
        return self._filter

    def filtered(self, workload: Workload) -> Workload:
        """Return ``workload`` with the filter of the settings, which goes before its own.

        Raises:
            ValueError: one line, if there is no such callable.
        """
        try:
            found = self.filter()
        except ValueError as error:
            raise ValueError(f"--int8-filter: {error}") from None
        return workload if found is None else dataclasses.replace(workload, filter_fn=found)

    def throughput(self) -> Throughput:
        """Return what measures points."""
        if self._throughput is None:
            from pytest_int8bench.measure.point import Throughput
            from pytest_int8bench.plugin.progress import terminal_steps

            self._throughput = Throughput(
                self.pool(),
                with_baseline=self.settings.baseline,
                with_evidence=not self.settings.lean,
                profiles=self._profiles(),
                step=terminal_steps(self._config),
            )
        return self._throughput

    def _profiles(self) -> Profiles:
        from pytest_int8bench.measure.traces import Profiles

        self.profiles = Profiles(
            self.settings.profile,
            every=self.settings.changes.get("profiler_enabled", False),
            root=self.root,
            start=self.invocation,
        )
        return self.profiles

    def environment(self) -> dict[str, Any]:
        """Return the fingerprint of machine and software."""
        if self._environment is None:
            from pytest_int8bench.environment import fingerprint

            self._environment = fingerprint(self.root)
            if self.worker is not None:
                self._environment = self.worker.fingerprint(self._environment)
        return self._environment

    def gate(self) -> SessionGate | None:
        """Return what holds points to ``--int8-compare``, None without that option."""
        return self._gate

    def open_gate(self) -> None:
        """Read the files of ``--int8-compare``, if it is given.

        Raises:
            ValueError: one line, if one is damaged or not ours.
            OSError: if one cannot be read.
        """
        if not self.settings.compare:
            return
        from pytest_int8bench.gate.session import SessionGate
        from pytest_int8bench.results.locating import read_runs

        self._gate = SessionGate(read_runs(self.settings.compare), self.settings.rules)

    def guardrail(self) -> Guardrail:
        """Return what judges accuracy."""
        if self._guardrail is None:
            from pytest_int8bench.accuracy.guardrail import Guardrail
            from pytest_int8bench.plugin.progress import terminal_steps

            self._guardrail = Guardrail(
                self.pool(), self.settings.max_drop, step=terminal_steps(self._config)
            )
        return self._guardrail

    def remedied(
        self, workload: Workload, params: RunParams, verdicts: list[Accuracy], limit: Limit
    ) -> list[Accuracy]:
        """Try remedies for the metrics that failed. Return ``verdicts`` with what was tried."""
        from pytest_int8bench.accuracy.remedies import Remedies
        from pytest_int8bench.plugin.progress import say
        from pytest_int8bench.results.records import NO_LABELS

        remedies = Remedies(
            self.guardrail(),
            limit,
            record=self.record,
            tell=lambda text: say(self._config, f"remedies for {params.run_name}: {text}"),
        )
        found = []
        for index, verdict in enumerate(verdicts):  # those of labels come first
            to_mend = verdict.outcome == "FAIL" and verdict.metric != NO_LABELS
            if to_mend and not verdict.is_pipeline_check:
                verdict = remedies.walk(workload, params, index, verdict)
            found.append(verdict)
        return found

    def note_accuracy_failed(self, workload: str, params: RunParams, reason: str) -> None:
        """Mark the timing of a point whose accuracy test failed, also one yet to be measured."""
        self._accuracy_failed[workload, params.run_name] = reason
        for result in self.journal.results if self.journal else []:
            marked = self.marked(result)
            if marked is not result:
                self.record(marked)
                leave_out(self._config, result.nodeid)

    def marked(self, result: Result) -> Result:
        """Return ``result``, as ``accuracy-failed`` if it is one of a point that failed so."""
        reason = self._accuracy_failed.get((result.workload, result.run_name))
        if reason is None or result.status != "ok":
            return result
        return dataclasses.replace(result, status="accuracy-failed", reason=reason)

    def record(self, record: Result | Accuracy | Sensitivity) -> None:
        """Write ``record`` to the journal, at once. Where that fails, it is kept in memory and the
        session warned. A worker of pytest-xdist sends it to the process that started it, which
        writes the journal."""
        if self.worker is not None:
            record = self.worker.keep(record)
        try:
            (self.journal or self.start_journal(self.environment())).append(record)
        except OSError as error:
            warnings.warn(f"int8bench: a result is not in the journal: {error}", stacklevel=2)

    def start_journal(self, environment: Mapping[str, Any]) -> Journal:
        """Start the journal of the session with a fingerprint, and return it."""
        self._environment = dict(environment)
        self.journal = self._new_journal(self._environment)
        return self.journal

    def _new_journal(self, environment: dict[str, Any]) -> Journal:
        from pytest_int8bench.results.journal import Journal, journal_folder

        if self.worker is not None:
            return Journal(None, environment)
        stamp = timestamp()
        # Two sessions in one process may start within a second.
        name = f"{stamp}-{os.getpid()}-{id(self):x}.jsonl"
        try:
            asked = self.settings.journal
            path = self.invocation / asked if asked else journal_folder(self.root) / name
            return Journal(path, environment)
        except OSError as error:
            warnings.warn(f"int8bench: no journal: {error}", stacklevel=2)
            return Journal(None, environment)

    def track(self) -> None:
        """Log the points to Weights & Biases that ask for it, or all of them with
        ``--int8-wandb``. The runner does it for the processes that it starts."""
        if self.journal is None or self.worker is not None or self.in_suite or self.settings.lean:
            return
        from pytest_int8bench.report.wandb import log, runs_of

        every = self.settings.changes.get("wandb_enabled", False)
        runs = runs_of(self.journal.saved(), every=every)
        reporter: Any = self._config.pluginmanager.get_plugin("terminalreporter")
        if runs and reporter is not None and self._config.get_verbosity() >= 0:
            reporter.ensure_newline()
            reporter.write_line("int8bench: logging to Weights & Biases ...")
        if runs or every:
            self.tracked = log(runs, folder=self.invocation)

    def results_of(self, nodeid: str) -> list[Result]:
        """Return the results of a test so far."""
        return [r for r in self.journal.results if r.nodeid == nodeid] if self.journal else []

    def close(self) -> None:
        """Free the models."""
        if self._pool is not None:
            self._pool.clear()


def _cuda_available() -> bool:
    import torch

    return torch.cuda.is_available()

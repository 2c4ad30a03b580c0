"""What one pytest session holds: settings, and what is made from them when it is first needed."""

from __future__ import annotations

import dataclasses
import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_int8bench.errors import UndecidedError
from pytest_int8bench.options import OPTIONS, Settings
from pytest_int8bench.sweep import unique, with_baselines

if TYPE_CHECKING:
    from pytest_int8bench.accuracy.guardrail import Guardrail
    from pytest_int8bench.accuracy.limit import Limit
    from pytest_int8bench.distributed.controller import Controller
    from pytest_int8bench.distributed.worker import Worker
    from pytest_int8bench.gate.insession import SessionGate
    from pytest_int8bench.models import ModelPool
    from pytest_int8bench.params import RunParams
    from pytest_int8bench.profiles import Profiles
    from pytest_int8bench.results import Accuracy, Journal, Result, Sensitivity
    from pytest_int8bench.throughput import Throughput
    from pytest_int8bench.tracking import Tracked
    from pytest_int8bench.workloads import Workload

STATE = pytest.StashKey["State"]()
_MAX_REASON = 500
_SUITE_INI = Path(__file__).parent / "suite" / "pytest.ini"


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
        from pytest_int8bench.workloads.names import load_workload

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
            from pytest_int8bench.models import ModelPool

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
            from pytest_int8bench.workloads.names import load_object

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
            from pytest_int8bench.progress import terminal_steps
            from pytest_int8bench.throughput import Throughput

            self._throughput = Throughput(
                self.pool(),
                with_baseline=self.settings.baseline,
                with_evidence=not self.settings.lean,
                profiles=self._profiles(),
                step=terminal_steps(self._config),
            )
        return self._throughput

    def _profiles(self) -> Profiles:
        from pytest_int8bench.profiles import Profiles

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
        from pytest_int8bench.gate.files import read_runs
        from pytest_int8bench.gate.insession import SessionGate

        self._gate = SessionGate(read_runs(self.settings.compare), self.settings.rules)

    def guardrail(self) -> Guardrail:
        """Return what judges accuracy."""
        if self._guardrail is None:
            from pytest_int8bench.accuracy.guardrail import Guardrail
            from pytest_int8bench.progress import terminal_steps

            self._guardrail = Guardrail(
                self.pool(), self.settings.max_drop, step=terminal_steps(self._config)
            )
        return self._guardrail

    def remedied(
        self, workload: Workload, params: RunParams, verdicts: list[Accuracy], limit: Limit
    ) -> list[Accuracy]:
        """Try remedies for the metrics that failed. Return ``verdicts`` with what was tried."""
        from pytest_int8bench.accuracy.remedies import Remedies
        from pytest_int8bench.progress import say
        from pytest_int8bench.results import NO_LABELS

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
        from pytest_int8bench.results import Journal, journal_folder

        if self.worker is not None:
            return Journal(None, environment)
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
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
        from pytest_int8bench.tracking import log, runs_of

        every = self.settings.changes.get("wandb_enabled", False)
        runs = runs_of(self.journal.saved(), every=every)
        reporter: Any = self._config.pluginmanager.get_plugin("terminalreporter")
        if runs and reporter is not None and self._config.get_verbosity() >= 0:
            reporter.ensure_newline()
            reporter.write_line("int8bench: logging to Weights & Biases ...")
        if runs or every:
            self.tracked = log(runs, folder=self.invocation)

    def close(self) -> None:
        """Free the models."""
        if self._pool is not None:
            self._pool.clear()


def marker_changes(item: pytest.Item) -> tuple[dict[str, Any], str | None]:
    """Return the RunParams fields and the workload that ``@pytest.mark.int8`` sets; the closest
    marker wins.

    Raises:
        ValueError: one line that names the marker, the test and the key.
    """
    try:
        return _read_markers(item)
    except ValueError as error:
        raise ValueError(f"@pytest.mark.int8 of {item.nodeid}: {error}") from None


def _read_markers(item: pytest.Item) -> tuple[dict[str, Any], str | None]:
    from pytest_int8bench.params import FIELD_TYPES, RunParams

    changes: dict[str, Any] = {}
    workload = None
    for marker in reversed(list(item.iter_markers("int8"))):
        if marker.args:
            raise ValueError(f"takes keywords only, got {marker.args[0]!r}")
        for key, value in marker.kwargs.items():
            if key == "workload":
                workload = _workload_name(value)
            elif key not in FIELD_TYPES and key != "extra":
                raise ValueError(
                    f"unknown key {key!r}; keys are workload, {', '.join(FIELD_TYPES)}, extra"
                )
            elif key == "extra" and isinstance(value, dict):
                changes["extra"] = {**changes.get("extra", {}), **value}
            else:
                changes[key] = value
    RunParams().replace(**changes)  # says what is wrong with a value
    return changes, workload


def _workload_name(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"workload must be a name, got {value!r}")
    from pytest_int8bench.workloads.names import check_workload_name

    try:
        return check_workload_name(value)
    except ValueError as error:
        raise ValueError(f"workload {error}") from None


def _cuda_available() -> bool:
    import torch

    return torch.cuda.is_available()


def shorten(report: pytest.TestReport, call: pytest.CallInfo[None], style: str) -> None:
    """Show an error that says all in its message without a traceback of this package, unless
    ``--tb`` asks for one."""
    if call.excinfo is None or not report.failed or style != "auto":
        return
    from pytest_int8bench.errors import ClearError

    error = call.excinfo.value
    if isinstance(error, ClearError) and error.__cause__ is None:
        notes = getattr(error, "__notes__", [])
        report.longrepr = "\n".join([f"{type(error).__name__}: {error}", *notes])


def record_outcome(
    state: State,
    item: pytest.Item,
    report: pytest.TestReport,
    params: RunParams | None,
    error: BaseException | None,
) -> None:
    """Write the point of ``item`` to the journal if it was skipped or failed; ``params`` are those
    it was parametrized with, ``error`` what ended it.

    A point that was measured is written when it is; if its test fails after that, for instance
    by an assertion of its own, its result is written again as ``failed``. One that fails because
    samples do not decide shows nothing against what was measured.
    """
    stands = isinstance(error, UndecidedError)
    _tell_benchmark(state, item, report, stands=stands)
    point = state.points_of.get(item.nodeid)
    if point is None and report.failed and params is not None:
        point = (state.settings.workload, params)  # it failed before its workload was known
    if point is None or not (report.failed or report.skipped) or hasattr(report, "wasxfail"):
        return
    from pytest_int8bench.results import Result

    workload, params = point
    status = "failed" if report.failed else "skipped"
    reason = _reason(report)
    measured = _results_of(state, item)
    if measured:
        if measured[0].status == "ok" and report.failed and not stands:
            state.record(dataclasses.replace(measured[0], status=status, reason=reason))
        return
    if state.journal and any(v.nodeid == item.nodeid for v in state.journal.accuracy):
        return  # the verdict says it
    state.record(
        Result(
            nodeid=item.nodeid,
            workload=workload,
            run_name=params.run_name,
            params=params.to_dict(),
            status=status,
            reason=reason,
        )
    )


def _results_of(state: State, item: pytest.Item) -> list[Result]:
    return [r for r in state.journal.results if r.nodeid == item.nodeid] if state.journal else []


def leave_out(config: pytest.Config, nodeid: str) -> None:
    """Keep the timing of a test out of pytest-benchmark's file, where it would pass for a
    baseline."""
    benchmarks: Any = config.pluginmanager.get_plugin("pytest-benchmark")
    for found in benchmarks.benchmarks if benchmarks is not None else []:
        if found.fullname == nodeid:
            found.fixture.has_error = True


def _tell_benchmark(
    state: State, item: pytest.Item, report: pytest.TestReport, *, stands: bool
) -> None:
    """Keep timings of failed tests out of pytest-benchmark's file, where they would pass for
    baselines (unless what was measured ``stands``), and its warning about unused benchmarks from
    points that failed or ran out of memory."""
    benchmark = getattr(item, "funcargs", {}).get("benchmark")
    if benchmark is None or item.nodeid not in state.points_of:
        return
    if report.failed and not stands:
        benchmark.has_error = True
    if report.failed or any(result.oom for result in _results_of(state, item)):
        benchmark.skipped = True


def _reason(report: pytest.TestReport) -> str:
    """Return what happened, in one line."""
    if report.skipped and isinstance(report.longrepr, tuple):
        text = report.longrepr[2].removeprefix("Skipped: ")
    else:
        crash = getattr(report.longrepr, "reprcrash", None)
        text = crash.message if crash is not None else str(report.longrepr)
    text = text.removeprefix("Failed: ")
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return first[:_MAX_REASON]


def save_without_timings(config: pytest.Config, state: State) -> None:
    """Save a session in which nothing was timed (all out of memory, skipped, accuracy only):
    pytest-benchmark writes no file then."""
    benchmarks: Any = config.pluginmanager.get_plugin("pytest-benchmark")
    if state.journal is None or benchmarks is None or benchmarks.benchmarks or state.worker:
        return
    if benchmarks.disabled:  # it saves nothing either: the latest measured file stays the latest
        return
    name = benchmarks.save or benchmarks.autosave
    if not (name or benchmarks.json):
        return
    hook = config.hook
    commit = hook.pytest_benchmark_generate_commit_info(config=config)
    hook.pytest_benchmark_update_commit_info(config=config, commit_info=commit)
    output = hook.pytest_benchmark_generate_json(
        config=config,
        benchmarks=[],
        include_data=False,
        machine_info=benchmarks.get_machine_info(),
        commit_info=commit,
    )
    hook.pytest_benchmark_update_json(config=config, benchmarks=[], output_json=output)
    if benchmarks.json:
        benchmarks.save_json(output)
    if name:
        benchmarks.storage.save(output, name)


def write_reports(config: pytest.Config, state: State) -> bool:
    """Write the reports of ``--int8-report``, and say so in ``state.reported``. Return whether all
    were written that there is something for."""
    if not state.settings.reports or state.worker is not None or config.option.collectonly:
        return True
    if state.journal is None:
        option = OPTIONS["report"]
        if option.source(config) == option.flag:  # in an ini file it waits for benchmarks
            state.reported.append("int8bench: no report: no test measured or judged a point")
        return True
    from pytest_int8bench.report.outputs import publish

    written = True
    for path in state.settings.reports:
        try:
            publish([("this session", state.journal.saved())], path)
            state.reported.append(f"report: {_shown(path)}")
        except Exception as error:  # whatever it is, the other files are still to be saved
            written = False
            state.reported.append(f"report: {_not_written(path, error)}")
            if state.journal.path is not None:
                state.reported.append(f"report: try int8bench report {_shown(state.journal.path)}")
    return written


def _not_written(path: Path, error: Exception) -> str:
    from pytest_int8bench.gate.files import FileError

    if isinstance(error, FileError):
        return str(error)
    return f"{path} is not written: {type(error).__name__}: {error}"


def _shown(path: Path) -> Path:
    """Return a path from the current folder, if it is in it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def gate_problems(config: pytest.Config, state: State) -> list[str]:
    """Return what ``--int8-compare`` must not let pass silently, a line each."""
    gate = state.gate()
    if gate is None or config.option.collectonly:
        return []
    by_node = any("::" in argument for argument in config.args)
    start = config.invocation_params.dir
    asked = [(start / argument).resolve() for argument in config.args]

    def is_gone(file: str) -> bool:
        path = (config.rootpath / file).resolve()
        return not path.exists() and any(path.is_relative_to(folder) for folder in asked)

    return gate.problems(state.collected, state.deselected, by_node=by_node, is_gone=is_gone)


def check_compared(config: pytest.Config, state: State) -> None:
    """Say if a file of ``--benchmark-compare`` was measured on another machine or software, of
    which pytest-benchmark knows a part only.

    Raises:
        IncomparableError: with ``--benchmark-compare-fail``, whose verdict would mean nothing.
    """
    from pytest_int8bench.environment import differences
    from pytest_int8bench.gate.insession import IncomparableError

    for base in state.compared_with:
        if base is None:
            problem = "was not saved by pytest-int8bench, so the machine is unknown"
        else:
            allowed = state.settings.rules.allow
            found = differences(base, state.environment())
            listed = [f"{k} {a} -> {b}" for k, (a, b) in found.items() if k not in allowed]
            if not listed:
                continue
            problem = f"was measured on another machine or software: {', '.join(listed)}"
        text = f"the file that is compared with {problem}; see --int8-allow"
        if config.getoption("benchmark_compare_fail"):
            raise IncomparableError(f"--benchmark-compare-fail: {text}")
        warnings.warn(f"int8bench: {text}", stacklevel=2)
        state.compared_with = []  # said once
        return


def where_saved(config: pytest.Config, state: State) -> list[str]:
    """Return lines that say where the session's results are."""
    benchmarks: Any = config.pluginmanager.get_plugin("pytest-benchmark")
    active = benchmarks is not None and not benchmarks.disabled
    saved = []
    if active:
        if benchmarks.json:
            # An open file before pytest-benchmark 5.3, a path since.
            is_path = isinstance(benchmarks.json, str | Path)
            saved.append(str(benchmarks.json if is_path else benchmarks.json.name))
        if benchmarks.save or benchmarks.autosave:
            saved.append(str(benchmarks.storage.location))
    journal = _shown(state.journal.path) if state.journal and state.journal.path else None
    if saved:
        where = f"saved: {', '.join(saved)}"
    elif active:
        where = "not saved as JSON: add --benchmark-autosave or --benchmark-json=PATH"
    else:
        where = "not saved as JSON: pytest-benchmark is disabled"
    return [
        where,
        f"journal: {journal or 'none, see the warnings'}",
        *_where_profiles(state),
    ]


def _where_profiles(state: State) -> list[str]:
    """Return where the traces of the session are, and what went wrong."""
    written = state.profiles.traces if state.profiles is not None else []
    results = state.journal.results if state.journal else []  # those of other processes too
    traces = {*written, *(result.trace for result in results if result.trace)}
    folders = sorted({os.path.dirname(trace) or "." for trace in traces})
    lines = []
    if traces:
        count = f"{len(traces)} trace{'s' if len(traces) > 1 else ''} for ui.perfetto.dev"
        lines.append(f"profiles: {', '.join(folders)}: {count}, tables of kernels beside them")
    problems = state.profiles.problems if state.profiles is not None else []
    return [*lines, *(f"profiles: not written: {problem}" for problem in problems)]

"""The controller of pytest-xdist: assign a GPU to each worker and merge the workers' results into
one session. It measures nothing and does not load torch."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import pytest

from pytest_int8bench import nvml
from pytest_int8bench.environment import differences
from pytest_int8bench.errors import ClearError
from pytest_int8bench.params import RunParams
from pytest_int8bench.plugin import options, pytest_benchmark
from pytest_int8bench.plugin.benchmark_files import check_saving
from pytest_int8bench.plugin.guarding import guarded
from pytest_int8bench.plugin.points import params_in
from pytest_int8bench.plugin.pytest_benchmark_workers import add_timing, enable_saving
from pytest_int8bench.plugin.recorder import Recorder
from pytest_int8bench.plugin.session import Session
from pytest_int8bench.plugin.xdist.messages import KEY, SLOT, Message, unpacked
from pytest_int8bench.results.base import Record
from pytest_int8bench.results.journal import Journal
from pytest_int8bench.results.records import Result

_HERE = "localhost"
#: The phase that pytest-xdist reports for a test that crashed its worker.
_CRASHED = "???"
_RERUN = "rerun"


def is_controller(config: pytest.Config) -> bool:
    """Return whether this process distributes the tests to workers."""
    option = config.option
    asked = getattr(option, "dist", "no") != "no" and bool(getattr(option, "tx", None))
    return asked and not option.collectonly and not hasattr(config, "workerinput")


def limit_workers(config: pytest.Config, workers: int) -> int:
    """Return the number of workers for ``-n auto``: at most one per GPU if the command line has an
    option of this plugin, otherwise ``workers``."""
    if not options.are_on_command_line(config.option) or (gpus := nvml.visible()) is None:
        return workers
    return max(1, min(workers, len(gpus)))


class Controller(Recorder):
    """The recorder of the controller, and a pytest plugin. It takes over the records of workers."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        #: Maps a worker to its host and its index among the workers of that host.
        self._slots: dict[Any, tuple[str, int]] = {}
        #: Maps a node id to its position among the tests.
        self._order: dict[str, int] = {}
        #: Ids of workers whose device was lost.
        self._lost: set[str] = set()
        #: Maps a worker's id to its latest message with records.
        self._measured: dict[str, Message] = {}
        #: Failed points that crashed a worker before any worker had sent a fingerprint.
        self._waiting: list[Result] = []
        #: Maps a node id to its worker and the number of the attempt on that worker.
        self._attempts: dict[str, tuple[str, int] | None] = {}
        #: Maps a worker's id to the separate journal of its incomparable results, and to the
        #: differences from the first worker.
        self._separate: dict[str, tuple[Journal, list[str]]] = {}

    # -- workers ------------------------------------------------------------------------------

    @guarded("placing a worker")
    def pytest_configure_node(self, node: Any) -> None:
        """Assign a worker an index on its host; a replacement takes the index of the crashed
        worker."""
        host = _host_of(node.gateway.spec, node.nodemanager)
        taken = [number for where, number in self._slots.values() if where == host]
        number = next(number for number in range(len(taken) + 1) if number not in taken)
        self._slots[node] = (host, number)
        count = _count(host, node.nodemanager)
        node.workerinput[KEY] = {"number": number, "count": count}
        code = f"import os; os.environ[{SLOT!r}] = '{number}/{count}'"
        node.gateway.remote_exec(code).waitclose()

    @guarded("reading a worker's tests")
    def pytest_testnodedown(self, node: Any) -> None:
        self._slots.pop(node, None)
        text = getattr(node, "workeroutput", {}).get(KEY)
        if text is None:
            return
        with self.guard("reading a worker's tests"):
            found = json.loads(text)
            self.session.collected |= set(map(self._without_group, found["collected"]))
            self.session.deselected |= set(map(self._without_group, found["deselected"]))
            self._take_problems(node.gateway.id, found["problems"])

    @guarded("looking for GPUs")
    def pytest_xdist_node_collection_finished(self, node: Any, ids: Sequence[str]) -> None:
        """Before the first test, check that this host has a GPU for each of its workers."""
        if not self._order:
            self._order = {self._without_group(nodeid): index for index, nodeid in enumerate(ids)}
            self.session.collected |= set(self._order)
        found = [params for params in map(params_in, ids) if params is not None]
        if found and self.config.option.dist == "each":
            raise pytest.UsageError(
                "--dist=each: not supported, every worker would measure all points"
            )
        if found:
            check_saving(self.config)
        workers = _count(_HERE, node.nodemanager)
        if workers < 2 or not any(params.gpu_type == "cuda" for params in found):
            return
        gpus = nvml.visible()
        if gpus and workers > len(gpus):
            asked = f"-n {workers}" if self.config.option.numprocesses else "--tx"
            raise pytest.UsageError(
                f"{asked} asks for {workers} workers, but {nvml.described(gpus)}, and each worker "
                "needs its own"
            )

    @pytest.hookimpl(wrapper=True)
    @guarded("choosing a distribution")
    def pytest_xdist_make_scheduler(
        self, config: pytest.Config, log: Any
    ) -> Generator[None, Any, Any]:
        usual = yield
        if config.option.dist != "load":  # the user asked for another distribution
            return usual
        from pytest_int8bench.plugin.xdist.scheduling import FamilyScheduling, Scheduling

        return Scheduling(usual, FamilyScheduling(config, log, self._lost))

    # -- results of workers -------------------------------------------------------------------

    @pytest.hookimpl(tryfirst=True)
    @guarded("recording")
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        nodeid = self._without_group(report.nodeid)
        text = getattr(report, KEY, None)
        with self.guard("recording"):
            if text is not None:
                self._merge(nodeid, Message.from_json(text))
            elif report.when == _CRASHED and report.failed:
                self._note_crashed(nodeid, str(report.longrepr))

    @guarded("recording")
    def pytest_handlecrashitem(self, crashitem: str, report: Any, sched: Any) -> None:
        """Rerun a test that did not start because its worker lost the device in an earlier test."""
        if report.node.gateway.id in self._lost:
            with contextlib.suppress(NotImplementedError):  # from schedulers that rerun it anyway
                sched.mark_test_pending(crashitem)
            report.outcome = _RERUN

    @guarded("recording")
    def pytest_report_teststatus(self, report: Any) -> tuple[str, str, str] | None:
        return ("", "", "") if (report.when, report.outcome) == (_CRASHED, _RERUN) else None

    def _merge(self, nodeid: str, message: Message) -> None:
        if message.device_lost:
            self._lost.add(message.worker)
        self._take_problems(message.worker, message.problems)
        attempt = (message.worker, message.attempt)
        if self._attempts.setdefault(nodeid, attempt) != attempt:
            self._attempts[nodeid] = attempt
            self.begin_attempt(nodeid)
            self.end_attempt(nodeid)
        if message.records:
            self._measured[message.worker] = message
        if message.point is not None:
            workload, values = message.point
            params = RunParams.from_dict(values).with_short_name(message.has_short_name)
            self.points_of[nodeid] = (workload, params)
        for kind, fields in message.records:
            with self.guard("recording"):  # if one fails, the others must not be lost
                record = unpacked(kind, fields)
                self._take(
                    dataclasses.replace(record, nodeid=self._without_group(record.nodeid)), message
                )
        for timing in message.timings:
            if message.worker not in self._separate:
                fullname = self._without_group(timing["fullname"])
                with self.guard("recording"):
                    add_timing(self.config, fullname, timing)

    def _take_problems(self, worker: str, problems: Sequence[str]) -> None:
        if problems:
            self._has_failed = True
            self.reported += [f"{worker}: {text}" for text in problems]

    def _take(self, record: Record, message: Message) -> None:
        environment = message.environment or {}
        if self.journal is None:
            self.start_journal(environment)
        if (journal := self._separate_journal(message, environment)) is not None:
            try:
                journal.append(record)
            except OSError as error:
                self.warn(f"cannot write a result to the journal: {error}")
            return
        self.record(record)
        if not isinstance(record, Result):
            return
        is_left_out = record.status not in ("ok", "oom")
        pytest_benchmark.leave_out(self.config, record.nodeid, is_left_out=is_left_out)
        gate = self.session.gate
        if gate is not None and record.status in ("ok", "oom", "accuracy-failed"):
            with contextlib.suppress(ClearError):  # the worker has already failed the test
                gate.judge(record, environment)

    def end_attempt(self, nodeid: str) -> None:
        """Withdraw the records of earlier attempts from every journal."""
        self._waiting = [result for result in self._waiting if result.nodeid != nodeid]
        for journal, _ in self._separate.values():
            try:
                journal.withdraw(journal.records_of(nodeid))
            except OSError as error:
                self.warn(f"cannot update the journal: {error}")
        super().end_attempt(nodeid)

    def start_journal(self, environment: Mapping[str, Any]) -> Journal:
        """Start the journal with the fingerprint of the first worker that measured."""
        journal = super().start_journal(environment)
        journal.order = self._order
        for result in self._waiting:
            self.record(result)
        self._waiting = []
        return journal

    def _separate_journal(self, message: Message, environment: Mapping[str, Any]) -> Journal | None:
        """Return the separate journal of a worker whose machine or software differs from the first
        worker's; None if they do not differ."""
        if message.worker in self._separate:
            return self._separate[message.worker][0]
        together = self.environment()
        found = differences(together, environment)
        if together.get("commit") != environment.get("commit"):
            found["commit"] = (together.get("commit"), environment.get("commit"))
        names = [name for name in found if name not in self.session.settings.rules.allow]
        if not names:
            return None
        main = self.journal.path if self.journal else None
        path = main and main.with_name(f"{main.stem}-{message.worker}.jsonl")
        try:
            journal = Journal(path, environment)
        except OSError as error:
            self.warn(f"cannot create the journal: {error}")
            journal = Journal(None, environment)
        listed = [f"{name} {found[name][0]} -> {found[name][1]}" for name in names]
        self._separate[message.worker] = (journal, listed)
        return journal

    def _note_crashed(self, nodeid: str, reason: str) -> None:
        """Record the point that crashed a worker as failed."""
        self._attempts[nodeid] = None
        point = self.points_of.get(nodeid)
        params = point[1] if point else params_in(nodeid)
        if params is None:
            return
        result = Result(
            nodeid=nodeid,
            workload=point[0] if point else self.session.settings.workload,
            run_name=params.run_name,
            params=params.to_dict(),
            status="failed",
            reason=reason,
        )
        pytest_benchmark.leave_out(self.config, nodeid)
        if self.journal is None:
            self._waiting.append(result)
            return
        measured = [entry for entry in self.journal.results if entry.nodeid == nodeid]
        kept = [dataclasses.replace(entry, status="failed", reason=reason) for entry in measured]
        self.record(kept[0] if kept else result)

    # -- the end of the session ---------------------------------------------------------------

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    @guarded("saving")
    def pytest_sessionfinish(self) -> Generator[None, object, object]:
        """Let pytest-benchmark, which disables itself under pytest-xdist, save and compare the
        workers' timings in the order of the tests."""
        with self.guard("saving"):
            if self._waiting:
                self.start_journal({})
            if self.journal is not None:
                has_disabled = any(result.is_disabled for result in self.journal.results)
                enable_saving(self.config, self._order, untimed=not has_disabled)
        return (yield)

    def measured_by(self) -> list[str]:
        """Return lines that name the presets, and the workers that measured with their GPUs."""
        places = [
            f"{name} ({', '.join([message.host, *message.gpus])})"
            for name, message in sorted(self._measured.items())
        ]
        lines = sorted({m.preset for m in self._measured.values() if m.preset})
        return [*lines, *([f"measured by {', '.join(places)}"] if places else [])]

    def problems(self) -> list[str]:
        """Return a line for each worker whose results are kept separate, with the reason."""
        lines = []
        for worker, (journal, listed) in self._separate.items():
            names = [text.partition(" ")[0] for text in listed]
            remedy = "add " + " ".join(f"--int8-allow {name}" for name in names)
            if "commit" in names:  # which --int8-allow does not take
                remedy = "check out the same commit on all hosts"
            problem = journal.problem()
            lacks = f", which {problem}" if problem else ""
            lines.append(
                f"{worker} ({self._measured[worker].host}) measured on another machine or with "
                f"other software than the first worker: {', '.join(listed)}; its "
                f"{len(journal.results)} results are in a separate file, {journal.path}{lacks}; to "
                f"merge them, {remedy}"
            )
        return lines

    def _without_group(self, nodeid: str) -> str:
        """Return a node id without the group that ``--dist=loadgroup`` appends to it."""
        if self.config.option.dist == "loadgroup" and nodeid.rfind("@") > nodeid.rfind("]"):
            return nodeid.rpartition("@")[0]
        return nodeid


def _count(host: str, manager: Any) -> int:
    return sum(_host_of(spec, manager) == host for spec in manager.specs)


def _host_of(spec: Any, manager: Any) -> str:
    """Return the host of a worker, given its ``--tx`` specification."""
    if spec.via:
        return _host_of(manager.group[spec.via].spec, manager)
    host = str(spec.ssh or (spec.socket or "").rpartition(":")[0] or _HERE)
    host = host.rpartition("@")[2]
    return _HERE if host in ("127.0.0.1", platform.node()) else host

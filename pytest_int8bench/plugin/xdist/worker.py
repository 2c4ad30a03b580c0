"""A pytest-xdist worker: use one GPU, and send results to the controller along with test
reports."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import pytest

from pytest_int8bench import nvml
from pytest_int8bench.params import RunParams
from pytest_int8bench.plugin import options, pytest_benchmark
from pytest_int8bench.plugin.guarding import guarded
from pytest_int8bench.plugin.points import params_of
from pytest_int8bench.plugin.pytest_benchmark_workers import silence_xdist_warning, take_timings
from pytest_int8bench.plugin.recorder import Recorder
from pytest_int8bench.plugin.session import Session
from pytest_int8bench.plugin.xdist.messages import KEY, SLOT, Message, kind_of
from pytest_int8bench.results.base import Record
from pytest_int8bench.results.journal import Journal
from pytest_int8bench.results.records import Result
from pytest_int8bench.words import plural


@dataclass(frozen=True)
class _Pinned:
    """The result of restricting a process to one GPU."""

    gpu: str | None
    """Its name in ``CUDA_VISIBLE_DEVICES``; None if there were too few GPUs."""
    shared: list[str] | None
    """The GPUs that the workers of this host share; None if unknown."""

    @classmethod
    def to(cls, number: int) -> _Pinned:
        shared = nvml.visible()  # before pin() changes it
        return cls(nvml.pin(number), shared)


_PINNED = pytest.StashKey[_Pinned]()


def pin_at_start(config: pytest.Config) -> None:
    """Restrict this process to its GPU if the command line has an option of this plugin. This
    happens before a ``conftest.py``, which may initialize CUDA, is imported."""
    # Remove the variable, because it is not meant for processes started by tests.
    number, count = map(int, os.environ.pop(SLOT).split("/"))
    if count > 1 and options.are_on_command_line(config.known_args_namespace):
        config.stash[_PINNED] = _Pinned.to(number)


class Worker(Recorder):
    """The recorder of a worker, and a pytest plugin. It keeps records in memory and sends each with
    the next test report to the controller, which writes it."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        given: dict[str, Any] = self.config.workerinput  # type: ignore[attr-defined]
        self.id: str = given["workerid"]
        #: Set by our plugin in the controller; None if the controller runs without it.
        self._slot: dict[str, int] | None = given.get(KEY)
        self._pinned: _Pinned | None = self.config.stash.get(_PINNED, None)
        self._is_lost = False
        self._records: list[Record] = []
        self._attempts: Counter[str] = Counter()

    @property
    def count(self) -> int:
        return self._slot["count"] if self._slot else 1

    @property
    def _gpu(self) -> str | None:
        return self._pinned.gpu if self._pinned else None

    def pin(self) -> None:
        """Restrict this process to its own GPU if it shares the host with other workers."""
        if self._pinned is None and self._slot is not None and self.count > 1:
            self._pinned = _Pinned.to(self._slot["number"])

    def check_collection(self, items: list[pytest.Item]) -> None:
        """Do nothing: an error here would look like a crash of the worker."""

    def environment(self) -> dict[str, Any]:
        """Return the fingerprint that a process with access to all GPUs of the host would have."""
        if self._environment is None:
            gpus = self._pinned.shared if self._pinned else None
            count = {"gpu_count": len(gpus)} if gpus else {}
            self._environment = {**super().environment(), **count}
        return self._environment

    # -- what cannot be measured here ---------------------------------------------------------

    def why_no_gpu(self, params: RunParams) -> str | None:
        if params.gpu_type != "cuda" or self._slot is None or self.count == 1:
            return None
        if self._gpu is None:
            gpus = len((self._pinned and self._pinned.shared) or ())
            return (
                f"worker {self.id} has no GPU of its own: {self.count} workers on this host share "
                f"{plural(gpus, 'GPU')}"
            )
        if (seen := nvml.seen_by_cuda()) > 1:
            return (
                f"worker {self.id} sees {seen} GPUs instead of only its own: a module imported "
                "before this test initialized CUDA; add an --int8 option to the command line, so "
                "that workers select their GPU before importing anything"
            )
        return None

    def why_not_kept(self) -> str | None:
        if self._slot is not None:
            return None
        return "the pytest-xdist controller runs without pytest-int8bench"

    def why_not_timed(self, params: RunParams) -> str | None:
        if pytest_benchmark.is_disabled_by_user(self.config):
            return pytest_benchmark.DISABLED
        if params.gpu_type != "cuda" and self.count > 1:
            return f"{self.count} workers on one CPU slow each other down; run with -n1"
        return self.why_not_kept()

    def why_not_benchmarked(
        self, benchmark: pytest_benchmark.Benchmark, params: RunParams
    ) -> str | None:
        # pytest-benchmark disables itself in every worker. Turn it on in workers that can time.
        why = self.why_not_timed(params)
        benchmark.set_disabled(why is not None)
        return why

    # -- messages to the controller -----------------------------------------------------------

    def with_worker(self, result: Result) -> Result:
        gpu = self._gpu if _is_on_gpu(result) else None
        where = {"id": self.id, "host": platform.node(), "gpu": gpu}
        return dataclasses.replace(result, worker=where)

    def record(self, record: Record) -> None:
        if isinstance(record, Result):
            record = self.with_worker(record)
        self._records.append(record)
        super().record(record)

    def _open_journal(self, environment: dict[str, Any]) -> Journal:
        return Journal(None, environment)

    def begin_attempt(self, nodeid: str) -> None:
        self._attempts[nodeid] += 1
        super().begin_attempt(nodeid)

    @pytest.hookimpl(tryfirst=True)
    @guarded("sending results")
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Attach queued records to a report that will be sent; some reports of rerun attempts are
        not."""
        point = self.points_of.get(report.nodeid)
        is_over = report.when == "teardown"
        message = Message(
            worker=self.id,
            host=platform.node(),
            gpus=[self._gpu] if self._gpu and any(map(_is_on_gpu, self._records)) else [],
            preset=self.session.preset,
            point=(point[0], point[1].to_dict()) if point and report.when == "setup" else None,
            has_short_name=point is not None and point[1].has_short_name,
            environment=self.environment() if self._records else None,
            records=[(kind_of(record), record.to_dict()) for record in self._records],
            timings=take_timings(self.config) if is_over else [],
            device_lost=self._is_lost,
            problems=self.reported,
            attempt=self._attempts[report.nodeid],
        )
        self._records, self.reported = [], []
        if message.is_worth_sending:
            setattr(report, KEY, message.to_json())

    def note_error(self, error: BaseException) -> None:
        """Note whether ``error`` shows that the device is unusable in this process from now on."""
        torch = sys.modules.get("torch")
        if torch is None or self._slot is None:
            return
        from pytest_int8bench.measure.memory import chain_of, oom_of

        if oom_of(error) is None:
            is_lost = any(isinstance(cause, torch.AcceleratorError) for cause in chain_of(error))
            self._is_lost = self._is_lost or is_lost

    @pytest.hookimpl(tryfirst=True)
    @guarded("looking at the device")
    def pytest_runtest_protocol(self) -> None:
        if self._is_lost:
            # Every further call on the device would fail. The controller has been told, and starts
            # a new worker that runs this test.
            os._exit(1)

    @pytest.hookimpl(wrapper=True, trylast=True)
    @guarded("looking at the tests")
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> Generator[None, object, object]:
        result = yield
        points = [params_of(item) for item in items if pytest_benchmark.uses_benchmark(item)]
        if all(params and not self.why_not_timed(params) for params in points):
            silence_xdist_warning(config)
        return result

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    @guarded("sending the tests")
    def pytest_sessionfinish(self) -> Generator[None, object, object]:
        """Send the collected tests, and drop the timings left in this worker before
        pytest-benchmark writes a file of its own."""
        with self.guard("sending the tests"):
            take_timings(self.config)
            found = {
                "collected": [*self.session.collected],
                "deselected": [*self.session.deselected],
                # Problems that arose since the last report was sent.
                "problems": self.reported,
            }
            self.config.workeroutput[KEY] = json.dumps(found)  # type: ignore[attr-defined]
        return (yield)

    def finish(self) -> bool:
        """Free the models. The controller saves and reports."""
        with self.guard("freeing the models"):
            self.session.close()
        return True


def _is_on_gpu(record: Record) -> bool:
    return record.params.get("gpu_type") == "cuda"

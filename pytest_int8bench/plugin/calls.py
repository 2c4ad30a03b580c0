"""The callables that ``int8_throughput``, ``int8_guardrail`` and ``int8_sensitivity`` return."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest

from pytest_int8bench.accuracy.limit import Limit
from pytest_int8bench.errors import AccuracyError, ClearError, UndecidedError, first_line
from pytest_int8bench.measure.generators import kept_generators
from pytest_int8bench.params import RunParams
from pytest_int8bench.plugin.benchmark_files import check_compared
from pytest_int8bench.plugin.progress import write_line
from pytest_int8bench.plugin.pytest_benchmark import Benchmark
from pytest_int8bench.plugin.recorder import Recorder
from pytest_int8bench.results.base import NOT_MEASURED
from pytest_int8bench.results.records import Result
from pytest_int8bench.results.verdicts import NO_LABELS, Accuracy, Sensitivity
from pytest_int8bench.workloads.workload import Workload

#: Fields of a Result to leave out of ``extra_info``, because they are saved elsewhere or too long.
_NOT_EXTRA = ("nodeid", "status", "gpu_before", "gpu_after", "kernels")


class AgainError(ClearError, RuntimeError):
    """Raised when a test tries to measure its point a second time."""


class _Call:
    """Base of the callables: the point of one test and the recorder for its results."""

    def __init__(
        self, nodeid: str, recorder: Recorder, workload: Workload, params: RunParams
    ) -> None:
        self._nodeid = nodeid
        self._recorder = recorder
        self._session = recorder.session
        self._workload = workload
        self._params = params

    def _out_of_memory(self, error: Exception) -> str | None:
        """If ``error`` means that memory ran out, free what it keeps alive and return its message;
        otherwise, return None."""
        from pytest_int8bench.measure.memory import oom_of, release

        if oom_of(error) is None:
            return None
        text = f"out of memory: {first_line(error)}"
        release(error)
        return text


class ThroughputCall(_Call):
    """Builds, compiles, warms up, measures and records a point."""

    def __init__(
        self,
        nodeid: str,
        recorder: Recorder,
        workload: Workload,
        params: RunParams,
        benchmark: Benchmark,
    ) -> None:
        super().__init__(nodeid, recorder, workload, params)
        self._benchmark = benchmark
        self._is_called = False

    def __call__(self) -> Result:
        with kept_generators():
            return self._recorded()

    def _recorded(self) -> Result:
        if self._is_called:  # clearer than pytest-benchmark's own error, which has a traceback
            raise AgainError(
                "int8_throughput must be called once per test, got a second call; to measure "
                "another point, use another test or parametrize int8_params"
            )
        self._is_called = True
        recorder, benchmark = self._recorder, self._benchmark
        if (why := recorder.why_not_benchmarked(benchmark, self._params)) is not None:
            # Like pytest-benchmark, run once without timing. Then skip the test, as the point was
            # not measured.
            benchmark.run_once(self._session.pool().get(self._workload, self._params).run)
            pytest.skip(f"{NOT_MEASURED}: {why}")
        self._check_machine()
        result = recorder.with_worker(self._measure())
        if not result.oom:
            benchmark.add_extra_info(_extra_info(result))
        marked = recorder.marked(result)
        if marked is not result:
            benchmark.leave_out()
        recorder.record(marked)
        if self._session.gate is not None:
            self._session.gate.judge(marked, recorder.environment())
        return marked

    def _check_machine(self) -> None:
        session, recorder = self._session, self._recorder
        check_compared(session.config, recorder.environment, session.settings.rules.allow)
        if session.gate is not None:
            session.gate.check_machine(recorder.environment())

    def _measure(self) -> Result:
        try:
            return self._session.throughput().measure(
                self._workload, self._params, self._benchmark.time_rounds, nodeid=self._nodeid
            )
        except BaseException:  # including Ctrl-C: incomplete rounds must not be saved
            self._benchmark.leave_out()
            raise


class GuardrailCall(_Call):
    """Compares a point's accuracy with that of its baseline and records the verdicts."""

    def __call__(self, max_drop: str | None = None) -> list[Accuracy]:
        with kept_generators():
            return self._verdicts(max_drop)

    def _verdicts(self, max_drop: str | None) -> list[Accuracy]:
        if not self._params.int8_enabled:
            pytest.skip("nothing to compare: the point is a baseline")
        if (why := self._why_not_judged()) is not None:
            pytest.skip(f"accuracy not judged: {why}")
        settings = self._session.settings
        limit = _limit(max_drop) if max_drop else settings.drop_limit()
        verdicts, problem = self._judge(limit)
        if settings.remedy and problem is None:
            verdicts = self._remedied(verdicts, limit)
        self._raise_if_failed(verdicts, problem)
        if problem is not None:
            pytest.skip(problem)
        from pytest_int8bench.report.verdict_text import describe

        undecided = [describe(verdict) for verdict in verdicts if _fails(verdict, "fail")]
        if undecided:
            if settings.inconclusive == "skip":
                pytest.skip(undecided[0][0])
            warnings.warn("\n".join(line for lines in undecided for line in lines), stacklevel=2)
        return verdicts

    def _why_not_judged(self) -> str | None:
        """Return why the accuracy is not judged; None if it is."""
        why = self._recorder.why_not_kept()
        if why is None and self._session.settings.remedy:
            why = self._recorder.why_not_timed(self._params)  # remedies are timed
        return why

    def _judge(self, limit: Limit) -> tuple[list[Accuracy], str | None]:
        """Return the verdicts and, if the comparison ended early because memory ran out, the
        reason."""
        from pytest_int8bench.report.verdict_text import describe

        verdicts: list[Accuracy] = []

        def keep(verdict: Accuracy) -> None:
            verdicts.append(verdict)
            self._recorder.record(verdict)
            if _is_failed(verdict):  # immediately, since later steps may be interrupted
                self._note_failed(describe(verdict)[0])

        problem = None
        try:
            self._session.guardrail().check(
                self._workload,
                self._params,
                nodeid=self._nodeid,
                limit=limit,
                record=keep,
                tell=_line_writer(self._session.config, "accuracy"),
            )
        except Exception as error:
            if (problem := self._out_of_memory(error)) is None:
                self._note_failed(
                    f"accuracy not judged: {type(error).__name__}: {first_line(error)}"
                )
                raise
        if problem is None:
            return verdicts, None
        self._session.pool().clear()
        return verdicts, f"accuracy not judged: {problem}"

    def _note_failed(self, reason: str) -> None:
        self._recorder.note_accuracy_failed(self._nodeid, self._workload.name, self._params, reason)

    def _remedied(self, verdicts: list[Accuracy], limit: Limit) -> list[Accuracy]:
        """Try remedies for the metrics that failed. Return the verdicts, completed with the
        remedies tried."""
        from pytest_int8bench.accuracy.remedies import Remedies

        remedies = Remedies(
            self._session.guardrail(),
            limit,
            record=self._recorder.record,
            tell=_line_writer(self._session.config, f"remedies for {self._params.run_name}"),
        )
        found = []
        for index, verdict in enumerate(verdicts):  # verdicts on labels come first
            is_fixable = verdict.outcome == "FAIL" and verdict.metric != NO_LABELS
            if is_fixable and not verdict.is_pipeline_check:
                verdict = remedies.walk(self._workload, self._params, index, verdict)
            found.append(verdict)
        return found

    def _raise_if_failed(self, verdicts: list[Accuracy], problem: str | None) -> None:
        from pytest_int8bench.report.verdict_text import message

        settings = self._session.settings
        failing = [verdict for verdict in verdicts if _fails(verdict, settings.inconclusive)]
        if not failing:
            return
        text = message(failing, remedied=settings.remedy)
        kind = AccuracyError if any(map(_is_failed, failing)) else UndecidedError
        raise kind(f"{text}\n{problem}" if problem else text)


class SensitivityCall(_Call):
    """Quantizes one layer or block at a time, ranks the layers or blocks, and records the
    ranking."""

    def __call__(self, by: str = "layer", metric: bool = False) -> Sensitivity:
        with kept_generators():
            return self._table(by, metric)

    def _table(self, by: str, metric: bool) -> Sensitivity:
        from pytest_int8bench.accuracy.sensitivity import SensitivityScan

        if not self._params.int8_enabled:
            pytest.skip("nothing to quantize: the point is a baseline")
        if (why := self._recorder.why_not_kept()) is not None:
            pytest.skip(f"sensitivity not measured: {why}")
        problem = None
        try:
            return SensitivityScan(
                self._session.guardrail(), self._workload, self._params, by=by
            ).run(
                nodeid=self._nodeid,
                metric=metric,
                tell=_line_writer(self._session.config, f"sensitivity of {self._params.run_name}"),
                record=self._recorder.record,
            )
        except Exception as error:
            if (problem := self._out_of_memory(error)) is None:
                raise
        self._session.pool().clear()
        pytest.skip(f"sensitivity scan not finished: {problem}")


def _line_writer(config: pytest.Config, what: str) -> Callable[[str], None]:
    return lambda text: write_line(config, f"{what}: {text}")


def _limit(text: str) -> Limit:
    problem = None
    try:
        return Limit.parse(text)
    except ValueError as error:
        problem = f"int8_guardrail: max_drop {error}"
    pytest.fail(problem, pytrace=False)


def _is_failed(verdict: Accuracy) -> bool:
    """Return whether a verdict proves that its point lost too much accuracy."""
    return verdict.outcome == "FAIL" and not verdict.is_pipeline_check


def _fails(verdict: Accuracy, inconclusive: str) -> bool:
    """Return whether a verdict fails its test under ``--int8-inconclusive=INCONCLUSIVE``."""
    undecided = verdict.outcome == "INCONCLUSIVE" and not verdict.is_pipeline_check
    return _is_failed(verdict) or (undecided and inconclusive == "fail")


def _extra_info(result: Result) -> dict[str, Any]:
    values = result.to_dict()
    return {name: value for name, value in values.items() if name not in _NOT_EXTRA}

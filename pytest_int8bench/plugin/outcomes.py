"""Record points whose test failed or was skipped."""

from __future__ import annotations

import dataclasses

import pytest

from pytest_int8bench.errors import ClearError, UndecidedError
from pytest_int8bench.plugin.plain import record_failure
from pytest_int8bench.plugin.points import is_plain, params_of, point_of, workload_name
from pytest_int8bench.plugin.pytest_benchmark import mark_outcome
from pytest_int8bench.plugin.recorder import Recorder
from pytest_int8bench.results.base import UNKNOWN_WORKLOAD

_MAX_REASON = 500


def shorten(report: pytest.TestReport, call: pytest.CallInfo[None], style: str) -> None:
    """Show a ClearError without a traceback, unless ``--tb`` asks for one."""
    if call.excinfo is None or not report.failed or style != "auto":
        return
    error = call.excinfo.value
    if isinstance(error, ClearError) and error.__cause__ is None:
        notes = getattr(error, "__notes__", [])
        report.longrepr = "\n".join([f"{type(error).__name__}: {error}", *notes])


def record_outcome(
    recorder: Recorder,
    item: pytest.Item,
    report: pytest.TestReport,
    error: BaseException | None,
) -> None:
    """Record the point of ``item`` if the test was skipped, or failed with ``error``.

    A measured point is already in the journal. If its test fails later, for instance in an
    assertion, the result is written again as ``failed``. An UndecidedError does not change the
    result: too few samples prove nothing against the measurement.
    """
    if recorder.session.records_benchmarks and is_plain(item):
        if (report.failed or report.skipped) and not hasattr(report, "wasxfail"):
            status = "failed" if report.failed else "skipped"
            record_failure(recorder, item.nodeid, status, _reason(report, error))
        return
    is_undecided = isinstance(error, UndecidedError)
    found = recorder.records_of(item.nodeid)
    measured = recorder.results_of(item.nodeid) if found else []
    point = recorder.points_of.get(item.nodeid)
    if point is not None:
        is_oom = any(result.oom for result in measured)
        mark_outcome(
            item,
            leaves_out=report.failed and not is_undecided,
            may_be_unused=report.failed or is_oom,
        )
    elif report.failed and (params := params_of(item)) is not None:
        # The test failed before its workload was known, perhaps in the fixture that returns it.
        session = recorder.session
        point = (workload_name(item, session) or UNKNOWN_WORKLOAD, point_of(item, session, params))
    if point is None or not (report.failed or report.skipped) or hasattr(report, "wasxfail"):
        return
    workload, params = point
    status = "failed" if report.failed else "skipped"
    reason = _reason(report, error)
    if measured:
        result = measured[0]
        if report.failed and not is_undecided:
            recorder.keep_marked(result)
            if result.status == "ok":
                recorder.record(dataclasses.replace(result, status=status, reason=reason))
        return
    from pytest_int8bench.results.records import Result
    from pytest_int8bench.results.verdicts import Accuracy

    if any(isinstance(record, Accuracy) for record in found):
        return  # the verdict is already recorded
    recorder.record(
        Result(
            nodeid=item.nodeid,
            workload=workload,
            run_name=params.run_name,
            params=params.to_dict(),
            status=status,
            reason=reason.removeprefix(f"{workload}: "),
        )
    )


def _reason(report: pytest.TestReport, error: BaseException | None) -> str:
    """Return the reason for the outcome in one line, whatever the style of ``--tb``."""
    if report.failed and isinstance(error, ClearError):
        text = f"{type(error).__name__}: {error}"
    elif report.skipped and isinstance(report.longrepr, tuple):
        text = report.longrepr[2].removeprefix("Skipped: ")
    else:
        crash = getattr(report.longrepr, "reprcrash", None)
        text = crash.message if crash is not None else str(report.longrepr)
    text = text.removeprefix("Failed: ")
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return first[:_MAX_REASON]

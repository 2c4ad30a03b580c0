"""Record points that were skipped or that failed."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest

from pytest_int8bench.errors import UndecidedError
from pytest_int8bench.plugin.pytest_benchmark import mark_outcome
from pytest_int8bench.plugin.session import State

if TYPE_CHECKING:
    from pytest_int8bench.params import RunParams


_MAX_REASON = 500


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
    mark_outcome(state, item, report, stands=stands)
    point = state.points_of.get(item.nodeid)
    if point is None and report.failed and params is not None:
        point = (state.settings.workload, params)  # it failed before its workload was known
    if point is None or not (report.failed or report.skipped) or hasattr(report, "wasxfail"):
        return
    from pytest_int8bench.results.records import Result

    workload, params = point
    status = "failed" if report.failed else "skipped"
    reason = _reason(report)
    measured = state.results_of(item.nodeid)
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

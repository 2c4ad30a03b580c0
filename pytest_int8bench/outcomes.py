"""From a test's outcome to the journal: points that were skipped or failed are results too."""

from __future__ import annotations

import dataclasses

import pytest

from pytest_int8bench.state import State

_MAX_REASON = 500


def record_outcome(state: State, item: pytest.Item, report: pytest.TestReport) -> None:
    """Write the point of ``item`` to the journal if it was skipped or failed.

    A point that was measured is written when it is; if its test fails after that, for instance
    by an assertion of its own, its result is written again as ``failed``.
    """
    point = state.points_of.get(item.nodeid)
    if point is None or not (report.failed or report.skipped) or hasattr(report, "wasxfail"):
        return
    from pytest_int8bench.results import Result

    workload, params = point
    status = "failed" if report.failed else "skipped"
    reason = _reason(report)
    measured = (
        [r for r in state.journal.results if r.nodeid == item.nodeid] if state.journal else []
    )
    if measured:
        if measured[0].status == "ok":
            state.record(dataclasses.replace(measured[0], status=status, reason=reason))
        return
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
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return first[:_MAX_REASON]

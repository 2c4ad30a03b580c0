"""The points that a test is parametrized with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_int8bench.plugin.pytest_benchmark import uses_benchmark
from pytest_int8bench.plugin.session import Session

if TYPE_CHECKING:
    from pytest_int8bench.params import RunParams

#: Fixtures of a test that is ours: all others depend on one of them.
_OURS = frozenset({"int8_params", "int8_workload", "int8_throughput"})


def is_ours(item: pytest.Item) -> bool:
    """Return whether a test uses the fixtures of this plugin."""
    return not _OURS.isdisjoint(getattr(item, "fixturenames", ()))


def is_plain(item: pytest.Item) -> bool:
    """Return whether a test has pytest-benchmark's fixture of its own, and measures no point."""
    return uses_benchmark(item) and "int8_throughput" not in getattr(item, "fixturenames", ())


def parametrize(metafunc: pytest.Metafunc, session: Session) -> None:
    """Give a test the points of its markers and of the options, unless it brings its own."""
    from pytest_int8bench.plugin.markers import marker_changes

    problem, points = None, []
    try:
        changes, _ = marker_changes(metafunc.definition)
        if has_points(metafunc):
            return
        points = session.points(changes, baselines="int8_throughput" in metafunc.fixturenames)
    except ValueError as error:
        problem = str(error)
    if problem is not None:
        pytest.fail(problem, pytrace=False)  # outside, so that only this line is shown
    # Names, not objects: pytest-benchmark saves parameters as JSON.
    names = [point.run_name for point in points]
    metafunc.parametrize("int8_params", names, ids=names, indirect=True)


def has_points(metafunc: pytest.Metafunc) -> bool:
    """Return whether a test brings its own points, by parametrize or by a fixture."""
    for marker in metafunc.definition.iter_markers("parametrize"):
        names = marker.args[0] if marker.args else marker.kwargs.get("argnames", ())
        names = names.split(",") if isinstance(names, str) else names
        if "int8_params" in [name.strip() for name in names]:
            return True
    defined = metafunc._arg2fixturedefs.get("int8_params", ())
    if defined and defined[-1].func.__module__ != "pytest_int8bench.plugin.fixtures":
        return True
    return any("int8_params" in call.params for call in metafunc._calls)


def params_of(item: pytest.Item) -> RunParams | None:
    """Return the point that ``item`` is parametrized with, if it is."""
    callspec = getattr(item, "callspec", None)
    value = callspec.params.get("int8_params") if callspec is not None else None
    if value is None:
        return None
    from pytest_int8bench.params import RunParams

    if isinstance(value, RunParams):
        return value
    try:
        return RunParams.from_run_name(value) if isinstance(value, str) else None
    except ValueError:
        return None


def params_in(nodeid: str) -> RunParams | None:
    """Return the point that a node id names, alone or among other parameters; None if none."""
    text = nodeid.rpartition("::")[2].partition("[")[2].rpartition("]")[0]
    if "_ps" not in text:  # every run name has it: other ids are not worth a closer look
        return None
    from pytest_int8bench.params import RunParams

    parts = text.split("-")  # which run names hold as well
    spans = [(i, j) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)]
    for i, j in sorted(spans, key=lambda span: span[0] - span[1]):
        try:
            return RunParams.from_run_name("-".join(parts[i:j]))
        except ValueError:
            continue
    return None

"""Parametrize tests with points, and find the points of tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from pytest_int8bench.plugin.pytest_benchmark import uses_benchmark
from pytest_int8bench.plugin.session import Session

if TYPE_CHECKING:
    from pytest_int8bench.params import RunParams
    from pytest_int8bench.plugin.pytest_benchmark import Benchmark
    from pytest_int8bench.workloads.workload import Workload


def is_plain(item: pytest.Item) -> bool:
    """Return whether a test uses the ``benchmark`` fixture without measuring a point."""
    return uses_benchmark(item) and "int8_throughput" not in getattr(item, "fixturenames", ())


def parametrize(metafunc: pytest.Metafunc, session: Session) -> None:
    """Parametrize a test with points from its markers and the options, unless it defines its own
    points."""
    from pytest_int8bench.plugin.markers import marker_changes

    problem, points, workload = None, [], None
    try:
        changes, _ = marker_changes(metafunc.definition)
        if has_points(metafunc):
            return
        workload = workload_name(metafunc.definition, session)
        baselines = "int8_throughput" in metafunc.fixturenames
        points = session.points(changes, workload, baselines=baselines)
    except ValueError as error:
        problem = str(error)
    if problem is not None:
        pytest.fail(problem, pytrace=False)  # outside `except`, so that only this line is shown
    # Use names rather than RunParams objects, because pytest-benchmark saves parameters as JSON.
    names = [point.run_name for point in points]
    label = "" if workload in (None, session.settings.workload) else f"{workload}-"
    metafunc.parametrize("int8_params", names, ids=[label + name for name in names], indirect=True)


def workload_name(item: pytest.Item, session: Session) -> str | None:
    """Return the name of the workload that a test uses, from its marker or the session. Return None
    if one of the user's fixtures returns the workload, as the name is then unknown until the
    fixture runs.

    Raises:
        ValueError: if a marker is invalid; one line.
    """
    from pytest_int8bench.plugin.markers import marker_changes

    if any("int8_workload" in names and not indirect for names, indirect in _parametrized(item)):
        return None
    for definition in reversed(_workload_fixtures(item)):
        if definition.func.__module__ == "pytest_int8bench.plugin.fixtures":
            break
        if "int8_workload" not in definition.argnames:  # it does not use the overridden fixture
            return None
    return marker_changes(item)[1] or session.settings.workload


def _workload_fixtures(item: pytest.Item) -> Sequence[Any]:
    """Return the definitions of ``int8_workload`` visible to a test; the last one applies."""
    info = getattr(item, "_fixtureinfo", None)
    found = info.name2fixturedefs.get("int8_workload") if info is not None else None
    if found is None:  # it uses a point but no model: take the workload of its file
        manager: Any = getattr(item.session, "_fixturemanager", None)
        found = manager and manager.getfixturedefs("int8_workload", item)
    return found or ()


def name_workload(
    item: pytest.Item, session: Session, workload: Workload, benchmark: Benchmark
) -> None:
    """Add the workload to the name that pytest-benchmark shows, unless the test's id contains the
    workload, or it is set for the session by an option or by a fixture in the root
    ``conftest.py``."""
    definitions = _workload_fixtures(item)
    named = {workload.name, workload_name(item, session)}
    is_named = any(f"{start}{name}-" in item.name for name in named for start in "[-")
    is_sessions = workload.name == session.workload_name()
    is_everywhere = bool(definitions) and not definitions[-1].baseid and None in named
    if not (is_named or is_sessions or is_everywhere):
        benchmark.name_workload(workload.name)


def point_of(item: pytest.Item, session: Session, params: RunParams) -> RunParams:
    """Return the point of a test, with the run name adapted to its workload and unused fields
    reset."""
    from pytest_int8bench.workloads.registry import point_for

    return point_for(params, workload_name(item, session))


def has_points(metafunc: pytest.Metafunc) -> bool:
    """Return whether a test defines its own points, by ``parametrize`` or by a fixture."""
    if any("int8_params" in names for names, _ in _parametrized(metafunc.definition)):
        return True
    defined = metafunc._arg2fixturedefs.get("int8_params", ())
    if defined and defined[-1].func.__module__ != "pytest_int8bench.plugin.fixtures":
        return True
    return any("int8_params" in call.params for call in metafunc._calls)


def _parametrized(item: pytest.Item) -> Iterator[tuple[list[str], bool]]:
    """Yield the argument names of each ``parametrize`` marker, and whether any is indirect."""
    for marker in item.iter_markers("parametrize"):
        names = marker.args[0] if marker.args else marker.kwargs.get("argnames", ())
        names = names.split(",") if isinstance(names, str) else names
        indirect = marker.args[2] if len(marker.args) > 2 else marker.kwargs.get("indirect")
        yield [name.strip() for name in names], bool(indirect)


def params_of(item: pytest.Item) -> RunParams | None:
    """Return the point that ``item`` is parametrized with; None if there is none."""
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
    """Return the point that a node id names, alone or among other parameters; None if it names
    none."""
    text = nodeid.rpartition("::")[2].partition("[")[2].rpartition("]")[0]
    if "_bs" not in text:  # part of every run name: skip other ids quickly
        return None
    from pytest_int8bench.params import RunParams

    parts = text.split("-")  # run names contain hyphens too
    spans = [(i, j) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)]
    for i, j in sorted(spans, key=lambda span: span[0] - span[1]):
        try:
            return RunParams.from_run_name("-".join(parts[i:j]))
        except ValueError:
            continue
    return None

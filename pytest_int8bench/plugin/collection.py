"""Check which workloads the collected tests use, and sort the tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from pytest_int8bench.plugin.markers import marker_changes
from pytest_int8bench.plugin.options import OPTIONS
from pytest_int8bench.plugin.points import params_of
from pytest_int8bench.plugin.pytest_benchmark import uses_benchmark
from pytest_int8bench.plugin.session import Session


def leave_out_other_tests(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect all tests except throughput tests and plain benchmarks."""
    kept: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        measures = "int8_throughput" in getattr(item, "fixturenames", ()) or uses_benchmark(item)
        (kept if measures else others).append(item)
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = kept


def check_workload(session: Session, items: list[pytest.Item]) -> None:
    """Reject ``--int8-workload`` if every test brings its own workload.

    Raises:
        pytest.UsageError: if so; one line that names the sources of the workloads.
    """
    option = OPTIONS["workload"]
    if option.source(session.config) != option.flag:
        return  # in an ini file, it applies to the tests that use it, if any
    owners = [_workload_owner(item) for item in items if params_of(item) is not None]
    if owners and None not in owners:
        listed = ", ".join(dict.fromkeys(str(owner) for owner in owners))
        raise pytest.UsageError(
            f"{option.flag}: no collected test uses {session.settings.workload!r}: each brings its "
            f"own workload ({listed})"
        )


def check_loadable(session: Session, items: list[pytest.Item]) -> None:
    """Reject a workload, one of its axes, or a filter that cannot be loaded, once for all tests.

    Axes are checked only if all tests use the session's workload. Otherwise, an axis may belong to
    another workload, and each test checks the axes itself.

    Raises:
        pytest.UsageError: if one cannot be loaded; one line.
    """
    config, settings = session.config, session.settings
    users = [item for item in items if "int8_workload" in getattr(item, "fixturenames", ())]
    takers = [item for item in users if uses_session_workload(item)]
    names = {*settings.changes, *settings.axes}
    axes = [name.removeprefix("extra.") for name in names if name.startswith("extra.")]
    is_common = len(takers) == len(users) and bool(axes)
    if takers and (OPTIONS["workload"].read(config) is not None or is_common):
        with captured(config), _usage_error(config, "workload"):
            workload = session.workload(None)
            if is_common:
                from pytest_int8bench.params import RunParams

                with _usage_error(config, "set"):
                    workload.with_axes(RunParams(extra=dict.fromkeys(sorted(axes), 0)))
    if users:
        with captured(config), _usage_error(config, "filter"):
            session.filter()


@contextmanager
def captured(config: pytest.Config) -> Iterator[None]:
    """Discard what libraries print while they load, as pytest does for a test that passes."""
    capture: Any = config.pluginmanager.getplugin("capturemanager")
    if capture is None:  # with -p no:capture
        yield
        return
    capture.resume_global_capture()
    try:
        yield
    finally:
        capture.suspend_global_capture()
        capture.read_global_capture()


@contextmanager
def _usage_error(config: pytest.Config, option: str) -> Iterator[None]:
    """Turn a ValueError into a usage error that names the option. Suppress other errors, which come
    from the user's code: the tests report them with a traceback."""
    try:
        yield
    except ValueError as error:
        raise pytest.UsageError(f"{OPTIONS[option].source(config)}: {error}") from None
    except pytest.UsageError:
        raise
    except Exception:
        return


def uses_session_workload(item: pytest.Item) -> bool:
    """Return whether ``item`` definitely uses the session's workload."""
    definitions = _fixture_definitions(item).get("int8_workload", ())
    own = not definitions or definitions[-1].func.__module__ != "pytest_int8bench.plugin.fixtures"
    return not own and _workload_owner(item) is None


def _workload_owner(item: pytest.Item) -> str | None:
    """Return the source of the workload that ``item`` has of its own; None if it may use the
    session's."""
    for definition in reversed(_fixture_definitions(item).get("int8_workload", ())):
        if definition.func.__module__ == "pytest_int8bench.plugin.fixtures":
            break
        # A fixture with one of these arguments may return the workload that it overrides.
        if not {"int8_workload", "request"} & {*definition.argnames}:
            return f"int8_workload in {definition.func.__module__}"
    try:
        return "@pytest.mark.int8" if marker_changes(item)[1] else None
    except ValueError:  # the test reports it
        return None


def sort_by_model(items: list[pytest.Item]) -> None:
    """Group tests of the same model, baselines first.

    Each model is then built and compiled once, and at most one baseline and one candidate are on
    the device at a time. Tests without points keep their positions.
    """
    groups: dict[object, int] = {}
    keyed: list[tuple[int, tuple[int, int], pytest.Item]] = []
    for index, item in enumerate(items):
        params = params_of(item)
        if params is None:
            continue
        defined = _fixture_definitions(item).get("int8_workload", ())
        where = defined[-1].baseid if defined else ""
        varied = _indices_of("int8_workload", item)
        try:
            marked = marker_changes(item)[1]
        except ValueError:
            marked = None
        family = (where, marked, varied, params.baseline())
        first = groups.setdefault(family, len(groups))
        member = groups.setdefault((family, params), len(groups)) if params.int8_enabled else -1
        keyed.append((index, (first, member), item))
    slots = [index for index, _, _ in keyed]
    ordered = sorted(keyed, key=lambda entry: entry[1])
    for slot, (_, _, item) in zip(slots, ordered, strict=True):
        items[slot] = item


def _fixture_definitions(item: pytest.Item) -> dict[str, Any]:
    info = getattr(item, "_fixtureinfo", None)
    return info.name2fixturedefs if info is not None else {}


def _indices_of(fixture: str, item: pytest.Item) -> tuple[tuple[str, int], ...]:
    """Return the parameter indices of ``item`` that ``fixture`` depends on, except the point's."""
    definitions = _fixture_definitions(item)
    names = [fixture]
    for name in names:  # names grows while we iterate: transitive closure over fixtures
        for made in definitions.get(name, ()):
            names += [other for other in made.argnames if other not in names]
    indices = dict(getattr(getattr(item, "callspec", None), "indices", {}))
    indices.pop("int8_params", None)
    return tuple((name, indices[name]) for name in names if name in indices)

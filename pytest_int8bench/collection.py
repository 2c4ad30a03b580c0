"""Collected tests: which have points, whose workload they take, their benchmark markers, and the
order they run in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from pytest_int8bench.options import OPTIONS
from pytest_int8bench.session import STATE, marker_changes

if TYPE_CHECKING:
    from pytest_int8bench.params import RunParams


def has_points(metafunc: pytest.Metafunc) -> bool:
    """Say whether a test brings its own points, by parametrize or by a fixture."""
    for marker in metafunc.definition.iter_markers("parametrize"):
        names = marker.args[0] if marker.args else marker.kwargs.get("argnames", ())
        names = names.split(",") if isinstance(names, str) else names
        if "int8_params" in [name.strip() for name in names]:
            return True
    defined = metafunc._arg2fixturedefs.get("int8_params", ())
    if defined and defined[-1].func.__module__ != "pytest_int8bench.fixtures":
        return True
    return any("int8_params" in call.params for call in metafunc._calls)


def leave_out_other_tests(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what is no test of throughput."""
    kept: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        is_throughput = "int8_throughput" in getattr(item, "fixturenames", ())
        (kept if is_throughput else others).append(item)
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = kept


def merge_benchmark_markers(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give tests of throughput the synchronizing timer, and keep their own benchmark options:
    pytest-benchmark reads the closest marker only."""
    if not config.pluginmanager.hasplugin("benchmark"):
        return
    for item in items:
        if "int8_throughput" not in getattr(item, "fixturenames", ()):
            continue
        markers = list(item.iter_markers("benchmark"))
        if any(marker.args for marker in markers):
            continue  # pytest-benchmark says what is wrong with them
        from pytest_int8bench import clock

        merged: dict[str, Any] = {}
        for marker in reversed(markers):
            merged |= marker.kwargs
        merged["timer"] = clock.synchronized_perf_counter
        item.add_marker(pytest.mark.benchmark(**merged), append=False)


def check_workload(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuse ``--int8-workload`` where every test brings a workload of its own.

    Raises:
        pytest.UsageError: one line that says whose they are.
    """
    option = OPTIONS["workload"]
    if option.source(config) != option.flag:
        return  # in an ini file it waits for tests that take it
    owners = [_workload_owner(item) for item in items if params_of(item) is not None]
    if owners and None not in owners:
        listed = ", ".join(dict.fromkeys(str(owner) for owner in owners))
        raise pytest.UsageError(
            f"{option.flag}: no test takes it, each has a workload of its own ({listed}), got "
            f"{config.stash[STATE].settings.workload!r}"
        )


def check_named(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuse a workload, an axis of it, or a filter that cannot be had, once for all tests. Where
    workloads differ, an axis may be another's, and each test says so for itself.

    Raises:
        pytest.UsageError: one line.
    """
    state = config.stash[STATE]
    settings = state.settings
    users = [item for item in items if "int8_workload" in getattr(item, "fixturenames", ())]
    takers = [item for item in users if _takes_workload(item)]
    names = {*settings.changes, *settings.axes}
    axes = [name.removeprefix("extra.") for name in names if name.startswith("extra.")]
    is_common = len(takers) == len(users) and bool(axes)
    if takers and (OPTIONS["workload"].read(config) is not None or is_common):
        with _captured(config), _refused(config, "workload"):
            workload = state.workload(None)
            if is_common:
                from pytest_int8bench.params import RunParams

                with _refused(config, "set"):
                    workload.with_axes(RunParams(extra=dict.fromkeys(sorted(axes), 0)))
    if users:
        with _captured(config), _refused(config, "filter"):
            state.filter()


@contextmanager
def _captured(config: pytest.Config) -> Iterator[None]:
    """Keep what libraries say while they are loaded off the terminal, as in a test that passes."""
    capture: Any = config.pluginmanager.getplugin("capturemanager")
    if capture is None:  # of -p no:capture
        yield
        return
    capture.resume_global_capture()
    try:
        yield
    finally:
        capture.suspend_global_capture()
        capture.read_global_capture()


@contextmanager
def _refused(config: pytest.Config, option: str) -> Iterator[None]:
    """Turn a ValueError into one of the option. Others are of the user's code: the tests show
    their traceback."""
    try:
        yield
    except ValueError as error:
        raise pytest.UsageError(f"{OPTIONS[option].source(config)}: {error}") from None
    except pytest.UsageError:
        raise
    except Exception:
        return


def _takes_workload(item: pytest.Item) -> bool:
    """Say whether ``item`` surely has the session's workload."""
    definitions = _fixture_definitions(item).get("int8_workload", ())
    own = not definitions or definitions[-1].func.__module__ != "pytest_int8bench.fixtures"
    return not own and _workload_owner(item) is None


def _workload_owner(item: pytest.Item) -> str | None:
    """Return what gives ``item`` its workload, None if it is, or may be, the session's."""
    for definition in reversed(_fixture_definitions(item).get("int8_workload", ())):
        if definition.func.__module__ == "pytest_int8bench.fixtures":
            break
        if not {"int8_workload", "request"} & {*definition.argnames}:  # which lead to the next one
            return f"int8_workload in {definition.func.__module__}"
    try:
        return "@pytest.mark.int8" if marker_changes(item)[1] else None
    except ValueError:  # its test says so
        return None


def sort_by_model(items: list[pytest.Item]) -> None:
    """Bring tests of the same models together, baselines first, so that each model is built and
    compiled once and at most one baseline and one candidate are on the device.

    Tests without points keep their places.
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
    """Return which parameters, the point aside, ``item`` gives a fixture and what it is made
    from."""
    definitions = _fixture_definitions(item)
    names = [fixture]
    for name in names:  # it grows
        for made in definitions.get(name, ()):
            names += [other for other in made.argnames if other not in names]
    indices = dict(getattr(getattr(item, "callspec", None), "indices", {}))
    indices.pop("int8_params", None)
    return tuple((name, indices[name]) for name in names if name in indices)


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

"""All code that depends on pytest-benchmark's internals, except what only pytest-xdist needs, which
is in :mod:`.pytest_benchmark_workers`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pytest_int8bench.measure.timing import Plan, Run
    from pytest_int8bench.processes.runner_files import Handover

#: Folder in which pytest-benchmark saves, relative to the folder in which pytest is started.
STORAGE = Path(".benchmarks")

DISABLED = "pytest-benchmark is disabled"
_NOT_SAVED = pytest.StashKey[bool]()


# -- options of pytest-benchmark ----------------------------------------------------------------


def is_active(config: pytest.Config) -> bool:
    """Return whether pytest-benchmark is loaded."""
    return config.pluginmanager.hasplugin("benchmark")


def is_disabled_by_user(config: pytest.Config) -> bool:
    """Return whether the user disabled pytest-benchmark, as opposed to pytest-benchmark disabling
    itself under pytest-xdist."""
    disable = config.getoption("benchmark_disable", False)
    return bool(disable and not config.getoption("benchmark_enable", False))


def find_obstacle(config: pytest.Config) -> str | None:
    """Return the first given option that turns measuring off, or None."""
    obstacles = {
        "-p no:benchmark": not is_active(config),
        "--codspeed": config.getoption("codspeed", False),  # implies --benchmark-disable
        "--benchmark-disable": is_disabled_by_user(config),
        "--benchmark-skip": config.getoption("benchmark_skip", False),
    }
    return next((name for name, is_given in obstacles.items() if is_given), None)


def json_target(config: pytest.Config) -> Path | None:
    """Return the path of ``--benchmark-json``; None if it is not given."""
    return _path_of(config.getoption("benchmark_json", None))


def storage_target(config: pytest.Config) -> Path | None:
    """Return the folder in which ``--benchmark-save`` or ``--benchmark-autosave`` creates a file.
    Return None if neither is given or the storage is not a folder."""
    wants = config.getoption("benchmark_save", None) or config.getoption("benchmark_autosave", None)
    storage = getattr(session_of(config), "storage", None)
    folder = getattr(storage, "path", None)
    if not wants or folder is None:
        return None
    return Path(folder, getattr(storage, "default_machine_id", None) or "")


def _path_of(target: Any) -> Path | None:
    if not target:
        return None
    # pytest-benchmark provides an open file before 5.3, and a path since then.
    return Path(target if isinstance(target, str | Path) else target.name)


def session_of(config: pytest.Config) -> Any:
    """Return pytest-benchmark's session; None if the plugin is turned off or missing."""
    return config.pluginmanager.get_plugin("pytest-benchmark")


# -- one test -----------------------------------------------------------------------------------


class Benchmark:
    """The ``benchmark`` fixture of one test."""

    def __init__(self, fixture: Any) -> None:
        self._fixture = fixture

    @property
    def is_disabled(self) -> bool:
        return bool(self._fixture.disabled)

    def set_disabled(self, is_disabled: bool) -> None:
        self._fixture.disabled = is_disabled

    def name_workload(self, workload: str) -> None:
        """Add a workload to the name in tables, where tests of different workloads would look the
        same."""
        test, bracket, parameters = self._fixture.name.partition("[")
        self._fixture.name = f"{test}[{workload}{'-' if bracket else ''}{parameters or ']'}"

    def run_once(self, run: Run) -> None:
        """Run a model once without timing it, as a disabled benchmark does."""
        self._fixture.pedantic(run)

    def time_rounds(self, run: Run, plan: Plan) -> list[float]:
        """Time the rounds of ``plan`` and return the duration of each in seconds.

        Raises:
            ClockError: if pytest-benchmark used a timer that does not wait for the device.
        """
        from pytest_int8bench import clock
        from pytest_int8bench.measure.timing import ClockError, prepare

        prepare(run, plan.iterations)
        with clock.untraced():
            self._fixture.pedantic(
                run,
                rounds=plan.rounds,
                iterations=plan.iterations,
                # Runs after each round and is not timed.
                teardown=lambda: prepare(run, plan.iterations),
            )
        stats = self._fixture.stats
        if stats.options["timer"] is not clock.synchronized_perf_counter:
            raise ClockError(
                "the benchmark's timer must wait for the device, got "
                f"{stats.options['timer']!r}, which does not"
            )
        return list(stats.stats.data)

    def add_extra_info(self, values: Mapping[str, Any]) -> None:
        self._fixture.extra_info.update(values)

    def leave_out(self) -> None:
        """Keep the timing out of the saved file."""
        self._fixture.has_error = True


def merge_markers(config: pytest.Config, items: Iterable[pytest.Item]) -> None:
    """Set the synchronizing timer for throughput tests. Their ``benchmark`` markers are merged into
    one, because pytest-benchmark reads only the closest."""
    if not is_active(config):
        return
    for item in items:
        if "int8_throughput" not in getattr(item, "fixturenames", ()):
            continue
        markers = list(item.iter_markers("benchmark"))
        if any(marker.args for marker in markers):
            continue  # pytest-benchmark rejects positional arguments
        from pytest_int8bench import clock

        merged: dict[str, Any] = {}
        for marker in reversed(markers):
            merged |= marker.kwargs
        merged["timer"] = clock.synchronized_perf_counter
        item.add_marker(pytest.mark.benchmark(**merged), append=False)


def leave_out(config: pytest.Config, nodeid: str, *, is_left_out: bool = True) -> None:
    """Keep the timing of a test out of the saved file, so that the timing does not become a
    baseline. With ``is_left_out=False``, include it again."""
    session = session_of(config)
    for timed in session.benchmarks if session is not None else []:
        if timed.fullname == nodeid:
            timed.fixture.has_error = is_left_out


def timing_of(config: pytest.Config, nodeid: str) -> dict[str, Any] | None:
    """Return the latest timing, in the form in which pytest-benchmark saves it, or None if it
    belongs to another test."""
    for timed in getattr(session_of(config), "benchmarks", [])[-1:]:
        if timed and timed.fullname == nodeid and not timed.has_error:
            return dict(timed.as_dict(include_data=False))
    return None


def is_disabled(item: pytest.Item) -> bool:
    """Return whether the ``benchmark`` fixture of a test runs functions without timing them."""
    return bool(getattr(getattr(item, "funcargs", {}).get("benchmark"), "disabled", False))


def drop_timings(config: pytest.Config, nodeid: str) -> None:
    """Remove the timings of a test before a rerun, so that they are neither listed nor compared."""
    session = session_of(config)
    if session is not None:
        session.benchmarks[:] = [t for t in session.benchmarks if t.fullname != nodeid]


def uses_benchmark(item: pytest.Item) -> bool:
    return "benchmark" in getattr(item, "fixturenames", ())


def mark_outcome(item: pytest.Item, *, leaves_out: bool, may_be_unused: bool) -> None:
    """Apply the outcome of a test to its ``benchmark`` fixture.

    Args:
        item: a test, with or without the fixture.
        leaves_out: whether to keep its timing out of the saved file, so that it does not become a
            baseline.
        may_be_unused: whether to suppress the warning about a fixture that timed nothing.
    """
    benchmark = getattr(item, "funcargs", {}).get("benchmark")
    if benchmark is None:
        return
    if leaves_out:
        benchmark.has_error = True
    if may_be_unused:
        benchmark.skipped = True


def rename_entries(config: pytest.Config, names: Mapping[str, str]) -> None:
    """Add entries under new node ids to the files that pytest-benchmark compares with. ``names``
    maps old node ids to new ones."""
    session = session_of(config)
    for entries in (getattr(session, "compared_mapping", None) or {}).values():
        for old, new in names.items():
            if old in entries:
                entries.setdefault(new, entries[old])


# -- the session --------------------------------------------------------------------------------


def save_without_timings(config: pytest.Config) -> None:
    """Save a session without timings, for which pytest-benchmark itself writes no file: all points
    ran out of memory or were skipped, or only accuracy was tested."""
    session = session_of(config)
    if session is None or session.benchmarks:
        return
    if session.disabled:  # keep the last measured file the latest one
        return
    name = session.save or session.autosave
    if not (name or session.json):
        return
    hook = config.hook
    commit = hook.pytest_benchmark_generate_commit_info(config=config)
    hook.pytest_benchmark_update_commit_info(config=config, commit_info=commit)
    output = hook.pytest_benchmark_generate_json(
        config=config,
        benchmarks=[],
        include_data=False,
        machine_info=session.get_machine_info(),
        commit_info=commit,
    )
    hook.pytest_benchmark_update_json(config=config, benchmarks=[], output_json=output)
    if session.json:
        session.save_json(output)
    if name:
        session.storage.save(output, name)


def guard_saving(
    config: pytest.Config, note: Callable[[str, Exception], None], handover: Handover | None
) -> None:
    """Pass errors that occur while pytest-benchmark saves, such as a full disk, to ``note``. If
    such an error reached pytest, it would end without a summary.

    Each file is saved independently of the others, and an existing one is replaced atomically.

    Args:
        config: pytest's configuration.
        note: called with the name of the failed step and the error.
        handover: receives the JSON for the runner, if it started this process and wants it.
    """
    session = session_of(config)
    if session is None:
        return

    def guarded(save: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            try:
                save(*args)
            except Exception as error:
                config.stash[_NOT_SAVED] = True
                note("saving", error)

        return call

    save_in_place = session.save_json

    def save_json(output: Any) -> None:
        from pytest_benchmark import utils

        from pytest_int8bench.files import real_path, replace_text

        dumps: Any = utils.safe_dumps
        text = dumps(output, ensure_ascii=True, indent=4)
        if handover is not None:
            handover.note_json(json.loads(text))
            return
        path = session.json
        if not isinstance(path, Path) or (path.exists() and not path.is_file()):
            save_in_place(output)  # a device, a pipe, or an open file (before 5.3)
            return
        try:
            replace_text(real_path(path), text)
        except PermissionError:  # no temporary file can be created next to it
            save_in_place(output)
        else:
            session.logger.info(f"Wrote benchmark data in: {path}", purple=True)

    if handover is not None and handover.wants_json:
        session.json = handover.path
    session.save_json = guarded(save_json)
    session.storage.save = guarded(session.storage.save)
    session.handle_saving = guarded(session.handle_saving)


def describe_saved(config: pytest.Config) -> str:
    """Return one line with the path of the session's JSON, or with the reason why there is none."""
    session = session_of(config)
    if session is None or session.disabled:
        return f"not saved as JSON: {DISABLED}"
    if config.stash.get(_NOT_SAVED, False):
        return "not saved as JSON: see below"
    saved = []
    if session.json:
        saved.append(str(_path_of(session.json)))
    if session.save or session.autosave:
        from pytest_int8bench.files import relative

        # Storage.location fails for a folder outside the current one.
        path = getattr(session.storage, "path", None)
        saved.append(str(session.storage if path is None else relative(Path(path))))
    if not saved:
        return "not saved as JSON: add --benchmark-autosave or --benchmark-json=PATH"
    return f"saved: {', '.join(saved)}"

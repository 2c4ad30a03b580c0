"""The Python API: configure a sweep with an object and run it through pytest.

>>> config = ThroughputBenchmarkRunnerConfig(
...     default_run_params=RunParams(int8_enabled=True), sweep_keys=["int8_mode"]
... )
>>> [point.int8_mode for point in config.build().points]
['w8a8', 'w8']
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_int8bench.choices import ALL
from pytest_int8bench.files import PASSING, relative, timestamp
from pytest_int8bench.params import MEASURING_FIELDS, RunParams
from pytest_int8bench.printing import show
from pytest_int8bench.processes.runner_files import Handover
from pytest_int8bench.processes.running import (
    FAILED,
    INTERRUPTED,
    NO_TESTS,
    ending,
    is_pytests,
    run,
)
from pytest_int8bench.processes.signals import ENDING, exit_now, handling
from pytest_int8bench.report import wandb
from pytest_int8bench.report.terminal import render
from pytest_int8bench.results.journal import DEFAULT_FOLDER, journal_folder
from pytest_int8bench.results.records import Result
from pytest_int8bench.results.sweep_files import SweepFiles
from pytest_int8bench.sweep import axes_of, expand, unique
from pytest_int8bench.workloads.registry import check_fields, check_workload_name, point_for

_SUITE = Path(__file__).parent / "suite"
_DEFAULT_GROUP = "throughput"
_GROUP = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class RunnerError(RuntimeError):
    """The measuring process could not run, or its files cannot be written."""


@dataclass(kw_only=True)
class ThroughputBenchmarkRunnerConfig:
    """A sweep around one point. Set exactly one of ``sweep_keys`` and ``sweep_dict``."""

    default_run_params: RunParams | None = None
    """The point that provides the fields that are not swept; ``RunParams()`` by default."""
    sweep_keys: Sequence[str] | None = None
    """Names of sweeps, which are keys of ``SWEEPS``."""
    sweep_dict: Mapping[str, Sequence[Any]] | None = None
    """RunParams field (or ``extra.NAME``) -> values."""
    cross_product_sweep: bool = False
    """Measure all combinations instead of one axis at a time."""
    sweep_group_name: str | None = None
    """Group of the results in pytest-benchmark's JSON and of the runs in Weights & Biases, and
    prefix of the file names; ``throughput`` by default."""
    save_folder: str | os.PathLike[str] | None = None
    """Folder for the JSON and the journals, created if it does not exist. Several runners may use
    one folder at once. If a process is killed, the JSON contains its results but not its rounds. By
    default, journals go to ``.benchmarks/int8bench`` in ``work_dir``, and no JSON is written."""
    work_dir: str | os.PathLike[str] = "."
    """Folder in which the benchmarks run, created if it does not exist."""
    workload: str = "olmoearth"
    """Workload to measure, as in ``--int8-workload``; relative paths start from ``work_dir``."""
    pytest_args: Sequence[str] = ()
    """More arguments for pytest, such as ``--int8-no-baseline`` or ``-x``."""

    def build(self) -> ThroughputBenchmarkRunner:
        """Expand the sweep and return its runner without running anything.

        Raises:
            ValueError: if neither or both of ``sweep_keys`` and ``sweep_dict`` are set, a key or
                field is unknown, or a value is invalid.
        """
        if (self.sweep_keys is None) == (self.sweep_dict is None):
            given = "neither" if self.sweep_keys is None else "both"
            raise ValueError(f"set exactly one of sweep_keys and sweep_dict, got {given}")
        if isinstance(self.sweep_keys, str):
            raise ValueError(f"sweep_keys must be a list of keys, got {self.sweep_keys!r}")
        axes = dict(self.sweep_dict or {}) if self.sweep_keys is None else axes_of(self.sweep_keys)
        if not axes:
            raise ValueError("sweep_keys and sweep_dict must not be empty")
        for name in axes:
            if name in MEASURING_FIELDS:
                raise ValueError(f"{name} is not part of the run name, so it cannot be swept")
        default = self.default_run_params or RunParams()
        if default.wandb_enabled:
            try:
                wandb.check_installed()
            except ValueError as error:
                raise ValueError(f"wandb_enabled {error}") from None
        group = self.sweep_group_name or _DEFAULT_GROUP
        if not _GROUP.fullmatch(group):
            raise ValueError(
                "sweep_group_name must be letters, digits, dots, underscores and hyphens, "
                f"got {group!r}"
            )
        if any(argument.startswith("--benchmark-json") for argument in self.pytest_args):
            raise ValueError("pytest_args must not contain --benchmark-json; set save_folder")
        if "--int8-wandb" in self.pytest_args:
            raise ValueError("pytest_args must not contain --int8-wandb; set wandb_enabled")
        workload = check_workload_name(self.workload)
        if ALL not in (self.sweep_keys or ()):  # ALL skips fields that the workload does not read
            check_fields(workload, axes)
        points = expand(default, axes, cross_product=self.cross_product_sweep)
        return ThroughputBenchmarkRunner(
            unique(point_for(point, workload) for point in points),
            group=group,
            save_folder=None if self.save_folder is None else Path(self.save_folder).absolute(),
            work_dir=Path(self.work_dir).absolute(),
            workload=workload,
            pytest_args=tuple(self.pytest_args),
        )


class ThroughputBenchmarkRunner:
    """Measures points by running the packaged test file with pytest in a separate process.

    Attributes:
        points: the points to measure, in the order of the results.
        saved: the JSON file written by the last :meth:`run`, or None without one.
        journals: the journals of the last :meth:`run`, one per process.
    """

    def __init__(
        self,
        points: Sequence[RunParams],
        *,
        group: str,
        save_folder: Path | None,
        work_dir: Path,
        workload: str,
        pytest_args: Sequence[str],
    ) -> None:
        self.points = list(points)
        self.saved: Path | None = None
        self.journals: list[Path] = []
        self._group = group
        self._save_folder = save_folder
        self._work_dir = work_dir
        self._workload = workload
        self._pytest_args = list(pytest_args)

    def run(self) -> list[Result]:
        """Measure the points while pytest prints its progress.

        A point that fails, runs out of memory or is not supported yields a result with its status
        and reason. A point that kills its process is ``failed``, and the remaining points run in a
        new process. Each result is written to a journal as soon as the point is finished, so Ctrl-C
        does not lose it. Results are returned even if the disk fails.

        Returns:
            One result for each point that ran, in the order of ``points``.

        Raises:
            RunnerError: if pytest could not run at all, or ``save_folder`` or ``work_dir`` cannot
                be written for a permanent reason (a full disk is considered temporary).
            KeyboardInterrupt: on Ctrl-C, after the finished points are saved.
            SystemExit: on SIGTERM and SIGHUP, after the finished points are saved, if this runs in
                the main thread of a program that does not handle these signals.
        """
        self.saved, self.journals = None, []
        sweep = SweepFiles(self._make_folder(), f"{self._group}-{timestamp()}")
        with handling(exit_now, *ENDING, only_default=True):
            try:
                self._measure(sweep)
            finally:
                results = [
                    sweep.found[p.run_name] for p in self.points if p.run_name in sweep.found
                ]
                self._finish(sweep, results)
        return results

    def _make_folder(self) -> Path:
        """Create the output folders and return the folder of the journals."""
        name = "work_dir"
        try:
            self._work_dir.mkdir(parents=True, exist_ok=True)
            if self._save_folder is None:
                return journal_folder(self._work_dir)
            name = "save_folder"
            self._save_folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if error.errno not in PASSING:
                raise _not_writable(name, error) from None
        return self._save_folder or self._work_dir / DEFAULT_FOLDER

    def _measure(self, sweep: SweepFiles) -> None:
        left = [point.run_name for point in self.points]
        while left:
            try:
                part = sweep.begin()
            except OSError as error:
                name = "work_dir" if self._save_folder is None else "save_folder"
                raise _not_writable(name, error) from None
            with Handover.start(
                self._group, left, journal=part.path, wants_json=self._save_folder is not None
            ) as handover:
                try:
                    code, is_interrupted = self._run_pytest(handover)
                finally:  # an interrupt may have left results unread
                    part.take(handover)
                left = [name for name in left if name not in sweep.found]
                running, measured = handover.running(), part.results
                is_interrupted |= handover.is_interrupted() or code == -signal.SIGINT
                if is_interrupted or (code == INTERRUPTED and (measured or running)):
                    raise KeyboardInterrupt
                if code not in (0, FAILED, INTERRUPTED) and running in left:
                    part.add(self._killed(running, code, handover.workload()))
                    left.remove(running)
                elif left and not (measured or running or (sweep.found and code == NO_TESTS)):
                    raise RunnerError(
                        f"pytest measured nothing: {ending(code)}; see its output above"
                    )
                if code in (0, FAILED, NO_TESTS) and not handover.asked_for_new_process():
                    return  # pytest_args such as -x or -k excluded the remaining points

    def _finish(self, sweep: SweepFiles, results: list[Result]) -> None:
        """Merge the results of all processes into one JSON file and one table."""
        self.journals, problems = sweep.save_journals()
        if results:
            saved = sweep.saved(results)
            if self._save_folder is not None:
                self.saved, more = sweep.save_json(saved)
                problems += more
            if len(sweep.parts) > 1:
                show(f"\nint8bench: results of all {len(sweep.parts)} processes:")
                show(render(saved, width=None, color=False), end="")
            if self.saved is not None:
                show(f"int8bench: saved: {relative(self.saved)}")
            # Log here, because a measuring process that is killed logs nothing.
            if runs := wandb.runs_of(saved, every=False):
                tracked = wandb.log(runs, folder=self._work_dir, group=self._group)
                show(f"int8bench: {tracked.line}")
        for problem in problems:
            show(f"int8bench: {problem}", error=True)

    def _run_pytest(self, handover: Handover) -> tuple[int, bool]:
        """Run the points of ``handover``. Return pytest's exit code, negative if a signal ended it,
        and whether Ctrl-C interrupted this process."""
        measuring = {name: getattr(self.points[0], name) for name in MEASURING_FIELDS}
        sets = [f"--int8-set={k}={v}" for k, v in measuring.items()]
        command = [sys.executable, "-m", "pytest", f"-c={_SUITE / 'pytest.ini'}"]
        command += ["-p", "pytest_int8bench.suite.runner_side", str(_SUITE / "test_throughput.py")]
        command += [f"--int8-workload={self._workload}", *sets]
        # Plugins and options from the user's environment, such as xdist, random order or -x, would
        # change the measurements; pytest_args can add them back.
        environ = {name: value for name, value in os.environ.items() if not is_pytests(name)}
        environ |= handover.to_env_vars()
        environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        environ["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, sys.path))
        sys.stdout.flush()
        try:
            return run([*command, *self._pytest_args], cwd=self._work_dir, env=environ), False
        except KeyboardInterrupt:  # raised after pytest has finished its output
            return INTERRUPTED, True

    def _killed(self, run_name: str, code: int, workload: str | None) -> Result:
        """Return a result of status ``failed`` for the point that killed its process."""
        params = next(point for point in self.points if point.run_name == run_name)
        return Result(
            nodeid=f"test_throughput.py::test_throughput[{params.run_name}]",
            workload=workload or self._workload,
            run_name=params.run_name,
            params=params.to_dict(),
            status="failed",
            reason=f"the process ended while measuring this point: {ending(code)}",
        )


def _not_writable(name: str, error: OSError) -> RunnerError:
    why = f"{str(error.filename)!r}: {error.strerror}" if error.filename else str(error)
    return RunnerError(f"{name} must be a writable folder, got {why}")

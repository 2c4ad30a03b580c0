"""The Python front: a sweep as a configuration object, run through pytest.

>>> config = ThroughputBenchmarkRunnerConfig(
...     default_run_params=RunParams(int8_enabled=True), sweep_keys=["int8_mode"]
... )
>>> [point.int8_mode for point in config.build().points]
['w8a8', 'w8']
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pytest_int8bench.files import replace_text, timestamp
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
from pytest_int8bench.report import wandb
from pytest_int8bench.report.terminal import render
from pytest_int8bench.results.base import SchemaError
from pytest_int8bench.results.journal import Journal, journal_folder
from pytest_int8bench.results.reading import read
from pytest_int8bench.results.records import Result, Saved
from pytest_int8bench.sweep import axes_of, expand
from pytest_int8bench.workloads.registry import check_fields, check_workload_name

_SUITE = Path(__file__).parent / "suite"
_DEFAULT_GROUP = "throughput"
_GROUP = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class RunnerError(RuntimeError):
    """The process that measures could not be run."""


@dataclass(kw_only=True)
class ThroughputBenchmarkRunnerConfig:
    """A sweep around one point. Exactly one of ``sweep_keys`` and ``sweep_dict`` says over what."""

    default_run_params: RunParams | None = None
    """The point whose other fields are kept; ``RunParams()`` by default."""
    sweep_keys: Sequence[str] | None = None
    """Names of sweeps, keys of ``SWEEPS``."""
    sweep_dict: Mapping[str, Sequence[Any]] | None = None
    """RunParams field (or ``extra.NAME``) -> values."""
    cross_product_sweep: bool = False
    """All combinations instead of one axis at a time."""
    sweep_group_name: str | None = None
    """Group of the results in pytest-benchmark's JSON and of the runs in Weights & Biases, and
    start of the names of the files; ``throughput`` by default."""
    save_folder: str | os.PathLike[str] | None = None
    """Where the JSON and the journals are written, made if it is not there. Of a process that was
    killed, the JSON has the results, but not the rounds. By default, journals go to
    ``.benchmarks/int8bench`` in ``work_dir``, and no JSON is written."""
    work_dir: str | os.PathLike[str] = "."
    """Folder the benchmarks run in, made if it is not there."""
    workload: str = "olmoearth"
    """What to measure, as in ``--int8-workload``; paths start from ``work_dir``."""
    pytest_args: Sequence[str] = ()
    """More arguments for pytest, such as ``--int8-no-baseline`` or ``-x``."""

    def build(self) -> ThroughputBenchmarkRunner:
        """Expand the sweep and return its runner. Nothing is run.

        Raises:
            ValueError: for neither or both of ``sweep_keys`` and ``sweep_dict``, an unknown key
                or field, or a bad value.
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
                raise ValueError(f"{name} is no part of a run's name and cannot be swept")
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
            raise ValueError("pytest_args must not hold --benchmark-json; set save_folder")
        if "--int8-wandb" in self.pytest_args:
            raise ValueError("pytest_args must not hold --int8-wandb; set wandb_enabled")
        check_fields(self.workload, axes)
        return ThroughputBenchmarkRunner(
            expand(default, axes, cross_product=self.cross_product_sweep),
            group=group,
            save_folder=None if self.save_folder is None else Path(self.save_folder).absolute(),
            work_dir=Path(self.work_dir).absolute(),
            workload=check_workload_name(self.workload),
            pytest_args=tuple(self.pytest_args),
        )


class ThroughputBenchmarkRunner:
    """Measures points by running the packaged test file with pytest in a process of its own.

    Attributes:
        points: what is measured, in this order in the results.
        saved: the JSON file that :meth:`run` wrote; None before it, or without ``save_folder``.
        journals: the journals of the last :meth:`run`, one for each process.
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
        """Measure the points; pytest prints as it goes.

        A point that fails, runs out of memory or cannot be is a result with its status and
        reason. A point that kills the process is ``failed``, and the others go on in a new one.
        Every finished point is in a journal at once, also after Ctrl-C.

        Returns:
            One result for each point that was run, in the order of ``points``.

        Raises:
            RunnerError: if pytest could not run at all.
            KeyboardInterrupt: on Ctrl-C, after the finished points are saved.
        """
        self._work_dir.mkdir(parents=True, exist_ok=True)
        folder = self._save_folder or journal_folder(self._work_dir)
        folder.mkdir(parents=True, exist_ok=True)
        stem = _free_stem(folder, self._group)
        self.saved, self.journals = None, []
        found: dict[str, Result] = {}
        parts: list[Path] = []
        with tempfile.TemporaryDirectory(prefix="int8bench-") as handover_folder:
            try:
                left = [point.run_name for point in self.points]
                while left:
                    name = stem if not parts else f"{stem}-{len(parts) + 1}"
                    parts.append(folder / f"{name}.json")
                    handover = Handover.start(Path(handover_folder), self._group, left)
                    code = self._run_pytest(handover, parts[-1])
                    measured = {r.run_name: r for r in _journal(parts[-1]).results}
                    found |= measured
                    left = [name for name in left if name not in found]
                    running = handover.running()
                    if code not in (0, FAILED, INTERRUPTED) and running in left:
                        found[running] = self._note_killed(code, handover, parts[-1])
                        left.remove(running)
                    elif left and not measured and not running and not (found and code == NO_TESTS):
                        raise RunnerError(
                            f"pytest measured nothing: {ending(code)}; see its output above"
                        )
                    if code == INTERRUPTED:
                        raise KeyboardInterrupt
                    if code in (0, FAILED, NO_TESTS) and not handover.asked_for_new_process():
                        break  # what is left was not to be run: -x or -k among pytest_args
            finally:
                for part in parts:  # also what an interrupt left unread
                    found = {r.run_name: r for r in _journal(part).results} | found
                results = [found[p.run_name] for p in self.points if p.run_name in found]
                self._finish(parts, results)
        return results

    def _finish(self, parts: Sequence[Path], results: list[Result]) -> None:
        """Put what several processes wrote into one JSON, and show it as one table."""
        self.journals = [p.with_suffix(".jsonl") for p in parts if p.with_suffix(".jsonl").exists()]
        if not results:
            return
        environments = [environment for p in parts if (environment := _journal(p).environment)]
        saved = Saved(environments[0] if environments else {}, results, [])
        if self._save_folder is not None:
            self.saved = parts[0]
            merged = _merged([json.loads(p.read_text()) for p in parts if _is_json(p)], saved)
            replace_text(parts[0], json.dumps(merged, indent=2))
            for part in parts[1:]:
                part.unlink(missing_ok=True)
        if len(parts) > 1:
            show(f"\nint8bench: {len(parts)} processes together:")
            show(render(saved, width=None, color=False), end="")
        # Here, not in the processes that measure: one that is killed logs nothing.
        if runs := wandb.runs_of(saved, every=False):
            tracked = wandb.log(runs, folder=self._work_dir, group=self._group)
            show(f"int8bench: {tracked.line}")

    def _run_pytest(self, handover: Handover, json_path: Path) -> int:
        """Run the points of ``handover`` and return the exit code, negative for a signal."""
        measuring = {name: getattr(self.points[0], name) for name in MEASURING_FIELDS}
        sets = [f"--int8-set={k}={v}" for k, v in measuring.items()]
        command = [sys.executable, "-m", "pytest", f"-c={_SUITE / 'pytest.ini'}"]
        command += [
            str(_SUITE / "test_throughput.py"),
            f"--int8-journal={json_path.with_suffix('.jsonl')}",
        ]
        command += [f"--int8-workload={self._workload}", *sets]
        if self._save_folder is not None:
            command.append(f"--benchmark-json={json_path}")
        # Other plugins and options of the user's environment, such as xdist, random order or
        # -x, would change what is measured; pytest_args can bring them back.
        environ = {name: value for name, value in os.environ.items() if not is_pytests(name)}
        environ |= handover.to_env_vars()
        environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        environ["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, sys.path))
        sys.stdout.flush()
        try:
            return run([*command, *self._pytest_args], cwd=self._work_dir, env=environ)
        except KeyboardInterrupt:  # after pytest has said what it has to say
            return INTERRUPTED

    def _note_killed(self, code: int, handover: Handover, part: Path) -> Result:
        """Write the point that took the process down into its journal, as failed."""
        params = next(p for p in self.points if p.run_name == handover.running())
        result = Result(
            nodeid=f"test_throughput.py::test_throughput[{params.run_name}]",
            workload=handover.workload() or self._workload,
            run_name=params.run_name,
            params=params.to_dict(),
            status="failed",
            reason=f"the process ended in this point: {ending(code)}",
        )
        path = part.with_suffix(".jsonl")
        (Journal.reopen(path) if path.exists() else Journal(path, {})).append(result)
        return result


def _free_stem(folder: Path, group: str) -> str:
    """Return the start of file names that are not in ``folder`` yet."""
    stem = f"{group}-{timestamp()}"
    number = 1
    free = stem
    while any(folder.glob(f"{free}[.-]*")):
        number += 1
        free = f"{stem}_{number}"
    return free


def _journal(part: Path) -> Saved:
    """Return what is in the journal of a process, nothing if no point got as far as that."""
    try:
        return read(part.with_suffix(".jsonl"))
    except (FileNotFoundError, SchemaError):  # a full disk leaves a file without a header
        return Saved({}, [], [])


def _is_json(path: Path) -> bool:
    """Return whether a process lived to write its file; pytest-benchmark opens it at the start."""
    return path.exists() and path.stat().st_size > 0


def _head() -> dict[str, Any]:
    """Return what pytest-benchmark wants to find around benchmarks, for when no process lived to
    write it."""
    now = datetime.now(UTC).isoformat()
    version = importlib.metadata.version("pytest-benchmark")
    return {"machine_info": {}, "commit_info": {}, "datetime": now, "version": version}


def _merged(parts: Sequence[Mapping[str, Any]], saved: Saved) -> dict[str, Any]:
    """Return one JSON of pytest-benchmark from those of several processes on one machine."""
    benchmarks = [benchmark for part in parts for benchmark in part["benchmarks"]]
    head = parts[-1] if parts else _head()
    return {**head, "benchmarks": benchmarks, "int8bench": saved.to_dict()}

"""Hold the settings of one pytest session and the objects that are created on demand from them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_int8bench.plugin.settings import Settings
from pytest_int8bench.sweep import unique, with_baselines

if TYPE_CHECKING:
    from pytest_int8bench.accuracy.guardrail import Guardrail
    from pytest_int8bench.gate.session import SessionGate
    from pytest_int8bench.measure.point import Throughput
    from pytest_int8bench.measure.pool import ModelPool
    from pytest_int8bench.measure.traces import Profiles
    from pytest_int8bench.params import RunParams
    from pytest_int8bench.processes.runner_files import Handover
    from pytest_int8bench.workloads.workload import Workload


_SUITE_INI = Path(__file__).parents[1] / "suite" / "pytest.ini"


class Session:
    """The settings of a session, and the objects that measure and judge points."""

    def __init__(self, config: pytest.Config, settings: Settings) -> None:
        self.config = config
        self.settings = settings
        self.invocation = config.invocation_params.dir
        # With the runner's ini file, pytest takes this package's own folder as its root.
        self.in_suite = config.inipath == _SUITE_INI
        self.root = self.invocation if self.in_suite else config.rootpath
        self.handover = _handover() if self.in_suite else None
        """The connection to the runner that started this process; None without one."""
        self.collected: set[str] = set()
        """Node ids of all collected tests."""
        self.deselected: set[str] = set()
        """Node ids of the collected tests that were deselected."""
        self.records_benchmarks = False
        """Whether plain benchmarks are recorded: only if there are INT8 tests or options that need
        them."""
        self.gate: SessionGate | None = None
        """Compares points with the files of ``--int8-compare``; None without that option."""
        self.profiles: Profiles | None = None
        """Created by :meth:`throughput`."""
        self._preset: str | None = None
        self._workloads: dict[str, Workload | ValueError] = {}
        self._pool: ModelPool | None = None
        self._filter: Any = None
        self._throughput: Throughput | None = None
        self._guardrail: Guardrail | None = None

    # -- points -----------------------------------------------------------------------------

    @property
    def preset(self) -> str | None:
        """The preset in use and why it was chosen; None until a test asks for points."""
        if self._preset is None:
            return None
        why = "as asked"
        if self.settings.preset == "auto":
            found = {"seed": "CUDA is available", "smoke": "no CUDA device"}
            why = f"chosen by auto: {found[self._preset]}"
        return f"preset {self._preset} ({why})"

    def points(
        self, changes: dict[str, Any], workload: str | None, *, baselines: bool
    ) -> list[RunParams]:
        """Return the points of a test.

        Args:
            changes: RunParams fields that the test's markers set.
            workload: name of the workload; None if a fixture returns it.
            baselines: whether to insert the baseline of each point before it.
        """
        from pytest_int8bench.workloads.registry import is_olmoearth, point_for

        if self._preset is None:
            self._preset = self.settings.resolved_preset(_cuda_available)
        found = self.settings.points(self._preset, is_olmoearth=is_olmoearth(workload))
        points = [
            point_for(
                p.replace(**{**changes, "extra": {**p.extra, **changes.get("extra", {})}}), workload
            )
            for p in found
        ]
        points = unique(p if p.int8_enabled else p.baseline() for p in points)
        return with_baselines(points) if baselines and self.settings.baseline else points

    @property
    def needs_benchmarks(self) -> bool:
        """Whether an option uses the timings of plain benchmarks, even without INT8 tests."""
        settings = self.settings
        return bool(self.gate or settings.lean or settings.reports or settings.journal)

    # -- created on first use ---------------------------------------------------------------

    def workload(self, name: str | None) -> Workload:
        """Return a workload, loading it on first use.

        Args:
            name: the workload named by a test's marker; None for the one in the settings.

        Raises:
            ValueError: if it cannot be loaded; one line.
        """
        from pytest_int8bench.workloads.registry import load_workload

        name = name or self.settings.workload
        if name not in self._workloads:
            try:
                self._workloads[name] = load_workload(
                    name,
                    self.invocation,
                    eval_data=self.settings.eval_data,
                    trust_remote_code=self.settings.trust_remote_code,
                )
            except ValueError as error:  # cached, because waiting for an unreachable Hub is slow
                self._workloads[name] = error
        found = self._workloads[name]
        if isinstance(found, ValueError):
            raise found
        return found

    def workload_name(self) -> str:
        """Return the name of the workload in the settings; until it is loaded, as the user wrote
        it."""
        found = self._workloads.get(self.settings.workload)
        if found is None or isinstance(found, ValueError):
            return self.settings.workload
        return found.name

    def pool(self) -> ModelPool:
        """Return the session's pool of models, creating it on first use."""
        if self._pool is None:
            from pytest_int8bench.measure.pool import ModelPool

            self._pool = ModelPool(
                weights=self.settings.weights, cache_dir=self.settings.compile_cache
            )
        return self._pool

    def filter(self) -> Any:
        """Return the callable that ``--int8-filter`` names; None without that option.

        Raises:
            ValueError: if it does not exist or is not callable; one line.
        """
        if self._filter is None and self.settings.filter is not None:
            from pytest_int8bench.workloads.registry import load_object

            found = load_object(self.settings.filter, self.invocation)
            if not callable(found):
                raise ValueError(f"must be a callable, got {self.settings.filter}")
            self._filter = found
        return self._filter

    def filtered(self, workload: Workload) -> Workload:
        """Return ``workload`` with its filter replaced by that of ``--int8-filter``, if given.

        Raises:
            ValueError: if the filter does not exist or is not callable; one line.
        """
        try:
            found = self.filter()
        except ValueError as error:
            raise ValueError(f"--int8-filter: {error}") from None
        return workload if found is None else dataclasses.replace(workload, filter_fn=found)

    def throughput(self) -> Throughput:
        """Return the session's Throughput, which measures points, creating it on first use."""
        if self._throughput is None:
            from pytest_int8bench.measure.point import Throughput
            from pytest_int8bench.measure.traces import Profiles
            from pytest_int8bench.plugin.progress import terminal_steps

            self.profiles = Profiles(
                self.settings.profile,
                every=self.settings.changes.get("profiler_enabled", False),
                root=self.root,
                start=self.invocation,
            )
            self._throughput = Throughput(
                self.pool(),
                with_baseline=self.settings.baseline,
                with_evidence=not self.settings.lean,
                profiles=self.profiles,
                step=terminal_steps(self.config),
            )
        return self._throughput

    def guardrail(self) -> Guardrail:
        """Return the session's Guardrail, which judges accuracy, creating it on first use."""
        if self._guardrail is None:
            from pytest_int8bench.accuracy.guardrail import Guardrail
            from pytest_int8bench.plugin.progress import terminal_steps

            self._guardrail = Guardrail(
                self.pool(), self.settings.drop_limit(), step=terminal_steps(self.config)
            )
        return self._guardrail

    def open_gate(self) -> None:
        """Read the files of ``--int8-compare``, if it is given.

        Raises:
            ValueError: if a file is damaged or was not saved by this plugin; one line.
            OSError: if a file cannot be read.
        """
        if not self.settings.compare:
            return
        from pytest_int8bench.gate.session import SessionGate
        from pytest_int8bench.results.locating import read_runs

        self.gate = SessionGate(read_runs(self.settings.compare), self.settings.rules)

    def gate_problems(self) -> list[str]:
        """Return one line for each problem because of which ``--int8-compare`` fails the
        session."""
        if self.gate is None or self.config.option.collectonly:
            return []
        arguments, rootpath = self.config.args, self.config.rootpath
        asked = [(self.invocation / argument).resolve() for argument in arguments]

        def is_gone(file: str) -> bool:
            path = (rootpath / file).resolve()
            return not path.exists() and any(path.is_relative_to(folder) for folder in asked)

        return self.gate.problems(
            self.collected,
            self.deselected,
            by_node=any("::" in argument for argument in arguments),
            is_gone=is_gone,
        )

    def close(self) -> None:
        if self._pool is not None:
            self._pool.clear()


def _cuda_available() -> bool:
    import torch

    return torch.cuda.is_available()


def _handover() -> Handover | None:
    from pytest_int8bench.processes.runner_files import Handover

    return Handover.from_env_vars() if Handover.is_given() else None

"""The settings of one pytest session, and what is made from them when it is first needed."""

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


SESSION = pytest.StashKey["Session"]()
_SUITE_INI = Path(__file__).parents[1] / "suite" / "pytest.ini"


class Session:
    """Settings, and the objects that measure and judge. Nothing heavy is imported before it is
    used."""

    def __init__(self, config: pytest.Config, settings: Settings) -> None:
        self.config = config
        self.settings = settings
        self.invocation = config.invocation_params.dir
        # The runner's ini file makes the package's own folder the root.
        self.in_suite = config.inipath == _SUITE_INI
        self.root = self.invocation if self.in_suite else config.rootpath
        self.handover = _handover() if self.in_suite else None
        """What connects this process with the runner that started it; None without one."""
        self.collected: set[str] = set()
        """Node ids of all tests that were found."""
        self.deselected: set[str] = set()
        """Those among them that are not to be run."""
        self.parametrized: pytest.Item | None = None
        """The test whose parameters are being named."""
        self.takes_benchmarks = False
        """Plain benchmarks are recorded: there are tests of ours, or an option that needs them."""
        self.gate: SessionGate | None = None
        """Holds points to ``--int8-compare``; None without that option."""
        self.profiles: Profiles | None = None
        """Made together with what measures points."""
        self._preset: str | None = None
        self._workloads: dict[str, Workload | ValueError] = {}
        self._pool: ModelPool | None = None
        self._filter: Any = None
        self._throughput: Throughput | None = None
        self._guardrail: Guardrail | None = None

    # -- points -----------------------------------------------------------------------------

    @property
    def preset(self) -> str | None:
        """The preset in use and the reason for it, None before a test asked for points."""
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
            workload: name of the workload; None for one that a fixture returns.
            baselines: put the baseline of each point before it.
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
    def wants_benchmarks(self) -> bool:
        """An option needs what plain benchmarks time, whether there are tests of ours or not."""
        settings = self.settings
        return bool(self.gate or settings.lean or settings.reports or settings.journal)

    # -- made when first needed -------------------------------------------------------------

    def workload(self, name: str | None) -> Workload:
        """Return the workload of a test's marker, or of the settings.

        Args:
            name: the workload of the marker, None if it names none.

        Raises:
            ValueError: one line, if it cannot be loaded.
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
            except ValueError as error:  # kept: a hub that does not answer takes its time
                self._workloads[name] = error
        found = self._workloads[name]
        if isinstance(found, ValueError):
            raise found
        return found

    def workload_name(self) -> str:
        """Return the name of the settings' workload; until it is loaded, as the user wrote it."""
        found = self._workloads.get(self.settings.workload)
        if found is None or isinstance(found, ValueError):
            return self.settings.workload
        return found.name

    def pool(self) -> ModelPool:
        """Return the session's models."""
        if self._pool is None:
            from pytest_int8bench.measure.pool import ModelPool

            self._pool = ModelPool(
                weights=self.settings.weights, cache_dir=self.settings.compile_cache
            )
        return self._pool

    def filter(self) -> Any:
        """Return the filter of the settings, None if there is none.

        Raises:
            ValueError: one line, if there is no such callable.
        """
        if self._filter is None and self.settings.filter is not None:
            from pytest_int8bench.workloads.registry import load_object

            found = load_object(self.settings.filter, self.invocation)
            if not callable(found):
                raise ValueError(f"{self.settings.filter} is not callable")
            self._filter = found
        return self._filter

    def filtered(self, workload: Workload) -> Workload:
        """Return ``workload`` with the filter of the settings, which overrides its own.

        Raises:
            ValueError: one line, if there is no such callable.
        """
        try:
            found = self.filter()
        except ValueError as error:
            raise ValueError(f"--int8-filter: {error}") from None
        return workload if found is None else dataclasses.replace(workload, filter_fn=found)

    def throughput(self) -> Throughput:
        """Return the session's Throughput, which measures points."""
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
        """Return the session's Guardrail, which judges accuracy."""
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
            ValueError: one line, if one is damaged or not ours.
            OSError: if one cannot be read.
        """
        if not self.settings.compare:
            return
        from pytest_int8bench.gate.session import SessionGate
        from pytest_int8bench.results.locating import read_runs

        self.gate = SessionGate(read_runs(self.settings.compare), self.settings.rules)

    def gate_problems(self) -> list[str]:
        """Return what ``--int8-compare`` must not let pass silently, a line each."""
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
        """Free the models."""
        if self._pool is not None:
            self._pool.clear()


def _cuda_available() -> bool:
    import torch

    return torch.cuda.is_available()


def _handover() -> Handover | None:
    from pytest_int8bench.processes.runner_files import Handover

    return Handover.from_env_vars() if Handover.is_given() else None

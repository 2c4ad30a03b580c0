"""Represent the user's options as a frozen dataclass, and expand them into points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_int8bench.gate.limits import Rules
from pytest_int8bench.sweep import expand_modes

if TYPE_CHECKING:
    from pytest_int8bench.accuracy.limit import Limit
    from pytest_int8bench.params import RunParams


PRESETS: dict[str, dict[str, Any]] = {
    "seed": {},
    "smoke": {
        "model_size": "nano",
        "image_size": 16,
        "num_timesteps": 3,
        "batch_size": 4,
        "compile_mode": "default",
        "gpu_type": "cpu",
    },
}

#: Defaults of ``--int8-lean``: timings over 2 s vary less within one process than between two
#: processes.
LEAN: dict[str, Any] = {"benchmark_interval_s": 2.0}

_DEFAULT_MAX_DROP = "1%"


@dataclass(frozen=True)
class Settings:
    """The validated options of a session."""

    preset: str = "auto"
    """``auto``, ``seed`` or ``smoke``."""
    modes: tuple[str, ...] = ("w8a8",)
    """INT8 modes to run, which may include ``off``."""
    changes: dict[str, Any] = field(default_factory=dict)
    """RunParams fields set to one value; ``extra.NAME`` for axes of the workload."""
    axes: dict[str, list[Any]] = field(default_factory=dict)
    """RunParams fields to sweep, with their values."""
    cross_product: bool = False
    """Whether to sweep all combinations of the axes instead of one axis at a time."""
    workload: str = "olmoearth"
    """Name of the workload, or a reference such as ``module:callable``."""
    trust_remote_code: bool = False
    """Whether ``hf:NAME`` may run code that comes with a model."""
    weights: str = "random"
    """``random``, ``hub`` or an absolute path."""
    filter: str | None = None
    """Reference to the callable that selects layers; None for the default filter."""
    compile_cache: Path | None = None
    """Absolute path of the folder for compiled code; None for torch's own cache."""
    baseline: bool = True
    """Whether to add baselines and measure the speedup."""
    max_drop: Limit | None = None
    """Largest drop of a metric that passes; None for the default (see :meth:`drop_limit`)."""
    inconclusive: str = "fail"
    """What an accuracy test does if it has too few samples to decide: ``fail``, ``warn`` or
    ``skip``."""
    eval_data: Path | None = None
    """Absolute path of a folder of labelled images."""
    remedy: bool = False
    """Whether to try remedies when accuracy drops too much."""
    compare: tuple[Path, ...] = ()
    """Saved files to compare each point with."""
    rules: Rules = field(default_factory=Rules)
    """Limits of that comparison, including those from ``pyproject.toml``, and the parts of the
    fingerprint that may differ."""
    profile: Path | None = None
    """Absolute path of the folder for profiles; None for the default one."""
    reports: tuple[Path, ...] = ()
    """Absolute paths of reports to write."""
    lean: bool = False
    """Whether to measure throughput only, for ``int8bench ab``."""
    journal: str | None = None
    """Path of the journal, relative to pytest's starting folder; None for a new file."""

    def drop_limit(self) -> Limit:
        """Return the largest drop of a metric that passes."""
        from pytest_int8bench.accuracy.limit import Limit

        return self.max_drop or Limit.parse(_DEFAULT_MAX_DROP)

    def resolved_preset(self, cuda_available: Callable[[], bool]) -> str:
        """Return the preset's name, with ``auto`` resolved by calling ``cuda_available``."""
        if self.preset != "auto":
            return self.preset
        return "seed" if cuda_available() else "smoke"

    def default_params(self, preset: str, *, is_olmoearth: bool = True) -> RunParams:
        """Return the point from which all others are derived. For workloads other than OlmoEarth,
        presets leave OlmoEarth's fields at their defaults."""
        from pytest_int8bench.params import RunParams
        from pytest_int8bench.workloads.registry import OLMOEARTH_FIELDS

        changes = {k: v for k, v in self.changes.items() if not k.startswith("extra.")}
        extra = {k.removeprefix("extra."): v for k, v in self.changes.items() if k not in changes}
        start = {**PRESETS[preset], **(LEAN if self.lean else {})}
        if not is_olmoearth:
            start = {name: v for name, v in start.items() if name not in OLMOEARTH_FIELDS}
        return RunParams(**{**start, **changes, "extra": extra})

    def points(self, preset: str, *, is_olmoearth: bool = True) -> list[RunParams]:
        """Return the points to run, without baselines."""
        start = self.default_params(preset, is_olmoearth=is_olmoearth)
        return expand_modes(start, self.modes, self.axes, cross_product=self.cross_product)

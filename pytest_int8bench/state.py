"""What one pytest session holds: settings, and what is made from them when it is first needed."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_int8bench.options import Settings
from pytest_int8bench.params import FIELD_TYPES, MEASURING_FIELDS, RunParams
from pytest_int8bench.sweep import unique, with_baselines
from pytest_int8bench.workloads.names import check_workload_name, load_object, load_workload

if TYPE_CHECKING:
    from pytest_int8bench.models import ModelPool
    from pytest_int8bench.results import Journal, Result
    from pytest_int8bench.throughput import Throughput
    from pytest_int8bench.workloads import Workload

STATE = pytest.StashKey["State"]()
JOURNAL_FOLDER = Path(".benchmarks") / "int8bench"


class State:
    """Everything of one session. Nothing heavy is imported before it is used."""

    measuring_fields = MEASURING_FIELDS

    def __init__(self, config: pytest.Config, settings: Settings) -> None:
        self.settings = settings
        self.root = config.rootpath
        self.invocation = config.invocation_params.dir
        self.journal: Journal | None = None
        self.points_of: dict[str, tuple[str, RunParams]] = {}
        self._preset: str | None = None
        self._pool: ModelPool | None = None
        self._throughput: Throughput | None = None
        self._workloads: dict[str, Workload] = {}

    # -- points -----------------------------------------------------------------------------

    @property
    def preset(self) -> str | None:
        """The preset that is used, None before a test asked for points."""
        return self._preset

    def points(self, changes: dict[str, Any], *, twins: bool) -> list[RunParams]:
        """Return the points of a test.

        Args:
            changes: RunParams fields that the test's markers set.
            twins: put BF16 twins before them.
        """
        if self._preset is None:
            self._preset = self.settings.resolved_preset(_cuda_available)
        points = [p.replace(**changes) for p in self.settings.points(self._preset)]
        points = unique(p if p.int8_enabled else p.baseline() for p in points)
        return with_baselines(points) if twins and self.settings.baseline else points

    def note_point(self, item: pytest.Item, params: RunParams, workload: str) -> None:
        """Remember which point a test runs, for when it fails or is skipped."""
        self.points_of[item.nodeid] = (workload, params)

    # -- made when first needed -------------------------------------------------------------

    def workload(self, name: str | None) -> Workload:
        """Return the workload of the settings, or of a test's marker."""
        name = name or self.settings.workload
        if name not in self._workloads:
            self._workloads[name] = load_workload(name, self.invocation)
        return self._workloads[name]

    def pool(self) -> ModelPool:
        """Return the session's models."""
        if self._pool is None:
            from pytest_int8bench.models import ModelPool

            filter_fn = None
            if self.settings.filter is not None:
                filter_fn = load_object(self.settings.filter, self.invocation)
            self._pool = ModelPool(filter_fn)
        return self._pool

    def throughput(self) -> Throughput:
        """Return what measures points."""
        if self._throughput is None:
            from pytest_int8bench.throughput import Throughput

            self._throughput = Throughput(self.pool(), with_baseline=self.settings.baseline)
        return self._throughput

    def record(self, result: Result) -> None:
        """Write ``result`` to the journal, at once."""
        if self.journal is None:
            from pytest_int8bench.environment import fingerprint
            from pytest_int8bench.results import Journal

            folder = self.root / JOURNAL_FOLDER
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ".gitignore").write_text("*\n")
            name = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{os.getpid()}.jsonl"
            self.journal = Journal(folder / name, fingerprint(self.root))
        self.journal.append(result)

    def close(self) -> None:
        """Free the models."""
        if self._pool is not None:
            self._pool.clear()


def marker_changes(item: pytest.Item) -> tuple[dict[str, Any], str | None]:
    """Return the RunParams fields and the workload that ``@pytest.mark.int8`` sets; the closest
    marker wins.

    Raises:
        ValueError: naming the key, if it is not one.
    """
    changes: dict[str, Any] = {}
    workload = None
    for marker in reversed(list(item.iter_markers("int8"))):
        if marker.args:
            raise ValueError(f"@pytest.mark.int8 takes keywords only, got {marker.args[0]!r}")
        for key, value in marker.kwargs.items():
            if key == "workload":
                if not isinstance(value, str):
                    raise ValueError(f"@pytest.mark.int8: workload must be a name, got {value!r}")
                workload = check_workload_name(value)
            elif key not in FIELD_TYPES and key != "extra":
                raise ValueError(
                    f"@pytest.mark.int8: unknown key {key!r}; "
                    f"keys are workload, {', '.join(FIELD_TYPES)}, extra"
                )
            else:
                changes[key] = value
    RunParams().replace(**changes)  # says what is wrong with a value
    return changes, workload


def _cuda_available() -> bool:
    import torch

    return torch.cuda.is_available()

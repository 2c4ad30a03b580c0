"""Files that the runner and the process that measures exchange."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_FOLDER = "INT8BENCH_HANDOVER"
_POINTS, _RUNNING, _WORKLOAD, _AGAIN = "points.json", "running", "workload", "again"


@dataclass(frozen=True)
class Handover:
    """A folder with the points to run and the name of the one that is running."""

    folder: Path
    group: str
    run_names: list[str]

    @classmethod
    def start(cls, folder: Path, group: str, run_names: Sequence[str]) -> Handover:
        """Write the points for a process to be started."""
        handover = cls(folder, group, list(run_names))
        for leftover in (_RUNNING, _AGAIN):
            (folder / leftover).unlink(missing_ok=True)
        (folder / _POINTS).write_text(json.dumps({"group": group, "points": [*run_names]}))
        return handover

    @classmethod
    def from_env_vars(cls, environ: Mapping[str, str] = os.environ) -> Handover:
        """Read what :meth:`start` wrote, in the folder that :meth:`to_env_vars` names.

        Raises:
            RuntimeError: if the variable is not set.
        """
        if _FOLDER not in environ:
            raise RuntimeError(
                "these tests are run by pytest_int8bench.ThroughputBenchmarkRunner, "
                f"which sets {_FOLDER}"
            )
        folder = Path(environ[_FOLDER])
        values = json.loads((folder / _POINTS).read_text())
        return cls(folder, values["group"], values["points"])

    def to_env_vars(self) -> dict[str, str]:
        """Return the environment variable that names the folder."""
        return {_FOLDER: str(self.folder)}

    def note_running(self, run_name: str) -> None:
        """Write down the point that runs now; empty for none."""
        (self.folder / _RUNNING).write_text(run_name)

    def running(self) -> str | None:
        """Return the point that was running last, None if there was none."""
        return self._read(_RUNNING)

    def note_workload(self, name: str) -> None:
        """Write down the name of the workload, which is known when it is loaded."""
        (self.folder / _WORKLOAD).write_text(name)

    def workload(self) -> str | None:
        """Return the name of the workload, None if it was not loaded."""
        return self._read(_WORKLOAD)

    def ask_for_new_process(self) -> None:
        """Say that the points that are left need a new process."""
        (self.folder / _AGAIN).touch()

    def asked_for_new_process(self) -> bool:
        """Return whether :meth:`ask_for_new_process` was called."""
        return (self.folder / _AGAIN).exists()

    def _read(self, name: str) -> str | None:
        path = self.folder / name
        return (path.read_text() if path.exists() else "") or None

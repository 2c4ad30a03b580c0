"""What the runner and the process that measures tell each other, through files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_FOLDER = "INT8BENCH_HANDOVER"


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
        for leftover in (handover._running, handover._again):
            leftover.unlink(missing_ok=True)
        handover._points(folder).write_text(json.dumps({"group": group, "points": [*run_names]}))
        return handover

    @classmethod
    def from_env_vars(cls, environ: Mapping[str, str] | None = None) -> Handover:
        """Read what :meth:`start` wrote, in the folder that :meth:`to_env_vars` names.

        Raises:
            RuntimeError: if the variable is not set.
        """
        environ = os.environ if environ is None else environ
        if _FOLDER not in environ:
            raise RuntimeError(
                "these tests are run by pytest_int8bench.ThroughputBenchmarkRunner, "
                f"which sets {_FOLDER}"
            )
        folder = Path(environ[_FOLDER])
        values = json.loads(cls._points(folder).read_text())
        return cls(folder, values["group"], values["points"])

    def to_env_vars(self) -> dict[str, str]:
        """Return the environment variable that names the folder."""
        return {_FOLDER: str(self.folder)}

    def note_running(self, run_name: str) -> None:
        """Write down the point that runs now; empty for none."""
        self._running.write_text(run_name)

    def running(self) -> str | None:
        """Return the point that was running last, None if there was none."""
        return _text(self._running)

    def note_workload(self, name: str) -> None:
        """Write down the name of the workload, which is known when it is loaded."""
        self._workload.write_text(name)

    def workload(self) -> str | None:
        """Return the name of the workload, None if it was not loaded."""
        return _text(self._workload)

    def ask_for_new_process(self) -> None:
        """Say that the points that are left need a new process."""
        self._again.touch()

    def asked_for_new_process(self) -> bool:
        """Return whether :meth:`ask_for_new_process` was called."""
        return self._again.exists()

    @staticmethod
    def _points(folder: Path) -> Path:
        return folder / "points.json"

    @property
    def _running(self) -> Path:
        return self.folder / "running"

    @property
    def _workload(self) -> Path:
        return self.folder / "workload"

    @property
    def _again(self) -> Path:
        return self.folder / "again"


def _text(path: Path) -> str | None:
    return (path.read_text() if path.exists() else "") or None

"""Exchange points and results between the runner and its measuring process."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FILE = "INT8BENCH_HANDOVER"
_RUNNING, _WORKLOAD, _AGAIN, _INTERRUPTED = "running", "workload", "again", "interrupted"
_RECORD, _JSON = "record", "json"


@dataclass(frozen=True)
class Handover:
    """A file with the points to run, to which the measuring process appends progress and results.

    It is in memory if the system supports that, so that a full disk costs no result and a killed
    runner leaves no file behind.
    """

    path: Path
    runner: int
    """Process id of the runner."""
    group: str
    run_names: list[str]
    journal: str | None
    """Path of the existing journal, or None without one."""
    wants_json: bool
    """Whether the runner needs pytest-benchmark's JSON."""

    @classmethod
    @contextmanager
    def start(
        cls,
        group: str,
        run_names: Sequence[str],
        *,
        journal: Path | None = None,
        wants_json: bool = False,
    ) -> Iterator[Handover]:
        """Write the points for a new process.

        Raises:
            OSError: if the disk is full and the system has no in-memory files.
        """
        with _exchange() as path:
            written = None if journal is None else str(journal)
            handover = cls(path, os.getpid(), group, [*run_names], written, wants_json)
            values = {k: v for k, v in vars(handover).items() if k != "path"}
            _append(path, json.dumps(values))
            yield handover

    @classmethod
    def from_env_vars(cls, environ: Mapping[str, str] = os.environ) -> Handover:
        """Read the points from the file that :meth:`to_env_vars` names.

        Raises:
            RuntimeError: if the variable is not set.
        """
        if _FILE not in environ:
            raise RuntimeError(
                "these tests can only be run by pytest_int8bench.ThroughputBenchmarkRunner, "
                f"which sets {_FILE}"
            )
        path = Path(environ[_FILE])
        with path.open("rb") as file:
            return cls(path, **json.loads(file.readline()))

    @staticmethod
    def is_given() -> bool:
        """Return whether the runner started this process."""
        return _FILE in os.environ

    def to_env_vars(self) -> dict[str, str]:
        """Return the environment variable that names the file."""
        return {_FILE: str(self.path)}

    def is_started_by(self, pid: int) -> bool:
        """Return whether the process ``pid`` wrote the points."""
        return pid == self.runner

    def note_running(self, run_name: str) -> None:
        """Record the run name of the current point; empty for none."""
        self._note(_RUNNING, run_name)

    def running(self) -> str | None:
        """Return the run name of the point that is running, or ran when the process ended; None
        if there is none."""
        return next(reversed(self._noted(_RUNNING)), None) or None

    def note_workload(self, name: str) -> None:
        """Record the name of the workload once it is loaded."""
        self._note(_WORKLOAD, name)

    def workload(self) -> str | None:
        """Return the name of the workload, or None if it was not loaded."""
        return next(reversed(self._noted(_WORKLOAD)), None)

    def ask_for_new_process(self) -> None:
        """Request a new process for the remaining points."""
        self._note(_AGAIN, True)

    def asked_for_new_process(self) -> bool:
        """Return whether :meth:`ask_for_new_process` was called."""
        return bool(self._noted(_AGAIN))

    def note_interrupted(self) -> None:
        """Record that Ctrl-C ended the process."""
        self._note(_INTERRUPTED, True)

    def is_interrupted(self) -> bool:
        """Return whether :meth:`note_interrupted` was called."""
        return bool(self._noted(_INTERRUPTED))

    def note_line(self, line: str) -> None:
        """Send a line of the journal to the runner."""
        self._note(_RECORD, json.loads(line))

    def lines(self) -> list[Any]:
        """Return the received lines of the journal as parsed JSON."""
        return self._noted(_RECORD)

    def note_json(self, values: Any) -> None:
        """Send pytest-benchmark's JSON to the runner."""
        self._note(_JSON, values)

    def json(self) -> dict[str, Any] | None:
        """Return pytest-benchmark's JSON, or None if the process ended before sending it."""
        return next(reversed(self._noted(_JSON)), None)

    def _note(self, kind: str, value: Any) -> None:
        # Keep measuring even if nothing can be written or the runner has been killed.
        try:
            _append(self.path, json.dumps({kind: value}))
        except OSError as error:
            if self.path.exists():
                what = f"int8bench: cannot send a {kind!r} message to the runner: {error}"
                warnings.warn(what, stacklevel=3)

    def _noted(self, kind: str) -> list[Any]:
        found = []
        for line in self.path.read_bytes().splitlines()[1:]:
            with contextlib.suppress(ValueError):  # incomplete line of a killed process
                values = json.loads(line)
                found += [values[kind]] if kind in values else []
        return found


def _append(path: Path, line: str) -> None:
    with path.open("ab", buffering=0) as file:
        file.write(f"{line}\n".encode())


@contextmanager
def _exchange() -> Iterator[Path]:
    """Create an empty file that this process and its children can open."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("int8bench")
        try:
            path = Path(f"/proc/{os.getpid()}/fd/{descriptor}")
            if path.exists():
                yield path
                return
        finally:
            os.close(descriptor)
    with tempfile.TemporaryDirectory(prefix="int8bench-") as folder:
        path = Path(folder, "handover.jsonl")
        path.touch()
        yield path

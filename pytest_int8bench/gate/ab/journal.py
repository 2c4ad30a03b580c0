"""Save the processes of an A/B comparison, so that the same command can resume it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pytest_int8bench.errors import ClearError
from pytest_int8bench.files import LineFile, create, timestamp
from pytest_int8bench.gate.renames import Renames
from pytest_int8bench.printing import cleaned
from pytest_int8bench.results.lines import unwrapped, wrapped
from pytest_int8bench.results.records import KINDS, Saved, Timed

SCHEMA = 1
"""Schema of the JSON that a comparison writes."""
JOURNAL_SCHEMA = 2
"""Schema of the journal. In 1, verdict blocks had three processes in a fixed order."""
_FINISHED = json.dumps({"finished": True})

Identity = tuple[str, str]


class AbError(ClearError, RuntimeError):
    """Raised for a comparison that is not possible, or not within its budget."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """One measuring process that has finished."""

    stage: str
    block: int
    attempt: int
    position: int
    """Index in the block's order."""
    side: str
    seconds: float
    results: tuple[Timed, ...]

    def by_identity(self) -> dict[Identity, Timed]:
        """Map node id and workload to the result."""
        return {(result.nodeid, result.workload): result for result in self.results}


class AbJournal:
    """File to which each process is appended as soon as it has finished."""

    def __init__(self, path: Path, header: Mapping[str, Any], tell: Callable[[str], None]) -> None:
        self.environment: dict[str, Any] | None = None
        self.notes: list[str] = []
        self._processes: list[Process] = []
        self._renames: Renames | None = None
        self._is_finished = False
        self._header = json.dumps({"int8bench_ab": {"schema": JOURNAL_SCHEMA, **header}})
        self._tell = tell
        self._file = LineFile(path, self._lines, mark=self._header, size=None)

    @property
    def path(self) -> Path:
        return self._file.path

    @property
    def processes(self) -> list[Process]:
        """Finished processes, including those of interrupted commands."""
        return [self.named(process) for process in self._processes]

    def match_names(self, processes: Iterable[Process]) -> None:
        """Apply the newer of the two sides' names to points that were renamed between them."""
        self._renames = Renames(result for process in processes for result in process.results)
        self.notes += self._renames.lines

    def named(self, process: Process) -> Process:
        """Return a process with the names that :meth:`match_names` chose."""
        if self._renames is None:
            return process
        return replace(process, results=tuple(map(self._renames.of, process.results)))

    def nodeids(self, identities: Iterable[Identity]) -> list[str]:
        """Return the node ids of runs, including their names on the other side."""
        now = {nodeid for nodeid, _ in identities}
        renames = self._renames.nodeids if self._renames is not None else {}
        return sorted(now | {old for old, new in renames.items() if new in now})

    @classmethod
    @contextmanager
    def open(
        cls, folder: Path, key: str, header: Mapping[str, Any], tell: Callable[[str], None]
    ) -> Iterator[AbJournal]:
        """Resume the journal of an interrupted comparison, or start a new one.

        Args:
            folder: folder with the journals.
            key: :attr:`.plan.Plan.key` of the comparison.
            header: values to write at the start of a new journal.
            tell: called with progress messages, one line each.

        Raises:
            AbError: if a new journal cannot be written, or the old one is damaged.
        """
        found = sorted(folder.glob(f"{key}-*.jsonl"), key=lambda path: path.stem)
        journal = cls(found[-1], header, tell) if found else None
        if journal is None or not journal._read(tell):
            stamp = timestamp()
            number = sum(stamp in path.name for path in found)
            path = folder / f"{key}-{stamp}{f'-{number}' if number else ''}.jsonl"
            journal = cls(path, header, tell)
            try:
                create(path, f"{journal._header}\n")
            except OSError as error:
                raise AbError(f"cannot write {path}: {error.strerror}") from None
            journal._file = LineFile(
                path, journal._lines, mark=journal._header, size=path.stat().st_size
            )
        elif journal.processes:
            tell(f"resuming with {len(journal.processes)} processes from {journal.path}")
        try:
            yield journal
        except BaseException:
            if journal.processes and journal._is_saved():
                tell(
                    f"{len(journal.processes)} processes are saved in {journal.path}; run the same "
                    "command again to resume"
                )
            raise

    def _read(self, tell: Callable[[str], None]) -> bool:
        """Read the journal of an earlier command, and return whether it can be resumed.

        Raises:
            AbError: if the file is damaged.
        """
        path = self.path
        text = path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:  # a command was killed while it wrote the last line
            os.truncate(path, len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                record = cleaned(json.loads(line))
                if "finished" in record:
                    return False
                if "environment" in record:
                    self.environment = record["environment"]
                elif number > 1:
                    lines = map(unwrapped, record.pop("results"))
                    records = [KINDS[kind].from_dict(values) for kind, values in lines]
                    results = tuple(Saved.of({}, records).timed)
                    self._processes.append(Process(**record, results=results))
                elif (schema := record["int8bench_ab"]["schema"]) != JOURNAL_SCHEMA:
                    tell(
                        f"{path} was written by another version of int8bench ab (schema {schema} "
                        f"instead of {JOURNAL_SCHEMA}): keeping it, and starting a new journal"
                    )
                    return False
            except (ValueError, TypeError, LookupError, AttributeError):
                raise AbError(
                    f"{path} is damaged (line {number}); remove it to start over"
                ) from None
        self._header = whole.partition(b"\n")[0].decode()
        self._file = LineFile(path, self._lines, mark=self._header, size=len(whole))
        return bool(whole)

    def add(self, process: Process, environment: dict[str, Any]) -> None:
        """Append a finished process.

        Raises:
            AbError: if it cannot be written. Closing the journal tries once more.
        """
        if self.environment is None:
            self.environment = environment
            self._write(_environment_line(environment))
        self._processes.append(process)
        self._write(_process_line(process))

    def finish(self) -> None:
        """Mark the comparison as finished, so that the same command starts a new one."""
        self._is_finished = True
        with suppress(AbError):  # do not lose the result, which is shown next
            self._write(_FINISHED)
        self._is_saved()

    def _lines(self) -> Iterator[str]:
        yield self._header
        if self.environment is not None:
            yield _environment_line(self.environment)
        yield from map(_process_line, self._processes)
        if self._is_finished:
            yield _FINISHED

    def _write(self, line: str) -> None:
        try:
            self._file.add(line)
        except OSError as error:
            raise AbError(f"cannot write {self.path}: {error.strerror or error}") from None

    def _is_saved(self) -> bool:
        """Write the lines that the file lacks; report a failure and return whether it succeeded."""
        try:
            self._file.save()
        except OSError as error:
            lacking = min(self._file.lacking(), len(self._processes))
            self._tell(
                f"cannot write {lacking} of {len(self._processes)} processes to {self.path}: "
                f"{error.strerror or error}"
            )
            return False
        return True


def _environment_line(environment: Mapping[str, Any]) -> str:
    return json.dumps({"environment": environment})


def _process_line(process: Process) -> str:
    record = {name: getattr(process, name) for name in process.__dataclass_fields__}
    return json.dumps({**record, "results": [wrapped(result) for result in process.results]})

"""Keep on disk what an A/B has measured, so that the same command continues an interrupted one."""

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
"""Of the JSON that a comparison writes."""
JOURNAL_SCHEMA = 2
"""Of the journal. With 1, verdict blocks had three processes, in an order that was not drawn."""
_FINISHED = json.dumps({"finished": True})

Identity = tuple[str, str]


class AbError(ClearError, RuntimeError):
    """A comparison that cannot be made, or not with this budget."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """One process that measured."""

    stage: str
    block: int
    attempt: int
    position: int
    """In the block's order."""
    side: str
    seconds: float
    results: tuple[Timed, ...]

    def by_identity(self) -> dict[Identity, Timed]:
        """Return the results by node id and workload."""
        return {(result.nodeid, result.workload): result for result in self.results}


class AbJournal:
    """Keeps each finished process on disk at once."""

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
        """The file."""
        return self._file.path

    @property
    def processes(self) -> list[Process]:
        """The processes that finished."""
        return [self.named(process) for process in self._processes]

    def match_names(self, processes: Iterable[Process]) -> None:
        """Let one side's points have the other side's names, where these are newer."""
        self._renames = Renames(result for process in processes for result in process.results)
        self.notes += self._renames.lines

    def named(self, process: Process) -> Process:
        """Return a process with the names of :meth:`match_names`."""
        if self._renames is None:
            return process
        return replace(process, results=tuple(map(self._renames.of, process.results)))

    def nodeids(self, identities: Iterable[Identity]) -> list[str]:
        """Return the node ids of runs, on both sides."""
        now = {nodeid for nodeid, _ in identities}
        renames = self._renames.nodeids if self._renames is not None else {}
        return sorted(now | {old for old, new in renames.items() if new in now})

    @classmethod
    @contextmanager
    def open(
        cls, folder: Path, key: str, header: Mapping[str, Any], tell: Callable[[str], None]
    ) -> Iterator[AbJournal]:
        """Go on with the journal of an interrupted comparison, or start a new one.

        Args:
            folder: where journals are.
            key: what makes two commands the same comparison.
            header: what is written at the start of a new one.
            tell: called with a line for each thing that happens.

        Raises:
            AbError: if a new one cannot be written.
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
                raise AbError(f"{path} cannot be written: {error.strerror}") from None
            journal._file = LineFile(
                path, journal._lines, mark=journal._header, size=path.stat().st_size
            )
        elif journal.processes:
            tell(f"going on with {len(journal.processes)} processes of {journal.path}")
        try:
            yield journal
        except BaseException:
            if journal.processes and journal._is_saved():
                tell(
                    f"{len(journal.processes)} processes are in {journal.path}: the same command "
                    "goes on from there"
                )
            raise

    def _read(self, tell: Callable[[str], None]) -> bool:
        """Read what an earlier command wrote; return whether it can be gone on with.

        Raises:
            AbError: if the file is damaged.
        """
        path = self.path
        text = path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:  # half a line, of a process that was killed
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
                        f"{path} is of another version of int8bench ab (journal {schema}, "
                        f"this one writes {JOURNAL_SCHEMA}): it stays there, and a new one is begun"
                    )
                    return False
            except (ValueError, TypeError, LookupError, AttributeError):
                raise AbError(
                    f"{path} is damaged (line {number}): remove it to begin anew"
                ) from None
        self._header = whole.partition(b"\n")[0].decode()
        self._file = LineFile(path, self._lines, mark=self._header, size=len(whole))
        return bool(whole)

    def add(self, process: Process, environment: dict[str, Any]) -> None:
        """Keep a finished process.

        Raises:
            AbError: if it cannot be written; that is tried once more when the journal is closed.
        """
        if self.environment is None:
            self.environment = environment
            self._write(_environment_line(environment))
        self._processes.append(process)
        self._write(_process_line(process))

    def finish(self) -> None:
        """Note that the comparison is over: the same command starts a new one."""
        self._is_finished = True
        with suppress(AbError):  # the result is still to be shown
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
            raise AbError(f"{self.path} cannot be written: {error.strerror or error}") from None

    def _is_saved(self) -> bool:
        """Write what the file lacks; return whether all is there, and say so if not."""
        try:
            self._file.save()
        except OSError as error:
            lacking = min(self._file.lacking(), len(self._processes))
            self._tell(
                f"{self.path} lacks {lacking} of {len(self._processes)} processes: "
                f"{error.strerror or error}"
            )
            return False
        return True


def _environment_line(environment: Mapping[str, Any]) -> str:
    return json.dumps({"environment": environment})


def _process_line(process: Process) -> str:
    record = {name: getattr(process, name) for name in process.__dataclass_fields__}
    return json.dumps({**record, "results": [wrapped(result) for result in process.results]})

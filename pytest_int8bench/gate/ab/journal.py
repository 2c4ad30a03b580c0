"""Keep on disk what an A/B has measured, so that the same command continues an interrupted one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_int8bench.errors import ClearError
from pytest_int8bench.files import append_text, timestamp
from pytest_int8bench.printing import cleaned
from pytest_int8bench.results.records import Result

SCHEMA = 1
"""Of the JSON that a comparison writes."""
JOURNAL_SCHEMA = 2
"""Of the journal. With 1, verdict blocks had three processes, in an order that was not drawn."""

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
    results: tuple[Result, ...]

    def by_identity(self) -> dict[Identity, Result]:
        """Return the results by node id and workload."""
        return {(result.nodeid, result.workload): result for result in self.results}


class AbJournal:
    """Keeps each finished process on disk at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.environment: dict[str, Any] | None = None
        self.processes: list[Process] = []
        self.notes: list[str] = []

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
        """
        found = sorted(folder.glob(f"{key}-*.jsonl"), key=lambda path: path.stem)
        journal = cls(found[-1]) if found else None
        if journal is None or not journal._read(tell):
            stamp = timestamp()
            number = sum(stamp in path.name for path in found)
            journal = cls(folder / f"{key}-{stamp}{f'-{number}' if number else ''}.jsonl")
            journal._write({"int8bench_ab": {"schema": JOURNAL_SCHEMA, **header}})
        elif journal.processes:
            tell(f"going on with {len(journal.processes)} processes of {journal.path}")
        try:
            yield journal
        except BaseException:
            if journal.processes:
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
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:  # half a line, of a process that was killed
            os.truncate(self.path, len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                record = cleaned(json.loads(line))
                if "finished" in record:
                    return False
                if "environment" in record:
                    self.environment = record["environment"]
                elif number > 1:
                    results = tuple(map(Result.from_dict, record.pop("results")))
                    self.processes.append(Process(**record, results=results))
                elif (schema := record["int8bench_ab"]["schema"]) != JOURNAL_SCHEMA:
                    tell(
                        f"{self.path} is of another version of int8bench ab (journal {schema}, "
                        f"this one writes {JOURNAL_SCHEMA}): it stays there, and a new one is begun"
                    )
                    return False
            except (ValueError, TypeError, LookupError, AttributeError):
                raise AbError(
                    f"{self.path} is damaged (line {number}): remove it to begin anew"
                ) from None
        return bool(whole)

    def add(self, process: Process, environment: dict[str, Any]) -> None:
        """Keep a finished process."""
        if self.environment is None:
            self.environment = environment
            self._write({"environment": environment})
        self.processes.append(process)
        record = {name: getattr(process, name) for name in process.__dataclass_fields__}
        self._write({**record, "results": [result.to_dict() for result in process.results]})

    def finish(self) -> None:
        """Note that the comparison is over: the same command starts a new one."""
        self._write({"finished": True})

    def _write(self, record: Mapping[str, Any]) -> None:
        try:
            append_text(self.path, json.dumps(record) + "\n")
        except OSError as error:
            raise AbError(f"{self.path} cannot be written: {error.strerror}") from None

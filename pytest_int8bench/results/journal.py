"""The journal: a file to which each record is appended as soon as it exists."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pytest_int8bench.files import LineFile, create
from pytest_int8bench.results.base import Record
from pytest_int8bench.results.lines import wrapped
from pytest_int8bench.results.reading import read
from pytest_int8bench.results.records import (
    KINDS,
    SCHEMA,
    AnyRecord,
    Result,
    Saved,
    latest,
)
from pytest_int8bench.results.verdicts import Accuracy
from pytest_int8bench.words import plural

#: Folder of journals, relative to the root of the project.
DEFAULT_FOLDER = Path(".benchmarks") / "int8bench"


class Journal:
    """Appends each record to a file immediately, so that a crash cannot lose finished records. If
    several records have the same identity, readers keep only the last.
    """

    def __init__(self, path: Path | None, environment: Mapping[str, Any]) -> None:
        """Start a journal in a new file, or only in memory if ``path`` is None.

        Raises:
            OSError: if the file cannot be created; ``FileExistsError`` if it already exists.
        """
        self.environment = dict(environment)
        self.order: Mapping[str, int] = {}
        """Node id -> position among the tests, by which results are sorted if tests finish in
        another order."""
        self.tell: Callable[[str], None] | None = None
        """Called with each line that is written, even if writing it to the file fails."""
        self._time = datetime.now(UTC).isoformat()
        self._records: list[Record] = []
        self._file: LineFile | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            create(path, self.text())
            self._file = self._line_file(path, len(self.text().encode()))

    @classmethod
    def reopen(cls, path: Path) -> Journal:
        """Continue the journal of a process that has ended, perhaps in the middle of a line.

        Raises:
            SchemaError: if ``path`` is not a journal.
            OSError: if it cannot be read.
        """
        saved = read(path)
        text = path.read_text(encoding="utf-8")
        journal = cls(None, saved.environment)
        journal._time = json.loads(text.partition("\n")[0])["int8bench"]["datetime"]
        journal._records = saved.records
        is_whole = text.endswith("\n") and not saved.skipped
        journal._file = journal._line_file(path, len(text.encode()) if is_whole else None)
        return journal

    def _line_file(self, path: Path, size: int | None) -> LineFile:
        # The start time includes microseconds, so no other journal starts with the same text.
        mark = self._header().partition('"environment"')[0]
        return LineFile(path, self._lines, mark=mark, size=size)

    def _header(self) -> str:
        header = {"schema": SCHEMA, "datetime": self._time, "environment": self.environment}
        return json.dumps({"int8bench": header})

    def _lines(self) -> Iterator[str]:
        yield self._header()
        # Write results first, as older versions did.
        kinds = list(KINDS.values())
        for record in sorted(self._records, key=lambda record: kinds.index(type(record))):
            yield _line_of(record)

    @property
    def path(self) -> Path | None:
        """The file, or None for a journal in memory."""
        return None if self._file is None else self._file.path

    def begin(self, environment: Mapping[str, Any]) -> None:
        """Set the fingerprint of a journal that was started before the fingerprint was known.

        Raises:
            OSError: if writing fails; the fingerprint is then written with the next record.
        """
        self.environment = dict(environment)
        if self.tell is not None:
            self.tell(self._header())
        if self._file is not None:
            self._file.rewrite()

    @property
    def results(self) -> list[Result]:
        """The latest result of each node, in the order in which they finished."""
        return latest(self._of(Result))

    @property
    def accuracy(self) -> list[Accuracy]:
        """The latest verdict of each node and metric, in the order in which they finished."""
        return latest(self._of(Accuracy))

    def _of(self, kind: type[AnyRecord]) -> list[AnyRecord]:
        return [record for record in self._records if isinstance(record, kind)]

    def append(self, record: Record) -> None:
        """Keep ``record`` in memory and append it to the file."""
        self._records.append(record)  # first, to keep it even if writing fails
        self._write(_line_of(record))

    def records_of(self, nodeid: str) -> list[Record]:
        """Return all records of a test so far."""
        return [record for record in self._records if record.nodeid == nodeid]

    def withdraw(self, records: Iterable[Record]) -> None:
        """Remove records of a test that is run again, both from memory and from the file.

        Raises:
            OSError: if the file cannot be written, in which case it is unchanged.
        """
        gone = {id(record) for record in records}
        self._records = [record for record in self._records if id(record) not in gone]
        if self._file is not None and gone:
            self._file.rewrite()

    def text(self) -> str:
        """Return the complete text of the file."""
        return "".join(f"{line}\n" for line in self._lines())

    def problem(self) -> str | None:
        """Write all records that the file lacks. Return one line that describes the problem if that
        fails, else None."""
        if self._file is None:
            return None
        try:
            self._file.save()
        except OSError as error:
            count = len(self._records)
            lacking = min(self._file.lacking(), count)
            what = f"lacks {lacking} of {plural(count, 'record')}" if lacking else "is out of date"
            return f"{what}: {error.strerror or error}"
        return None

    def discard(self) -> None:
        """Remove the file if there are no records."""
        if self._file is not None and not self._records:
            with contextlib.suppress(OSError):
                self._file.remove()

    def saved(self) -> Saved:
        """Return the content for the JSON file."""
        kinds = KINDS.values()
        found = [r for kind in kinds for r in self._in_order(latest(self._of(kind)))]
        return Saved.of(self.environment, found).cleaned()

    def _in_order(self, records: list[AnyRecord]) -> list[AnyRecord]:
        return sorted(records, key=lambda record: self.order.get(record.nodeid, -1))

    def _write(self, line: str) -> None:
        if self.tell is not None:
            self.tell(line)
        if self._file is not None:
            self._file.add(line)


def _line_of(record: Record) -> str:
    return json.dumps(wrapped(record))


def journal_folder(root: Path) -> Path:
    """Create and return the default folder of journals, which git ignores.

    Raises:
        OSError: if it cannot be created.
    """
    folder = root / DEFAULT_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    # create() does not follow symbolic links.
    with contextlib.suppress(FileExistsError):
        create(folder / ".gitignore", "*\n")
    return folder

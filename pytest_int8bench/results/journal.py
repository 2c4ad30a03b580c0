"""Append each record to a file as soon as it exists."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pytest_int8bench.files import append_text, replace_text
from pytest_int8bench.results.reading import read
from pytest_int8bench.results.records import (
    ACCURACY,
    SCHEMA,
    SENSITIVITY,
    AnyRecord,
    Result,
    Saved,
    latest,
)
from pytest_int8bench.results.verdicts import Accuracy, Sensitivity

_FOLDER = Path(".benchmarks") / "int8bench"


class Journal:
    """Appends each record to a file at once, so that no crash loses a finished one.

    A later record of the same identity replaces the earlier one for readers.
    """

    def __init__(self, path: Path | None, environment: Mapping[str, Any]) -> None:
        """Start a journal in a new file; None keeps the results in memory only.

        Raises:
            OSError: if the file cannot be made, ``FileExistsError`` if it is there already.
        """
        self.path = path
        self.environment = dict(environment)
        self.order: Mapping[str, int] = {}
        """Places of node ids among the tests, where those finish in another order."""
        self._results: list[Result] = []
        self._accuracy: list[Accuracy] = []
        self._sensitivity: list[Sensitivity] = []
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(exist_ok=False)
        now = datetime.now(UTC).isoformat()
        header = {"schema": SCHEMA, "datetime": now, "environment": self.environment}
        self._header = json.dumps({"int8bench": header})
        self._write(self._header)

    @classmethod
    def reopen(cls, path: Path) -> Journal:
        """Go on with the journal of a process that ended, perhaps in the middle of a line.

        Raises:
            SchemaError: if ``path`` is not a journal.
        """
        saved = read(path)
        text = path.read_text(encoding="utf-8")
        whole, _, last = text.rpartition("\n")
        try:
            json.loads(last)
        except ValueError:
            replace_text(path, f"{whole}\n")
        else:  # only the end of its line is missing
            replace_text(path, f"{text}\n")
        journal = cls(None, saved.environment)
        journal.path = path
        journal._header = text.partition("\n")[0]
        journal._results = saved.results
        journal._accuracy = saved.accuracy
        journal._sensitivity = saved.sensitivity
        return journal

    @property
    def results(self) -> list[Result]:
        """The latest result of each node, in the order they finished."""
        return latest(self._results)

    @property
    def accuracy(self) -> list[Accuracy]:
        """The latest verdict of each node and metric, in the order they finished."""
        return latest(self._accuracy)

    def append(self, record: Result | Accuracy | Sensitivity) -> None:
        """Write ``record`` to disk."""
        # What cannot be written is still kept.
        if isinstance(record, Result):
            self._results.append(record)
        elif isinstance(record, Accuracy):
            self._accuracy.append(record)
        else:
            self._sensitivity.append(record)
        self._write(_line_of(record))

    def records_of(self, nodeid: str) -> list[Result | Accuracy | Sensitivity]:
        """Return all records of a test so far, of every kind."""
        return [record for record in self._records if record.nodeid == nodeid]

    def withdraw(self, records: Iterable[Result | Accuracy | Sensitivity]) -> None:
        """Take back records of a test that was run again, also from the file.

        Raises:
            OSError: if the file cannot be written; it is as it was.
        """
        gone = {id(record) for record in records}
        self._results = [r for r in self._results if id(r) not in gone]
        self._accuracy = [r for r in self._accuracy if id(r) not in gone]
        self._sensitivity = [r for r in self._sensitivity if id(r) not in gone]
        if self.path is not None and gone:
            lines = [self._header, *map(_line_of, self._records)]
            replace_text(self.path, "".join(f"{line}\n" for line in lines))

    @property
    def _records(self) -> list[Result | Accuracy | Sensitivity]:
        return [*self._results, *self._accuracy, *self._sensitivity]

    def saved(self) -> Saved:
        """Return what the JSON is to hold."""
        return Saved(
            self.environment,
            self._in_order(self.results),
            self._in_order(self.accuracy),
            self._in_order(latest(self._sensitivity)),
        ).cleaned()

    def _in_order(self, records: list[AnyRecord]) -> list[AnyRecord]:
        return sorted(records, key=lambda record: self.order.get(record.nodeid, -1))

    def _write(self, line: str) -> None:
        if self.path is not None:
            append_text(self.path, f"{line}\n")


def _line_of(record: Result | Accuracy | Sensitivity) -> str:
    if isinstance(record, Result):
        return json.dumps(record.to_dict())
    kind = ACCURACY if isinstance(record, Accuracy) else SENSITIVITY
    return json.dumps({kind: record.to_dict()})


def journal_folder(root: Path) -> Path:
    """Make the folder that journals go to by default, out of sight of git, and return it.

    Raises:
        OSError: if it cannot be made.
    """
    folder = root / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    # "x", so that nothing is written through a symbolic link.
    with (
        contextlib.suppress(FileExistsError),
        open(folder / ".gitignore", "x", encoding="utf-8") as file,
    ):
        file.write("*\n")
    return folder

"""The files of one sweep of the runner: a journal for each process, and one JSON file for all."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pytest_int8bench.files import PASSING, create, replace_text
from pytest_int8bench.printing import cleaned
from pytest_int8bench.processes.runner_files import Handover
from pytest_int8bench.results.base import SchemaError
from pytest_int8bench.results.journal import Journal
from pytest_int8bench.results.lines import unwrapped
from pytest_int8bench.results.reading import read
from pytest_int8bench.results.records import Result, Saved
from pytest_int8bench.words import plural


class Part:
    """The results that one process handed over, and its journal.

    Attributes:
        path: the journal's file; None if it could not be created because the disk was full.
    """

    def __init__(self, journal: Journal, path: Path | None) -> None:
        self.path = path
        self.json: dict[str, Any] | None = None
        self._journal = journal

    @property
    def results(self) -> list[Result]:
        """The results of the process."""
        return self._journal.results

    @property
    def environment(self) -> dict[str, Any]:
        """The fingerprint of the process; empty if it ended before it had one."""
        return self._journal.environment

    def take(self, handover: Handover) -> None:
        """Take the JSON and the journal's lines that the process handed over."""
        self.json = handover.json()
        for line in map(cleaned, handover.lines()):
            if "int8bench" in line:
                self._journal.begin(line["int8bench"]["environment"])
            elif unwrapped(line)[0] == "results":
                self._journal.append(Result.from_dict(line))

    def add(self, result: Result) -> None:
        """Add the result of a point that crashed the process, and write it to the file."""
        self._journal.append(result)
        self.save()

    def save(self) -> str | None:
        """Rewrite the journal from memory if the file is incomplete. Return one line that describes
        the problem if that fails, else None."""
        if self.path is None:
            return None
        there = self._there()
        if there == self.results:
            return None
        try:
            replace_text(self.path, self._journal.text())
        except OSError as error:
            count = len(self.results)
            lacking = sum(result not in there for result in self.results)
            return (
                f"{self.path} lacks {lacking} of {plural(count, 'result')}: "
                f"{error.strerror or error}"
            )
        return None

    def reserve(self, path: Path) -> None:
        """Create the file.

        Raises:
            OSError: if it cannot be created; ``FileExistsError`` if it already exists.
        """
        create(path, self._journal.text())
        self.path = path

    def _there(self) -> list[Result]:
        try:
            return read(self.path).results if self.path is not None else []
        except (OSError, SchemaError):
            return []


class SweepFiles:
    """The files of a sweep, with names that no other sweep in the folder uses."""

    def __init__(self, folder: Path, stem: str) -> None:
        self.parts: list[Part] = []
        self._folder = folder
        self._wanted = stem
        self._stem: str | None = None
        """Common start of the file names; None until the first journal reserves it."""

    @property
    def found(self) -> dict[str, Result]:
        """Run name -> result."""
        return {result.run_name: result for part in self.parts for result in part.results}

    def begin(self) -> Part:
        """Start the journal of the next process; if the disk is full, keep it only in memory.

        Raises:
            OSError: if the folder is permanently unwritable (a full disk is considered temporary).
        """
        part = Part(Journal(None, {}), None)
        try:
            self._reserve(part)
        except OSError as error:
            if error.errno not in PASSING:
                raise
        self.parts.append(part)
        return part

    def _reserve(self, part: Part) -> None:
        number = len(self.parts) + 1 if part not in self.parts else self.parts.index(part) + 1
        if self._stem is not None:
            part.reserve(self._folder / f"{self._stem}-{number}.jsonl")
            return
        for count in itertools.count(1):
            stem = f"{self._wanted}_{count}" if count > 1 else self._wanted
            if any(self._folder.glob(f"{stem}[.-]*")):
                continue
            try:
                part.reserve(self._folder / f"{stem}.jsonl")
            except FileExistsError:  # another sweep has just taken this name
                continue
            self._stem = stem
            return

    def save_journals(self) -> tuple[list[Path], list[str]]:
        """Complete the journals on disk, and remove those without results. Return the paths of the
        remaining journals, and one line for each problem."""
        paths, problems = [], []
        for part in self.parts:
            if not part.results:
                if part.path is not None:
                    part.path.unlink(missing_ok=True)
                continue
            try:
                if part.path is None:
                    self._folder.mkdir(parents=True, exist_ok=True)
                    self._reserve(part)
            except OSError as error:
                count = plural(len(part.results), "result")
                problems.append(f"cannot write a journal of {count}: {error}")
            if problem := part.save():
                problems.append(problem)
            if part.path is not None and part.path.exists():
                paths.append(part.path)
        return paths, problems

    def saved(self, results: Sequence[Result]) -> Saved:
        """Return the content for the JSON file."""
        found = [part.environment for part in self.parts if part.environment]
        return Saved(found[0] if found else {}, [*results], []).cleaned()

    def save_json(self, saved: Saved) -> tuple[Path | None, list[str]]:
        """Write the JSON atomically. Return its path and an empty list, or None and one line that
        gives the reason."""
        path = self._folder / f"{self._stem or self._wanted}.json"
        parts = [part.json for part in self.parts if part.json is not None]
        try:
            replace_text(path, json.dumps(_merged(parts, saved), indent=2))
        except OSError as error:
            return None, [f"cannot write {path}: {error.strerror or error}"]
        return path, []


def _head() -> dict[str, Any]:
    """Return the fields that pytest-benchmark requires around ``benchmarks``, for a sweep in which
    no process survived to write them."""
    now = datetime.now(UTC).isoformat()
    version = importlib.metadata.version("pytest-benchmark")
    return {"machine_info": {}, "commit_info": {}, "datetime": now, "version": version}


def _merged(parts: Sequence[Mapping[str, Any]], saved: Saved) -> dict[str, Any]:
    """Merge pytest-benchmark's JSONs of several processes on one machine into one."""
    benchmarks = [benchmark for part in parts for benchmark in part["benchmarks"]]
    head = parts[-1] if parts else _head()
    return {**head, "benchmarks": benchmarks, "int8bench": saved.to_dict()}

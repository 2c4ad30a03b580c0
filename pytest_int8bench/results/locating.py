"""Find and read the saved files to compare."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pytest_int8bench.files import FileError, real_path
from pytest_int8bench.results.base import SchemaError
from pytest_int8bench.results.reading import read
from pytest_int8bench.results.records import Saved
from pytest_int8bench.words import plural

_NUMBER = re.compile(r"[0-9]{4}|[1-9][0-9]{4,}")
# pytest-benchmark's file names start with a number of four digits, or more above 9999.
_NUMBERED = re.compile(rf"({_NUMBER.pattern})_.*\.json")


@dataclass(frozen=True)
class Run:
    """A saved file with the measurements of one process."""

    path: Path
    saved: Saved


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read saved files.

    Raises:
        SchemaError: one line, if a file is damaged or not ours.
        OSError: if a file cannot be read.
    """
    return [Run(path, read(path)) for path in paths]


def find(name: str, storage: Path, *, journals: bool = False) -> list[Path]:
    """Return the saved files that ``name`` refers to.

    Args:
        name: a file, a folder of JSON files, or a run number of pytest-benchmark such as ``0003``.
        storage: pytest-benchmark's folder of saved files.
        journals: whether to include the journals in a folder.

    Raises:
        FileError: one line, if there are none.
    """
    if not name:
        raise FileError("must be a file, a folder or a pytest-benchmark run number, got ''")
    path = Path(name)
    if path.is_dir():
        found = [*path.glob("*.json"), *(path.glob("*.jsonl") if journals else ())]
        if found:
            return sorted(found)
        raise FileError(f"{name} contains no JSON files{' or journals' if journals else ''}")
    if path.exists():
        return [path]
    if _NUMBER.fullmatch(name):
        found = sorted(storage.glob(f"*/{name}_*.json"))
        if len(found) > 1:
            raise FileError(f"{name} is ambiguous; name one of {', '.join(map(str, found))}")
        if found:
            return found
        raise FileError(f"{storage} contains no file with number {name}")
    raise FileError(f"{name} does not exist")


def find_side(names: Sequence[str], storage: Path) -> list[Path]:
    """Return the saved files of one side (base or new) of a comparison.

    Raises:
        FileError: one line, if a file does not exist or is given twice, which would make the noise
            look too small.
    """
    paths = [path for name in names for path in find(name, storage)]
    if len({real_path(path) for path in paths}) < len(paths):
        raise FileError(f"one side has the same file twice: {', '.join(map(str, paths))}")
    return paths


def latest_two(storage: Path) -> tuple[Path, Path]:
    """Return the two files that pytest-benchmark saved last on one machine, the older one first.

    They are found by their numbers. Other names can look numbered too, such as
    ``2024_results.json``, so the times in the files must agree with the numbers.

    Raises:
        FileError: one line, if there are fewer than two files, or numbers and times disagree.
    """
    numbers = {path: int(m[1]) for path in storage.glob("*/*.json") if (m := _numbered(path))}
    if numbers:
        newest = max(numbers, key=_modified)
        numbers = {path: n for path, n in numbers.items() if path.parent == newest.parent}
    if len(numbers) < 2:
        raise FileError(
            f"{storage} contains {plural(len(numbers), 'numbered file')} to compare, but two are "
            "needed; save them with --benchmark-autosave, or name BASE and NEW"
        )
    # pytest-benchmark does not count beyond 10000, so several files can have that number.
    base, new = sorted(numbers, key=lambda path: (numbers[path], _modified(path), path))[-2:]
    others = sorted(numbers, key=_modified)[-2:]
    times = {path: time for path in (base, new, *others) if (time := _time(path)) is not None}
    by_time = sorted(times, key=times.__getitem__)[-2:]
    if len({numbers[path] for path in (base, new, *by_time)}) == 1 and len(by_time) == 2:
        base, new = by_time
    if base in times and new in times and by_time != [base, new]:
        raise FileError(
            f"the latest two files in {new.parent} are {base.name} and {new.name} by number, but "
            f"{by_time[0].name} and {by_time[1].name} by the times in them; name BASE and NEW"
        )
    return base, new


def _numbered(path: Path) -> re.Match[str] | None:
    return _NUMBERED.fullmatch(path.name)


def _modified(path: Path) -> float:
    return path.stat().st_mtime


def _time(path: Path) -> datetime | None:
    """Return the time at which a file was saved, or None if it has none or cannot be read."""
    try:
        return read(path).time
    except (OSError, SchemaError):
        return None

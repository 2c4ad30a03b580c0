"""Find the saved files that are to be compared, and read them."""

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

_NUMBER = re.compile(r"[0-9]{4}|[1-9][0-9]{4,}")
# As pytest-benchmark names what it saves: four digits or, past 9999, more, and what comes after.
_NUMBERED = re.compile(rf"({_NUMBER.pattern})_.*\.json")


@dataclass(frozen=True)
class Run:
    """One saved file: what one process measured."""

    path: Path
    saved: Saved


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read saved files.

    Raises:
        SchemaError: one line, if a file is damaged or not ours.
        OSError: if one cannot be read.
    """
    return [Run(path, read(path)) for path in paths]


def find(name: str, storage: Path, *, journals: bool = False) -> list[Path]:
    """Return the saved files that ``name`` stands for.

    Args:
        name: a file, a folder of JSON files, or a number of pytest-benchmark, such as ``0003``.
        storage: pytest-benchmark's folder.
        journals: a folder stands for its journals too.

    Raises:
        FileError: if there is none.
    """
    if not name:
        raise FileError("must be a file, a folder or a number of pytest-benchmark, got ''")
    path = Path(name)
    if path.is_dir():
        found = [*path.glob("*.json"), *(path.glob("*.jsonl") if journals else ())]
        if found:
            return sorted(found)
        raise FileError(f"{name} holds no JSON file{' and no journal' if journals else ''}")
    if path.exists():
        return [path]
    if _NUMBER.fullmatch(name):
        found = sorted(storage.glob(f"*/{name}_*.json"))
        if len(found) > 1:
            raise FileError(f"{name} is ambiguous, name one of {', '.join(map(str, found))}")
        if found:
            return found
        raise FileError(f"{storage} holds no file with number {name}")
    raise FileError(f"{name} is not there")


def find_side(names: Sequence[str], storage: Path) -> list[Path]:
    """Return the saved files of one side.

    Raises:
        FileError: if one is not there, or given twice, which would pass for a lack of noise.
    """
    paths = [path for name in names for path in find(name, storage)]
    if len({real_path(path) for path in paths}) < len(paths):
        raise FileError(f"a file is given twice for one side: {', '.join(map(str, paths))}")
    return paths


def latest_two(storage: Path) -> tuple[Path, Path]:
    """Return the two files that pytest-benchmark saved last on one machine, the older one first.

    Its numbers say which these are. Names can look like numbers, such as ``2024_results.json``: the
    times in the files must not say otherwise.

    Raises:
        FileError: if there are not two, or numbers and times disagree.
    """
    numbers = {path: int(m[1]) for path in storage.glob("*/*.json") if (m := _numbered(path))}
    if numbers:
        newest = max(numbers, key=_modified)
        numbers = {path: n for path, n in numbers.items() if path.parent == newest.parent}
    if len(numbers) < 2:
        raise FileError(
            f"{storage} holds {len(numbers)} saved file(s), two are needed: save with "
            "--benchmark-autosave, or name BASE and NEW"
        )
    # pytest-benchmark does not count past 10000: several files have that number.
    base, new = sorted(numbers, key=lambda path: (numbers[path], _modified(path), path))[-2:]
    others = sorted(numbers, key=_modified)[-2:]
    times = {path: time for path in (base, new, *others) if (time := _time(path)) is not None}
    by_time = sorted(times, key=times.__getitem__)[-2:]
    if len({numbers[path] for path in (base, new, *by_time)}) == 1 and len(by_time) == 2:
        base, new = by_time
    if base in times and new in times and by_time != [base, new]:
        raise FileError(
            f"by their numbers, {base.name} and {new.name} were saved last in {new.parent}, by the "
            f"times in them {by_time[0].name} and {by_time[1].name}: name BASE and NEW"
        )
    return base, new


def _numbered(path: Path) -> re.Match[str] | None:
    return _NUMBERED.fullmatch(path.name)


def _modified(path: Path) -> float:
    return path.stat().st_mtime


def _time(path: Path) -> datetime | None:
    """Return when a file was saved; None where it does not say, or cannot be read."""
    try:
        return read(path).time
    except (OSError, SchemaError):
        return None

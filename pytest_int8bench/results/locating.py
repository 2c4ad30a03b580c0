"""Find the saved files that are to be compared, and read them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pytest_int8bench.files import FileError
from pytest_int8bench.results.reading import read
from pytest_int8bench.results.records import Saved

_NUMBER = re.compile(r"\d{4}")


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
    if len({path.resolve() for path in paths}) < len(paths):
        raise FileError(f"a file is given twice for one side: {', '.join(map(str, paths))}")
    return paths


def latest_two(storage: Path) -> tuple[Path, Path]:
    """Return the two files that pytest-benchmark saved last on one machine, the older one first.

    Raises:
        FileError: if there are not two.
    """
    files = [path for path in storage.glob("*/*.json") if _NUMBER.match(path.name)]
    if files:
        newest = max(files, key=lambda path: path.stat().st_mtime)
        files = sorted(path for path in files if path.parent == newest.parent)
    if len(files) < 2:
        raise FileError(
            f"{storage} holds {len(files)} saved file(s), two are needed: save with "
            "--benchmark-autosave, or name BASE and NEW"
        )
    return files[-2], files[-1]

"""Saved files on disk: which ones to compare, and reports that are written whole or not at all."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pytest_int8bench.errors import ClearError
from pytest_int8bench.results import Saved, read

_NUMBER = re.compile(r"\d{4}")
# Keys of saved files and journals, also of damaged ones and of those of newer versions.
_BENCHMARKS = re.compile(r'"(benchmarks|int8bench)"\s*:')


class FileError(ClearError, ValueError):
    """There is no such file, or it must not be written."""


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


def check_writable(path: Path) -> None:
    """Refuse to write over what is no report.

    Raises:
        FileError: one line, if ``path`` holds benchmarks or is no regular file.
        OSError: if it cannot be read.
    """
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_file():
        raise FileError(f"{path} is not written: it is no regular file")
    if _BENCHMARKS.search(path.read_text(encoding="utf-8", errors="replace")):
        raise FileError(f"{path} holds saved benchmarks, which are not overwritten")


def write(path: Path, text: str) -> None:
    """Write a report whole or not at all. A report that is there is replaced, a saved file of
    benchmarks is not.

    Raises:
        FileError: one line, if ``path`` holds benchmarks or cannot be written.
    """
    partial = None
    try:
        check_writable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        partial = Path(name)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.chmod(0o666 & ~_umask())
        partial.replace(path)
        partial = None
    except OSError as error:
        raise FileError(f"{path} is not written: {error.strerror or error}") from None
    finally:  # also at Ctrl-C
        if partial is not None:
            partial.unlink(missing_ok=True)


def append(path: Path, text: str) -> None:
    """Add to a file that others add to as well, such as ``$GITHUB_STEP_SUMMARY``: all of ``text``
    or nothing.

    Raises:
        FileError: one line, if it cannot be written.
    """
    try:
        with path.open("ab") as file:
            before = file.tell() if path.is_file() else None
            try:
                file.write(text.encode())
                file.flush()
                if before is not None:
                    os.fsync(file.fileno())
            except OSError:
                if before is not None:
                    file.truncate(before)
                raise
    except OSError as error:
        raise FileError(f"{path} is not written: {error.strerror or error}") from None


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current

"""Write files whole or not at all, and check paths before anything is measured."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from pytest_int8bench.errors import ClearError

# Keys of saved files and journals, also of damaged ones and of those of newer versions.
_BENCHMARKS = re.compile(r'"(benchmarks|int8bench)"\s*:')


class FileError(ClearError, ValueError):
    """There is no such file, or it must not be written."""


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

"""Write files whole or not at all, name them by time, and find the folder for cached ones."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pytest_int8bench.errors import ClearError

# Keys of saved files and journals, also of damaged ones and of those of newer versions.
_PLAIN = re.compile(r"[A-Za-z0-9_./+@:%~=,-]*")
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
    with _one_line(path):
        check_writable(path)
        replace_text(path, text)


def append(path: Path, text: str) -> None:
    """Add to a file that others add to as well, such as ``$GITHUB_STEP_SUMMARY``: all of ``text``
    or nothing.

    Raises:
        FileError: one line, if it cannot be written.
    """
    with _one_line(path):
        append_text(path, text)


def replace_text(path: Path, text: str) -> None:
    """Make a file with this text, or replace the one that is there, which keeps its mode.

    The text is on disk when this returns. Readers see the old text or the new one, never a part.
    The folder is made if it does not exist.

    Raises:
        OSError: if it cannot be written; the old file is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    partial = Path(name)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.chmod(_mode(path))
        partial.replace(path)
    except BaseException:  # also at Ctrl-C
        partial.unlink(missing_ok=True)
        raise


def append_text(path: Path, text: str) -> None:
    """Add all of ``text`` to a file, which is made if it does not exist, or nothing of it. It is
    on disk when this returns.

    Raises:
        OSError: if it cannot be written; the file is as it was.
    """
    with path.open("ab") as file:
        before = file.tell() if path.is_file() else None  # None for a device or a pipe
        try:
            file.write(text.encode())
            file.flush()
            if before is not None:
                os.fsync(file.fileno())
        except OSError:
            if before is not None:
                file.truncate(before)
            raise


def relative(path: Path) -> Path:
    """Return a path from the current folder, if it is in it and there still is one."""
    try:
        return path.relative_to(Path.cwd())
    except (ValueError, OSError):
        return path


def timestamp() -> str:
    """Return the current time for the name of a file, in UTC: 20260131T235959Z."""
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())


def cache_folder() -> Path:
    """Return the user's folder for files that can be made again; it may not exist yet.

    It is ``pytest-int8bench`` in ``$XDG_CACHE_HOME``, or in ``~/.cache`` where that variable is
    empty or holds a relative path, which the XDG specification tells programs to ignore.

    Raises:
        RuntimeError: if there is no home directory.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    return folder / "pytest-int8bench"


def is_noexec(folder: Path) -> bool:
    """Return whether ``folder``, which may not exist yet, is where no code can be loaded from."""
    if not hasattr(os, "statvfs"):  # Windows
        return False
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return bool(os.statvfs(there).f_flag & getattr(os, "ST_NOEXEC", 0))


def is_plain(path: Path | str) -> bool:
    """Return whether command lines need no quotes for ``path``."""
    return _PLAIN.fullmatch(str(path)) is not None


def plain_path(folder: Path) -> Path:
    """Return a path of ``folder`` that command lines need no quotes for: its own or, where that has
    spaces or quotes, a link in :func:`cache_folder` or in a folder for temporary files.

    Raises:
        OSError: if the link cannot be made, or all these folders need quotes too.
    """
    if is_plain(folder):
        return folder
    links = _links_folder(folder)
    link = links / hashlib.sha256(str(folder).encode(errors="surrogateescape")).hexdigest()[:16]
    if not (link.is_symlink() and link.readlink() == folder):
        partial = link.with_suffix(f".{os.getpid()}")
        partial.unlink(missing_ok=True)
        partial.symlink_to(folder)
        partial.replace(link)
    return link


def _links_folder(folder: Path) -> Path:
    """Make and return the folder for links, which the caches behind them need for good."""
    with contextlib.suppress(RuntimeError, OSError):  # no home, or one that cannot be written to
        links = cache_folder() / "links"
        if is_plain(links):
            links.parent.mkdir(parents=True, exist_ok=True)
            links.mkdir(mode=0o700, exist_ok=True)
            return links
    user = os.getuid() if hasattr(os, "getuid") else 0
    temporary = [Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp")]
    usable = [path for path in temporary if is_plain(path) and path.is_dir()]
    if not usable:
        raise OSError(errno.EINVAL, "must be a path without spaces and quotes", str(folder))
    links = usable[0] / f"int8bench-links-{user}"
    links.mkdir(mode=0o700, exist_ok=True)
    if links.lstat().st_uid != user:
        raise PermissionError(errno.EACCES, "belongs to another user", str(links))
    return links


@contextlib.contextmanager
def _one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FileError(f"{path} is not written: {error.strerror or error}") from None


def _mode(path: Path) -> int:
    """Return the mode of a file, or the one that a new file gets."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mode & 0o777
    current = os.umask(0)
    os.umask(current)
    return 0o666 & ~current

"""Write files whole or not at all, name them by time, and find the folder for cached ones."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from pytest_int8bench.errors import ClearError

# Keys of saved files and journals, also of damaged ones and of those of newer versions.
_PLAIN = re.compile(r"[A-Za-z0-9_./+@:%~=,-]*")
#: Errors of a disk that may be gone when it is written to again.
PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
#: What must fit on a disk that is not full: the smallest files of benchmarks have as much.
_ROOM_BYTES = 1 << 16
_SHORT_NAME = 100
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
        FileError: one line, if it holds benchmarks or cannot be written.
    """
    with _one_line(path):
        if path.is_file() and _is_saved(path.read_text(encoding="utf-8", errors="replace")):
            raise FileError(f"{path} holds saved benchmarks, which are not added to")
        with _read_if_pipe(path):
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
    # Unbuffered: a buffer keeps what could not be written, and writes it when the file is closed.
    with path.open("ab", buffering=0) as file:
        before = file.tell() if path.is_file() else None  # None for a device or a pipe
        try:
            _write_all(file, text.encode())
            if before is not None:
                os.fsync(file.fileno())
        except BaseException:  # also at Ctrl-C
            if before is not None:
                with contextlib.suppress(OSError):
                    file.truncate(before)
            raise


def create(path: Path, text: str) -> None:
    """Make a file that is not there yet. Of several processes that do so at once, one succeeds.

    Raises:
        FileExistsError: if it is there, or a link to nowhere is.
        OSError: if it cannot be made; then there is none.
    """
    with path.open("xb", buffering=0) as file:
        try:
            _write_all(file, text.encode())
            os.fsync(file.fileno())
        except BaseException:  # also at Ctrl-C
            path.unlink(missing_ok=True)
            raise


def probe_report(path: Path) -> None:
    """Try whether :func:`write` can write a file, as :func:`probe` does; its folder need not exist.

    Raises:
        FileError: one line, if it cannot be written.
    """
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    with _one_line(path):
        probe(folder / path.name)


def probe(path: Path) -> None:
    """Try whether a file can be written: whether its path can be, and whether the disk has room.
    Nothing is changed.

    Raises:
        OSError: if it cannot be written.
    """
    target = real_path(path)
    if target.is_fifo():
        raise OSError(errno.EINVAL, "a named pipe, which nobody may read", str(path))
    if target.exists():
        with target.open("rb+" if target.is_file() else "ab"):
            pass
        if not target.is_file():
            return
    elif path.exists():  # a pipe of the shell, such as /dev/fd/63: its target has no path
        return
    beside = target.with_name(f".{target.name[:_SHORT_NAME]}.{os.getpid()}")
    try:
        create(beside, " " * _ROOM_BYTES)
    except PermissionError:
        if not target.exists():
            raise
        return  # no other file can be made beside it
    beside.unlink()


class LineFile:
    """A file that lines are added to, each on disk at once.

    A line that cannot be written is written with the next one. A file that is gone, or not as it
    was left, is written anew; one that is another's by now is left alone, and another name taken.

    Args:
        path: the file, which is there; see :meth:`save`.
        lines: returns all lines that it is to hold, without their ends.
        mark: what the first of them starts with, and no other file.
        size: its bytes, None if it must be written anew.
    """

    def __init__(
        self, path: Path, lines: Callable[[], Iterable[str]], *, mark: str, size: int | None
    ) -> None:
        self.path = path
        self._lines = lines
        self._mark = mark.encode()
        self._size = size
        self._unwritten: list[str] = []

    def add(self, line: str) -> None:
        """Add a line, which ``lines`` returns from now on.

        Raises:
            OSError: if it cannot be written; the file is as it was.
        """
        self._unwritten.append(line)
        self.save()

    def rewrite(self) -> None:
        """Write all lines anew.

        Raises:
            OSError: if they cannot be written; the file is as it was.
        """
        self._size = None
        self.save()

    def save(self) -> None:
        """Write what the file lacks.

        Raises:
            OSError: if it cannot be written; the file is as it was.
        """
        start, size = self._found()
        if start == self._mark and size == self._size:
            if self._unwritten:
                append_text(self.path, _joined(self._unwritten))
        elif not self._mark.startswith(start):
            self._move()
        else:
            replace_text(self.path, _joined(self._lines()))
        self._size = self.path.stat().st_size
        self._unwritten.clear()

    def lacking(self) -> int:
        """Return how many lines the file lacks, or holds otherwise than they are to be."""
        start, size = self._found()
        if start == self._mark and size == self._size:
            return len(self._unwritten)
        return len([*self._lines()])

    def remove(self) -> None:
        """Remove the file, unless it is not as it was left: what is in it then is another's.

        Raises:
            OSError: if it cannot be removed.
        """
        if self._found() == (self._mark, self._size):
            self.path.unlink()

    def _found(self) -> tuple[bytes, int]:
        """Return how the file starts, and its bytes."""
        try:
            with self.path.open("rb") as file:
                return file.read(len(self._mark)), os.fstat(file.fileno()).st_size
        except OSError:
            return b"", 0

    def _move(self) -> None:
        text = _joined(self._lines())
        for number in itertools.count(2):
            path = self.path.with_stem(f"{self.path.stem}-{number}")
            with contextlib.suppress(FileExistsError):
                create(path, text)
                self.path = path
                return


def _joined(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def real_path(path: Path) -> Path:
    """Return where a path leads; ``resolve`` may raise RuntimeError for a circle of links."""
    return Path(os.path.realpath(path))


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


def _write_all(file: BinaryIO, data: bytes) -> None:
    """Write to an unbuffered file, which may take less at a time: a disk that is nearly full."""
    left = memoryview(data)
    while left:
        written = file.write(left)
        if not written:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        left = left[written:]


def _is_saved(text: str) -> bool:
    """Return whether a file is saved benchmarks, also damaged ones, not a page that shows some."""
    return text.lstrip().startswith("{") and _BENCHMARKS.search(text) is not None


@contextlib.contextmanager
def _read_if_pipe(path: Path) -> Iterator[None]:
    """Refuse a named pipe that nobody reads: opening it to write would wait for a reader."""
    if not path.is_fifo():
        yield
        return
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        raise OSError(error.errno, "a named pipe that nobody reads", str(path)) from None
    try:
        yield  # with the pipe open, so that its reader does not take it for ended
    finally:
        os.close(descriptor)


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
